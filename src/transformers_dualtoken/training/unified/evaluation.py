"""How well the unified model predicts text and codes: exact over a whole data set, and between two logs of training."""

import math
from collections.abc import Mapping

import torch
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from ...configuration_dualtoken import DualTokenConfig
from ...modeling_vision_tokenizer import CODE_KINDS


class UnifiedLossSums:
    """
    Sums of cross-entropies and counts of right predictions, over any number of batches and ranks.

    `update` never waits for the device. Batches of any split of the data add up to the same means.

    Args:
        config ([`DualTokenConfig`]): the model's, for its depths and the weights of its loss.
        device (`torch.device` or `str`, defaults to `"cpu"`): where the sums are, which must be a device that the
            process group can send.
    """

    def __init__(self, config: DualTokenConfig, device: torch.device | str = "cpu"):
        self.config, self.device = config, torch.device(device)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        # In float64, since a sum of millions would swallow single terms in float32; MPS lacks it.
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        by_depth = len(CODE_KINDS), self.config.num_depths
        self.text_loss_sum = torch.zeros((), dtype=dtype, device=self.device)
        self.num_text_correct = torch.zeros((), dtype=torch.int64, device=self.device)
        self.depth_loss_sums = torch.zeros(by_depth, dtype=dtype, device=self.device)
        self.num_depth_correct = torch.zeros(by_depth, dtype=torch.int64, device=self.device)
        self.num_text_targets = self.num_visual_targets = 0

    def update(self, outputs: Mapping) -> None:
        """
        Add a batch.

        Args:
            outputs ([`DualTokenCausalLMOutputWithPast`]): of a forward with `labels`.
        """
        for name in ("text_loss_sum", "num_text_correct", "depth_loss_sums", "num_depth_correct"):
            total = getattr(self, name)
            total += outputs[name].detach().to(total)
        self.num_text_targets += outputs["num_text_targets"]
        self.num_visual_targets += outputs["num_visual_targets"]

    def reduce(self, accelerator) -> "UnifiedLossSums":
        """
        The sums of all ranks together, as a new object; this one keeps its own. Every rank must call it.

        Args:
            accelerator (`accelerate.Accelerator`).
        """
        total = UnifiedLossSums(self.config, self.device)
        losses = torch.cat([self.text_loss_sum.view(1), self.depth_loss_sums.flatten()])
        targets = torch.tensor([self.num_text_targets, self.num_visual_targets], device=self.device)
        counts = torch.cat([self.num_text_correct.view(1), self.num_depth_correct.flatten(), targets])
        losses, counts = accelerator.reduce(losses, "sum"), accelerator.reduce(counts, "sum")
        total.text_loss_sum, total.depth_loss_sums = losses[0], losses[1:].view_as(self.depth_loss_sums)
        total.num_text_correct = counts[0]
        total.num_depth_correct = counts[1:-2].view_as(self.num_depth_correct)
        total.num_text_targets, total.num_visual_targets = counts[-2:].tolist()
        return total

    def compute(self) -> dict[str, float]:
        """
        Means over the targets, and the numbers of targets. Losses are in nats.

        Returns:
            `dict`: `loss`, the weighted sum of the three losses; of text `text_loss`, `text_perplexity` (e to it) and
            `text_accuracy`; of both kinds of codes `pixel_loss`, over the depths summed or averaged as
            `config.depth_reduction` says, and `pixel_loss_depth_1`, `pixel_accuracy_depth_1` and so on;
            `num_text_targets`, `num_visual_targets`. What has no target is left out, and adds nothing to `loss`.
        """
        config, metrics = self.config, {"loss": 0.0}
        if self.num_text_targets:
            text_loss = self.text_loss_sum.cpu().double() / self.num_text_targets
            metrics["loss"] += config.text_loss_weight * text_loss.item()
            metrics["text_loss"] = text_loss.item()
            metrics["text_perplexity"] = text_loss.exp().item()
            metrics["text_accuracy"] = self.num_text_correct.item() / self.num_text_targets
        if self.num_visual_targets:
            losses = self.depth_loss_sums.cpu().double() / self.num_visual_targets
            accuracies = self.num_depth_correct.cpu().double() / self.num_visual_targets
            for kind, of_kind, right in zip(CODE_KINDS, losses, accuracies):
                loss = (of_kind.sum() if config.depth_reduction == "sum" else of_kind.mean()).item()
                metrics["loss"] += getattr(config, f"{kind}_loss_weight") * loss
                metrics[f"{kind}_loss"] = loss
                for depth, (of_depth, accuracy) in enumerate(zip(of_kind.tolist(), right.tolist()), start=1):
                    metrics[f"{kind}_loss_depth_{depth}"] = of_depth
                    metrics[f"{kind}_accuracy_depth_{depth}"] = accuracy
        metrics |= {"num_text_targets": self.num_text_targets, "num_visual_targets": self.num_visual_targets}
        return metrics


