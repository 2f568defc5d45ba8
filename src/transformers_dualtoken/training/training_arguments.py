"""`TrainingArguments` with the defaults of the two trainings, and what else their settings have in common."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import TrainingArguments


def use_cpu_threads(number: int) -> str:
    """
    Let PyTorch compute with `number` threads, unless the user has set `OMP_NUM_THREADS`.

    Threads of a small model wait for each other at every operation: where another program takes one of the cores, two
    of them need many times as long as one. How many there are also decides how sums are rounded, so that a number that
    depended on the machine or its load would train other weights every time.

    Returns:
        `str`: a sentence that says how many there are, and why.
    """
    if number < 1:
        raise ValueError(f"`cpu_threads` must be at least 1, got {number}.")
    set_by_user = os.environ.get("OMP_NUM_THREADS")
    if not set_by_user:
        torch.set_num_threads(number)
    used = torch.get_num_threads()
    reason = "as OMP_NUM_THREADS says" if set_by_user else "OMP_NUM_THREADS sets another number"
    return f"Computing with {used} CPU thread{'s' if used > 1 else ''} ({reason})."


@dataclass
class _CpuThreads:
    cpu_threads: int | None = field(
        default=None,
        metadata={
            "help": "CPU threads to compute with: 1 suits small models. By default, and where OMP_NUM_THREADS is set, "
            "what PyTorch chooses."
        },
    )


@dataclass
class DualTokenVisionTokenizerTrainingArguments(_CpuThreads, TrainingArguments):
    """`TrainingArguments` whose defaults are the optimizer settings of the authors' code."""

    output_dir: str = field(default="tokenizer")
    learning_rate: float = field(default=7.2e-5)
    adam_beta1: float = field(default=0.5)
    adam_beta2: float = field(default=0.9)
    weight_decay: float = field(default=1e-4)
    lr_scheduler_type: str = field(default="cosine")
    logging_steps: int = field(default=50)
    report_to: str = field(default="none")


@dataclass
class DualTokenTrainingArguments(_CpuThreads, TrainingArguments):
    """`TrainingArguments` of the unified model. The default rate is that of the paper's stage 2."""

    output_dir: str = field(default="unified")
    learning_rate: float = field(default=2e-5)
    lr_scheduler_type: str = field(default="cosine")
    logging_steps: int = field(default=50)
    report_to: str = field(default="none")
    # The codebooks never move in this training.
    ddp_broadcast_buffers: bool | None = field(default=False)
    # Every parameter takes part in every step, on every rank, whatever the batch holds.
    ddp_find_unused_parameters: bool | None = field(default=False)
    # The Trainer would cut them from what a data set gives.
    remove_unused_columns: bool = field(default=False)


def json_object(value: dict | str | None, name: str) -> dict:
    """A dict as it is, or read from JSON text or from a `.json` file."""
    if isinstance(value, str):
        if value.endswith(".json"):
            if not Path(value).is_file():
                raise FileNotFoundError(f"`{name}` names the file {value!r}, which does not exist.")
            value = Path(value).read_text()
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"`{name}` must be a JSON object or the path of one, got {value!r}: {error}.") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"`{name}` must be a JSON object or the path of one, got {value!r}.")
    return value
