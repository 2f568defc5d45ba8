"""A training step on precomputed codes against one on pixels: time, loading, and the encoder's share at full size.

    python benchmarks/bench_precomputed_codes.py            # a few minutes, 2 GB
    python benchmarks/bench_precomputed_codes.py --small    # seconds

Pictures of 640 x 480 px in JPEG files, each to be drawn from a caption. One side reads, decodes and resizes them and runs
the frozen encoder in every step; the other reads the codes that `precompute_codes` wrote to parquet. Everything else is
the same: data set, order, collator, model. Losses are compared first. The model is a miniature with the proportions of
the paper's (the encoder takes about a tenth of a step of stage 3). Times are the processor's, on one thread, medians of
runs that alternate in one process; a row of its own gives the encoder, whose share drowns in the noise of a busy machine.

The shares of the paper's 3B-384 are computed, from its layers, on the meta device.
"""

import argparse
import contextlib
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import alternating_medians, print_head, print_machine, print_row
from datasets import Dataset
from PIL import Image
from tokenizers import pre_tokenizers
from torch.utils.data import DataLoader
from transformers import Qwen2Tokenizer
from unified_models import full_size_config, small_config

from transformers_dualtoken import DualTokenForCausalLM, DualTokenImageProcessorPil, DualTokenProcessor
from transformers_dualtoken.training import (
    ChatEncoder,
    ChatSource,
    DualTokenChatDataset,
    DualTokenDataCollator,
    TrainingFlops,
    load_code_source,
    precompute_codes,
    set_trainable,
)
from transformers_dualtoken.training.unified.adapters import add_lora
from transformers_dualtoken.training.unified.throughput import StepCounts


SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
NAMES = ("pixels", "codes")
PARTS = {"heads": ["heads"], "full": ["projector", "language_model", "heads"]}
CAPTION = "A harbour at dusk."


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64, help="default %(default)s")
    parser.add_argument("--batch", type=int, default=16, help="samples of a step (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each (default %(default)s)")
    parser.add_argument("--small", action="store_true", help="8 images, one run")
    args = parser.parse_args()
    if args.small:
        args.images, args.batch, args.repeats = 8, 4, 1
    return args


def byte_tokenizer():
    """Qwen2's, with a token for every byte and no others; the image tokens are the last three."""
    vocabulary = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    return tokenizer


def write_pictures(folder, count):
    """Smooth noise with some grain, which JPEG compresses about as a photograph."""
    rng = np.random.default_rng(0)
    paths = []
    for index in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((640, 480), Image.BICUBIC)
        picture = np.asarray(coarse, dtype=np.int16) + rng.integers(-12, 13, (480, 640, 3))
        paths.append(str(folder / f"{index}.jpg"))
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


def to_example(row):
    return {
        "messages": [
            {"role": "user", "content": CAPTION},
            {"role": "assistant", "content": [{"type": "image", "image": row["image"]}]},
        ]
    }


