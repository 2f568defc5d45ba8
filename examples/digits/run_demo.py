"""
The whole path on real images: a small SigLIP, the dual tokenizer and the unified model, trained on scikit-learn's
handwritten digits and measured on held-out scans. No download; some minutes on one CPU core.

    python examples/digits/run_demo.py --output_dir dualtoken-demo

It first shows what the kept checkpoint can do, then trains its own with the same scripts anybody uses
(`run_tokenizer.py`, `run_unified.py`). The output folder ends up with pictures, `metrics.json`, and `dualtoken/`, a
checkpoint for `from_pretrained`. `--keep_checkpoint examples/digits/checkpoint` makes the kept checkpoint anew.
"""

import argparse
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1] / "miniature"))
from demo import parse, parser_of, run  # noqa: E402


def plan(arguments: argparse.Namespace) -> dict[str, float]:
    """The stages and the seconds they take on one core of a quiet machine."""
    stages = {
        "loading PyTorch": 5,
        "kept checkpoint": 14,
        "data": 3,
        "siglip": 3 + 0.075 * arguments.siglip_steps,
        "tokenizer": 1 + 0.31 * arguments.tokenizer_steps,
        "codes": 15 + 6 * arguments.variants,
        "unified": 0.28 * arguments.unified_steps,
        "evaluation": 10,
    }
    if arguments.skip_preview:
        del stages["kept checkpoint"]
    return stages


def load_stages():
    sys.path.insert(0, str(Path(__file__).parent))
    from demo_stages import DigitsStages

    return DigitsStages()


def main(argv: list[str] | None = None) -> dict:
    parser = parser_of(__doc__, "dualtoken-demo")
    parser.add_argument("--variants", type=int, default=4, help="changed copies of every training scan")
    parser.add_argument("--siglip_steps", type=int, default=800)
    parser.add_argument("--tokenizer_steps", type=int, default=450)
    parser.add_argument("--unified_steps", type=int, default=1000)
    arguments = parse(parser, argv)
    return run(arguments, plan(arguments), load_stages)


if __name__ == "__main__":
    main()
