"""Memory and time of the head loss: `linear_cross_entropy` against all logits at once and against torch's own.

    python benchmarks/bench_head_loss.py                      # 2 heads x 8 depths, 2 images: 10 minutes, 8 GB
    python benchmarks/bench_head_loss.py --text               # 2048 tokens of Qwen2.5's vocabulary: 10 minutes, 10 GB
    python benchmarks/bench_head_loss.py --dtype bfloat16 --repeats 0      # memory alone, of a model in bfloat16
    python benchmarks/bench_head_loss.py --device cuda --dtype bfloat16    # on a GPU: seconds
    python benchmarks/bench_head_loss.py --small              # seconds

The cases:
    training       loss, and the gradients of hidden states and classifiers
    frozen         the classifiers have no gradient (stages 1 and 2; the text head under LoRA, or in stage 3)
    accumulation   as training, but `.grad` holds those of an earlier part of the batch
    evaluation     the loss, without gradients

Memory is the peak beyond what was held before: the inputs, and with accumulation `.grad`. Of the first two cases it is
given as well without the new gradients themselves, which any implementation returns. On a CPU every implementation
has a child process of its own (VmHWM, Linux). Times are medians of runs that alternate in
one process, on a CPU of the processor's time. torch's own
(`torch.nn.functional.linear_cross_entropy`, from 2.13 on) is called once for every classifier, its weight a parameter
of its own; it does not count right answers.
"""

import argparse
import json
import time

import torch
import torch.nn.functional as F
from common import (
    alternating_medians,
    cpu_name,
    relative_error,
    run_child,
    transient_bytes,
)
from naive.head_loss import materialised_linear_cross_entropy

from transformers_dualtoken.linear_cross_entropy import linear_cross_entropy


NAMES = ("materialised", "chunked", *(["torch"] if hasattr(F, "linear_cross_entropy") else []))
CASES = ("training", "frozen", "accumulation", "evaluation")
SIZES = ("groups", "rows", "width", "classes")
SMALL = {"groups": 4, "rows": 300, "width": 256, "classes": 4096}
TEXT = {"groups": 1, "rows": 2048, "width": 2048, "classes": 151936}
# Of the largest value, against the materialised version; bfloat16 gradients have 8 bits.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=16, help="classifiers: heads x depths (default %(default)s)")
    parser.add_argument("--rows", type=int, default=2 * 729, help="image positions (default %(default)s: 2 images)")
    parser.add_argument("--width", type=int, default=1024, help="width of the head (default %(default)s)")
    parser.add_argument("--classes", type=int, default=16384, help="codes (default %(default)s)")
    parser.add_argument("--chunk-size", type=int, default=None, help="rows of logits at once (default: ours)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="default %(default)s")
    parser.add_argument("--device", default="cpu", help="default %(default)s, with one thread")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, help="default: all")
    parser.add_argument("--names", nargs="+", choices=NAMES, default=NAMES, help="default: all")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each (default %(default)s; 0: none)")
    parser.add_argument("--text", action="store_true", help=f"the text head, by default at {TEXT}")
    parser.add_argument("--small", action="store_true", help=f"a fast run, by default at {SMALL}")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    chosen = parser.parse_known_args()[0]
    parser.set_defaults(**(SMALL if chosen.small else TEXT if chosen.text else {}))
    args = parser.parse_args()
    args.dtype = getattr(torch, args.dtype)
    return args


class Loss:
    """One implementation with its inputs: hidden (G, T, W), weight (G, V, W) as a fresh classifier, targets (G, T)."""

    def __init__(self, name, sizes, dtype, device, chunk_size=None):
        groups, rows, width, classes = sizes
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(groups, rows, width, generator=generator).to(device, dtype)
        weight = torch.empty(groups, classes, width).normal_(std=0.02, generator=generator).to(device, dtype)
        self.targets = torch.randint(classes, (groups, rows), generator=generator).to(device)
        self.name, self.chunk_size = name, chunk_size
        # As in training: each group is averaged over its positions, and groups are weighted apart.
        self.scales = torch.linspace(0.5, 2.0, groups, device=device) / max(1, rows)
        # torch's knows no groups: its classifiers are parameters of their own.
        self.hidden, self.weight = ([*hidden], [*weight]) if name == "torch" else ([hidden], [weight])

    def loss_sums(self):
        """(G,)"""
        if self.name == "torch":
            options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=self.chunk_size) if self.chunk_size else None
            options = options or torch.nn.LinearCrossEntropyOptions()
            return torch.stack(
                [
                    F.linear_cross_entropy(hidden, weight, target, reduction="sum", options=options).float()
                    for hidden, weight, target in zip(self.hidden, self.weight, self.targets)
                ]
            )
        (hidden,), (weight,) = self.hidden, self.weight
        if self.name == "materialised":
            return materialised_linear_cross_entropy(hidden, weight, self.targets)
        return linear_cross_entropy(hidden, weight, self.targets, chunk_size=self.chunk_size).loss_sums

    def prepare(self, case):
        """Before a run, untimed: what needs a gradient, and what `.grad` holds."""
        for tensor in (*self.hidden, *self.weight):
            tensor.grad = None
            tensor.requires_grad_(case != "evaluation")
        for weight in self.weight:
            weight.requires_grad_(case in ("training", "accumulation"))
        if case == "accumulation":
            self.run(case)

    def run(self, case):
        """Returns the loss sums (G,); the gradients lie in `.grad`."""
        # Of hidden states nothing is kept from one part of a batch to the next.
        for hidden in self.hidden:
            hidden.grad = None
        with torch.set_grad_enabled(case != "evaluation"):
            loss_sums = self.loss_sums()
            if case != "evaluation":
                (loss_sums * self.scales).sum().backward()
        if self.scales.is_cuda:
            torch.cuda.synchronize()
        return loss_sums.detach()

    def gradients(self):
        return {
            name: torch.stack([tensor.grad for tensor in tensors]).view(-1)
            for name, tensors in (("grad_hidden", self.hidden), ("grad_weight", self.weight))
        }


