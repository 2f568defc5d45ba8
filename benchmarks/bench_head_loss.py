"""Memory and time of the head loss: `linear_cross_entropy` against all logits at once, on one CPU thread.

    python benchmarks/bench_head_loss.py            # 2 heads x 8 depths, 2 images: 5 to 8 minutes, 8 GB
    python benchmarks/bench_head_loss.py --small    # seconds

Peak memory is measured in a child process of its own for each (VmHWM, Linux), times as medians of runs that alternate
in one process. "training" is the loss and all its gradients, "evaluation" the loss under `no_grad`. Training's memory
is given twice: all beyond the inputs, and also without the gradients themselves, which any implementation returns.
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
from naive.head_loss import materialised_linear_cross_entropy

from transformers_dualtoken.linear_cross_entropy import linear_cross_entropy


NAMES = ("materialised", "chunked")
MODES = ("training", "evaluation")
SIZES = ("groups", "rows", "width", "classes")
SMALL = {"groups": 4, "rows": 300, "width": 256, "classes": 4096}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=16, help="classifiers: heads x depths (default %(default)s)")
    parser.add_argument("--rows", type=int, default=2 * 729, help="image positions (default %(default)s: 2 images)")
    parser.add_argument("--width", type=int, default=1024, help="width of the head (default %(default)s)")
    parser.add_argument("--classes", type=int, default=16384, help="codes (default %(default)s)")
    parser.add_argument("--chunk-size", type=int, default=None, help="rows of logits at once (default: ours)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each (default %(default)s)")
    parser.add_argument("--small", action="store_true", help=f"a fast run at {SMALL}")
    parser.add_argument("--child", nargs=2, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.small:
        vars(args).update(SMALL)
    return args


def make_inputs(groups, rows, width, classes):
    """hidden (G, T, W), weight (G, V, W) as a fresh classifier, targets (G, T)."""
    torch.manual_seed(0)
    hidden = torch.randn(groups, rows, width, requires_grad=True)
    weight = torch.empty(groups, classes, width).normal_(std=0.02).requires_grad_()
    return hidden, weight, torch.randint(classes, (groups, rows))


def run_once(name, mode, hidden, weight, targets, chunk_size=None):
    """Returns the loss sums (G,); in training the gradients lie in `.grad`."""
    # As in training: each group is averaged over its positions, and groups are weighted apart.
    scales = torch.linspace(0.5, 2.0, hidden.shape[0]) / max(1, hidden.shape[1])
    hidden.grad = weight.grad = None
    with torch.set_grad_enabled(mode == "training"):
        if name == "materialised":
            loss_sums = materialised_linear_cross_entropy(hidden, weight, targets)
        else:
            loss_sums = linear_cross_entropy(hidden, weight, targets, chunk_size=chunk_size).loss_sums
        if mode == "training":
            (loss_sums * scales).sum().backward()
    return loss_sums.detach()


def measure_memory(args):
    """In the child: peak memory beyond the inputs, in bytes."""
    name, mode = args.child
    run_once(name, mode, *make_inputs(1, 8, 8, 8))  # loads what the first call loads
    inputs = make_inputs(*(getattr(args, size) for size in SIZES))
    print(json.dumps(transient_bytes(lambda: run_once(name, mode, *inputs, chunk_size=args.chunk_size))))


def memory_in_child(args, name, mode):
    arguments = ["--child", name, mode]
    arguments += [x for size in SIZES for x in (f"--{size}", getattr(args, size))]
    if args.chunk_size is not None:
        arguments += ["--chunk-size", args.chunk_size]
    return run_child(__file__, *arguments)


def measure_times(args):
    """Seconds by (name, mode), and the relative errors of the chunked version by quantity."""
    hidden, weight, targets = make_inputs(*(getattr(args, size) for size in SIZES))
    errors = {}
    # One untimed run of each, for the equality and to warm up.
    reference = {"loss": run_once("materialised", "training", hidden, weight, targets)}
    reference |= {"grad_hidden": hidden.grad, "grad_weight": weight.grad}
    ours = {"loss": run_once("chunked", "training", hidden, weight, targets, args.chunk_size)}
    ours |= {"grad_hidden": hidden.grad, "grad_weight": weight.grad}
    for quantity in reference:
        errors[quantity] = relative_error(ours[quantity], reference[quantity])
        assert errors[quantity] < 1e-5, f"{quantity} differs by {errors[quantity]:.1e} of its largest value."
    del reference, ours

    runs = {
        (name, mode): lambda name=name, mode=mode: run_once(name, mode, hidden, weight, targets, args.chunk_size)
        for name in NAMES
        for mode in MODES
    }
    return alternating_medians(runs, args.repeats), errors


def main():
    args = parse_args()
    torch.set_num_threads(1)
    if args.child:
        return measure_memory(args)

    memory = {(name, mode): memory_in_child(args, name, mode) for name in NAMES for mode in MODES}
    seconds, errors = measure_times(args)
    gradient_bytes = 4 * args.groups * args.width * (args.rows + args.classes)
    logit_bytes = 4 * args.groups * args.rows * args.classes

    print_machine()
    print(", ".join(f"{size} {getattr(args, size)}" for size in SIZES), end="")
    print(f", chunk size {args.chunk_size or 'default'}, medians of {args.repeats}")
    print(f"all logits {logit_bytes / 1e6:.0f} MB, gradients {gradient_bytes / 1e6:.0f} MB\n")
    print_head(NAMES)
    for mode in MODES:
        peaks = [memory[name, mode] / 1e6 for name in NAMES]
        print_row(f"{mode}: peak memory beyond inputs", peaks, "MB", 0)
        if mode == "training":
            print_row(
                f"{mode}: the same, less the gradients", [peak - gradient_bytes / 1e6 for peak in peaks], "MB", 0
            )
        print_row(f"{mode}: time", [seconds[name, mode] for name in NAMES], "s", 3)
    print("\nrelative errors: " + ", ".join(f"{quantity} {error:.1e}" for quantity, error in errors.items()))


if __name__ == "__main__":
    main()
