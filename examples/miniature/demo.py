"""The command line of the demos, and the order of what they do; imports nothing heavy, so that it can speak at once."""

import argparse
import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from progress import Progress


# Says that a folder is a demo's.
MARKER = ".dualtoken-demo"
TRAINED = ("data", "siglip", "tokenizer", "codes", "unified")


def parser_of(description: str, output_dir: str) -> argparse.ArgumentParser:
    """The options that all demos have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(output_dir))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validation", action="store_true", help="measure on validation data, to choose settings")
    parser.add_argument("--skip_preview", action="store_true", help="do not show the kept checkpoint first")
    parser.add_argument("--keep_checkpoint", type=Path, help="also write the checkpoint there, in bfloat16")
    return parser


def parse(
    parser: argparse.ArgumentParser, argv: list[str] | None, resumed_with: tuple[str, ...] = ()
) -> argparse.Namespace:
    """
    The arguments, with an output folder that is a demo's and can be written to.

    Of an earlier demo what the stages write piece by piece goes, unless it was begun with the same arguments
    `resumed_with`; its results stay until new ones replace them.
    """
    arguments = parser.parse_args(argv)
    output_dir, settings = arguments.output_dir, {name: getattr(arguments, name) for name in resumed_with}
    try:
        marker = output_dir / MARKER
        if output_dir.exists() and any(output_dir.iterdir()) and not marker.exists():
            parser.error(f"{output_dir} holds files that are not a demo's; name another --output_dir.")
        output_dir.mkdir(parents=True, exist_ok=True)
        is_resumed = resumed_with and marker.exists() and marker.read_text() == json.dumps(settings)
        if not is_resumed:
            if (output_dir / "training").exists():
                shutil.rmtree(output_dir / "training")
            (output_dir / "training.log").write_text("")
        marker.write_text(json.dumps(settings))
    except OSError as error:
        parser.error(f"{output_dir} cannot be written to ({error.strerror}); name another --output_dir.")
    return arguments


@contextlib.contextmanager
def _logged(path: Path):
    """What the stages print goes to a file; the screen belongs to the progress line."""
    with path.open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        yield


def run(
    arguments: argparse.Namespace, plan: dict[str, float], load_stages: Callable, again: str = "from the beginning"
) -> dict:
    """
    Show the kept checkpoint, train another, measure it.

    Args:
        arguments: of [`parser_of`] and what the stages need besides.
        plan: the stages and the seconds they take on one core of a quiet machine.
        load_stages: imports the demo's stages, which takes some seconds, and returns the object of
            [`stages.DemoStages`].
        again: where the same command starts after an interruption.

    Returns:
        `dict`: what was measured and on what; also in `metrics.json`.
    """
    # Nothing here is downloaded, so nobody should wait for a network that is not there. Read at import.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        with Progress(sys.stdout, plan) as progress:
            return _run(arguments, progress, load_stages)
    except KeyboardInterrupt:
        print(f"\nInterrupted. The same command starts again {again}.")
        raise SystemExit(130) from None


def _run(arguments: argparse.Namespace, progress: Progress, load_stages: Callable) -> dict:
    output_dir, log_path = arguments.output_dir, arguments.output_dir / "training.log"
    progress.start("loading PyTorch")
    with _logged(log_path):
        stages = load_stages()
        threads = stages.prepare(output_dir)
    progress.message(f"{threads} Details go to {log_path}.")

    kept = None
    if not arguments.skip_preview and not stages.kept_checkpoint.exists():
        progress.message(f"No checkpoint is kept in {stages.kept_checkpoint}: nothing to show before training.")
    elif not arguments.skip_preview:
        progress.start("kept checkpoint")
        with _logged(log_path):
            kept = stages.show_kept_checkpoint(output_dir / "kept-checkpoint")
        progress.message(f"Pictures of the kept checkpoint are in {output_dir / 'kept-checkpoint'}.")
    progress.message(f"Training another, with seed {arguments.seed}.")
    with _logged(log_path):
        stages.train(output_dir, arguments, progress)
        progress.start("evaluation")
        metrics = stages.save_and_measure(output_dir, arguments)
    progress.finish()
    report = {**metrics, "seed": arguments.seed, "seconds": progress.seconds, **stages.environment()}
    (output_dir / "metrics.json").write_text(json.dumps(report, indent=2) + "\n")
    seconds = sum(progress.seconds[stage] for stage in TRAINED)
    progress.message(f"\n\n{stages.table(metrics, kept)}\n")
    progress.message(f"Trained in {seconds:.0f} s. Pictures, metrics.json and the checkpoint dualtoken/: {output_dir}")
    return report
