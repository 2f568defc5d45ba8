"""
Draw what was never seen: the whole path on OpenMoji's colour pictures, checked against the truth.

    python examples/emoji/run_demo.py --output_dir emoji-demo

It shows what the kept checkpoint does, if there is one, with combinations of activity, gender and skin tone that were
held out, then trains its own by the short recipe: a SigLIP, the dual tokenizer and the unified model, meant to fit 90 minutes on two cores,
no download. Interrupted, the same command goes on where it was. The output folder ends up with pictures,
`metrics.json`, and `dualtoken/`, a checkpoint for `from_pretrained`.

    python examples/emoji/run_demo.py --recipe long --keep_checkpoint examples/emoji/checkpoint

makes the kept checkpoint anew, in several hours. The pictures are OpenMoji's (CC BY-SA 4.0).
"""

import argparse
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1] / "miniature"))
from demo import parse, parser_of, run  # noqa: E402


TEST_COMBINATIONS = 212
# Seconds of the stages on one core of a quiet machine, computed from those of some hundred steps.
SECONDS = {
    "short": {"siglip": 720, "tokenizer": 1200, "codes": 60, "unified": 2500},
    "long": {"siglip": 1800, "tokenizer": 3000, "codes": 60, "unified": 6600},
    # On a GPU nobody has timed it.
    "gpu": {"siglip": 1200, "tokenizer": 2400, "codes": 60, "unified": 4800},
}


def plan(arguments: argparse.Namespace) -> dict[str, float]:
    """The stages and the seconds they take on one core of a quiet machine."""
    factor, share = arguments.steps_factor, min(1, (arguments.limit or TEST_COMBINATIONS) / TEST_COMBINATIONS)
    trained = {name: 5 + factor * seconds for name, seconds in SECONDS[arguments.recipe].items()}
    stages = {"loading PyTorch": 5, "kept checkpoint": 150 + 250 * share, "data": 15, **trained}
    stages["evaluation"] = 10 + 250 * share
    if arguments.skip_preview:
        del stages["kept checkpoint"]
        stages["evaluation"] += 140
    return stages


def main(argv: list[str] | None = None) -> dict:
    parser = parser_of(__doc__, "emoji-demo")
    parser.add_argument("--recipe", choices=tuple(SECONDS), default="short")
    parser.add_argument("--steps_factor", type=float, default=1.0, help="share of the recipe's steps")
    parser.add_argument("--num_activities", type=int, help="train on so many activities only, to try things")
    parser.add_argument("--limit", type=int, help="measure on so many combinations only")
    arguments = parse(parser, argv, resumed_with=("seed", "recipe", "steps_factor", "num_activities"))

    def load_stages():
        sys.path.insert(0, str(Path(__file__).parent))
        from emoji_stages import EmojiStages

        return EmojiStages(arguments)

    return run(arguments, plan(arguments), load_stages, again="where it was")


if __name__ == "__main__":
    main()
