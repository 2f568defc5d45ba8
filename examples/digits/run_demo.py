"""
The whole path on real images: a small SigLIP, the dual tokenizer and the unified model, trained on scikit-learn's
handwritten digits and measured on held-out scans. No download; some minutes on one CPU core.

    python examples/digits/run_demo.py --output_dir dualtoken-demo

It first shows what the kept checkpoint can do, then trains its own with the same scripts anybody uses
(`run_tokenizer.py`, `run_unified.py`). The output folder ends up with pictures, `metrics.json`, and `dualtoken/`, a
checkpoint for `from_pretrained`. `--keep_checkpoint examples/digits/checkpoint` makes the kept checkpoint anew.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))
from progress import Progress  # noqa: E402


# Says that a folder is a demo's.
MARKER = ".dualtoken-demo"


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


@contextlib.contextmanager
def logged(path: Path):
    """What the stages print goes to a file; the screen belongs to the progress line."""
    with path.open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        yield


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("dualtoken-demo"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", type=int, default=4, help="changed copies of every training scan")
    parser.add_argument("--siglip_steps", type=int, default=800)
    parser.add_argument("--tokenizer_steps", type=int, default=450)
    parser.add_argument("--unified_steps", type=int, default=1000)
    parser.add_argument("--validation", action="store_true", help="measure on validation scans, to choose settings")
    parser.add_argument("--skip_preview", action="store_true", help="do not show the kept checkpoint first")
    parser.add_argument("--keep_checkpoint", type=Path, help="also write the checkpoint there, in bfloat16")
    arguments = parser.parse_args(argv)
    output_dir = arguments.output_dir
    try:
        if output_dir.exists() and any(output_dir.iterdir()) and not (output_dir / MARKER).exists():
            parser.error(f"{output_dir} holds files that are not a demo's; name another --output_dir.")
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / MARKER).touch()
        # Of an earlier demo only what the stages write piece by piece goes; its results stay until new ones replace
        # them.
        if (output_dir / "training").exists():
            shutil.rmtree(output_dir / "training")
        (output_dir / "training.log").write_text("")
    except OSError as error:
        parser.error(f"{output_dir} cannot be written to ({error.strerror}); name another --output_dir.")
    return arguments


def run(arguments: argparse.Namespace, progress: Progress) -> dict[str, float]:
    output_dir, log_path = arguments.output_dir, arguments.output_dir / "training.log"
    progress.start("loading PyTorch")
    with logged(log_path):
        # Here, because it takes some seconds, and many at the first time.
        import demo_stages as stages

        threads = stages.prepare(output_dir)
    progress.message(f"{threads} Details go to {log_path}.")

    if not arguments.skip_preview:
        progress.start("kept checkpoint")
        with logged(log_path):
            stages.show_kept_checkpoint(output_dir / "kept-checkpoint")
        progress.message(f"Pictures of the kept checkpoint are in {output_dir / 'kept-checkpoint'}.")
    progress.message(f"Training another, with seed {arguments.seed}.")
    with logged(log_path):
        stages.train(output_dir, arguments, progress)
        progress.start("evaluation")
        metrics = stages.save_and_measure(output_dir, arguments)
    progress.finish()
    report = {**metrics, "seed": arguments.seed, "seconds": progress.seconds, **stages.environment()}
    (output_dir / "metrics.json").write_text(json.dumps(report, indent=2) + "\n")
    trained = ("data", "siglip", "tokenizer", "codes", "unified")
    seconds = sum(progress.seconds[stage] for stage in trained)
    progress.message(f"\n\n{stages.measure.table(metrics)}\n")
    progress.message(f"Trained in {seconds:.0f} s. Pictures, metrics.json and the checkpoint dualtoken/: {output_dir}")
    return report


def main(argv: list[str] | None = None) -> dict[str, float]:
    # Nothing here is downloaded, so nobody should wait for a network that is not there. Read at import.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        arguments = parse(argv)
        with Progress(sys.stdout, plan(arguments)) as progress:
            return run(arguments, progress)
    except KeyboardInterrupt:
        print("\nInterrupted. The same command starts again from the beginning.")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
