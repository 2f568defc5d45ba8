"""What the digits' demo has of its own: data, settings, measurements; importing it loads PyTorch."""

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer


sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "miniature")]
import data  # noqa: E402
import measure  # noqa: E402
from evaluation import table  # noqa: E402
from stages import DemoStages  # noqa: E402


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


class DigitsStages(DemoStages):
    kept_checkpoint = Path(__file__).parent / "checkpoint"
    sampling = measure.SAMPLING

    def write_data(self, data_dir: Path, arguments: argparse.Namespace) -> None:
        data.write_data(data_dir, arguments.variants, arguments.validation, arguments.seed)

    def options(self, stage: str, arguments: argparse.Namespace) -> list[str]:
        return {
            "language_model": [],
            "siglip": ["--max_steps", str(arguments.siglip_steps)],
            "tokenizer": [
                *("--config_overrides", json.dumps(TOKENIZER_SETTINGS["config_overrides"])),
                *("--loss_weights", json.dumps(TOKENIZER_SETTINGS["loss_weights"])),
                *("--learning_rate", "1.5e-3", "--per_device_train_batch_size", "64"),
                *("--max_steps", str(arguments.tokenizer_steps)),
            ],
            "unified": [
                *("--config_overrides", json.dumps(UNIFIED_CONFIG), "--learning_rate", "2e-3"),
                *("--per_device_train_batch_size", "48", "--max_steps", str(arguments.unified_steps)),
            ],
        }[stage]

    def save_checkpoint(self, training_dir: Path, output_dir: Path, dtype: torch.dtype) -> None:
        """With the captions' tokenizer, which zero-shot classification needs."""
        super().save_checkpoint(training_dir, output_dir, dtype)
        AutoTokenizer.from_pretrained(training_dir / "tokenizer").save_pretrained(output_dir / "captions")

    def evaluation(self, checkpoint: Path, validation: bool, seed: int) -> measure.DigitsEvaluation:
        return measure.DigitsEvaluation(
            *self.load(checkpoint / "dualtoken"),
            AutoTokenizer.from_pretrained(checkpoint / "captions"),
            validation=validation,
            seed=seed,
        )

    def table(self, metrics: dict[str, float], kept: dict[str, float] | None) -> str:
        return table({"value": metrics}, measure.EXPLANATIONS, measure.GOALS, measure.TITLE)
