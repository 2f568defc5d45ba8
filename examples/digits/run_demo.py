"""
The whole path on real images: a small SigLIP, the dual tokenizer and the unified model, trained on scikit-learn's
handwritten digits and measured on held-out scans. No download; a few minutes on two CPU cores.

    python examples/digits/run_demo.py --output_dir dualtoken-demo

It first shows what the kept checkpoint can do, then trains its own with the same scripts anybody uses
(`run_tokenizer.py`, `run_unified.py`). The output folder ends up with pictures, `metrics.json`, and `dualtoken/`, a
checkpoint for `from_pretrained`. `--keep_checkpoint examples/digits/checkpoint` makes the kept checkpoint anew.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import sys
import time
import warnings
from pathlib import Path


# Nothing here is downloaded, so nobody should wait for a network that is not there.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, TrainerCallback  # noqa: E402


sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import build_language_model  # noqa: E402
import data  # noqa: E402
import measure  # noqa: E402
import run_tokenizer  # noqa: E402
import run_unified  # noqa: E402
import train_siglip  # noqa: E402


KEPT_CHECKPOINT = Path(__file__).parent / "checkpoint"
# Says that a folder is a demo's.
MARKER = ".dualtoken-demo"

# Chosen on validation scans. The same settings, as a file for run_tokenizer.py alone.
TOKENIZER_SETTINGS = json.loads((Path(__file__).parent / "tokenizer.json").read_text())
UNIFIED_CONFIG = {
    "depth_head_config": {
        "hidden_size": 96,
        "num_hidden_layers": 2,
        "head_dim": 32,
        "intermediate_size": 192,
        "input_hidden_size": 128,
    }
}


class Progress:
    """One line about where the whole demo stands, and the time left judging by the time taken so far."""

    # Share of the whole time, measured on two cores.
    SHARES = {"data": 2, "siglip": 11, "tokenizer": 24, "unified": 57, "evaluation": 6}

    def __init__(self, stream):
        self.stream, self.started, self.seconds = stream, time.monotonic(), {}
        self.done, self.stage, self.last_shown, self.stage_started = 0, None, 0.0, 0.0

    def start(self, stage: str) -> None:
        self.finish()
        self.stage, self.stage_started = stage, time.monotonic()
        self.show(0.0, "")

    def finish(self) -> None:
        if self.stage is not None:
            self.seconds[self.stage] = round(time.monotonic() - self.stage_started, 1)
            self.done += self.SHARES[self.stage]
            self.stage = None

    def show(self, fraction: float, detail: str) -> None:
        now = time.monotonic()
        if fraction and fraction < 1 and now - self.last_shown < (0.5 if self.stream.isatty() else 10):
            return
        self.last_shown = now
        share = (self.done + self.SHARES[self.stage] * fraction) / sum(self.SHARES.values())
        left = ""
        if share > 0.03:
            seconds = (now - self.started) * (1 - share) / share
            left = f", about {seconds / 60:.0f} min left" if seconds > 90 else f", about {seconds:.0f} s left"
        line = f"[{share:4.0%}] {self.stage}{detail}{left}"
        self.stream.write(f"\r{line:<79}" if self.stream.isatty() else f"{line}\n")
        self.stream.flush()


class ProgressCallback(TrainerCallback):
    """Reports a Trainer's steps to [`Progress`]."""

    def __init__(self, progress: Progress):
        self.progress, self.loss = progress, ""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.loss = f", loss {float(logs['loss']):.2f}"

    def on_step_end(self, args, state, control, **kwargs):
        detail = f": step {state.global_step}/{state.max_steps}{self.loss}"
        self.progress.show(state.global_step / state.max_steps, detail)


def show_kept_checkpoint(output_dir: Path) -> None:
    """Reconstruct, ask and draw with the checkpoint that comes with the repository."""
    evaluation = measure.DigitsEvaluation(
        AutoModelForCausalLM.from_pretrained(KEPT_CHECKPOINT / "dualtoken", dtype=torch.float32),
        AutoProcessor.from_pretrained(KEPT_CHECKPOINT / "dualtoken"),
        AutoTokenizer.from_pretrained(KEPT_CHECKPOINT / "captions"),
    )
    evaluation.run()
    evaluation.save(output_dir)


