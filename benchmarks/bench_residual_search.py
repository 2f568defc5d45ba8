"""Time and memory of the residual search: `nearest_codes` against a distance matrix per depth, on one CPU thread.

    python benchmarks/bench_residual_search.py            # 4 images, 16384 codes, 8 depths: a minute or two
    python benchmarks/bench_residual_search.py --small    # seconds

Times are medians of runs that alternate in one process; the peak memory beyond the inputs is measured in a child
process of its own for each (VmHWM, Linux). "distances" is the usual code, whose matrix of distances needs a second one
of squares; "scores" leaves the vectors' squares out and holds one. "bare product" is the matrix product that any
search in float32 needs, in the same chunks, with nothing looked for in it: a lower bound. Codes must be equal up to
ties of floating point, where the two nearest distances differ by less than 1e-5 of themselves.
"""

import argparse
import json

import torch
import torch.nn.functional as F
from common import alternating_medians, print_head, print_machine, print_row, run_child, transient_bytes
from naive.residual_search import nearest_codes_by_distance_matrix, nearest_codes_by_score_matrix

from transformers_dualtoken.code_search import nearest_codes


SEARCHES = {
    "distances": nearest_codes_by_distance_matrix,
    "scores": nearest_codes_by_score_matrix,
    "ours": nearest_codes,
}
SIZES = ("vectors", "codes", "width", "depths")
SMALL = {"vectors": 400, "codes": 2048, "depths": 3}
CHUNK_BYTES = 1 << 22  # as `nearest_codes` on a CPU


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=4 * 729, help="positions (default %(default)s: 4 images)")
    parser.add_argument("--codes", type=int, default=16384, help="codes of the codebook (default %(default)s)")
    parser.add_argument("--width", type=int, default=32, help="width of a code (default %(default)s)")
    parser.add_argument("--depths", type=int, default=8, help="residual codes of a position (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each (default %(default)s)")
    parser.add_argument("--small", action="store_true", help=f"a fast run at {SMALL}")
    parser.add_argument("--child", choices=SEARCHES, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.small:
        vars(args).update(SMALL)
    return args


def make_inputs(vectors, codes, width):
    """Vectors (T, C) and a codebook (K, C)."""
    torch.manual_seed(0)
    return torch.randn(vectors, width), torch.randn(codes, width)


def residual_search(nearest, vectors, codebook, depths):
    """Codes (T, D)."""
    residual, codes = vectors, []
    for _ in range(depths):
        codes.append(nearest(residual, codebook))
        residual = residual - F.embedding(codes[-1], codebook)
    return torch.stack(codes, dim=1)


def bare_product(vectors, codebook, depths):
    keys = codebook.t().contiguous()
    chunk = max(1, min(len(vectors), CHUNK_BYTES // 4 // len(codebook)))
    scores = torch.empty(chunk, len(codebook))
    for _ in range(depths):
        for part in vectors.split(chunk):
            torch.mm(part, keys, out=scores[: len(part)])


def count_ties(vectors, codebook, depths):
    """Searches from the same residuals at every depth; returns how many codes are ties, and fails for the others."""
    residual, ties = vectors, 0
    for depth in range(depths):
        expected, actual = (SEARCHES[name](residual, codebook) for name in ("distances", "ours"))
        rows = (expected != actual).nonzero()[:, 0]
        if len(rows):
            first, second = (
                (residual[rows].double() - codebook[codes[rows]].double()).square().sum(1)
                for codes in (expected, actual)
            )
            gap = ((first - second).abs() / torch.minimum(first, second)).max().item()
            assert gap < 1e-5, f"depth {depth}: another code, whose distance differs by {gap:.1e} of itself."
            ties += len(rows)
        residual = residual - F.embedding(expected, codebook)
    return ties


def main():
    args = parse_args()
    torch.set_num_threads(1)
    inputs = make_inputs(args.vectors, args.codes, args.width)
    if args.child:
        search = SEARCHES[args.child]
        residual_search(search, *make_inputs(4, 256, args.width), 2)  # loads what the first call loads
        print(json.dumps(transient_bytes(lambda: residual_search(search, *inputs, args.depths))))
        return

    sizes = [x for size in SIZES for x in (f"--{size}", getattr(args, size))]
    memory = {name: run_child(__file__, "--child", name, *sizes) for name in SEARCHES}
    ties = count_ties(*inputs, args.depths)
    runs = {name: lambda s=search: residual_search(s, *inputs, args.depths) for name, search in SEARCHES.items()}
    runs["bare"] = lambda: bare_product(*inputs, args.depths)
    seconds = alternating_medians(runs, args.repeats)

    print_machine()
    print(", ".join(f"{size} {getattr(args, size)}" for size in SIZES), end="")
    print(f", medians of {args.repeats}\n")
    for name in ("distances", "scores"):
        names = [name, "ours"]
        print_head(names)
        print_row("time", [seconds[key] for key in names], "s", 3)
        print_row("peak memory beyond inputs", [memory[key] / 1e6 for key in names], "MB", 1)
        print(f"ours takes {memory['ours'] / memory[name]:.1%} of the memory\n")
    print(f"ours / bare product: {seconds['ours'] / seconds['bare']:.2f} of {seconds['bare']:.3f} s")
    print(f"codes: {ties} ties of {args.vectors * args.depths}, the others identical")


if __name__ == "__main__":
    main()
