"""`TrainingArguments` with the defaults of the two trainings, and what else their settings have in common."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import TrainingArguments

from ..field_rules import at_least


def use_cpu_threads(number: int) -> str:
    """
    Let PyTorch compute with `number` threads, unless the user has set `OMP_NUM_THREADS`.

    More than one make a small model slow on busy cores. Their number decides how sums are rounded, so it must not
    depend on the machine.

    Returns:
        `str`: a sentence that says how many there are, and why.
    """
    at_least(1).check("cpu_threads", number)
    set_by_user = os.environ.get("OMP_NUM_THREADS")
    if not set_by_user:
        torch.set_num_threads(number)
    used = torch.get_num_threads()
    reason = "as OMP_NUM_THREADS says" if set_by_user else "OMP_NUM_THREADS sets another number"
    return f"Computing with {used} CPU thread{'s' if used > 1 else ''} ({reason})."


@dataclass
class _SharedArguments(TrainingArguments):
    lr_scheduler_type: str = field(default="cosine")
    logging_steps: int = field(default=50)
    report_to: str = field(default="none")
    cpu_threads: int | None = field(
        default=None,
        metadata={
            "help": "CPU threads to compute with: 1 suits small models. By default, and where OMP_NUM_THREADS is set, "
            "what PyTorch chooses."
        },
    )


@dataclass
class DualTokenVisionTokenizerTrainingArguments(_SharedArguments):
    """`TrainingArguments` whose defaults are the optimizer settings of the authors' code."""

    output_dir: str = field(default="tokenizer")
    learning_rate: float = field(default=7.2e-5)
    adam_beta1: float = field(default=0.5)
    adam_beta2: float = field(default=0.9)
    weight_decay: float = field(default=1e-4)


@dataclass
class DualTokenTrainingArguments(_SharedArguments):
    """`TrainingArguments` of the unified model. The default rate is that of the paper's stage 2."""

    output_dir: str = field(default="unified")
    learning_rate: float = field(default=2e-5)
    # Every parameter takes part in every step, on every rank, whatever the batch holds.
    ddp_find_unused_parameters: bool | None = field(default=False)


def json_object(value: dict | str | None, name: str) -> dict:
    """A dict as it is, or read from JSON text or from a `.json` file; `{}` of `None`."""
    given = value = {} if value is None else value
    if isinstance(value, str):
        try:
            value = json.loads(Path(value).read_text() if value.endswith(".json") else value)
        except OSError as error:
            raise FileNotFoundError(f"`{name}` names the file {value!r}, which cannot be read: {error}.") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"`{name}` must be a JSON object or the path of one, got {given!r}: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"`{name}` must be a JSON object or the path of one, got {given!r}.")
    return value
