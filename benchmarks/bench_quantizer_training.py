"""Time and memory of the quantiser's training forward and backward against one-hot products, on one CPU thread.

    python benchmarks/bench_quantizer_training.py            # 4 images, 8 depths, 16384 codes: a minute or two, 4 GB
    python benchmarks/bench_quantizer_training.py --small    # seconds

One training step of a quantiser whose codebook all depths share: search, straight-through sums, commitment loss and
its backward, EMA and restarts of unused codes. Under `rq` the codebook moves after every depth, under `rq_ema` once.

"one-hot" holds all distances at once, and looks codes up and sums their vectors by products with one-hot codes;
"one-hot EMA" does only the latter by such products, as the usual code, and looks codes up by index. Times are medians
of runs that alternate in one process; the peak memory beyond the inputs is measured in a child process of its own for
each (VmHWM, Linux). From the same state and random numbers all must choose the same codes and leave the same codebook.
"""

import argparse
import json

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
from naive.quantizer_training import NaiveCodebook, naive_training_forward

from transformers_dualtoken.configuration_dualtoken import DualTokenQuantizerConfig
from transformers_dualtoken.vector_quantization import DualTokenResidualQuantizer


RULES = ("rq", "rq_ema")
NAIVE = {"one-hot": True, "one-hot EMA": False}  # name: are codes looked up by a one-hot product too?
NAMES = (*NAIVE, "ours")
BUFFERS = ("embeddings", "cluster_size", "embedding_sum")
SIZES = ("vectors", "codes", "width", "depths")
SMALL = {"vectors": 400, "codes": 2048, "depths": 3}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=4 * 729, help="positions (default %(default)s: 4 images)")
    parser.add_argument("--codes", type=int, default=16384, help="codes of the codebook (default %(default)s)")
    parser.add_argument("--width", type=int, default=32, help="width of a code (default %(default)s)")
    parser.add_argument("--depths", type=int, default=8, help="residual codes of a position (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each (default %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="another one, should a tie of floating point make codes differ"
    )
    parser.add_argument("--small", action="store_true", help=f"a fast run at {SMALL}")
    parser.add_argument("--child", nargs=2, metavar=("RULE", "NAME"), default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.small:
        vars(args).update(SMALL)
    return args


def make_step(name, rule, sizes, seed):
    """A function that trains one step and returns the codes (T, D), the gradient (T, C) and the codebook's buffers."""
    num_vectors, num_codes, width, num_depths = sizes
    torch.manual_seed(seed)
    config = DualTokenQuantizerConfig(codebook_size=num_codes, code_dim=width, num_depths=num_depths, update_rule=rule)
    quantizer = DualTokenResidualQuantizer(config).train()
    codebook = quantizer.codebook
    codebook.embeddings.normal_()
    # Some codes are about to fall below 1 and restart.
    codebook.cluster_size.uniform_(0.9, 3)
    codebook.embedding_sum.copy_(codebook.embeddings * codebook.cluster_size[..., None])
    vectors = torch.randn(num_vectors, width)
    if name != "ours":
        codebook = NaiveCodebook(*(getattr(codebook, buffer)[0] for buffer in BUFFERS), codebook.decay, codebook.eps)

    def step():
        leaf = vectors.detach().requires_grad_()
        if name == "ours":
            output = quantizer(leaf)
            codes, quantized, commitment = output.codes, output.quantized, output.commitment_loss
        else:
            codes, quantized, commitment = naive_training_forward(codebook, leaf, num_depths, rule, NAIVE[name])
        (commitment + quantized.square().mean()).backward()
        return codes, leaf.grad, {buffer: getattr(codebook, buffer).view(num_codes, -1) for buffer in BUFFERS}

    return step


def compare(steps, seed):
    """Run a step of each and fail unless all agree; returns the largest relative error of anything but the codes."""
    results = {}
    for name, step in steps.items():
        torch.manual_seed(seed)  # the same restarts
        results[name] = step()
    codes, gradient, buffers = results["ours"]
    errors = []
    for name in NAIVE:
        naive_codes, naive_gradient, naive_buffers = results[name]
        differing = (codes != naive_codes).sum().item()
        assert not differing, (
            f"{name}: {differing} of {codes.numel()} codes differ; ties would not with another --seed."
        )
        errors.append(relative_error(gradient, naive_gradient))
        errors += [relative_error(buffers[buffer], naive_buffers[buffer]) for buffer in BUFFERS]
    assert max(errors) < 1e-5, f"Gradients or codebooks differ: {errors}."
    return max(errors)


def main():
    args = parse_args()
    torch.set_num_threads(1)
    sizes = [getattr(args, size) for size in SIZES]
    if args.child:
        rule, name = args.child
        make_step(name, rule, (8, 256, args.width, 2), args.seed)()  # loads what the first call loads
        step = make_step(name, rule, sizes, args.seed)
        print(json.dumps(transient_bytes(step)))
        return

    print_machine()
    print(", ".join(f"{size} {getattr(args, size)}" for size in SIZES), end="")
    print(f", medians of {args.repeats}")
    arguments = [x for size, value in zip(SIZES, sizes) for x in (f"--{size}", value)]
    for rule in RULES:
        memory = {name: run_child(__file__, "--child", rule, name, *arguments) for name in NAMES}
        steps = {name: make_step(name, rule, sizes, args.seed) for name in NAMES}
        error = compare(steps, args.seed)
        seconds = alternating_medians(steps, args.repeats)
        print(f"\n{rule}: codes identical, gradient and codebook to {error:.0e}")
        for name in NAIVE:
            names = [name, "ours"]
            print_head(names)
            print_row("time", [seconds[key] for key in names], "s", 3)
            print_row("peak memory beyond inputs", [memory[key] / 1e6 for key in names], "MB", 1)
            print(f"ours takes {memory['ours'] / memory[name]:.1%} of the memory")


if __name__ == "__main__":
    main()
