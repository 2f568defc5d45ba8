"""How fast the unified model trains: tokens and images a second, and the share of the device's peak that is used."""

import contextlib
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ...depth_heads import NUM_KINDS, DualTokenStackedLinear
from ...modeling_dualtoken import DualTokenForCausalLM
from ...modeling_vision_tokenizer import CODE_KINDS


# Dense bfloat16 matrix products with float32 accumulation, in TFLOP/s, from the vendors' data sheets.
PEAK_TFLOPS = {
    "A10": 125.0,
    "A10G": 70.0,
    "A30": 165.0,
    "A40": 149.7,
    "A100": 312.0,
    "A800": 312.0,
    "B200": 2250.0,
    "GH200": 989.0,
    "H20": 148.0,
    "H100": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H200": 989.0,
    "H800": 989.0,
    "L4": 121.0,
    "L40": 181.0,
    "L40S": 362.0,
    "MI300X": 1307.0,
    "RTX 3090": 71.0,
    "RTX 4090": 165.0,
    "RTX 5090": 209.5,
    "RTX 6000 Ada": 364.0,
    "RTX A6000": 154.8,
}


def peak_flops(device: torch.device | str, peak_tflops: float | None = None) -> float | None:
    """
    The floating-point operations a second that a device can do at most, in bfloat16.

    Args:
        device (`torch.device` or `str`).
        peak_tflops (`float`, *optional*): given instead of looked up, in 1e12 operations a second.

    Returns:
        `float` or `None`: `None` for a CPU, and for a device that is not in [`PEAK_TFLOPS`].

    Raises:
        ValueError: if `peak_tflops` is not positive.
    """
    if peak_tflops is not None:
        if not peak_tflops > 0:
            raise ValueError(f"`peak_tflops` must be positive, in 1e12 operations a second; got {peak_tflops}.")
        return peak_tflops * 1e12
    device = torch.device(device)
    return find_peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def find_peak_flops(device_name: str) -> float | None:
    """[`peak_flops`] by the name that the driver gives a device, such as `"NVIDIA A100-SXM4-80GB"`."""
    found = [name for name in PEAK_TFLOPS if re.search(rf"\b{name}\b", device_name)]
    if not found or "Laptop" in device_name:
        return None
    return PEAK_TFLOPS[max(found, key=len)] * 1e12


@dataclass
class StepCounts:
    """
    What a step works on, over all of its samples; no padding.

    Args:
        tokens (`int`): positions of the sequences, image positions included.
        attention_pairs (`int`): pairs of a position and one it sees, itself included; a sample of length L has
            L (L + 1) / 2.
        text_targets, visual_targets (`int`).
        images (`int`): of the sequences.
        encoded_images (`int`): those among them that were given as pixels.
    """

    tokens: int = 0
    attention_pairs: int = 0
    text_targets: int = 0
    visual_targets: int = 0
    images: int = 0
    encoded_images: int = 0


class _Gradient:
    """Counts matrix products of a network in the order of its forward, with what its backward will need."""

    def __init__(self, flows: bool):
        # Whether the input of the next layer needs a gradient.
        self.flows = flows

    def product(self, size: int, weight_requires_grad: bool, input_flows: bool) -> int:
        """FLOPs of a product with a weight of `size` numbers: forward, gradient of the input, and of the weight."""
        return 2 * size * (1 + input_flows + weight_requires_grad)

    def side_by_side(self, modules: list[nn.Module]) -> int:
        """Modules that take one input; each module's linear layers come one after the other."""
        flops, before = 0, self.flows
        after = before
        for module in modules:
            self.flows = before
            # PEFT's wrapper of trained tokens holds a layer twice.
            for part in dict.fromkeys(_active_modules(module)):
                if isinstance(part, nn.Linear):
                    size = part.in_features * part.out_features
                    flops += self.product(size, part.weight.requires_grad, self.flows)
                self.pass_parameters(part)
            after |= self.flows
        self.flows = after
        return flops

    def pass_parameters(self, module: nn.Module) -> None:
        """A module's own parameters make gradients flow from here on."""
        self.flows |= any(parameter.requires_grad for parameter in module.parameters(recurse=False))


