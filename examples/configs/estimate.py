"""Expected memory and speed of the recipes in this folder on one of their GPUs: computed, not measured.

    python examples/configs/estimate.py                      # every recipe; a minute, no GPU, no download
    python examples/configs/estimate.py examples/configs/tokenizer_l_256.json --micro_batch 8 16 32

A training step of stage 1 with its adversary runs at full size on the meta device, where tensors have shapes but no
numbers: the real tokenizer, teacher and discriminator, and the convolutions of LPIPS' VGG-16, with the dtypes that
bf16 autocast gives on a GPU and with flash attention. Counted are its floating-point operations (PyTorch's counter)
and the bytes of all tensors that live at once. Not counted is what a GPU holds besides: its context, workspaces of
cuDNN and cuBLAS, what several GPUs need to talk, and gaps between blocks; a GPU should have a tenth more.

The speed follows from the operations and two assumed shares of the GPU's peak, of which the first is a guess.
"""

import argparse
import contextlib
import json
import weakref
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import SiglipConfig, SiglipModel, logging

from transformers_dualtoken import DualTokenVisionTokenizer, DualTokenVisionTokenizerConfig
from transformers_dualtoken.training import PatchDiscriminator


FOLDER = Path(__file__).parent

_SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_SO400M_TEXT = {**_SO400M, "vocab_size": 256000, "max_position_embeddings": 64, "projection_size": 1152}
_LARGE_TEXT = {**_LARGE, "vocab_size": 32000, "max_position_embeddings": 64, "projection_size": 1024}
# Sizes of the towers, which a run reads from the checkpoint.
TOWERS = {
    "google/siglip2-so400m-patch14-384": ({**_SO400M, "image_size": 384, "patch_size": 14}, _SO400M_TEXT),
    "google/siglip2-so400m-patch16-256": ({**_SO400M, "image_size": 256, "patch_size": 16}, _SO400M_TEXT),
    "google/siglip-large-patch16-256": ({**_LARGE, "image_size": 256, "patch_size": 16}, _LARGE_TEXT),
}

# Channels of VGG-16's convolutions; LPIPS compares what stands before each pooling "M" and at the end.
_VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", type=Path, default=sorted(FOLDER.glob("*.json")), help="JSON files")
    parser.add_argument(
        "--micro_batch", type=int, nargs="+", help="images of a forward on a GPU (default: as in the recipe)"
    )
    parser.add_argument("--gpus", type=int, default=8, help="default %(default)s")
    parser.add_argument(
        "--tflops",
        type=float,
        default=989,
        help="the GPU's bf16 peak without sparsity (default %(default)s: H100 SXM)",
    )
    parser.add_argument(
        "--share", type=float, default=0.35, help="share of that peak reached over a step (default %(default)s)"
    )
    parser.add_argument(
        "--tflops_float32", type=float, default=67, help="its float32 peak, for the search (default %(default)s)"
    )
    parser.add_argument("--share_float32", type=float, default=0.5, help="likewise (default %(default)s)")
    return parser.parse_args()


def tokenizer_config(recipe: dict) -> DualTokenVisionTokenizerConfig:
    """The config that a run of the recipe makes of the checkpoint's towers."""
    vision, text = TOWERS[recipe["siglip_model_name_or_path"]]
    return DualTokenVisionTokenizerConfig(vision_config=vision, text_config=text, **recipe["config_overrides"])


def build_models(config: DualTokenVisionTokenizerConfig) -> dict[str, nn.Module]:
    """What a step of stage 1 holds, on the meta device, with what it trains marked as such."""
    with torch.device("meta"):
        tokenizer = DualTokenVisionTokenizer(config)
        towers = {name: getattr(config, name).to_dict() for name in ("vision_config", "text_config")}
        teacher = SiglipModel(SiglipConfig(**towers)).vision_model
        models = {
            "tokenizer": tokenizer,
            "teacher": teacher,
            "discriminator": PatchDiscriminator(),
            "LPIPS": PerceptualConvolutions(),
        }
    for part in (tokenizer.siglip.text_model, tokenizer.siglip.logit_scale, tokenizer.siglip.logit_bias):
        part.requires_grad_(False)
    for name in ("teacher", "LPIPS"):
        models[name].requires_grad_(False)
    # What these look at has no numbers here: pixel values in range, and the device's autocast.
    tokenizer._check_pixel_values = lambda pixel_values: None
    for quantizer in (tokenizer.pixel_quantizer, tokenizer.semantic_quantizer):
        quantizer.forward = quantizer._quantize
    tokenizer.train()
    return models


