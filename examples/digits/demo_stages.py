"""What `run_demo.py` does, stage by stage, with the scripts that anybody uses; importing it loads PyTorch."""

import argparse
import json
import platform
import sys
import warnings
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, TrainerCallback

from transformers_dualtoken.optional_libraries import needed_libraries


with needed_libraries("The digits' demo"):
    import datasets


sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import build_language_model  # noqa: E402
import data  # noqa: E402
import measure  # noqa: E402
import run_tokenizer  # noqa: E402
import run_unified  # noqa: E402
import train_siglip  # noqa: E402
from progress import Progress  # noqa: E402

from transformers_dualtoken.training import use_cpu_threads  # noqa: E402


KEPT_CHECKPOINT = Path(__file__).parent / "checkpoint"

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


class ProgressCallback(TrainerCallback):
    """Reports a Trainer's steps to [`Progress`]; where it is given, `stage` begins with the first of them."""

    def __init__(self, progress: Progress, stage: str | None = None):
        self.progress, self.stage, self.loss = progress, stage, ""

    def on_train_begin(self, args, state, control, **kwargs):
        if self.stage is not None:
            self.progress.start(self.stage)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.loss = f", loss {float(logs['loss']):.2f}"

    def on_step_end(self, args, state, control, **kwargs):
        detail = f": step {state.global_step}/{state.max_steps}{self.loss}"
        self.progress.step(state.global_step / state.max_steps, detail)


def prepare(output_dir: Path) -> str:
    """Quiet libraries, caches in the output folder, and the threads, of which it returns a sentence."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    # The home may be read-only, and what is trained here once is of no use there.
    datasets.config.HF_DATASETS_CACHE = output_dir.absolute() / "training" / "cache"
    return use_cpu_threads(1)


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
    data.write_data(folders["data"], arguments.variants, arguments.validation, arguments.seed)
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

    progress.start("codes")
    run_unified.main(
        ["--vision_tokenizer_name_or_path", folders["tokenizer"], "--language_model_name_or_path", folders["qwen2"]]
        + ["--config_overrides", json.dumps(UNIFIED_CONFIG), "--train_dataset", f"{folders['data']}/chat.jsonl"]
        + ["--precompute_codes", "1"]
        + ["--output_dir", folders["unified"], *common, "--learning_rate", "2e-3"]
        + ["--per_device_train_batch_size", "48", "--max_steps", str(arguments.unified_steps)],
        callbacks=[ProgressCallback(progress, "unified")],
    )


def save_checkpoint(training_dir: Path, output_dir: Path, dtype: torch.dtype) -> None:
    """The trained model and its processor, and the captions' tokenizer that zero-shot classification needs."""
    model = AutoModelForCausalLM.from_pretrained(training_dir / "unified", dtype=dtype)
    # A checkpoint carries its own sampling.
    for name, value in measure.SAMPLING.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(output_dir / "dualtoken")
    AutoProcessor.from_pretrained(training_dir / "unified").save_pretrained(output_dir / "dualtoken")
    AutoTokenizer.from_pretrained(training_dir / "tokenizer").save_pretrained(output_dir / "captions")


def save_and_measure(output_dir: Path, arguments: argparse.Namespace) -> dict[str, float]:
    save_checkpoint(output_dir / "training", output_dir, torch.float32)
    if arguments.keep_checkpoint is not None:
        save_checkpoint(output_dir / "training", arguments.keep_checkpoint, torch.bfloat16)
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


def environment() -> dict:
    """What the numbers depend on beside the seed."""
    return {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