class TrainingFlops:
    """
    Floating-point operations of a training step, from the model's own layers: forward, and the backward that its
    trainable weights need.

    A product with a weight of n numbers takes 2 n operations a position forward, 2 n more for the weight's gradient
    where it is trained, and 2 n more for its input's where anything before it is. Norms, activations, softmaxes,
    embeddings and the optimizer are left out, and so is what gradient checkpointing computes a second time: model
    FLOPs, not hardware FLOPs.

    Make it once it is settled what is trained. Weights that LoRA, quantisation, ZeRO-3 or FSDP hold in another form
    count with their full shapes.

    Args:
        model ([`DualTokenForCausalLM`], or a `PeftModel` of one).

    Attributes:
        per_token, per_attention_pair, per_text_target, per_visual_target, per_image, per_encoded_image (`int`).
    """

    def __init__(self, model: nn.Module):
        model: DualTokenForCausalLM = model.get_base_model() if hasattr(model, "get_base_model") else model
        config, base = model.config, model.model
        projector = _Gradient(flows=False)
        per_position = sum(projector.side_by_side([layer]) for layer in _children(_active(base.visual_projector)))
        self.per_image = config.num_positions * per_position
        self.per_encoded_image = self._encoder(base.vision_tokenizer)
        embedding = _Gradient(projector.flows)
        for module in _active_modules(base.language_model.get_input_embeddings()):
            embedding.pass_parameters(module)
        flows = self._backbone(base.language_model, embedding.flows)
        head = _Gradient(flows)
        self.per_text_target = head.side_by_side([model.lm_head])
        self.per_visual_target = self._depth_heads(_active(model.depth_heads), flows)

    def _backbone(self, language_model: nn.Module, flows: bool) -> bool:
        """Sets what a token and a pair take; returns whether the last hidden states need a gradient."""
        config = language_model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        # Queries with keys, and weights with values.
        attention = 2 * 2 * config.num_attention_heads * head_dim
        gradient = _Gradient(flows)
        self.per_token = self.per_attention_pair = 0
        for layer in language_model.layers:
            gradient.pass_parameters(layer.input_layernorm)
            block = layer.self_attn
            self.per_token += gradient.side_by_side([block.q_proj, block.k_proj, block.v_proj])
            self.per_attention_pair += attention * (3 if gradient.flows else 1)
            self.per_token += gradient.side_by_side([block.o_proj])
            gradient.pass_parameters(layer.post_attention_layernorm)
            self.per_token += gradient.side_by_side([layer.mlp.gate_proj, layer.mlp.up_proj])
            self.per_token += gradient.side_by_side([layer.mlp.down_proj])
        gradient.pass_parameters(language_model.norm)
        return gradient.flows

    @staticmethod
    def _depth_heads(heads: nn.Module, flows: bool) -> int:
        depths = heads.num_depths
        gradient = _Gradient(flows)

        def product(layer: DualTokenStackedLinear, times: int = 1) -> int:
            flops = times * gradient.product(_size(layer.weight), layer.weight.requires_grad, gradient.flows)
            gradient.pass_parameters(layer)
            return flops

        flops = product(heads.input_fc1) + product(heads.input_fc2) + product(heads.input_proj)
        # Its input are code vectors, which have no gradient.
        code_requires_grad = heads.code_proj.weight.requires_grad
        flops += (depths - 1) * gradient.product(_size(heads.code_proj.weight), code_requires_grad, False)
        gradient.pass_parameters(heads.code_proj)
        for layer in heads.layers:
            gradient.pass_parameters(layer.input_layernorm)
            flops += product(layer.qkv_proj, depths)
            pairs = NUM_KINDS * depths * (depths + 1) // 2
            flops += 2 * 2 * pairs * layer.num_heads * layer.head_dim * (3 if gradient.flows else 1)
            flops += product(layer.o_proj, depths)
            gradient.pass_parameters(layer.post_attention_layernorm)
            # These have a weight for every depth.
            flops += product(layer.up_proj) + product(layer.down_proj)
        gradient.pass_parameters(heads.norm)
        return flops + product(heads.classifier)

    @classmethod
    def _encoder(cls, tokenizer: nn.Module) -> int:
        """From the pixels of an image to both kinds of codes; forward only, since the tokenizer is frozen."""
        config, vision_model = tokenizer.config, tokenizer.siglip.vision_model
        positions, width = config.grid_size**2, config.vision_config.hidden_size
        flops = 2 * positions * _size(vision_model.embeddings.patch_embedding.weight)
        for layer in vision_model.encoder.layers[: config.semantic_layer]:
            flops += 2 * positions * _linear_size(layer) + 2 * 2 * positions**2 * width
        down = ["pixel_down_proj", "semantic_down_proj"]
        if config.shortcut_layer is not None:
            down.append("shortcut_down_proj")
        flops += sum(cls._projection(getattr(tokenizer, name), positions) for name in down)
        for kind in CODE_KINDS:
            quantizer = tokenizer.quantizer(kind).config
            flops += 2 * positions * quantizer.num_depths * quantizer.codebook_size * quantizer.code_dim
        return flops

    @staticmethod
    def _projection(projection: nn.Module, positions: int) -> int:
        """One of the tokenizer's projections down, of an image, forward."""
        attention, pairs = projection.attn, positions**2
        return 2 * positions * _linear_size(projection) + 2 * 2 * pairs * attention.num_heads * attention.head_dim

    def __call__(self, counts: StepCounts) -> int:
        """FLOPs of a step that works on `counts`."""
        return (
            self.per_token * counts.tokens
            + self.per_attention_pair * counts.attention_pairs
            + self.per_text_target * counts.text_targets
            + self.per_visual_target * counts.visual_targets
            + self.per_image * counts.images
            + self.per_encoded_image * counts.encoded_images
        )


