"""Training that is told to end (SIGTERM, as of a cluster that takes a machine back): save whole, then exit."""

import contextlib
import os
import signal
import threading

import torch
import torch.distributed as dist
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


class TrainingStopped(SystemExit):
    """
    Raised out of `train` when a SIGTERM ended it. Nothing after it in a script runs, and the exit status is 0.

    Attributes:
        checkpoint (`str`): the folder from which training goes on.
    """

    def __init__(self, checkpoint: str):
        super().__init__(0)
        self.checkpoint = checkpoint


class SaveOnSigterm(TrainerCallback):
    """
    After the step in which a SIGTERM came, to any rank: a log, a checkpoint, and [`TrainingStopped`].

    Between two steps, not within one as transformers' `enable_jit_checkpoint`: a forward of the vision tokenizer has
    moved the codebooks already, and its batch would move them again after a resume. An evaluation that is due at that
    step is left out, since a cluster waits for seconds only; after the last step training ends as usual.
    """

    def __init__(self):
        self.is_asked = self.is_stopping = False
        self._group = None

    @contextlib.contextmanager
    def listening(self):
        """Within this context SIGTERM is heeded; on all ranks together. Python lets the main thread only do so."""
        self.is_asked = self.is_stopping = False
        is_distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        # Between hosts: the ranks' flags never wait for a GPU.
        self._group = dist.new_group(backend="gloo") if is_distributed else None
        is_main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, self._ask) if is_main else None
        try:
            yield
        finally:
            # Unless transformers' own handler has put another in its place at the end of training.
            if is_main and signal.getsignal(signal.SIGTERM) == self._ask:
                signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
            if self._group is not None:
                dist.destroy_process_group(self._group)
                self._group = None

    def _ask(self, signum, frame) -> None:
        self.is_asked = True

    def _any_rank_is_asked(self) -> bool:
        if self._group is None:
            return self.is_asked
        asked = torch.tensor(int(self.is_asked), device="cpu")
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group)
        return bool(asked)

    def on_step_end(self, args, state, control, **kwargs):
        if self._any_rank_is_asked():
            control.should_log = control.should_save = True
            control.should_evaluate = False
            self.is_stopping = state.global_step < state.max_steps

    def on_save(self, args, state, control, **kwargs):
        if not self.is_stopping:
            return
        checkpoint = os.path.join(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        if state.is_world_process_zero:
            print(
                f"SIGTERM: stopped after step {state.global_step} of {state.max_steps}, saved as {checkpoint}. The same "
                "command goes on from there.",
                flush=True,
            )
        # Not by `should_training_stop`: at its end the Trainer loads the best checkpoint, and with `save_total_limit=1`
        # deletes all others, this one too.
        raise TrainingStopped(checkpoint)