def make(args, name):
    return Loss(name, [getattr(args, size) for size in SIZES], args.dtype, args.device, args.chunk_size)


def measure_memory(args, name):
    """Peak memory in bytes beyond what was held before, by case."""
    peaks = {}
    warm, loss = Loss(name, (2, 8, 8, 8), args.dtype, args.device), make(args, name)
    for case in args.cases:
        for prepared in (warm, loss):
            prepared.prepare(case)
        warm.run(case)  # loads what the first call loads
        if args.device == "cpu":
            peaks[case] = transient_bytes(lambda case=case: loss.run(case))
        else:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            loss.run(case)
            peaks[case] = torch.cuda.max_memory_allocated() - before
    return peaks


def memory(args, name):
    if args.device != "cpu":
        return measure_memory(args, name)
    arguments = ["--child", name, "--dtype", str(args.dtype).removeprefix("torch."), "--cases", *args.cases]
    arguments += [x for size in SIZES for x in (f"--{size}", getattr(args, size))]
    if args.chunk_size is not None:
        arguments += ["--chunk-size", args.chunk_size]
    return run_child(__file__, *arguments)


def measure_times(args):
    """Seconds by (name, case), and by name the relative errors against the materialised version by quantity."""
    errors, reference, seconds = {}, None, {}
    losses = {name: make(args, name) for name in args.names}
    # One untimed run of each, for the equality and to warm up.
    for name, loss in losses.items():
        loss.prepare("training")
        values = {"loss": loss.run("training"), **loss.gradients()}
        reference = reference or values
        errors[name] = {key: relative_error(values[key].float(), reference[key].float()) for key in values}
        if name == "chunked":
            worst = max(errors[name].values())
            assert worst < TOLERANCES[args.dtype], f"{name} differs by {worst:.1e} of the largest value."
        del values
        loss.prepare("evaluation")
    del reference
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    for case in args.cases:
        for loss in losses.values():
            loss.prepare(case)
        runs = {name: lambda loss=loss, case=case: loss.run(case) for name, loss in losses.items()}
        seconds |= {(name, case): value for name, value in alternating_medians(runs, args.repeats, clock).items()}
        for loss in losses.values():
            loss.prepare("evaluation")
    return seconds, errors


def print_values(label, values, unit, places):
    """A row: the values, and the first divided by each of the others."""
    cells = "".join(f"{value:>11.{places}f} {unit:2}" for value in values)
    ratios = "".join(f"{values[0] / value:>8.2f}" for value in values[1:])
    print(f"{label:46}{cells}{ratios}", flush=True)


def main():
    args = parse_args()
    torch.set_num_threads(1)
    if args.child:
        return print(json.dumps(measure_memory(args, args.child)))

    item = args.dtype.itemsize
    hidden_bytes, weight_bytes = (item * args.groups * args.width * n for n in (args.rows, args.classes))
    logit_bytes = item * args.groups * args.rows * args.classes
    device = f"{cpu_name()}, 1 thread" if args.device == "cpu" else torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, {args.dtype}")
    print(", ".join(f"{size} {getattr(args, size)}" for size in SIZES), end="")
    print(f", chunk size {args.chunk_size or 'default'}, medians of {args.repeats}")
    print(
        f"all logits {logit_bytes / 1e6:.0f} MB, gradients of hidden states {hidden_bytes / 1e6:.0f} MB and of "
        f"classifiers {weight_bytes / 1e6:.0f} MB\n"
    )
    print(" " * 46 + "".join(f"{name:>14}" for name in args.names) + f"{'ratio':>8}" * (len(args.names) - 1))
    # Gradients that a case returns; those of accumulation are added to what is there.
    returned = {"training": hidden_bytes + weight_bytes, "frozen": hidden_bytes}
    memories = [memory(args, name) for name in args.names]
    for case in args.cases:
        peaks = [peak[case] / 1e6 for peak in memories]
        print_values(f"{case}: peak memory", peaks, "MB", 0)
        if case in returned:
            less = [peak - returned[case] / 1e6 for peak in peaks]
            print_values(f"{case}: the same, less the gradients", less, "MB", 0)
    if not args.repeats:
        return
    seconds, errors = measure_times(args)
    for case in args.cases:
        print_values(f"{case}: time", [seconds[name, case] for name in args.names], "s", 3)
    for name in args.names[1:]:
        print(f"relative errors of {name}: " + ", ".join(f"{key} {error:.1e}" for key, error in errors[name].items()))


if __name__ == "__main__":
    main()
