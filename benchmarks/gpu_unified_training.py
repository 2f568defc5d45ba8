"""Training the full-size unified model on one GPU: tokens and images a second, model FLOPs utilisation, memory.

    python benchmarks/gpu_unified_training.py --output gpu.json   # an H100: 5 minutes
    python benchmarks/gpu_unified_training.py --small             # the same on a CPU with a tiny model: seconds

The paper's 3B-384 (Qwen2.5-3B, So400m tokenizer, two heads of 258 M parameters) with random weights, in bfloat16. What
a step does is what the Trainer does: forward under bf16 autocast, backward, gradient clipping, AdamW. Rows are packed
full with samples of three kinds, one after the other: a picture to draw from a caption, a question about a picture,
and text. Images come as precomputed codes, unless a row of the table says pixels.

    heads    stage 3: the depth heads are trained, in bfloat16 as the rest
    lora     `add_lora` as it is: low rank in the language model; projector, heads and image tokens in full, float32
    full     all but the tokenizer, weights and optimizer states in bfloat16: what fits one GPU, to see the speed

For each the rows of a step are doubled until the memory ends; the last that fits is the largest batch. The table is
printed as it grows, and written to --output as JSON. Utilisation is model FLOPs (no recomputation) over the peak that
the vendor states. Needs torch and transformers; peft for lora; flash-attn is used where it is installed, otherwise SDPA.
The package need not be installed: PYTHONPATH=src.
"""

import argparse
import importlib.util
import itertools
import os
import sys
import time
from pathlib import Path


# Before torch starts: batches of growing size would otherwise leave gaps between blocks.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch  # noqa: E402
from gpu_device import Device, Report  # noqa: E402
from unified_models import full_size_config, small_config  # noqa: E402

from transformers_dualtoken.data.collators import DualTokenDataCollator  # noqa: E402
from transformers_dualtoken.modeling_dualtoken import DualTokenForCausalLM  # noqa: E402
from transformers_dualtoken.training.unified.throughput import StepCounts, TrainingFlops, peak_flops  # noqa: E402


# Training, input, gradient checkpointing. Without a gradient in the language model there is nothing to checkpoint.
CASES = (
    ("heads", "codes", False),
    ("heads", "pixels", False),
    ("lora", "codes", False),
    ("lora", "codes", True),
    ("full", "codes", True),
)
# Text tokens of the three kinds of samples: before the image or answer, and after it.
CAPTION, QUESTION, ANSWER, TEXT = 40, 30, 120, 400
COLUMNS = ("training", "input", "checkpointing", "rows", "tokens/s", "images/s", "MFU", "seconds a step", "peak GiB")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["heads", "lora", "full"], help="default: %(default)s")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row (default %(default)s)")
    parser.add_argument("--max-rows", type=int, default=64, help="rows of the largest step (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=7, help="begin nothing new after that (default %(default)s)")
    parser.add_argument("--attention", help="default: flash_attention_2 where flash-attn is installed, else sdpa")
    parser.add_argument("--compile", action="store_true", help="compile the layers of the language model")
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    parser.add_argument("--small", action="store_true", help="a tiny model on the CPU")
    args = parser.parse_args()
    if args.small:
        args.length, args.max_rows = 128, 2
    if args.attention is None:
        has_flash = importlib.util.find_spec("flash_attn") is not None and not args.small
        args.attention = "flash_attention_2" if has_flash else "sdpa"
    return args


def make_samples(config, generator):
    """Samples without end, of the three kinds in turn; where `labels` are -100 nothing is learned."""
    start, image, end = config.special_image_token_ids
    picture = torch.tensor([start, *[image] * config.num_positions, end])
    grid = (1, config.vision_tokenizer_config.grid_size, config.vision_tokenizer_config.grid_size, config.num_depths)

    def words(count):
        # Below every special token.
        return torch.randint(1, min(config.special_image_token_ids), (count,), generator=generator)

    def codes():
        return torch.randint(config.codebook_size, grid, generator=generator)

    for kind in itertools.cycle(("draw", "see", "text")):
        if kind == "draw":
            ids, num_context = torch.cat([words(CAPTION), picture]), CAPTION
        elif kind == "see":
            ids, num_context = torch.cat([picture, words(QUESTION), words(ANSWER)]), len(picture) + QUESTION
        else:
            ids, num_context = words(TEXT), QUESTION
        labels = ids.clone()
        labels[:num_context] = -100
        images = {} if kind == "text" else {"pixel_codes": codes(), "semantic_codes": codes()}
        yield {"input_ids": ids, "labels": labels, **images}


def make_batch(config, num_rows, length, source, device):
    """Packed rows as [`DualTokenDataCollator`] makes them, full to the last token, and what they hold."""
    collate = DualTokenDataCollator(pad_token_id=0, packed_length=length)
    samples = make_samples(config, torch.Generator().manual_seed(0))
    rows = []
    for _ in range(num_rows):
        row, left = [], length
        for sample in samples:
            if len(sample["input_ids"]) <= left:
                row.append(sample)
                left -= len(sample["input_ids"])
            elif left < TEXT:
                break
        if left > 1:
            ids = torch.ones(left, dtype=torch.int64)
            row.append({"input_ids": ids, "labels": ids})
        rows.append(collate(row))
    batch = {key: torch.cat([row[key] for row in rows if key in row]) for key in rows[0]}
    is_visual = batch["labels"][:, 1:] == config.image_token_id
    num_images = len(batch["pixel_codes"])
    counts = StepCounts(
        tokens=batch["input_ids"].numel(),
        attention_pairs=int((batch["position_ids"] + 1).sum()),
        text_targets=int(((batch["labels"][:, 1:] != -100) & ~is_visual).sum()),
        visual_targets=int(is_visual.sum()),
        images=num_images,
        encoded_images=num_images if source == "pixels" else 0,
    )
    if source == "pixels":
        size = config.vision_tokenizer_config.image_size
        del batch["pixel_codes"], batch["semantic_codes"]
        batch["pixel_values"] = torch.rand(num_images, 3, size, size) * 2 - 1
    batch["num_items_in_batch"] = torch.tensor([counts.text_targets, counts.visual_targets])
    return {key: value.to(device) for key, value in batch.items()}, counts


def make_model(training, checkpointing, args, device):
    """The model in training mode, with what is trained marked as such."""
    config = small_config() if args.small else full_size_config()
    torch.manual_seed(0)
    with device:
        model = DualTokenForCausalLM._from_config(
            config, dtype=torch.bfloat16, attn_implementation={"": "sdpa", "text_config": args.attention}
        )
    if training == "heads":
        model.requires_grad_(False)
        model.depth_heads.requires_grad_(True)
    if args.compile:
        for layer in model.model.language_model.layers:
            layer.compile()
    trained = model
    if training == "lora":
        from transformers_dualtoken.training.unified.adapters import add_lora

        trained = add_lora(model)
    if checkpointing:
        trained.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return trained.train(), config


class Step:
    """One optimizer step."""

    def __init__(self, model, device: Device):
        self.model, self.device = model, device
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # A rate at which nothing moves much, so that steps stay alike.
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-6, fused=device.is_gpu)

    def __call__(self, batch):
        with torch.autocast(self.device.device.type, dtype=torch.bfloat16):
            loss = self.model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def measure(step, batch, device: Device):
    """Seconds of a step, peak memory in GiB and the loss."""
    step(batch)
    peak_gib = device.peak_gib(lambda: step(batch))
    # A few seconds of it, at most twenty steps.
    seconds = device.seconds(lambda: step(batch), 20, 3 if device.is_gpu else 0.1)
    loss = step(batch)
    assert loss.isfinite(), f"The loss is {loss.item()}."
    return seconds, peak_gib, loss.item()


