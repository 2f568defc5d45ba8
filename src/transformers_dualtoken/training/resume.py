"""Where a stopped run goes on."""

import json
from pathlib import Path

from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


def find_checkpoint(arguments: TrainingArguments) -> str | None:
    """
    `arguments.resume_from_checkpoint`, or else the last whole checkpoint in the output folder, or `None`.

    A checkpoint that was being written when the run was stopped is passed over: the Trainer writes its state last, and
    a state cut short is no JSON. `resume_from_checkpoint="true"` means the last one as well, but there must be one;
    `"false"` begins anew.

    Raises:
        ValueError: if the checkpoint that is asked for is missing or not whole.
    """
    wanted = arguments.resume_from_checkpoint
    wanted = {"true": True, "false": False}.get(str(wanted).lower(), wanted)
    if wanted is False:
        return None
    if wanted not in (None, True):
        if not _is_whole(Path(wanted)):
            raise ValueError(
                f"`resume_from_checkpoint` names {wanted!r}, which is no whole checkpoint: it has no readable "
                "trainer_state.json, which is written last. Name an earlier one, or leave the argument out: the last whole "
                f"one of {arguments.output_dir!r} is taken then."
            )
        return str(wanted)
    steps = {
        int(number): folder
        for folder in Path(arguments.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (number := folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")).isdigit() and _is_whole(folder)
    }
    if wanted is True and not steps:
        raise ValueError(
            f"`resume_from_checkpoint` asks for the last checkpoint, but {arguments.output_dir!r} holds no whole one."
        )
    return str(steps[max(steps)]) if steps else None


def step_of(checkpoint: str | None) -> int:
    """The step at which a whole checkpoint was saved; 0 of none. To be asked before training, which may delete it."""
    return 0 if checkpoint is None else json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text())["global_step"]


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return True
