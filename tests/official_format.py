"""Checkpoints in the authors' format, and what a tokenizer makes of the inputs stored with their numbers."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import functional as F

from transformers_dualtoken import DualTokenVisionTokenizer
from transformers_dualtoken.convert import official_key


KINDS = ("pixel", "semantic")

# --- numbers to compare ---

INPUTS = ["pixel_values", "input_ids"]
EVALUATION = [
    "pixel_codes",
    "semantic_codes",
    "pixel_quantized",
    "pixel_code_embeds_with_depth",
    "semantic_code_embeds_with_depth",
    "semantic_features",
    "hidden_state_recon",
    "hidden_state_sem",
    "hidden_state_last",
    "pooler_output",
    "image_embeds",
    "text_embeds",
    "reconstruction",
    "decoded_from_pixel_codes",
    "pixel_commitment_loss",
    "semantic_commitment_loss",
]
TRAINING = [
    "train_pixel_codes",
    "train_semantic_codes",
    "train_reconstruction",
    "train_pixel_commitment_loss",
    "train_semantic_commitment_loss",
    "train_probe_loss",
    "train_pixel_codebook_after",
    "train_pixel_cluster_size_after",
    "train_semantic_codebook_after",
    "train_semantic_cluster_size_after",
    "grad/decoder.conv_out.weight",
    "grad/prequant_pix.proj.weight",
    "grad/prequant_sem.attn.qkv.weight",
    "grad/siglip_model.vision_model.embeddings.patch_embedding.weight",
    "grad/siglip_model.vision_model.encoder.layers.0.mlp.fc1.weight",
]


@torch.no_grad()
def evaluation_outputs(model, inputs):
    """One evaluation forward, under the names in `EVALUATION`."""
    output = model(inputs["pixel_values"], inputs["input_ids"])
    return {
        **output,
        "decoded_from_pixel_codes": model.decode(pixel_codes=output.pixel_codes).reconstruction,
        "hidden_state_recon": output.pixel_hidden_state,
        "hidden_state_sem": output.semantic_hidden_state,
        "hidden_state_last": output.last_hidden_state,
        **{
            f"{kind}_code_embeds_with_depth": model.quantizer(kind).embed_codes_with_depth(output[f"{kind}_codes"])
            for kind in KINDS
        },
    }


def training_outputs(model, inputs):
    """One training forward, its gradients and the moved codebooks, under the names in `TRAINING`."""
    output = model.train()(inputs["pixel_values"])
    # The authors' probe: what each branch ends in, and the commitments.
    loss = output.reconstruction.square().mean() + output.pooler_output.square().mean()
    loss = loss + output.pixel_commitment_loss + output.semantic_commitment_loss
    loss.backward()
    named = {"train_probe_loss": loss, "train_reconstruction": output.reconstruction}
    for kind in KINDS:
        codebook = model.quantizer(kind).codebook
        named[f"train_{kind}_codes"] = output[f"{kind}_codes"]
        named[f"train_{kind}_commitment_loss"] = output[f"{kind}_commitment_loss"]
        named[f"train_{kind}_codebook_after"] = codebook.embeddings
        named[f"train_{kind}_cluster_size_after"] = codebook.cluster_size
    levels = len(model.config.decoder_block_out_channels)
    for name, parameter in model.named_parameters():
        named[f"grad/{official_key(name, levels)}"] = parameter.grad
    return named


# --- the golden file ---

GOLDEN = Path(__file__).parent / "fixtures" / "golden_tokenizer.safetensors"
CHECKPOINT = "checkpoint/"


def write_golden_folder(folder):
    """Unpack the golden file into a folder in the authors' format; returns the inputs and expected tensors."""
    tensors = load_file(GOLDEN)
    names = [name for name in tensors if name.startswith(CHECKPOINT)]
    official = {name.removeprefix(CHECKPOINT): tensors.pop(name).float() for name in names}
    with safe_open(GOLDEN, "pt") as file:
        config = {name: json.loads(text) for name, text in file.metadata().items()}
    write_folder(folder, config["rqvaesiglip"], official, config["siglip"])
    return tensors