def evaluation_batches(num_samples: int, batch_size: int, rank: int, num_ranks: int) -> tuple[list[list[int]], int]:
    """
    The samples of one rank in batches, each sample on one rank, as many batches on every rank.

    Sharded weights (ZeRO-3, FSDP) are gathered by all ranks at once, so that a rank with fewer samples must go on
    calling the model: with the first sample, in batches that do not count.

    Returns:
        The batches, and how many of them, from the first on, count.
    """
    own = range(rank, num_samples, num_ranks)
    batches = [list(own[start : start + batch_size]) for start in range(0, len(own), batch_size)]
    num_batches = math.ceil(math.ceil(num_samples / num_ranks) / batch_size)
    return batches + [[0]] * (num_batches - len(batches)), len(batches)


class UnifiedEvaluationMixin:
    """
    Evaluation of the unified model for a `Trainer`: every sample once, means over the targets of the whole set.

    Results do not depend on the batch size or the number of ranks, and training goes on as if there had been no
    evaluation. The names are those of [`UnifiedLossSums.compute`] with a prefix.
    """

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """Every rank takes its own samples: accelerate would repeat some, so that the ranks have equal numbers."""
        if eval_dataset is None or isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset if eval_dataset is None else self.eval_dataset[eval_dataset]
        if eval_dataset is None:
            raise ValueError("There is no evaluation set: give the trainer an `eval_dataset`.")
        if not hasattr(eval_dataset, "__len__"):
            raise ValueError(
                f"The evaluation set must have a length, so that each rank knows its share of the samples; got "
                f"{type(eval_dataset).__name__}."
            )
        if len(eval_dataset) == 0:
            raise ValueError("The evaluation set holds no samples.")
        self.check_ranks_agree(eval_dataset)
        args = self.args
        batches, num_counted = evaluation_batches(
            len(eval_dataset), args.eval_batch_size, args.process_index, args.world_size
        )
        dataloader = DataLoader(
            eval_dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        dataloader.num_counted_batches = num_counted
        return self.spare_workers(dataloader)

    def get_test_dataloader(self, test_dataset) -> DataLoader:
        return self.get_eval_dataloader(test_dataset)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        # A loader draws a seed; training must go on as if there had been no evaluation.
        with torch.random.fork_rng(devices=[]):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """
        Trainer's loop, which wraps the model as its engine needs it; the metrics are those of all ranks' sums.

        Raises:
            ValueError: with `compute_metrics`, since no predictions are kept, or if no sample has a target.
        """
        if self.compute_metrics is not None:
            raise ValueError(
                "`compute_metrics` is not supported: the logits of a whole evaluation set are never in memory. "
                "Leave it out; losses, accuracies and perplexity are computed anyway."
            )
        # What `prediction_step` adds to.
        self._evaluation_sums = UnifiedLossSums(self.accelerator.unwrap_model(self.model).config, self.args.device)
        self._batches_to_count = dataloader.num_counted_batches
        output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        computed = self._evaluation_sums.reduce(self.accelerator).compute()
        if not computed["num_text_targets"] + computed["num_visual_targets"]:
            raise ValueError("No sample of the evaluation set has a target: all of its labels are -100.")
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in computed.items()}
        return output._replace(metrics={**output.metrics, **metrics}, num_samples=len(dataloader.dataset))

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """One batch of an evaluation; it hands nothing back, since the sums are all that is wanted."""
        # What readers of the data leave in a batch for a training step.
        others = ("num_skipped", "num_cut", "stream_position")
        inputs = self._prepare_inputs({name: value for name, value in inputs.items() if name not in others})
        with torch.no_grad(), self.compute_loss_context_manager():
            # The losses make their own logits, a chunk at a time.
            outputs = model(**inputs, logits_to_keep=1, use_cache=False)
        if self._batches_to_count > 0:
            self._evaluation_sums.update(outputs)
        self._batches_to_count -= 1
        return None, None, None


__all__ = ["UnifiedEvaluationMixin", "UnifiedLossSums", "evaluation_batches"]
