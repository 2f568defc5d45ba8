"""What a vision tokenizer's codes depend on, as one short text."""

import hashlib
import json

import torch

from ..modeling_vision_tokenizer import CODE_KINDS, DualTokenVisionTokenizer
from ..sharding import gathered


_CONFIG_FIELDS = ("pixel_layer", "semantic_layer", "shortcut_layer")
_ENCODER_FIELDS = ("image_size", "patch_size", "num_attention_heads", "hidden_act")
_IMAGE_SWITCHES = ("do_convert_rgb", "do_resize", "do_rescale", "do_normalize")


def tokenizer_fingerprint(
    vision_tokenizer: DualTokenVisionTokenizer, image_processor, dtype: torch.dtype | None = None
) -> str:
    """
    SHA-256 of everything that decides the codes of an image, as 64 hexadecimal digits.

    That is: the encoder up to the semantic layer, the down-projections, the vectors of both codebooks, the layers and
    sizes of the config, and how the image processor makes pixels of an image. Not: the layers above, the text tower,
    the decoder, the codebooks' statistics. The same tokenizer has the same fingerprint by itself and within a unified
    model, before and after saving. Rounded to
    bfloat16 it has another one, since rounded weights make other codes. The two
    backends of the image processor count as one; they differ by one level of 255 at a few pixels.

    Args:
        vision_tokenizer ([`DualTokenVisionTokenizer`]): under ZeRO-3 every rank must call, since parts are gathered.
        image_processor ([`DualTokenImageProcessor`] or [`DualTokenImageProcessorPil`]).
        dtype (`torch.dtype`, *optional*): the fingerprint that it has when its weights are loaded in this dtype.
    """
    settings = {"config": _config_settings(vision_tokenizer.config), "images": _image_settings(image_processor)}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(_deciding_tensors(vision_tokenizer).items()):
        tensor = _whole(tensor)
        if dtype is not None and not name.endswith("_codebook"):  # which stays in float32
            tensor = tensor.to(dtype)
        # Weights that were rounded once are the same ones, whatever holds them now.
        rounded = tensor.to(torch.bfloat16)
        tensor = rounded if torch.equal(rounded.to(tensor.dtype), tensor) else tensor
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _deciding_tensors(vision_tokenizer: DualTokenVisionTokenizer) -> dict[str, torch.Tensor]:
    vision = vision_tokenizer.siglip.vision_model
    modules = {"embeddings": vision.embeddings}
    modules |= {f"layers.{i}": vision.encoder.layers[i] for i in range(vision_tokenizer.config.semantic_layer)}
    names = ["pixel_down_proj", "semantic_down_proj"]
    if vision_tokenizer.config.shortcut_layer is not None:
        names.append("shortcut_down_proj")
    modules |= {name: getattr(vision_tokenizer, name) for name in names}
    tensors = {
        f"{name}.{key}": parameter for name, module in modules.items() for key, parameter in module.named_parameters()
    }
    return tensors | {f"{kind}_codebook": vision_tokenizer.quantizer(kind).codebook.embeddings for kind in CODE_KINDS}


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU, gathered where ZeRO-3 keeps a part of it on every rank."""
    with gathered([tensor]):
        return tensor.detach().cpu().clone()


def _config_settings(config) -> dict:
    vision = config.vision_config
    return {
        **{name: getattr(config, name) for name in _CONFIG_FIELDS},
        # Without a shortcut its weight decides nothing.
        "shortcut_weight": None if config.shortcut_layer is None else float(config.shortcut_weight),
        **{name: getattr(vision, name) for name in _ENCODER_FIELDS},
        "layer_norm_eps": float(vision.layer_norm_eps),
        "num_depths": {kind: getattr(config, f"{kind}_quantizer_config").num_depths for kind in CODE_KINDS},
    }


def _image_settings(image_processor) -> dict:
    """Settings that have an effect, in the form they have in JSON."""
    settings: dict = {name: bool(getattr(image_processor, name)) for name in _IMAGE_SWITCHES}
    if settings["do_resize"]:
        settings["size"] = [image_processor.size["height"], image_processor.size["width"]]
        settings["resize_mode"] = image_processor.resize_mode
        settings["resample"] = int(image_processor.resample)
        if image_processor.resize_mode == "pad":
            settings["fill_color"] = list(image_processor.fill_color)
    if settings["do_rescale"]:
        settings["rescale_factor"] = float(image_processor.rescale_factor)
    if settings["do_normalize"]:
        for name in ("image_mean", "image_std"):
            settings[name] = [float(value) for value in getattr(image_processor, name)]
    return settings