def make_loaders(args, model, processor, folder):
    """A `DataLoader` by name, and how long the codes took to compute."""
    rows = Dataset.from_list([{"image": path} for path in write_pictures(folder, args.images)])
    source = ChatSource("pictures", rows, to_example)
    seconds = alternating_medians(
        {
            "precompute": lambda: precompute_codes(
                model.vision_tokenizer, processor.image_processor, [source], folder / "codes", batch_size=args.batch
            )
        },
        1,
        time.process_time,
    )["precompute"]
    encoder = ChatEncoder(processor, prompt_drop_probability=0)
    collate = DualTokenDataCollator(processor.tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    loaders = {
        name: DataLoader(DualTokenChatDataset([part], encoder), batch_size=args.batch, collate_fn=collate)
        for name, part in zip(NAMES, (source, load_code_source(folder / "codes")))
    }
    return loaders, seconds


def step(model, batch):
    batch = {key: value for key, value in batch.items() if key != "num_skipped"}
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item()


def measure(args, folder):
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    model = DualTokenForCausalLM(
        small_config(width=256, layers=6, vocabulary=len(tokenizer), encoder_width=128, head_width=128)
    ).train()
    image_processor = DualTokenImageProcessorPil(size=model.config.vision_tokenizer_config.image_size)
    processor = DualTokenProcessor(image_processor, tokenizer, num_image_tokens=model.config.num_positions)
    loaders, precompute_seconds = make_loaders(args, model, processor, folder)
    batches = {name: next(iter(loader)) for name, loader in loaders.items()}

    set_trainable(model, PARTS["full"])
    losses = {name: step(model, batch) for name, batch in batches.items()}
    assert abs(losses["pixels"] - losses["codes"]) < 1e-5 * losses["codes"], f"The losses differ: {losses}."

    print_machine()
    positions, size = model.config.num_positions, sum(p.numel() for p in model.model.language_model.parameters())
    print(f"{args.images} pictures of 640 x 480 px, {args.batch} a step, {positions} positions each; language model")
    print(f"{size / 1e6:.1f} M parameters; medians of {args.repeats}; losses equal\n")
    print_head(NAMES)
    runs = {name: lambda loader=loader: next(iter(loader)) for name, loader in loaders.items()}
    load = alternating_medians(runs, args.repeats, time.process_time)
    print_row("loading a batch", [1e3 * load[name] for name in NAMES], "ms", 1)
    for part, trained in PARTS.items():
        set_trainable(model, trained)
        flops, lengths = TrainingFlops(model), batches["codes"]["attention_mask"].sum(-1)
        share = encoder_share(flops, model.config, int(lengths[0]))
        runs = {name: lambda batch=batch: step(model, batch) for name, batch in batches.items()}
        seconds = alternating_medians(runs, args.repeats, time.process_time)
        label = f"forward and backward, {part} ({100 * share:.0f} % encoder)"
        print_row(label, [1e3 * seconds[name] for name in NAMES], "ms", 1)
        whole = [1e3 * (seconds[name] + load[name]) for name in NAMES]
        print_row(f"{part}: both, one after the other", whole, "ms", 1)
    pixel_values = batches["pixels"]["pixel_values"]
    runs = {"encoder": lambda: model.model.get_image_codes(pixel_values)}
    encoder = alternating_medians(runs, args.repeats, time.process_time)["encoder"]
    print(f"{'the encoder alone':46}{1e3 * encoder:>11.1f} ms")
    print(f"\nThe codes were computed and written once, at {1e3 * precompute_seconds / args.images:.1f} ms a picture.")


def encoder_share(flops, config, length):
    """Share of the encoder in a step on pixels: samples of `length` tokens with one image to draw."""
    counts = StepCounts(
        tokens=length,
        attention_pairs=length * (length + 1) // 2,
        text_targets=length - config.num_positions,
        visual_targets=config.num_positions,
        images=1,
    )
    return flops.per_encoded_image / (flops.per_encoded_image + flops(counts))


def print_full_size():
    config = full_size_config()
    with torch.device("meta"):
        model = DualTokenForCausalLM(config)
    print("\nThe paper's 3B-384, computed: a caption of 40 tokens and its picture, 771 tokens")
    # LoRA last: it changes the model.
    for part in ("heads", "full", "lora"):
        if part == "lora":
            with contextlib.redirect_stdout(None):
                trained = add_lora(model)
        else:
            set_trainable(model, PARTS[part])
            trained = model
        flops = TrainingFlops(trained)
        share = encoder_share(flops, config, 40 + 2 + config.num_positions)
        tera = flops.per_encoded_image / 1e12
        print(f"{part:8} encoder {tera:.2f} of {tera / share:.1f} TFLOP of a step, {100 * share:.1f} %")


def main():
    args = parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        measure(args, Path(folder))
    print_full_size()


if __name__ == "__main__":
    main()
