"""Runs that are stopped and go on: the last whole checkpoint, and one that is saved at a SIGTERM."""

import contextlib
import ctypes
import functools
import json
import multiprocessing
import os
import signal
import threading
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy
from transformers.utils import logging


logger = logging.get_logger(__name__)


def find_checkpoint(arguments: TrainingArguments) -> str | None:
    """
    `arguments.resume_from_checkpoint`, or else the last whole checkpoint in the output folder, or `None`.

    Whole is what has a readable state, which the Trainer writes last (transformers' `get_last_checkpoint` takes the
    last of any kind). `"true"` means the last one too, but there must be one; `"false"` begins anew.
    """
    wanted = arguments.resume_from_checkpoint
    wanted = {"true": True, "false": False}.get(str(wanted).lower(), wanted)
    if wanted is False:
        return None
    if wanted not in (None, True):
        if _state(wanted) is None:
            raise ValueError(
                f"`resume_from_checkpoint` names {wanted!r}, which is no whole checkpoint: it has no readable "
                "trainer_state.json, which is written last. Name an earlier one, or leave it out for the last whole one."
            )
        return str(wanted)
    folders = Path(arguments.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    numbers = {folder: folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-") for folder in folders}
    whole = [folder for folder, number in numbers.items() if number.isdigit() and _state(folder) is not None]
    if wanted is True and not whole:
        where = arguments.output_dir
        raise ValueError(f"`resume_from_checkpoint` asks for the last checkpoint, but {where!r} holds no whole one.")
    return str(max(whole, key=lambda folder: int(numbers[folder]))) if whole else None


def step_of(checkpoint: str | None) -> int:
    """The step of a whole checkpoint; 0 of none. To be asked before training, which may delete it."""
    return 0 if checkpoint is None else _state(checkpoint)["global_step"]


def checkpoint_file(checkpoint: str | Path, name: str, saved: str) -> Path:
    """A file of a checkpoint, or an error that tells how one without it was saved."""
    path = Path(checkpoint, name)
    if not path.is_file():
        raise FileNotFoundError(
            f"The checkpoint {str(checkpoint)!r} lacks {name}: it was saved {saved}, or with `save_only_model`."
        )
    return path


def _state(checkpoint: str | Path) -> dict | None:
    try:
        return json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return None


class TrainingStopped(SystemExit):
    """Raised out of `train` when a SIGTERM ended it, with the `checkpoint` to go on from. The exit status is 0."""

    def __init__(self, checkpoint: str):
        super().__init__(0)
        self.checkpoint = checkpoint


class SaveOnSigterm(TrainerCallback):
    """
    After the step in which a SIGTERM came, to any rank: a log, an evaluation if it is due, a checkpoint, and
    [`TrainingStopped`]. (transformers' `enable_jit_checkpoint` saves within a step, when the vision tokenizer's forward
    has moved the codebooks; after a resume the same batch would move them again.)
    """

    def __init__(self):
        self.is_asked = self.is_stopping = False
        self._group = None
        # Seen by the workers of the data loaders, too.
        self._is_listening = multiprocessing.RawValue(ctypes.c_bool, False)

    def spare_workers(self, loader: DataLoader) -> DataLoader:
        """The same loader, whose workers heed no SIGTERM during training: a cluster may signal a whole group."""
        # accelerate's loaders wrap the one that starts the workers.
        started = getattr(loader, "base_dataloader", loader)
        known = {"is_training": self._is_listening, "init": started.worker_init_fn}
        started.worker_init_fn = functools.partial(_init_worker, **known)
        return loader

    @contextlib.contextmanager
    def listening(self, timeout: float):
        """Within this context a SIGTERM to the main thread of any rank is heeded; ranks wait `timeout` seconds."""
        self.is_asked = self.is_stopping = False
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # Between hosts: the ranks' flags never wait for a GPU.
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        is_main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, self._ask) if is_main else None
        self._is_listening.value = is_main
        try:
            yield
        finally:
            self._is_listening.value = False
            # At the end of training transformers' own handler may have put another in its place.
            if is_main and signal.getsignal(signal.SIGTERM) == self._ask:
                signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
            if self._group is not None:
                dist.destroy_process_group(self._group)
                self._group = None
        # Nothing was raised, so training was at its end.
        if self.is_asked:
            logger.warning("SIGTERM came when no step of training was left: training has ended as usual.")
            # Not the default, which would end the program before it has saved what was trained.
            if callable(signal.getsignal(signal.SIGTERM)):
                signal.raise_signal(signal.SIGTERM)

    def _ask(self, signum, frame) -> None:
        self.is_asked = True

    def on_step_end(self, args, state, control, **kwargs):
        asked = torch.tensor(int(self.is_asked), device="cpu")
        if self._group is not None:
            dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group)
        if asked:
            control.should_log = control.should_save = True
            # The end of an epoch, which a run that is resumed after it does not come by.
            is_due = args.eval_strategy == IntervalStrategy.EPOCH and args.eval_delay <= state.epoch
            control.should_evaluate |= is_due and state.epoch % 1 == 0
            self.is_stopping = state.global_step < state.max_steps

    def on_save(self, args, state, control, **kwargs):
        # The evaluation may have ended training.
        if not self.is_stopping or control.should_training_stop:
            return
        checkpoint = os.path.join(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        if state.is_world_process_zero:
            done = f"SIGTERM: stopped after step {state.global_step} of {state.max_steps}, saved as {checkpoint}."
            print(f"{done} The same command goes on from there.", flush=True)
        # Not by `should_training_stop`: at its end the Trainer loads the best checkpoint, and with `save_total_limit=1`
        # deletes all others, this one too.
        raise TrainingStopped(checkpoint)


def _init_worker(worker_id: int, is_training, init) -> None:
    """First of all that a worker does. Not `SIG_IGN`: the main process ends its workers by SIGTERM and waits for them."""

    def heed(signum, frame):
        if not is_training.value:
            # As PyTorch's own handler: another status would count as a failure of the worker.
            os._exit(0)

    signal.signal(signal.SIGTERM, heed)
    if init is not None:
        init(worker_id)