def _active(module: nn.Module) -> nn.Module:
    """The copy of a module that PEFT trains in its place, where it does (`modules_to_save`)."""
    if not hasattr(module, "modules_to_save"):
        return module
    return module.modules_to_save[module.active_adapters[0]]


def _active_modules(module: nn.Module) -> Iterator[nn.Module]:
    """A module and those within it, as they are called; of two copies the one in use."""
    module = _active(module)
    yield module
    for child in module.children():
        yield from _active_modules(child)


def _children(module: nn.Module) -> list[nn.Module]:
    return list(module.children())


def _size(weight: torch.Tensor) -> int:
    """Numbers of a weight, also where ZeRO-3 has it in parts (FSDP says the whole shape by itself)."""
    return getattr(weight, "ds_numel", None) or weight.numel()


def _linear_size(module: nn.Module) -> int:
    return sum(part.in_features * part.out_features for part in module.modules() if isinstance(part, nn.Linear))


class ThroughputMeter:
    """
    Tokens and images a second over all ranks, the share of padding, and model FLOPs utilisation, between two logs.

    Counting never waits for the device; `compute` does, and all ranks must call it.

    Args:
        accelerator (`accelerate.Accelerator`).
        image_token_id (`int`): the label of image positions.
        pad_token_id (`int`): without an `attention_mask` (packed samples), the run of it at a row's end is padding,
            from where positions begin anew.
        flops ([`TrainingFlops`], *optional*), peak (`float`, *optional*): of the model, and of one device as
            [`peak_flops`] says; without either no utilisation is reported.
    """

    def __init__(
        self,
        accelerator,
        image_token_id: int,
        pad_token_id: int,
        flops: TrainingFlops | None = None,
        peak: float | None = None,
    ):
        self.accelerator = accelerator
        self.image_token_id, self.pad_token_id = image_token_id, pad_token_id
        self.flops, self.peak = flops, peak
        self.reset()

    def reset(self) -> None:
        """Forget all counts and start the clock."""
        # Tokens, pairs, text targets, visual targets: known to the device alone.
        self._on_device = torch.zeros(4, dtype=torch.int64, device=self.accelerator.device)
        # Positions, images, encoded images: shapes.
        self._shapes = [0, 0, 0]
        self._started, self._paused = time.perf_counter(), 0.0
        self._is_paused = False

    @torch.no_grad()
    def update(self, batch: Mapping[str, torch.Tensor]) -> None:
        """Count a batch that was, or will be, trained on: `input_ids` and `labels` `(B, L)`, and what comes along."""
        input_ids, labels = batch["input_ids"], batch["labels"][:, 1:]
        mask, position_ids = batch.get("attention_mask"), batch.get("position_ids")
        if mask is not None:
            is_token = mask.bool()
        else:
            is_token = (input_ids != self.pad_token_id).flip(-1).cummax(-1).values.flip(-1)
            if position_ids is not None:
                # Padding begins like a sample; before it may stand a document's end, which may be the same token.
                is_token |= ((position_ids == 0) & ~is_token).cummax(-1).values.logical_not()
        if mask is not None or position_ids is None:
            lengths = is_token.sum(-1)
            pairs = (lengths * (lengths + 1) // 2).sum()
        else:
            # A position sees itself and those before it in its sample, where positions start at 0.
            pairs = ((position_ids + 1) * is_token).sum()
        is_visual = labels == self.image_token_id
        is_text = (labels != -100) & ~is_visual
        counts = torch.stack([is_token.sum(), pairs, is_text.sum(), is_visual.sum()])
        self._on_device += counts.to(self._on_device.device, non_blocking=True)
        pixels, codes = batch.get("pixel_values"), batch.get("pixel_codes")
        encoded = 0 if pixels is None else len(pixels)
        images = encoded + (0 if codes is None else len(codes))
        self._shapes = [a + b for a, b in zip(self._shapes, (input_ids.numel(), images, encoded))]

    @contextlib.contextmanager
    def paused(self):
        """Time within this context does not count: evaluation, and saving. Within itself it changes nothing."""
        if self._is_paused:
            yield
            return
        start, self._is_paused = time.perf_counter(), True
        try:
            yield
        finally:
            self._paused += time.perf_counter() - start
            self._is_paused = False

    def compute(self) -> dict[str, float]:
        """
        Numbers since the last call, over all ranks.

        Returns:
            `dict`: `tokens_per_second` (text and image positions, no padding), `images_per_second`, `padding_share`
            (of all positions, in 0..1) and, where the peak is known, `model_flops_utilization` (in 0..1). Empty where
            nothing was counted.
        """
        shapes = torch.tensor(self._shapes, device=self.accelerator.device)
        counts = self.accelerator.reduce(torch.cat([self._on_device, shapes]), "sum").tolist()
        seconds = time.perf_counter() - self._started - self._paused
        self.reset()
        tokens, pairs, text_targets, visual_targets, positions, images, encoded = counts
        if positions == 0:
            return {}
        numbers = {
            "tokens_per_second": tokens / seconds,
            "images_per_second": images / seconds,
            "padding_share": 1 - tokens / positions,
        }
        if self.flops is not None and self.peak is not None:
            flops = self.flops(StepCounts(tokens, pairs, text_targets, visual_targets, images, encoded))
            numbers["model_flops_utilization"] = flops / (seconds * self.peak * self.accelerator.num_processes)
        return numbers


__all__ = [
    "PEAK_TFLOPS",
    "StepCounts",
    "ThroughputMeter",
    "TrainingFlops",
    "find_peak_flops",
    "peak_flops",
]
