"""Where a stopped run goes on."""

from pathlib import Path

from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


def find_checkpoint(arguments: TrainingArguments) -> str | None:
    """
    `arguments.resume_from_checkpoint`, or else the last whole checkpoint in the output folder, or `None`.

    A checkpoint that was being written when the run was stopped is passed over: the Trainer writes its state last.
    """
    if arguments.resume_from_checkpoint is not None:
        return arguments.resume_from_checkpoint
    steps = {
        int(number): state.parent
        for state in Path(arguments.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/trainer_state.json")
        if (number := state.parent.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")).isdigit()
    }
    return str(steps[max(steps)]) if steps else None
