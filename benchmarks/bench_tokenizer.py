"""The vision tokenizer at work: encoding for one kind of codes or both, decoding by memory layout and in slices.

    python benchmarks/bench_tokenizer.py            # the paper's tokenizer, one image, one CPU thread: ten minutes, 5 GB
    python benchmarks/bench_tokenizer.py --small    # seconds

Pixel codes come from layer 6 of 27, so `encode(codes=("pixel",))` stops there; "both kinds" is what a tokenizer does that
always runs its encoder, the search of both kinds included, "and features" goes on to the pooled image feature. The
search's share is the time of the residual search by itself over that of the encoding it is part of. Decoding is timed
with maps in PyTorch's usual order (channel by channel), as it is (channels-last maps), and after
`tok.to(memory_format=torch.channels_last)` (weights too). Weights are random.

Times are the processor's, medians of runs that alternate in one process, and first all ways must agree: the same codes,
images equal to 1e-3 of their range. The peak memory of decoding a batch, beyond the model and its input, whole and in
slices of one image, is measured in a child process of its own for each (VmHWM, Linux).
"""

import argparse
import json
import time

import torch
from common import (
    alternating_medians,
    print_head,
    print_machine,
    print_row,
    relative_error,
    run_child,
    transient_bytes,
)
from unified_models import small_config

from transformers_dualtoken import DualTokenVisionTokenizer, DualTokenVisionTokenizerConfig


ENCODE_CALLS = {
    "both kinds and features": {},
    "both kinds": {"features": False},
    "pixel codes alone": {"codes": ("pixel",), "features": False},
}
KINDS = ("pixel", "semantic")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1, help="images encoded and decoded (default %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="images of the memory test (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each (default %(default)s)")
    parser.add_argument("--small", action="store_true", help="a tiny tokenizer")
    parser.add_argument("--child", choices=("whole", "sliced"), default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


@torch.no_grad()
def make_tokenizer(small: bool) -> DualTokenVisionTokenizer:
    """The paper's tokenizer at 384 px with random weights, or a tiny one. No text is looked at: its tower is tiny."""
    config = small_config().vision_tokenizer_config
    if not small:
        vision_config = DualTokenVisionTokenizerConfig().vision_config
        text_config = {**config.text_config.to_dict(), "projection_size": vision_config.hidden_size}
        config = DualTokenVisionTokenizerConfig(vision_config=vision_config.to_dict(), text_config=text_config)
    torch.manual_seed(0)
    model = DualTokenVisionTokenizer(config)
    for name, parameter in model.named_parameters():
        # At the usual initialisation the vectors to quantise would be all but equal.
        if "_proj." in name and parameter.ndim == 2 and not name.startswith("siglip"):
            parameter.normal_(std=parameter.shape[1] ** -0.5)
    for kind in KINDS:
        model.quantizer(kind).codebook.embeddings.normal_()
    return model.eval()


def random_images(model, count):
    """`(count, 3, S, S)` in [-1, 1]."""
    size = model.config.image_size
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def random_codes(model, count):
    """`(count, H, W, D)`."""
    grid, quantizer = model.config.grid_size, model.config.pixel_quantizer_config
    shape = (count, grid, grid, quantizer.num_depths)
    return torch.randint(quantizer.codebook_size, shape, generator=torch.Generator().manual_seed(0))


def latents_of(model, pixel_values):
    """The vectors `(B, N, C)` that each quantiser is given."""
    latents = {}
    hooks = [
        model.quantizer(kind).register_forward_pre_hook(lambda _, args, kind=kind: latents.update({kind: args[0]}))
        for kind in KINDS
    ]
    model.encode(pixel_values, features=False)
    for hook in hooks:
        hook.remove()
    return latents


def time_encoding(model, args):
    pixel_values = random_images(model, args.images)
    latents = latents_of(model, pixel_values)
    encoded = {name: model.encode(pixel_values, **call) for name, call in ENCODE_CALLS.items()}
    for name, output in encoded.items():
        assert torch.equal(output.pixel_codes, encoded["both kinds"].pixel_codes), f"{name} gives other pixel codes."

    runs = {name: lambda call=call: model.encode(pixel_values, **call) for name, call in ENCODE_CALLS.items()}
    runs["search of both kinds"] = lambda: [model.quantizer(kind)(latents[kind]) for kind in KINDS]
    runs["search of pixel codes"] = lambda: model.pixel_quantizer(latents["pixel"])
    seconds = alternating_medians(runs, args.repeats, clock=time.process_time)
    for name in ("both kinds", "both kinds and features"):
        print_head([name if len(name) < 14 else "and features", "pixel alone"])
        print_row("encoding", [seconds[key] for key in (name, "pixel codes alone")], "s", 3)
        print()
    for search, encoding in (("both kinds", "both kinds"), ("pixel codes", "pixel codes alone")):
        share = seconds[f"search of {search}"] / seconds[encoding]
        print(f"search of {search}: {seconds[f'search of {search}']:.3f} s, {share:.1%} of the encoding")


def time_decoding(model, args):
    """Decoding with maps and weights in the usual order, maps channels-last, and both channels-last."""
    codes = random_codes(model, args.images)

    def in_usual_order():
        hook = model.post_quantizer_block.register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))
        image = model.to(memory_format=torch.contiguous_format).decode(codes).reconstruction
        hook.remove()
        return image

    # Converting the weights takes no time beside decoding; where they already are in that order, none at all.
    runs = {
        "usual order": in_usual_order,
        "as it is": lambda: model.to(memory_format=torch.contiguous_format).decode(codes).reconstruction,
        "channels-last": lambda: model.to(memory_format=torch.channels_last).decode(codes).reconstruction,
    }
    images = {name: run() for name, run in runs.items()}
    for name, image in images.items():
        error = relative_error(image, images["usual order"])
        assert error < 1e-3, f"{name}: the image differs by {error:.1e} of its range."
    seconds = alternating_medians(runs, args.repeats, clock=time.process_time)
    print()
    for name in ("as it is", "channels-last"):
        print_head(["usual order", name])
        print_row("decoding", [seconds["usual order"], seconds[name]], "s", 3)
        print()


def check_slices(model, args):
    codes = random_codes(model, min(2, args.batch))
    error = relative_error(model.decode(codes, slice_size=1).reconstruction, model.decode(codes).reconstruction)
    assert error < 1e-3, f"In slices the images differ by {error:.1e} of their range."


@torch.no_grad()
def main():
    args = parse_args()
    torch.set_num_threads(1)
    if args.child:
        model, slice_size = make_tokenizer(args.small), 1 if args.child == "sliced" else None
        codes = random_codes(model, args.batch)
        print(json.dumps(transient_bytes(lambda: model.decode(codes, slice_size=slice_size))))
        return

    # Before this process holds a model too.
    small = ["--small"] if args.small else []
    memory = [run_child(__file__, "--child", name, "--batch", args.batch, *small) for name in ("whole", "sliced")]
    model = make_tokenizer(args.small)
    print_machine()
    print(f"{args.images} image of {model.config.image_size} px, medians of {args.repeats}\n")
    time_encoding(model, args)
    time_decoding(model, args)
    check_slices(model, args)
    print_head(["whole batch", "slices of 1"])
    print_row(f"decoding {args.batch} images, peak memory", [value / 1e6 for value in memory], "MB", 1)


if __name__ == "__main__":
    main()
