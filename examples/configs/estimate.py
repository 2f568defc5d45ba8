"""Expected memory and speed of the recipes in this folder on one of their GPUs: computed, not measured.

    python examples/configs/estimate.py                      # every recipe; minutes, no GPU, no download
    python examples/configs/estimate.py examples/configs/tokenizer_l_256.json --micro_batch 8 16 32
    python examples/configs/estimate.py --write              # the unified models' tables into README.md

A training step of stage 1 with its adversary runs at full size on the meta device, where tensors have shapes but no
numbers: the real tokenizer, teacher and discriminator, and the convolutions of LPIPS' VGG-16, with the dtypes that
bf16 autocast gives on a GPU and with flash attention. Counted are its floating-point operations (PyTorch's counter)
and the bytes of all tensors that live at once. Not counted is what a GPU holds besides: its context, workspaces of
cuDNN and cuBLAS, what several GPUs need to talk, and gaps between blocks; a GPU should have a tenth more.

Of the unified models the step is that of the recipe's parts (projector, language model, heads) on samples of one picture
and a caption of 40 tokens, to be drawn where the heads are trained and else described, by the real modules with gradient
checkpointing and the real chunked losses; weights and optimizer are divided as the recipe's DeepSpeed file says.

The speed follows from the operations and two assumed shares of the GPU's peak, of which the first is a guess.
"""

import argparse
import contextlib
import gc
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

from transformers_dualtoken import (
    DualTokenConfig,
    DualTokenForCausalLM,
    DualTokenVisionTokenizer,
    DualTokenVisionTokenizerConfig,
)
from transformers_dualtoken.training import PatchDiscriminator, TrainingFlops, set_trainable


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