def train(output_dir: Path, arguments: argparse.Namespace, progress: Progress) -> None:
    """All stages, one after the other; each takes only what the stages before left on disk."""
    folders = {
        name: str(output_dir / "training" / name) for name in ("data", "siglip", "tokenizer", "qwen2", "unified")
    }
    common = ["--seed", str(arguments.seed), "--disable_tqdm", "1", "--dataloader_pin_memory", "0"]
    common += ["--save_strategy", "no", "--weight_decay", "0.01", "--warmup_steps", "30"]

    progress.start("data")
    data.write_data(folders["data"], validation=arguments.validation, seed=arguments.seed)
    build_language_model.main(
        ["--data_dir", folders["data"], "--output_dir", folders["qwen2"], "--seed", str(arguments.seed)]
    )

    progress.start("siglip")
    train_siglip.main(
        ["--data_dir", folders["data"], "--output_dir", folders["siglip"], *common]
        + ["--max_steps", str(arguments.siglip_steps)],
        callbacks=[ProgressCallback(progress)],
    )

    progress.start("tokenizer")
    run_tokenizer.main(
        ["--siglip_model_name_or_path", folders["siglip"], "--train_dataset", f"{folders['data']}/train"]
        + [
            "--config_overrides",
            json.dumps(TOKENIZER_SETTINGS["config_overrides"]),
            "--output_dir",
            folders["tokenizer"],
            *common,
        ]
        + ["--loss_weights", json.dumps(TOKENIZER_SETTINGS["loss_weights"]), "--crop_scale", "1", "1"]
        + ["--learning_rate", "1.5e-3", "--adam_beta1", "0.9", "--adam_beta2", "0.95"]
        + ["--per_device_train_batch_size", "64", "--max_steps", str(arguments.tokenizer_steps)],
        callbacks=[ProgressCallback(progress)],
    )

    progress.start("unified")
    run_unified.main(
        ["--vision_tokenizer_name_or_path", folders["tokenizer"], "--language_model_name_or_path", folders["qwen2"]]
        + ["--config_overrides", json.dumps(UNIFIED_CONFIG), "--train_dataset", f"{folders['data']}/chat.jsonl"]
        + ["--precompute_codes", "1"]
        + ["--output_dir", folders["unified"], *common, "--learning_rate", "2e-3"]
        + ["--per_device_train_batch_size", "48", "--max_steps", str(arguments.unified_steps)],
        callbacks=[ProgressCallback(progress)],
    )


def save_checkpoint(training_dir: Path, output_dir: Path, dtype: torch.dtype) -> None:
    """The trained model and its processor, and the captions' tokenizer that zero-shot classification needs."""
    model = AutoModelForCausalLM.from_pretrained(training_dir / "unified", dtype=dtype)
    model.save_pretrained(output_dir / "dualtoken")
    AutoProcessor.from_pretrained(training_dir / "unified").save_pretrained(output_dir / "dualtoken")
    AutoTokenizer.from_pretrained(training_dir / "tokenizer").save_pretrained(output_dir / "captions")


def measure_checkpoint(output_dir: Path, arguments: argparse.Namespace) -> dict[str, float]:
    evaluation = measure.DigitsEvaluation(
        AutoModelForCausalLM.from_pretrained(output_dir / "dualtoken"),
        AutoProcessor.from_pretrained(output_dir / "dualtoken"),
        AutoTokenizer.from_pretrained(output_dir / "captions"),
        validation=arguments.validation,
        seed=arguments.seed,
    )
    evaluation.run()
    evaluation.save(output_dir)
    return evaluation.metrics


@contextlib.contextmanager
def logged(path: Path):
    """What the stages print goes to a file; the screen belongs to the progress line."""
    with path.open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        yield


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("dualtoken-demo"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--siglip_steps", type=int, default=800)
    parser.add_argument("--tokenizer_steps", type=int, default=450)
    parser.add_argument("--unified_steps", type=int, default=1000)
    parser.add_argument("--validation", action="store_true", help="measure on validation scans, to choose settings")
    parser.add_argument("--skip_preview", action="store_true", help="do not show the kept checkpoint first")
    parser.add_argument("--keep_checkpoint", type=Path, help="also write the checkpoint there, in bfloat16")
    arguments = parser.parse_args(argv)

    output_dir = arguments.output_dir
    if output_dir.exists() and any(output_dir.iterdir()) and not (output_dir / MARKER).exists():
        parser.error(f"{output_dir} holds files that are not a demo's; name another --output_dir.")
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / MARKER).touch()
    # Of an earlier demo only what the stages write piece by piece goes; its results stay until new ones replace them.
    shutil.rmtree(output_dir / "training", ignore_errors=True)
    log_path = output_dir / "training.log"
    log_path.write_text("")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", message=".*pin_memory.*")

    if not arguments.skip_preview:
        started = time.monotonic()
        with logged(log_path):
            show_kept_checkpoint(output_dir / "kept-checkpoint")
        seconds = time.monotonic() - started
        print(f"Pictures of the kept checkpoint are in {output_dir / 'kept-checkpoint'} ({seconds:.0f} s).")
    print(f"Training another, with seed {arguments.seed}; details go to {log_path}.")

    progress = Progress(sys.stdout)
    with logged(log_path):
        train(output_dir, arguments, progress)
        progress.start("evaluation")
        save_checkpoint(output_dir / "training", output_dir, torch.float32)
        metrics = measure_checkpoint(output_dir, arguments)
        progress.finish()
        if arguments.keep_checkpoint is not None:
            save_checkpoint(output_dir / "training", arguments.keep_checkpoint, torch.bfloat16)
    report = {
        **metrics,
        "seed": arguments.seed,
        "seconds": progress.seconds,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    (output_dir / "metrics.json").write_text(json.dumps(report, indent=2) + "\n")
    training_seconds = sum(seconds for stage, seconds in progress.seconds.items() if stage != "evaluation")
    print(f"\n\n{measure.table(metrics)}\n")
    print(f"Trained in {training_seconds:.0f} s. Pictures, metrics.json and the checkpoint dualtoken/: {output_dir}")
    return report


if __name__ == "__main__":
    main()
