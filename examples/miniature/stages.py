"""The stages of a demo, with the scripts that anybody uses; importing this loads PyTorch."""

import argparse
import platform
import sys
import warnings
from abc import ABC, abstractmethod
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoProcessor, TrainerCallback

from transformers_dualtoken.optional_libraries import needed_libraries


with needed_libraries("The demos"):
    import datasets


sys.path.append(str(Path(__file__).parents[1]))
import build_language_model  # noqa: E402
import run_tokenizer  # noqa: E402
import run_unified  # noqa: E402
import train_siglip  # noqa: E402
from evaluation import MiniatureEvaluation  # noqa: E402
from progress import Progress  # noqa: E402

from transformers_dualtoken.training import use_cpu_threads  # noqa: E402


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


class DemoStages(ABC):
    """
    All stages of a demo, one after the other; each takes only what the stages before left on disk. A demo gives its data,
    its measurements and, as options of the scripts, its settings.
    """

    # The checkpoint that comes with the repository.
    kept_checkpoint: Path
    # Image arguments of `generate` that a checkpoint carries.
    sampling: dict

    @abstractmethod
    def write_data(self, data_dir: Path, arguments: argparse.Namespace) -> None:
        """Pictures, `captions.jsonl` and `chat.jsonl`."""

    @abstractmethod
    def options(self, stage: str, arguments: argparse.Namespace) -> list[str]:
        """Of the scripts for "language_model", "siglip", "tokenizer" and "unified", beside those all demos give."""

    @abstractmethod
    def evaluation(self, checkpoint: Path, validation: bool, seed: int) -> MiniatureEvaluation:
        """Of the model in the folder `dualtoken` of a checkpoint."""

    @abstractmethod
    def table(self, metrics: dict[str, float], kept: dict[str, float] | None) -> str:
        """What was measured now and of the kept checkpoint, as text."""

    def prepare(self, output_dir: Path) -> str:
        """Quiet libraries, caches in the output folder, and the threads, of which it returns a sentence."""
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        datasets.disable_progress_bars()
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        # The home may be read-only, and what is trained here once is of no use there.
        datasets.config.HF_DATASETS_CACHE = output_dir.absolute() / "training" / "cache"
        return use_cpu_threads(1)

    def load(self, folder: Path, dtype: torch.dtype = torch.float32):
        """A checkpoint's unified model and processor."""
        return (
            AutoModelForCausalLM.from_pretrained(folder, dtype=dtype),
            AutoProcessor.from_pretrained(folder),
        )

    def show_kept_checkpoint(self, output_dir: Path) -> dict[str, float]:
        """Measure the checkpoint that comes with the repository, and save its pictures."""
        evaluation = self.evaluation(self.kept_checkpoint, validation=False, seed=0)
        metrics = evaluation.run()
        evaluation.save(output_dir)
        return metrics

    def train(self, output_dir: Path, arguments: argparse.Namespace, progress: Progress) -> None:
        folders = {
            name: str(output_dir / "training" / name) for name in ("data", "siglip", "tokenizer", "qwen2", "unified")
        }
        seed = ["--seed", str(arguments.seed)]
        common = [*seed, "--disable_tqdm", "1", "--dataloader_pin_memory", "0"]
        common += ["--save_strategy", "no", "--weight_decay", "0.01", "--warmup_steps", "30"]
        if not torch.accelerator.is_available():
            # Asked for by the Trainer, before it computes in bfloat16.
            common += ["--use_cpu", "1"]

        progress.start("data")
        self.write_data(output_dir / "training" / "data", arguments)
        build_language_model.main(
            ["--data_dir", folders["data"], "--output_dir", folders["qwen2"], *seed]
            + self.options("language_model", arguments)
        )

        progress.start("siglip")
        train_siglip.main(
            ["--data_dir", folders["data"], "--output_dir", folders["siglip"], *common]
            + self.options("siglip", arguments),
            callbacks=[ProgressCallback(progress)],
        )

        progress.start("tokenizer")
        run_tokenizer.main(
            ["--siglip_model_name_or_path", folders["siglip"], "--train_dataset", f"{folders['data']}/train"]
            + ["--output_dir", folders["tokenizer"], *common, "--crop_scale", "1", "1"]
            + ["--adam_beta1", "0.9", "--adam_beta2", "0.95"]
            + self.options("tokenizer", arguments),
            callbacks=[ProgressCallback(progress)],
        )

        progress.start("codes")
        run_unified.main(
            ["--vision_tokenizer_name_or_path", folders["tokenizer"]]
            + ["--language_model_name_or_path", folders["qwen2"]]
            + ["--train_dataset", f"{folders['data']}/chat.jsonl", "--precompute_codes", "1"]
            + ["--output_dir", folders["unified"], *common]
            + self.options("unified", arguments),
            callbacks=[ProgressCallback(progress, "unified")],
        )

    def save_checkpoint(self, training_dir: Path, output_dir: Path, dtype: torch.dtype) -> None:
        """The trained model and its processor."""
        model, processor = self.load(training_dir / "unified", dtype)
        # A checkpoint carries its own sampling.
        for name, value in self.sampling.items():
            setattr(model.generation_config, name, value)
        model.save_pretrained(output_dir / "dualtoken")
        processor.save_pretrained(output_dir / "dualtoken")

    def save_and_measure(self, output_dir: Path, arguments: argparse.Namespace) -> dict[str, float]:
        self.save_checkpoint(output_dir / "training", output_dir, torch.float32)
        if arguments.keep_checkpoint is not None:
            self.save_checkpoint(output_dir / "training", arguments.keep_checkpoint, torch.bfloat16)
        evaluation = self.evaluation(output_dir, arguments.validation, arguments.seed)
        metrics = evaluation.run()
        evaluation.save(output_dir)
        return metrics

    @staticmethod
    def environment() -> dict:
        """What the numbers depend on beside the seed."""
        return {
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        }
