"""How fast the unified model trains: tokens and images a second, and the share of the device's peak that is used."""

import contextlib
import re
import time
from collections.abc import Mapping
from dataclasses import astuple, dataclass

import torch
from torch import nn

from ...configuration_dualtoken import CODE_KINDS
from ...depth_heads import NUM_KINDS, DualTokenStackedLinear


# Dense bfloat16 matrix products with float32 accumulation, in TFLOP/s, from the vendors' data sheets.
PEAK_TFLOPS = {
    "A10": 125.0, "A10G": 70.0, "A30": 165.0, "A40": 149.7, "A100": 312.0, "A800": 312.0, "B200": 2250.0,
    "GH200": 989.0, "H20": 148.0, "H100": 989.0, "H100 NVL": 835.0, "H100 PCIe": 756.0, "H200": 989.0, "H800": 989.0,
    "L4": 121.0, "L40": 181.0, "L40S": 362.0, "MI300X": 1307.0, "RTX 3090": 71.0, "RTX 4090": 165.0,
    "RTX 5090": 209.5, "RTX 6000 Ada": 364.0, "RTX A6000": 154.8,
}  # fmt: skip


def peak_flops(device_name: str) -> float | None:
    """
    The bfloat16 operations a second of a device that [`PEAK_TFLOPS`] knows, by the name that the driver gives it, such as
    `"NVIDIA A100-SXM4-80GB"`.
    """
    found = [name for name in PEAK_TFLOPS if re.search(rf"\b{name}\b", device_name)]
    if not found or "Laptop" in device_name:
        return None
    return PEAK_TFLOPS[max(found, key=len)] * 1e12


@dataclass
class StepCounts:
    """What a step works on, over all of its samples; no padding."""

    tokens: int = 0  # positions of the sequences, image positions included
    attention_pairs: int = 0  # a position and one it sees, itself included: L (L + 1) / 2 of a sample of length L
    text_targets: int = 0
    visual_targets: int = 0
    images: int = 0  # of the sequences
    encoded_images: int = 0  # those among them that were given as pixels


class _Products:
    """FLOPs a position of modules called in the order of the forward; `flows`: the next one's input has a gradient."""

    def __init__(self, flows: bool = False):
        self.flows = flows

    def __call__(self, *modules: nn.Module) -> int:
        """Modules that take one input; each module's layers come one after the other."""
        flops, before, after = 0, self.flows, self.flows
        for module in modules:
            flows = before
            # PEFT's wrappers hold a layer and its trained copy, or a layer twice.
            names = module.named_modules(remove_duplicate=False)
            for part in dict.fromkeys(part for name, part in names if "original_module" not in name):
                if isinstance(part, (nn.Linear, DualTokenStackedLinear)):
                    flops += 2 * _size(part) * (1 + flows + part.weight.requires_grad)
                flows |= any(parameter.requires_grad for parameter in part.parameters(recurse=False))
            after |= flows
        self.flows = after
        return flops

    def pairs(self, width: int) -> int:
        """FLOPs of a pair in an attention of heads of altogether `width`: query with key, and weight with value."""
        return 2 * 2 * width * (3 if self.flows else 1)


class TrainingFlops:
    """
    Floating-point operations of a training step of a [`DualTokenForCausalLM`], or a `PeftModel` of one, by what is
    trained when this is made: `per_token`, `per_attention_pair` and so on, as [`StepCounts`] counts.

    A product with a weight of n numbers takes 2 n operations a position forward, 2 n more for the weight's gradient
    where it is trained, and 2 n more for its input's where anything before it is. Norms, activations, softmaxes,
    embeddings and the optimizer are left out, and so is what gradient checkpointing computes a second time: model
    FLOPs, not hardware FLOPs. Weights that LoRA, quantisation, ZeRO-3 or FSDP hold in another form count in full.

    Raises:
        AttributeError: for a language model of other blocks than Qwen2's.
    """

    def __init__(self, model: nn.Module):
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        base, language_model = model.model, model.model.language_model
        products = _Products()
        self.per_image = model.config.num_positions * products(base.visual_projector)
        self.per_encoded_image = _encoder_flops(base.vision_tokenizer)
        products(language_model.get_input_embeddings())
        self.per_token = self.per_attention_pair = 0
        for layer in language_model.layers:
            products(layer.input_layernorm)
            block = layer.self_attn
            self.per_token += products(block.q_proj, block.k_proj, block.v_proj)
            self.per_attention_pair += products.pairs(language_model.config.num_attention_heads * block.head_dim)
            self.per_token += products(block.o_proj)
            products(layer.post_attention_layernorm)
            self.per_token += products(layer.mlp.gate_proj, layer.mlp.up_proj)
            self.per_token += products(layer.mlp.down_proj)
        products(language_model.norm)
        flows = products.flows
        self.per_text_target = products(model.lm_head)
        self.per_visual_target = _depth_head_flops(model.depth_heads, flows)

    def __call__(self, counts: StepCounts) -> int:
        """FLOPs of a step that works on `counts`."""
        per = (self.per_token, self.per_attention_pair, self.per_text_target, self.per_visual_target)
        per += (self.per_image, self.per_encoded_image)
        return sum(flops * count for flops, count in zip(per, astuple(counts)))