_QWEN = {
    "model_type": "qwen2",
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "rms_norm_eps": 1e-6,
}
LANGUAGE_MODELS = {
    "Qwen/Qwen2.5-3B-Instruct": {
        **_QWEN,
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen2.5-7B-Instruct": {
        **_QWEN,
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
}
_BEGIN, _END = "<!-- written by estimate.py -->", "<!-- until here -->"
# Tokens of a sample beside its picture's positions: a caption, <image_start> and <image_end>.
_TEXT_TOKENS = 40 + 2

# Channels of VGG-16's convolutions; LPIPS compares what stands before each pooling "M" and at the end.
_VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", type=Path, default=sorted(FOLDER.glob("*.json")), help="JSON files")
    parser.add_argument("--write", action="store_true", help="write what is printed of unified models into README.md")
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


def _read_recipe(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text())


def first_stage(recipe: dict) -> dict:
    """The recipe that made the model that this one goes on from, by the stages between them."""
    before = recipe.get("model_name_or_path")
    return recipe if before is None else first_stage(_read_recipe(before))


def unified_config(recipe: dict) -> DualTokenConfig:
    """The config of the model that a recipe trains."""
    recipe = first_stage(recipe)
    return DualTokenConfig(
        text_config=LANGUAGE_MODELS[recipe["language_model_name_or_path"]],
        vision_tokenizer_config=tokenizer_config(_read_recipe(recipe["vision_tokenizer_name_or_path"])),
        **recipe.get("config_overrides", {}),
    )


def build_unified(recipe: dict) -> DualTokenForCausalLM:
    """The model on the meta device, with what the recipe trains marked as such."""
    with torch.device("meta"):
        model = DualTokenForCausalLM(unified_config(recipe))
    set_trainable(model, recipe["train_parts"])
    return model.train()


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


class FlashAttention(Autocast):
    """Without autocast, as DeepSpeed trains, whose weights are in bfloat16."""

    LOW = FULL = frozenset()


class LiveBytes(TorchDispatchMode):
    """The bytes of all tensors made within this context that live at once, and their peak."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.seen = {}
        gc.freeze()  # what was made before is not looked at

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
        if self.live > 1.01 * self.peak:
            # The exceptions by which checkpointing ends hold, with these modes on, what a run without them frees at once.
            gc.collect()
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


def unified_step(model: DualTokenForCausalLM, samples: int, text_tokens: int, draws: bool, autocast: Autocast) -> None:
    """The operations of a step on samples of one picture and a text, up to the optimizer; codes are given."""
    config, dtype = model.config, model.lm_head.weight.dtype
    positions, books = config.num_positions, model.model.codebooks()
    codes = torch.empty(2, samples * positions, config.num_depths, dtype=torch.long, device="meta")
    vectors = torch.empty(*codes.shape, books.shape[-1], device="meta")
    text = torch.empty(samples, text_tokens, dtype=torch.long, device="meta")
    images = model.model.visual_projector(vectors.sum(2).transpose(0, 1).flatten(1).to(dtype))
    inputs = [model.get_input_embeddings()(text), images.view(samples, positions, -1)]
    inputs = torch.cat(inputs, dim=1)
    # Every position sees those before it; to make a mask transformers would look at numbers.
    mask = {"full_attention": None}
    hidden = model.model.language_model(inputs_embeds=inputs, attention_mask=mask).last_hidden_state
    hidden = hidden.split([text_tokens, positions], dim=1)
    if draws:
        loss = model.depth_heads(hidden[1].flatten(0, 1), codes, vectors).loss_sums.sum()
    else:
        loss = model.lm_head(hidden[0].flatten(0, 1), text.flatten())[0].sum()
    del hidden, inputs, images
    autocast.weights.clear()
    loss.backward()


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


def unified_standing_bytes(model: DualTokenForCausalLM, zero_stage: int, ranks: int) -> dict[str, int]:
    """What lies on a GPU between steps and, of gradients, at the end of one: DDP (0) in float32, ZeRO in bfloat16."""
    everything, trained = count(model), count(model, trained=True)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    if not zero_stage:
        return {"weights": 4 * everything + buffers, "optimizer": 8 * trained, "gradients and buckets": 8 * trained}
    return {
        "weights": 2 * everything // (ranks if zero_stage == 3 else 1) + buffers,
        "optimizer": 12 * trained // ranks,  # with the float32 weights
        # What is being reduced, in two buckets of 500 million numbers at most.
        "gradients and buckets": 2 * trained // ranks + 2 * 2 * min(trained, 500_000_000),
    }


def unified_step_cost(recipe: dict, samples: int, text_tokens: int = _TEXT_TOKENS) -> dict[str, float]:
    """Peak bytes of a step beyond what stands, and operations per sample, what is computed again and the encoder included."""
    model, is_sharded = build_unified(recipe), "deepspeed" in recipe
    flops = TrainingFlops(model).per_encoded_image
    model = model.to(torch.bfloat16) if is_sharded else model
    mode = FlashAttention if is_sharded else Autocast
    options = {"use_reentrant": False, "context_fn": lambda: (contextlib.nullcontext(), mode())}
    model.gradient_checkpointing_enable(options)
    for parameter in model.parameters():
        if parameter.requires_grad:  # counted as standing
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    with FlopCounterMode(display=False) as operations, LiveBytes() as memory, mode() as autocast:
        unified_step(model, samples, text_tokens, "heads" in recipe["train_parts"], autocast)
    return {"peak": memory.peak, "operations": operations.get_total_flops() / samples + flops}


def unified_tables(recipes: dict[str, dict], gpus: int, flops_a_second: float) -> str:
    """Markdown: parameters of the models that the recipes make, and memory and speed of each."""

    def gib(size: float) -> str:
        return f"{size / 2**30:.1f}"

    sizes, rows = {}, []
    for name, recipe in sorted(recipes.items(), key=lambda item: count(build_unified(item[1]))):
        model = build_unified(recipe)
        size = first_stage(recipe)["language_model_name_or_path"].partition("/")[2]
        parts = [model.model.language_model, model.depth_heads, model.model.visual_projector, model.vision_tokenizer]
        millions = [count(model), *map(count, parts)]
        if not model.config.tie_word_embeddings:
            millions[1] += count(model.lm_head)
        millions[2] /= 2  # each head
        sizes[size] = f"| {size} | " + " | ".join(f"{number / 1e6:.1f}" for number in millions) + " |"
        engine = Path(recipe.get("deepspeed", "DDP")).stem
        zero_stage = int(engine.removeprefix("zero")[0]) if engine.startswith("zero") else 0
        samples = recipe["per_device_train_batch_size"]
        standing = unified_standing_bytes(model, zero_stage, gpus)
        cost = unified_step_cost(recipe, samples)
        longest = unified_step_cost(recipe, samples, recipe["max_length"] - model.config.num_positions)
        total = sum(standing.values())
        rows.append(
            f"| `{name}` | {count(model, trained=True) / 1e6:.0f} | {engine} | {samples} | {gib(total)} | "
            f"{gib(cost['peak'])} | {gib(total + cost['peak'])} | {gib(total + longest['peak'])} | "
            f"{cost['operations'] / 1e12:.1f} | {gpus * flops_a_second / cost['operations']:.0f} |"
        )
    head = ["| parameters in millions | all | language model | each head | projector | tokenizer |"]
    head += ["| --- | ---: | ---: | ---: | ---: | ---: |", *sizes.values(), ""]
    head += [
        "| recipe | trained, millions | engine | samples at once | standing | in the step | sum | with samples of full "
        f"length | Tflop per sample | samples/s, {gpus} GPUs |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    return "\n".join([*head, *rows])


def write_into_readme(text: str) -> None:
    path = FOLDER / "README.md"
    before, _, rest = path.read_text().partition(_BEGIN)
    after = rest.partition(_END)[2]
    path.write_text(f"{before}{_BEGIN}\n{text}\n{_END}{after}")


def main():
    args = parse_args()
    logging.set_verbosity_error()  # SigLIP's own default for ids of tokens that its vocabulary lacks
    print("COMPUTED, NOT MEASURED. GiB on one GPU; stage 1 with its adversary, bf16; see the top of this script.\n")
    recipes = {path.stem: json.loads(path.read_text()) for path in args.recipes}
    unified = {name: recipe for name, recipe in recipes.items() if "train_parts" in recipe}
    if unified:
        tables = unified_tables(unified, args.gpus, args.tflops * 1e12 * args.share)
        print(f"{tables}\n")
        if args.write:
            write_into_readme(tables)
    for path in args.recipes if not args.write else ():
        recipe = recipes[path.stem]
        if "stage" not in recipe:
            continue
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
