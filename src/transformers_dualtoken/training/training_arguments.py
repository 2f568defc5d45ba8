"""`TrainingArguments` with the defaults of the two trainings."""

from dataclasses import dataclass, field

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
    # Every parameter takes part in every step, on every rank, whatever the batch holds.
    ddp_find_unused_parameters: bool | None = field(default=False)
    # The Trainer would cut them from what a data set gives.
    remove_unused_columns: bool = field(default=False)