class TrainingReport(Report):
    """The table, printed as it grows."""

    def __init__(self, args, device: Device):
        self.peak_flops, product = peak_flops(device.name) if device.is_gpu else None, device.product_flops()
        super().__init__(
            args.output,
            device,
            COLUMNS,
            num_names=3,
            attention=args.attention,
            compiled=args.compile,
            length=args.length,
            stated_peak_tflops=self.peak_flops and self.peak_flops / 1e12,
            product_tflops=product / 1e12,
        )
        self.print_machine()
        print(
            f"rows of {args.length} tokens, attention {args.attention}{', compiled' if args.compile else ''}; a large "
            f"bfloat16 product runs at {product / 1e12:.0f} TFLOP/s"
        )
        self.print_head()

    def add(self, training, source, checkpointing, rows, counts, flops, seconds, peak_gib, loss):
        share = flops / seconds / self.peak_flops if self.peak_flops else None
        self.results.append(
            {
                "training": training,
                "input": source,
                "checkpointing": checkpointing,
                "rows": rows,
                "tokens_per_second": counts.tokens / seconds,
                "images_per_second": counts.images / seconds,
                "model_flops_utilization": share,
                "seconds": seconds,
                "peak_gib": peak_gib,
                "loss": loss,
                "tflops": flops / 1e12,
                "counts": vars(counts),
            }
        )
        names = [training, source, "yes" if checkpointing else "no", str(rows)]
        rates = [(counts.tokens / seconds, ",.0f"), (counts.images / seconds, ".1f"), (share, ".1%")]
        self.print_row(*names, *rates, (seconds, ".3f"), (peak_gib, ".1f"))
        self.write()


def run_case(training, source, checkpointing, args, device: Device, report: TrainingReport, deadline):
    """Double the rows until the memory ends; returns the largest number that fits."""
    name = f"{training} on {source}{', with checkpointing' if checkpointing else ''}"
    model, config = make_model(training, checkpointing, args, device.device)
    flops, step, fits, rows = TrainingFlops(model), Step(model, device), 0, 1
    while rows <= args.max_rows:
        if time.monotonic() > deadline:
            report.note(f"{name}: the time was up after {fits} rows.")
            return
        try:
            batch, counts = make_batch(config, rows, args.length, source, device.device)
            seconds, peak_gib, loss = measure(step, batch, device)
        except torch.cuda.OutOfMemoryError:
            report.note(f"{name}: {fits} rows of {args.length} tokens fit, {rows} do not.")
            return
        report.add(training, source, checkpointing, rows, counts, flops(counts), seconds, peak_gib, loss)
        fits, rows = rows, 2 * rows
        batch = None
    report.note(f"{name}: {fits} rows fit; more were not tried.")


def main():
    args = parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    device = Device(args.small)
    report = TrainingReport(args, device)
    for training, source, checkpointing in CASES:
        if training not in args.cases:
            continue
        try:
            run_case(training, source, checkpointing, args, device, report, deadline)
        except Exception as error:
            # The other cases stand; what failed is named in the results.
            report.note(f"{training} on {source} failed: {type(error).__name__}: {error}"[:500])
        device.free()
    print()
    report.print_notes()
    return 0 if report.results else 1


if __name__ == "__main__":
    sys.exit(main())
