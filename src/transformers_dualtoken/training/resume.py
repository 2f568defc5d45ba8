"""Where a stopped run goes on."""

import json
from pathlib import Path

from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


def find_checkpoint(arguments: TrainingArguments) -> str | None:
    """
    `arguments.resume_from_checkpoint`, or else the last whole checkpoint in the output folder, or `None`.

    A checkpoint that was being written when the run was stopped is passed over: the Trainer writes its state last, and
    a state cut short is no JSON.
    """
    if arguments.resume_from_checkpoint is not None:
        return arguments.resume_from_checkpoint
    steps = {
        int(number): state.parent
        for state in Path(arguments.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/trainer_state.json")
        if (number := state.parent.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")).isdigit() and _is_json(state)
    }
    return str(steps[max(steps)]) if steps else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except ValueError:
        return False
    return True