# --- checkpoints ---


def quantizer_fields(**overrides):
    return {
        "bottleneck_type": "rq",
        "code_shape": [3, 3, 3],
        "latent_shape": [3, 3, 8],
        "decay": 0.9,
        "embed_dim": 8,
        "n_embed": 24,
        "restart_unused_codes": False,
        "shared_codebook": True,
        "ckpt_path": None,
        **overrides,
    }


def decoder_fields(**overrides):
    return {
        "attn_resolutions": [12],
        "ch": 32,
        "ch_mult": [1, 2],
        "decoder_in_channels": 64,
        "num_res_blocks": 1,
        "resolution": 24,
        "in_channels": 3,
        "out_ch": 3,
        "dropout": 0.0,
        "double_z": False,
        **overrides,
    }


def official_fields(**overrides):
    """`rqvaesiglip` of a 24 px tokenizer with 3 x 3 positions; fields given as `...` are left out."""
    fields = {
        "layer_recon": 2,
        "layer_sem": 3,
        "layer_shortcut": 1,
        "weight_shortcut": 0.6,
        "ddconfig": decoder_fields(),
        "decoder_latent_shape": [12, 12],
        "vq_pix": quantizer_fields(),
        "vq_sem": quantizer_fields(bottleneck_type="rq_ema"),
        "pretrained_model": "siglip",
        **overrides,
    }
    return {key: value for key, value in fields.items() if value is not ...}


def siglip_fields(num_layers=4):
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    text = {"num_hidden_layers": 1, "vocab_size": 64, "max_position_embeddings": 8, "projection_size": 32}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = {"num_hidden_layers": num_layers, "image_size": 24, "patch_size": 8}
    return {"model_type": "siglip", "vision_config": {**tower, **vision}, "text_config": {**tower, **text, **ids}}


def official_state_dict(model, zero_k_bias=True):
    """A model's weights as the authors' code would save them."""
    levels = len(model.config.decoder_block_out_channels)
    official = {}
    for name, tensor in model.state_dict().items():
        if ".codebook." in name:
            continue
        key = official_key(name, levels)
        # Their attention over pixels is made of 1 x 1 convolutions.
        is_pixel_attention = "attentions" in name and name.endswith("weight") and tensor.ndim == 2
        official[key] = (tensor[:, :, None, None] if is_pixel_attention else tensor).clone()
        if zero_k_bias and key.endswith("attn.q_bias"):
            official[key.replace("q_bias", "zero_k_bias")] = torch.zeros_like(tensor)
    for kind, short in (("pixel", "pix"), ("semantic", "sem")):
        codebook, depths = model.quantizer(kind).codebook, model.quantizer(kind).config.num_depths
        for depth in range(depths):
            book = depth if len(codebook.embeddings) > 1 else 0
            prefix = f"quantizer_{short}.codebooks.{depth}."
            official[prefix + "weight"] = F.pad(codebook.embeddings[book], (0, 0, 0, 1))
            official[prefix + "cluster_size_ema"] = codebook.cluster_size[book].clone()
            official[prefix + "embed_ema"] = codebook.embedding_sum[book].clone()
    return official


def write_folder(folder, fields, official, siglip=None, name="epoch_3.pt"):
    """`fields` of `rqvaesiglip`, a state dict or `None`, `siglip_fields()` by default."""
    (folder / "siglip").mkdir(parents=True, exist_ok=True)
    (folder / "siglip" / "config.json").write_text(json.dumps(siglip or siglip_fields()))
    (folder / "config.json").write_text(json.dumps({"rqvaesiglip": fields}))
    if official is not None:
        torch.save({"epoch": 3, "name": "x", "state_dict": official}, folder / name)
    return folder


def random_model(config):
    torch.manual_seed(0)
    model = DualTokenVisionTokenizer(config)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.normal_(std=0.2)
        for kind in KINDS:
            codebook = model.quantizer(kind).codebook
            codebook.embeddings.normal_()
            codebook.cluster_size.uniform_(1, 3)
            codebook.embedding_sum.copy_(codebook.embeddings * codebook.cluster_size[..., None])
    return model.eval()