def _depth_head_flops(heads: nn.Module, flows: bool) -> int:
    """Of both heads, for a position; `flows` says whether its hidden state needs a gradient."""
    depths, products = heads.num_depths, _Products(flows)
    flops = products(heads.input_fc1) + products(heads.input_fc2) + products(heads.input_proj)
    # Its input are code vectors, which have no gradient.
    codes = _Products()
    flops += (depths - 1) * codes(heads.code_proj)
    products.flows |= codes.flows
    for layer in heads.layers:
        products(layer.input_layernorm)
        flops += depths * products(layer.qkv_proj)
        flops += NUM_KINDS * depths * (depths + 1) // 2 * products.pairs(layer.num_heads * layer.head_dim)
        flops += depths * products(layer.o_proj)
        products(layer.post_attention_layernorm)
        # These have a weight for every depth.
        flops += products(layer.up_proj) + products(layer.down_proj)
    products(heads.norm)
    return flops + products(heads.classifier)


def _encoder_flops(tokenizer: nn.Module) -> int:
    """From the pixels of an image to both kinds of codes; forward only, since the tokenizer is frozen."""
    config, vision_model = tokenizer.config, tokenizer.siglip.vision_model
    layers = vision_model.encoder.layers[: config.semantic_layer]
    projections = [tokenizer.pixel_down_proj, tokenizer.semantic_down_proj]
    if config.shortcut_layer is not None:
        projections.append(tokenizer.shortcut_down_proj)
    weights = _size(vision_model.embeddings.patch_embedding)
    parts = [part for module in (*layers, *projections) for part in module.modules()]
    weights += sum(_size(part) for part in parts if isinstance(part, (nn.Linear, nn.Conv2d)))
    for quantizer in (tokenizer.quantizer(kind).config for kind in CODE_KINDS):
        weights += quantizer.num_depths * quantizer.codebook_size * quantizer.code_dim
    widths = len(layers) * config.vision_config.hidden_size
    attentions = [projection.attn for projection in projections if hasattr(projection, "attn")]
    widths += sum(attention.num_heads * attention.head_dim for attention in attentions)
    positions = config.grid_size**2
    return 2 * positions * weights + 2 * 2 * positions**2 * widths


def _size(layer: nn.Module) -> int:
    """Numbers of a weight, also where it is packed (quantised) or in parts (ZeRO-3; FSDP says the whole shape)."""
    if isinstance(layer, nn.Linear):
        return layer.in_features * layer.out_features
    return getattr(layer.weight, "ds_numel", None) or layer.weight.numel()


class ThroughputMeter:
    """
    Tokens and images a second over all ranks, the share of padding, and model FLOPs utilisation, between two logs.

    Counting never waits for the device; `compute` does, and all ranks must call it. Without an `attention_mask` (packed
    samples), a run of `pad_token_id` at a row's end is padding, from where positions begin anew. Without `flops`
    ([`TrainingFlops`]) or `peak` ([`peak_flops`]) no utilisation is reported.
    """

    def __init__(self, accelerator, image_token_id: int, pad_token_id: int, flops=None, peak: float | None = None):
        self.accelerator = accelerator
        self.image_token_id, self.pad_token_id = image_token_id, pad_token_id
        self.flops, self.peak = flops, peak
        self.reset()

    def reset(self) -> None:
        # Tokens, pairs, text targets, visual targets: known to the device alone.
        self._on_device = torch.zeros(4, dtype=torch.int64, device=self.accelerator.device)
        # Images, encoded images, positions: shapes.
        self._shapes = [0, 0, 0]
        self._started, self._paused, self._pauses = time.perf_counter(), 0.0, 0

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
        encoded, coded = (0 if batch.get(n) is None else len(batch[n]) for n in ("pixel_values", "pixel_codes"))
        self._shapes = [a + b for a, b in zip(self._shapes, (encoded + coded, encoded, input_ids.numel()))]

    @contextlib.contextmanager
    def paused(self):
        """Time within this context does not count: evaluation, and saving. Within itself it changes nothing."""
        start, self._pauses = time.perf_counter(), self._pauses + 1
        try:
            yield
        finally:
            self._pauses -= 1
            self._paused += 0.0 if self._pauses else time.perf_counter() - start

    def compute(self) -> dict[str, float]:
        """
        Since the last call, over all ranks: `tokens_per_second` (no padding), `images_per_second`, `padding_share` (of all
        positions, in 0..1), `model_flops_utilization` (in 0..1, where the peak is known). Empty of nothing.
        """
        shapes = torch.tensor(self._shapes, device=self.accelerator.device)
        *counts, positions = self.accelerator.reduce(torch.cat([self._on_device, shapes]), "sum").tolist()
        seconds = time.perf_counter() - self._started - self._paused
        self.reset()
        if positions == 0:
            return {}
        counts = StepCounts(*counts)
        numbers = {
            "tokens_per_second": counts.tokens / seconds,
            "images_per_second": counts.images / seconds,
            "padding_share": 1 - counts.tokens / positions,
        }
        if self.flops is not None and self.peak is not None:
            peak = self.peak * self.accelerator.num_processes
            numbers["model_flops_utilization"] = self.flops(counts) / (seconds * peak)
        return numbers