class PerceptualConvolutions(nn.Module):
    """LPIPS' work without its package: VGG-16's convolutions, and the compared features."""

    def __init__(self):
        super().__init__()
        layers, width = [], 3
        for channels in _VGG16:
            if channels == "M":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(width, channels, 3, padding=1), nn.ReLU(inplace=True)]
                width = channels
        self.layers = nn.ModuleList(layers)

    def features(self, images):
        features = []
        for layer in self.layers:
            if isinstance(layer, nn.MaxPool2d):
                features.append(images)
            images = layer(images)
        return [*features, images]

    def forward(self, images, targets):
        pairs = zip(self.features(images), self.features(targets))
        return sum((F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().mean() for a, b in pairs)


def attention(query, key, value, *args, is_causal=False, **kwargs):
    """On the meta device PyTorch would choose attention that holds all scores."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, is_causal=is_causal)[0]


class Autocast(TorchFunctionMode):
    """What bf16 autocast does on a GPU: the dtype that an operation's inputs are brought to."""

    LOW = {F.linear, torch.conv2d, torch.matmul, torch.Tensor.matmul, F.scaled_dot_product_attention}
    FULL = {F.layer_norm, F.group_norm, F.mse_loss, F.cosine_similarity, F.normalize, torch.nn.functional.softmax}

    def __init__(self):
        super().__init__()
        self.weights = {}

    def cast(self, value, dtype):
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if isinstance(value, nn.Parameter) and value.requires_grad:
            # Autocast casts a weight once and keeps the copy.
            if id(value) not in self.weights:
                self.weights[id(value)] = value.to(dtype)
            return self.weights[id(value)]
        return value.to(dtype)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        dtype = torch.bfloat16 if function in self.LOW else torch.float32 if function in self.FULL else None
        if dtype is not None:
            args = [self.cast(value, dtype) for value in args]
            kwargs = {name: self.cast(value, dtype) for name, value in kwargs.items()}
        if function is F.scaled_dot_product_attention:
            function = attention
        return function(*args, **kwargs)


class LiveBytes(TorchDispatchMode):
    """The bytes of all tensors made within this context that live at once, and their peak."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.seen = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, output)):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage(), is_new=any(tensor is leaf for leaf in tree_leaves(output)))
        return output

    def add(self, storage, is_new):
        key = storage._cdata
        if key in self.seen:
            return
        size = storage.nbytes() if is_new else 0  # what came from outside is not ours
        self.seen[key] = weakref.finalize(storage, self.remove, key, size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def remove(self, key, size):
        del self.seen[key]
        self.live -= size


def training_step(models: dict[str, nn.Module], images: torch.Tensor, autocast: Autocast) -> None:
    """The operations of a step of stage 1, with the adversary, up to the optimizers; weights of the terms aside."""
    tokenizer, teacher, discriminator = models["tokenizer"], models["teacher"], models["discriminator"]
    output = tokenizer(images)
    with torch.no_grad():
        hidden = teacher.embeddings(images)
        for depth, layer in enumerate(teacher.encoder.layers, start=1):
            hidden = layer(hidden, attention_mask=None)
            if depth == tokenizer.config.semantic_layer:
                target = hidden.float()
        pooled = teacher.head(teacher.post_layernorm(hidden)).float()
    loss = output.pixel_commitment_loss + output.semantic_commitment_loss
    for ours, theirs in ((output.semantic_features, target), (output.pooler_output, pooled)):
        loss = loss + F.mse_loss(ours, theirs) - F.cosine_similarity(ours, theirs, dim=-1).mean()
    image = output.reconstruction.detach().float().requires_grad_()
    # As views: the counter of operations follows modules by hooks, which `torch.autograd.grad` refuses on a leaf.
    terms = [F.mse_loss(image, images), models["LPIPS"](image.view_as(image), images)]
    terms.append(-discriminator(image.view_as(image)).float().mean())
    gradients = [torch.autograd.grad(terms.pop(), image)[0] for _ in range(3)]
    loss = loss + (output.reconstruction * sum(gradients)).sum()
    fake = output.reconstruction.detach()
    del output, terms, gradients, image, target, hidden, pooled, ours, theirs
    autocast.weights.clear()  # as at the end of the context
    loss.backward()
    real_logits, fake_logits = discriminator(torch.cat([images, fake])).float().chunk(2)
    (F.leaky_relu(1 - real_logits, 0.01).mean() + F.leaky_relu(1 + fake_logits, 0.01).mean()).backward()


def count(module: nn.Module, trained: bool | None = None) -> int:
    """Number of parameters: all, or those that are trained or are not."""
    return sum(p.numel() for p in module.parameters() if trained is None or p.requires_grad == trained)


def standing_bytes(models: dict[str, nn.Module], ranks: int) -> dict[str, int]:
    """What lies on the GPU between steps, in bytes: float32 throughout."""
    trained = sum(count(model, trained=True) for model in models.values())
    return {
        "tokenizer": 4 * count(models["tokenizer"]),
        "codebooks and their EMA": sum(b.numel() * b.element_size() for b in models["tokenizer"].buffers()),
        "teacher, discriminator, LPIPS": 4 * sum(count(models[n]) for n in ("teacher", "discriminator", "LPIPS")),
        "moments of both optimizers": 8 * trained,
        # DistributedDataParallel copies gradients into buckets to send.
        "gradient buckets": 4 * trained if ranks > 1 else 0,
    }


def step_cost(config: DualTokenVisionTokenizerConfig, micro_batch: int, checkpointing: bool) -> dict[str, float]:
    """Peak bytes of a step beyond what stands (gradients are in it), and operations per image."""
    models = build_models(config)
    if checkpointing:
        # A backward leaves `Autocast`; what is computed again there needs one of its own.
        options = {"use_reentrant": False, "context_fn": lambda: (contextlib.nullcontext(), Autocast())}
        models["tokenizer"].gradient_checkpointing_enable(options)
    images = torch.empty(micro_batch, 3, config.image_size, config.image_size, device="meta")
    with FlopCounterMode(display=False) as operations, LiveBytes() as memory, Autocast() as autocast:
        training_step(models, images, autocast)
    by_module = operations.get_flop_counts()
    search = sum(
        sum(counts.values()) for name, counts in by_module.items() if name.rsplit(".")[-1].endswith("_quantizer")
    )
    return {
        "peak": memory.peak,
        "operations": (operations.get_total_flops() - search) / micro_batch,
        "search": search / micro_batch,
    }


def main():
    args = parse_args()
    logging.set_verbosity_error()  # SigLIP's own default for ids of tokens that its vocabulary lacks
    print("COMPUTED, NOT MEASURED. GiB on one GPU; stage 1 with its adversary, bf16; see the top of this script.\n")
    for path in args.recipes:
        recipe = json.loads(path.read_text())
        config = tokenizer_config(recipe)
        models = build_models(config)
        print(f"{path.name}: {count(models['tokenizer']) / 1e6:.0f} M parameters in the tokenizer, of which", end=" ")
        print(f"{count(models['tokenizer'], trained=True) / 1e6:.0f} M are trained;", end=" ")
        print(", ".join(f"{name} {count(models[name]) / 1e6:.1f} M" for name in ("teacher", "discriminator", "LPIPS")))
        standing = standing_bytes(models, args.gpus)
        print("  " + ", ".join(f"{name} {size / 2**30:.2f}" for name, size in standing.items()))
        for micro_batch in args.micro_batch or [recipe["per_device_train_batch_size"]]:
            for checkpointing in (False, True):
                cost = step_cost(config, micro_batch, checkpointing)
                seconds = cost["operations"] / (args.tflops * 1e12 * args.share)
                seconds += cost["search"] / (args.tflops_float32 * 1e12 * args.share_float32)
                print(
                    f"  {micro_batch} images{', gradient checkpointing' if checkpointing else ''}: "
                    f"{sum(standing.values()) / 2**30:.1f} standing + {cost['peak'] / 2**30:.1f} in the step = "
                    f"{(sum(standing.values()) + cost['peak']) / 2**30:.1f} GiB; "
                    f"{cost['operations'] / 1e12:.2f} + {cost['search'] / 1e12:.3f} (search) Tflop an image; "
                    f"{1 / seconds:.0f} images/s a GPU, {args.gpus / seconds:.0f} on {args.gpus}"
                )
        print()


if __name__ == "__main__":
    main()
