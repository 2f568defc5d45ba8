"""What the two trainers share: streams, evaluation, checkpoints that are whole or none, logged terms of the loss."""

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..data import SampleStream, StreamProgress
from .arguments import use_cpu_threads
from .checkpoints import SaveOnSigterm, TrainingStopped, checkpoint_file


logger = logging.get_logger(__name__)

# What readers of the data leave in a batch beside what the model takes.
_COUNTED = ("num_skipped", "num_cut")
_STREAM_POSITION = "stream_position"


class EpochCallback(TrainerCallback):
    """
    Tells the training data set the epoch (accelerate does not on several ranks, nor in the rest of an epoch after a
    resume), and the Trainer that of a stream, which it counts from where a run was resumed. A stream without
    `steps_per_epoch` is one epoch, as in `Trainer`.
    """

    def __init__(self, is_stream: bool, steps_per_epoch: int | None = None):
        self.is_stream, self.steps_per_epoch = is_stream, steps_per_epoch

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        dataset = getattr(train_dataloader, "dataset", None)
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args, state, control, **kwargs):
        if self.is_stream:
            state.epoch = state.global_step / (self.steps_per_epoch or state.max_steps)


class DualTokenBaseTrainer(Trainer):
    """
    `Trainer` that logs the terms of a loss, evaluates every sample once, and reads streams ([`SampleStream`]), whose
    position is part of its checkpoints.

    A batch may hold, beside what the model takes, `"num_skipped"` and `"num_cut"` (unusable and shortened samples, whose
    sums since the beginning are logged), and a stream's `"stream_position"`.

    A SIGTERM to any rank ends [`train`] after the step at hand, with an evaluation that is due then, a whole checkpoint
    (maybe the best one, for `load_best_model_at_end`) and [`TrainingStopped`], a `SystemExit` with status 0. Resumed from
    it, training ends in the bits of one that was left alone; callbacks such as early stopping count anew without
    `restore_callback_states_from_checkpoint`. After the last step a SIGTERM goes to the handler from before training.

    Raises:
        ValueError: if one process sees several GPUs, for a training set without a length that is no [`SampleStream`],
            and for `use_liger_kernel`.
    """

    arguments_class = TrainingArguments  # of a trainer without `args`
    terms_reduction = "mean"  # how the logged terms of the ranks are joined
    noun = "samples"  # what the logs call them

    def __init__(self, model=None, args=None, *trainer_args, steps_per_epoch: int | None = None, **kwargs):
        args = self.arguments_class() if args is None else args
        # Samples hold more than what the model takes.
        args.remove_unused_columns = False
        # It would hide what `check_finite` stops for, and wait for the device to do so.
        args.logging_nan_inf_filter = False
        # On a CPU, torch warns of it at every epoch.
        args.dataloader_pin_memory &= args.device.type != "cpu"
        # Every rank makes the same moves of the codebooks, so nothing needs to be sent before each forward.
        args.ddp_broadcast_buffers = bool(args.ddp_broadcast_buffers)
        super().__init__(model, args, *trainer_args, **kwargs)
        if args.n_gpu > 1:
            # Its replicas would lose their codebooks' moves, and images are flat over the batch.
            raise ValueError(
                f"DataParallel does not work for DualToken, and one process sees {args.n_gpu} GPUs. Start with "
                "`torchrun --nproc_per_node N`, or show it one by CUDA_VISIBLE_DEVICES=0."
            )
        if args.use_liger_kernel:
            raise ValueError(
                "`use_liger_kernel` would change nothing: Liger Kernel knows no DualToken model. Leave it out, and before "
                "the model is made call its `apply_liger_kernel_to_qwen2(fused_linear_cross_entropy=False)`."
            )
        if getattr(args, "cpu_threads", None) is not None:
            logger.info(use_cpu_threads(args.cpu_threads))
        self.is_stream = isinstance(self.train_dataset, SampleStream)
        if isinstance(self.train_dataset, IterableDataset) and not self.is_stream:
            raise ValueError(
                "A training set without a length must be a SampleStream such as DualTokenImageStream, which divides "
                f"itself over ranks and knows its position; got {type(self.train_dataset).__name__}."
            )
        # A stream goes to its position by itself.
        args.ignore_data_skip |= self.is_stream
        self.stream_progress = StreamProgress()
        self._save_on_sigterm = SaveOnSigterm()
        self.spare_workers = self._save_on_sigterm.spare_workers
        self.add_callback(EpochCallback(self.is_stream, steps_per_epoch))
        self.add_callback(self._save_on_sigterm)
        self._resumed_from = None
        self._term_sums, self._term_count = defaultdict(float), 0
        self._counts: dict[str, int | torch.Tensor] = dict.fromkeys(_COUNTED, 0)
        self._num_seen, self._logged_at = 0, time.perf_counter()

    # Data

    def get_train_dataloader(self) -> DataLoader:
        """A stream divides itself over ranks and workers: accelerate's dispatching is left out."""
        if not self.is_stream:
            self.check_ranks_agree(self.train_dataset)
            return super().get_train_dataloader()
        persistent = self.args.dataloader_persistent_workers and self.args.dataloader_num_workers > 0
        options = {"batch_size": self.args.train_batch_size, "drop_last": True, "persistent_workers": persistent}
        return self._plain_loader(self.train_dataset, **options)

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """Every rank takes its own samples: accelerate would repeat some, so that the ranks have equal numbers."""
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if eval_dataset is None:
            raise ValueError("There is no evaluation set: give the trainer an `eval_dataset`.")
        if not hasattr(eval_dataset, "__len__"):
            raise ValueError(f"The evaluation set must have a length to share; got {type(eval_dataset).__name__}.")
        if len(eval_dataset) == 0:
            raise ValueError("The evaluation set holds no samples.")
        self.check_ranks_agree(eval_dataset)
        share = self.args.eval_batch_size, self.args.process_index, self.args.world_size
        batches, num_counted = evaluation_batches(len(eval_dataset), *share)
        loader = self._plain_loader(eval_dataset, batch_sampler=batches)
        loader.num_counted_batches = num_counted
        return loader

    def get_test_dataloader(self, test_dataset) -> DataLoader:
        return self.get_eval_dataloader(test_dataset)

    def _plain_loader(self, dataset, **options) -> DataLoader:
        loader = DataLoader(
            dataset,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            **options,
        )
        return self.spare_workers(loader)

    def _get_dataloader(self, *args, **kwargs) -> DataLoader:
        return self.spare_workers(super()._get_dataloader(*args, **kwargs))

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
        for name in set(_COUNTED) & inputs.keys():
            # Summed where it is: to look at it would wait for the device.
            self._counts[name] = self._counts[name] + inputs.pop(name).sum()
        position = inputs.pop(_STREAM_POSITION, None)
        if position is not None:
            self.stream_progress.update(position)

    def _prepare_inputs(self, inputs: dict) -> dict:
        # Those of an evaluation are not counted.
        others = (*_COUNTED, _STREAM_POSITION)
        return super()._prepare_inputs({name: value for name, value in inputs.items() if name not in others})

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

    def tensors_to_save(self) -> Iterable[tuple[str, torch.Tensor]]:
        """What must be finite for a checkpoint to be written, by name."""
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    def _save_checkpoint(self, model, trial) -> None:
        # A broken step shows in the loss of the next one only, and must not replace the last good checkpoint.
        broken = [name for name, tensor in self.tensors_to_save() if not _is_finite(tensor)]
        # Together, for a rank that stopped alone would leave the others waiting.
        count = int(self.accelerator.reduce(torch.tensor(len(broken), device=self.args.device), "sum"))
        if count:
            raise FloatingPointError(
                f"Training stopped at step {self.state.global_step}, before its checkpoint was written: {count} "
                f"weights are not finite{f', {broken[0]} among them' if broken else ''}."
            )
        if self.args.should_save:
            # One of an earlier run may lie there, whose state would make a half-written one pass for whole.
            folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            Path(self._get_output_dir(trial), folder, TRAINER_STATE_NAME).unlink(missing_ok=True)
        only_model = self.args.save_only_model
        # Training goes on from the checkpoint of a SIGTERM.
        self.args.save_only_model = only_model and not self._save_on_sigterm.is_stopping
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_only_model = only_model

    def _determine_best_metric(self, metrics, trial) -> bool:
        # What it returns is whether to save, with `save_strategy="best"`.
        return super()._determine_best_metric(metrics, trial) or self._save_on_sigterm.is_stopping

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        path, counts = self._data_state(output_dir), {name: int(count) for name, count in self._counts.items()}
        # Of every rank; rank 0 may not have made the folder yet.
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"counts": counts, "stream": self.stream_progress.state_dict()}))

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
        path = self._data_state(checkpoint)
        if self.is_stream:
            checkpoint_file(checkpoint, path.name, f"by another number of ranks (now {self.args.world_size})")
        if path.is_file():
            state = json.loads(path.read_text())
            self._counts = state["counts"]
            if self.is_stream:
                self.train_dataset.load_state_dict(state["stream"])
                self.stream_progress.load_state_dict(state["stream"])

    def _data_state(self, checkpoint: str) -> Path:
        return Path(checkpoint, f"data_state_{self.args.process_index}.json")

    # Evaluation and logs

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        # A loader draws a seed; training must go on as if there had been no evaluation.
        with torch.random.fork_rng(devices=[]):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def sample_counts(self) -> dict[str, int]:
        """`<noun>_skipped` and `<noun>_cut`: samples of the training so far, on all ranks."""
        counts = torch.tensor([int(self._counts[name]) for name in _COUNTED], device=self.args.device)
        counts = self.accelerator.reduce(counts, "sum").tolist()
        return {f"{self.noun}_{name.removeprefix('num_')}": count for name, count in zip(_COUNTED, counts)}

    def add_terms(self, terms: dict[str, torch.Tensor], completes: bool = True) -> None:
        """Note the terms of a loss, to be logged as means over all calls with `completes`."""
        for name, term in terms.items():
            self._term_sums[name] += term.detach()
        self._term_count += completes

    def check_finite(self, terms: dict[str, float]) -> None:
        """Raise `FloatingPointError` if a term of the loss is not finite."""
        broken = ", ".join(f"{name} = {value}" for name, value in terms.items() if not math.isfinite(value))
        if broken:
            raise FloatingPointError(
                f"Training stopped at step {self.state.global_step}: the loss is not finite ({broken}). Usual remedies are "
                "a lower learning rate, a longer warm-up, gradient clipping, or a smaller weight for the term named."
            )

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


def evaluation_batches(num_samples: int, batch_size: int, rank: int, num_ranks: int) -> tuple[list[list[int]], int]:
    """
    The samples of one rank in batches, each sample on one rank, and how many of the batches, from the first on, count.

    All ranks gather sharded weights (ZeRO-3, FSDP) at once, so that one with fewer samples goes on calling the model:
    with the first sample, in batches that do not count.
    """
    own = range(rank, num_samples, num_ranks)
    batches = [list(own[start : start + batch_size]) for start in range(0, len(own), batch_size)]
    num_batches = math.ceil(math.ceil(num_samples / num_ranks) / batch_size)
    return batches + [[0]] * (num_batches - len(batches)), len(batches)


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether all of a tensor, or of this rank's share of it (FSDP2, ZeRO-3), is finite."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else getattr(tensor, "ds_tensor", tensor)
    return bool(local.isfinite().all())
