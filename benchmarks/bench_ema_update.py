"""Time and memory of a codebook's EMA update: sums by index against a product with one-hot codes, on one CPU thread.

    python benchmarks/bench_ema_update.py            # 8 depths of 4 images at once, 16384 codes: a minute, 2 GB
    python benchmarks/bench_ema_update.py --small    # seconds

Times are medians of runs that alternate in one process; the peak memory beyond the inputs is measured in a child
process of its own for each (VmHWM, Linux). "statistics" are the counts and sums alone, "update" is all that moves the
codebook, without restarts of unused codes, which cost both the same.
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
from naive.ema_update import one_hot_statistics, one_hot_update

from transformers_dualtoken.configuration_dualtoken import DualTokenQuantizerConfig
from transformers_dualtoken.vector_quantization import DualTokenCodebook


NAMES = ("one-hot", "ours")
BUFFERS = ("embeddings", "cluster_size", "embedding_sum")
SIZES = ("vectors", "codes", "width")
SMALL = {"vectors": 1200, "codes": 2048}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--vectors", type=int, default=8 * 4 * 729, help="vectors (default %(default)s: 8 depths of 4 images)"
    )
    parser.add_argument("--codes", type=int, default=16384, help="codes of the codebook (default %(default)s)")
    parser.add_argument("--width", type=int, default=32, help="width of a code (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each (default %(default)s)")
    parser.add_argument("--small", action="store_true", help=f"a fast run at {SMALL}")
    parser.add_argument("--child", choices=NAMES, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.small:
        vars(args).update(SMALL)
    return args


def make_inputs(vectors, codes, width):
    """A codebook with statistics, codes (T,) and their vectors (T, C)."""
    torch.manual_seed(0)
    config = DualTokenQuantizerConfig(codebook_size=codes, code_dim=width, restart_unused_codes=False)
    codebook = DualTokenCodebook(config)
    codebook.embeddings.normal_()
    codebook.cluster_size.uniform_(1, 3)
    codebook.embedding_sum.copy_(codebook.embeddings * codebook.cluster_size[..., None])
    return codebook, torch.randint(codes, (vectors,)), torch.randn(vectors, width)


def update(name, codebook, codes, vectors):
    if name == "ours":
        codebook.update(0, codes, vectors)
    else:
        buffers = (getattr(codebook, buffer)[0] for buffer in BUFFERS)
        one_hot_update(*buffers, codes, vectors, codebook.decay, codebook.eps)


def our_statistics(codes, vectors, num_codes):
    """As in `DualTokenCodebook.update`."""
    counts = vectors.new_zeros(num_codes).index_add_(0, codes, torch.ones_like(vectors[:, 0]))
    return counts, vectors.new_zeros(num_codes, vectors.shape[1]).index_add_(0, codes, vectors)


def main():
    args = parse_args()
    torch.set_num_threads(1)
    sizes = [getattr(args, size) for size in SIZES]
    if args.child:
        update(args.child, *make_inputs(8, 16, args.width))  # loads what the first call loads
        inputs = make_inputs(*sizes)
        print(json.dumps(transient_bytes(lambda: update(args.child, *inputs))))
        return

    arguments = [x for size, value in zip(SIZES, sizes) for x in (f"--{size}", value)]
    memory = {name: run_child(__file__, "--child", name, *arguments) for name in NAMES}
    inputs = {name: make_inputs(*sizes) for name in NAMES}
    for name in NAMES:
        update(name, *inputs[name])
    first, second = (inputs[name][0] for name in NAMES)
    errors = {buffer: relative_error(getattr(second, buffer), getattr(first, buffer)) for buffer in BUFFERS}
    assert max(errors.values()) < 1e-5, f"The codebooks differ: {errors}."

    _, codes, vectors = inputs["ours"]
    runs = {("update", name): lambda name=name: update(name, *inputs[name]) for name in NAMES}
    runs["statistics", "one-hot"] = lambda: one_hot_statistics(codes, vectors, args.codes)
    runs["statistics", "ours"] = lambda: our_statistics(codes, vectors, args.codes)
    seconds = alternating_medians(runs, args.repeats)

    print_machine()
    print(", ".join(f"{size} {value}" for size, value in zip(SIZES, sizes)), end="")
    print(f", medians of {args.repeats}\n")
    print_head(NAMES)
    for part in ("statistics", "update"):
        print_row(f"{part}: time", [1e3 * seconds[part, name] for name in NAMES], "ms", 2)
    print_row("update: peak memory beyond inputs", [memory[name] / 1e6 for name in NAMES], "MB", 1)
    print("\nrelative errors: " + ", ".join(f"{buffer} {error:.1e}" for buffer, error in errors.items()))


if __name__ == "__main__":
    main()
