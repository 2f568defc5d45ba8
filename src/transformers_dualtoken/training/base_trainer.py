"""What the two trainers share: streams, checkpoints that are whole or none, and the logged terms of the loss."""

import contextlib
import json
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..data.sample_stream import SampleStream, StreamProgress
from .preemption import SaveOnSigterm, TrainingStopped
from .training_arguments import use_cpu_threads


logger = logging.get_logger(__name__)

_COUNTED = ("num_skipped", "num_cut")


class DatasetEpochCallback(TrainerCallback):
    """
    Tells the training data set the epoch.

    accelerate does it only while nothing wraps the batch sampler: not on several ranks, and not in the rest of an
    epoch after a resume.
    """

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        dataset = getattr(train_dataloader, "dataset", None)
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(int(state.epoch or 0))


class StreamEpochCallback(TrainerCallback):
    """
    The logged epoch of a stream. The Trainer counts from where a run was resumed, since it skips no batches then.

    Without the length of an epoch the whole run counts as one, as in `Trainer`.
    """

    def __init__(self, steps_per_epoch: int | None = None):
        self.steps_per_epoch = steps_per_epoch

    def on_step_end(self, args, state, control, **kwargs):
        state.epoch = state.global_step / (self.steps_per_epoch or state.max_steps)


class DualTokenBaseTrainer(Trainer):
    """
    `Trainer` that logs the terms a loss is made of, keeps data sets with `set_epoch` up to date, and reads streams
    ([`SampleStream`]), whose position is part of its checkpoints.

    A batch may hold, beside what the model takes, `"num_skipped"` (how many unusable samples were passed over for it)
    and `"num_cut"` (how many were cut), whose sums since the beginning are logged, and a stream's `"stream_position"`.

    A SIGTERM to any rank ends [`train`] after the step at hand: an evaluation that is due then is run, a checkpoint is
    saved (whole, also with `save_only_model`), and [`TrainingStopped`], a `SystemExit` with status 0, is raised. Resumed
    from it, training ends in the bits of one that was left alone; but with `load_best_model_at_end` that checkpoint may
    be the best one, and callbacks such as early stopping count anew without `restore_callback_states_from_checkpoint`.
    A SIGTERM after the last step is passed on to the handler from before training, or is a warning.

    `cpu_threads` of the training arguments holds from the making of the trainer on ([`use_cpu_threads`]).

    Raises:
        ValueError: if several GPUs are visible to one process, which `Trainer` answers with `DataParallel`; for a
            training set without a length that is no [`SampleStream`].
    """

    # How the logged terms of the ranks are joined.
    terms_reduction = "mean"
    # What `num_skipped` and the samples of `note_batch` are called in the logs.
    noun = "samples"

    def __init__(self, *args, steps_per_epoch: int | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            # Its replicas would lose their codebooks' moves, and images are flat over the batch.
            raise ValueError(
                f"DataParallel does not work for DualToken, and one process sees {self.args.n_gpu} GPUs. Start with "
                "`torchrun --nproc_per_node N`, or show it one by CUDA_VISIBLE_DEVICES=0."
            )
        if getattr(self.args, "cpu_threads", None) is not None:
            logger.info(use_cpu_threads(self.args.cpu_threads))
        self.add_callback(DatasetEpochCallback())
        self._save_on_sigterm = SaveOnSigterm()
        self.add_callback(self._save_on_sigterm)
        self._term_sums, self._term_count = defaultdict(float), 0
        self.is_stream = isinstance(self.train_dataset, SampleStream)
        if isinstance(self.train_dataset, IterableDataset) and not self.is_stream:
            raise ValueError(
                f"A training set without a length must be a {SampleStream.__name__} such as DualTokenImageStream or "
                "DualTokenChatStream, which divides itself over ranks and knows its position; got "
                f"{type(self.train_dataset).__name__}."
            )
        self.stream_progress = StreamProgress()
        if self.is_stream:
            # A stream goes to its position by itself.
            self.args.ignore_data_skip = True
            self.add_callback(StreamEpochCallback(steps_per_epoch))
        self._resumed_from: str | None = None
        self._counts: dict[str, int | torch.Tensor] = dict.fromkeys(_COUNTED, 0)
        self._num_seen, self._logged_at = 0, time.perf_counter()

    # Data

    def get_train_dataloader(self) -> DataLoader:
        """A stream divides itself over ranks and workers: accelerate's dispatching is left out."""
        if not self.is_stream:
            self.check_ranks_agree(self.train_dataset)
            return super().get_train_dataloader()
        workers = self.args.dataloader_num_workers
        loader = DataLoader(
            self.train_dataset,
            batch_size=self.args.train_batch_size,
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers and workers > 0,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            drop_last=True,
        )
        return self.spare_workers(loader)

    def _get_dataloader(self, *args, **kwargs) -> DataLoader:
        return self.spare_workers(super()._get_dataloader(*args, **kwargs))

    def spare_workers(self, loader: DataLoader) -> DataLoader:
        """Let a SIGTERM to the whole group of processes not end the workers of a loader, before a checkpoint is saved."""
        return self._save_on_sigterm.spare_workers(loader)

    def check_ranks_agree(self, dataset) -> None:
        """Raise unless all ranks have the same samples: they would else wait for each other for ever."""
        if self.args.world_size == 1 or dataset is None:
            return
        mine = torch.tensor([[len(dataset), getattr(dataset, "digest", 0)]], device=self.args.device)
        each = self.accelerator.gather(mine).tolist()
        if any(other != each[0] for other in each):
            raise ValueError(
                f"The ranks have different data (samples and their checksum): {each}. Do all machines see the same files?"
            )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        # A finished run that is started again would take a step more, where it ended within an epoch.
        if self.state.global_step >= self.state.max_steps:
            return [], None
        samples = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.is_stream and self._resumed_from is not None:
            # The Trainer restores the random state after the batches it skips, and a stream skips none.
            self._load_rng_state(self._resumed_from)
        self._resumed_from = None
        return samples

    def note_batch(self, inputs: dict, num_samples: int = 0) -> None:
        """Take what is not the model's out of a training batch, and count its samples for `<noun>_per_second`."""
        self._num_seen += num_samples
        for name in _COUNTED:
            if name in inputs:
                # Summed where it is: to look at it would wait for the device.
                self._counts[name] = self._counts[name] + inputs.pop(name).sum()
        position = inputs.pop("stream_position", None)
        if position is not None:
            self.stream_progress.update(position)

    # Checkpoints

    def train(self, *args, **kwargs):
        with self._save_on_sigterm.listening(self.args.ddp_timeout):
            try:
                return super().train(*args, **kwargs)
            except TrainingStopped:
                # Trackers and the progress bar come to their end.
                self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
                raise

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        # The last that is made before training begins.
        self._num_seen, self._logged_at = 0, time.perf_counter()
        return super().create_scheduler(num_training_steps, optimizer)

    def _save_checkpoint(self, model, trial) -> None:
        if self.args.should_save:
            # One of an earlier run may lie there, whose state would make a half-written one pass for whole.
            folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        with self._whole_checkpoint() if self._save_on_sigterm.is_stopping else contextlib.nullcontext():
            super()._save_checkpoint(model, trial)

    @contextlib.contextmanager
    def _whole_checkpoint(self):
        """Training goes on from the checkpoint of a SIGTERM, also with `save_only_model`."""
        before, self.args.save_only_model = self.args.save_only_model, False
        try:
            yield
        finally:
            self.args.save_only_model = before

    def _determine_best_metric(self, metrics, trial) -> bool:
        # What it returns is whether to save, with `save_strategy="best"`.
        return super()._determine_best_metric(metrics, trial) or self._save_on_sigterm.is_stopping

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        # Of every rank; rank 0 may not have made the folder yet.
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        counts = {name: int(count) for name, count in self._counts.items()}
        state = {"counts": counts, "stream": self.stream_progress.state_dict()}
        Path(output_dir, self._data_state_name).write_text(json.dumps(state))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.args.world_size > 1:
            # The Trainer's state comes next, and says that a checkpoint is whole: on every rank.
            dist.barrier()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self._resumed_from = checkpoint
        path = Path(checkpoint, self._data_state_name)
        if path.is_file():
            state = json.loads(path.read_text())
            self._counts = state["counts"]
            if self.is_stream:
                self.train_dataset.load_state_dict(state["stream"])
                self.stream_progress.load_state_dict(state["stream"])
        elif self.is_stream:
            raise FileNotFoundError(
                f"The checkpoint {checkpoint!r} lacks {path.name}, the position of this rank in the stream: it was "
                f"saved by another number of ranks (now {self.args.world_size}), or with `save_only_model`."
            )

    @property
    def _data_state_name(self) -> str:
        return f"data_state_{self.args.process_index}.json"

    # Logs

    def sample_counts(self) -> dict[str, int]:
        """How many samples were skipped and cut in training so far, on all ranks: `<noun>_skipped`, `<noun>_cut`."""
        counts = torch.tensor([int(self._counts[name]) for name in _COUNTED], device=self.args.device)
        counts = self.accelerator.reduce(counts, "sum").tolist()
        return {f"{self.noun}_{name.removeprefix('num_')}": count for name, count in zip(_COUNTED, counts)}

    def add_terms(self, terms: dict[str, torch.Tensor], completes: bool = True) -> None:
        """Note the terms of a loss, to be logged as means over all calls with `completes`."""
        for name, term in terms.items():
            self._term_sums[name] += term.detach()
        self._term_count += completes

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Add the means of the terms since the last log, over all ranks, and the samples a second."""
        if "loss" in logs and self._term_count:
            sums = self.accelerator.reduce(torch.stack(list(self._term_sums.values())), self.terms_reduction)
            logs.update(zip(self._term_sums, (sums / self._term_count).tolist()))
            self._term_sums.clear()
            self._term_count = 0
        if "loss" in logs:
            seen = int(self.accelerator.reduce(torch.tensor(self._num_seen, device=self.args.device), "sum"))
            now = time.perf_counter()
            if seen:
                logs[f"{self.noun}_per_second"] = seen / (now - self._logged_at)
            self._num_seen, self._logged_at = 0, now
            logs.update({name: count for name, count in self.sample_counts().items() if count})
        super().log(logs, *args, **kwargs)
