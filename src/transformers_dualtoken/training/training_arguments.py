"""`TrainingArguments` with the defaults of the two trainings, and what else their settings have in common."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from transformers import TrainingArguments


@dataclass
class DualTokenVisionTokenizerTrainingArguments(TrainingArguments):
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
class DualTokenTrainingArguments(TrainingArguments):
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
