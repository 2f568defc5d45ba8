"""What the two trainers share: the epoch reaches the data set, and the terms of the loss are logged."""

from collections import defaultdict

import torch
from transformers import Trainer, TrainerCallback


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


class DualTokenBaseTrainer(Trainer):
    """
    `Trainer` that logs the terms a loss is made of, and keeps data sets with `set_epoch` up to date.

    Raises:
        ValueError: if several GPUs are visible to one process, which `Trainer` answers with `DataParallel`.
    """

    # How the logged terms of the ranks are joined.
    terms_reduction = "mean"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            # Its replicas would lose their codebooks' moves, and images are flat over the batch.
            raise ValueError(
                f"DataParallel does not work for DualToken, and one process sees {self.args.n_gpu} GPUs. Start with "
                "`torchrun --nproc_per_node N`, or show it one by CUDA_VISIBLE_DEVICES=0."
            )
        self.add_callback(DatasetEpochCallback())
        self._term_sums, self._term_count = defaultdict(float), 0

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        # A finished run that is started again would take a step more, where it ended within an epoch.
        if self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def add_terms(self, terms: dict[str, torch.Tensor], completes: bool = True) -> None:
        """Note the terms of a loss, to be logged as means over all calls with `completes`."""
        for name, term in terms.items():
            self._term_sums[name] += term.detach()
        self._term_count += completes

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Add the means of the terms since the last log, over all ranks."""
        if "loss" in logs and self._term_count:
            sums = self.accelerator.reduce(torch.stack(list(self._term_sums.values())), self.terms_reduction)
            logs.update(zip(self._term_sums, (sums / self._term_count).tolist()))
            self._term_sums.clear()
            self._term_count = 0
        super().log(logs, *args, **kwargs)
