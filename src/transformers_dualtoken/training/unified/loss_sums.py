"""How well the unified model predicts text and codes: sums over a whole data set, or between two logs of training."""

from collections.abc import Mapping

import torch

from ...configuration_dualtoken import CODE_KINDS, DualTokenConfig


class UnifiedLossSums:
    """
    Sums of cross-entropies and counts of right predictions. Batches of any split of the data add up to the same means.

    `device` is where the sums are, which the process group must be able to send. `update` never waits for it.
    """

    def __init__(self, config: DualTokenConfig, device: torch.device | str = "cpu"):
        self.config, self.device = config, torch.device(device)
        self.reset()

    def reset(self) -> None:
        # The text's, and those of both kinds by depth. In float64, since a sum of millions would swallow single terms in
        # float32; MPS lacks it.
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        size = 1 + len(CODE_KINDS) * self.config.num_depths
        self._losses = torch.zeros(size, dtype=dtype, device=self.device)
        self._num_correct = torch.zeros(size, dtype=torch.int64, device=self.device)
        self._num_targets = [0, 0]

    def update(self, outputs: Mapping) -> None:
        """Add a batch: the [`DualTokenCausalLMOutputWithPast`] of a forward with `labels`."""
        for total, text, by_depth in (
            (self._losses, "text_loss_sum", "depth_loss_sums"),
            (self._num_correct, "num_text_correct", "num_depth_correct"),
        ):
            total[0] += outputs[text].detach().to(total)
            total[1:] += outputs[by_depth].detach().to(total).flatten()
        self._num_targets[0] += outputs["num_text_targets"]
        self._num_targets[1] += outputs["num_visual_targets"]

    def reduce(self, accelerator) -> "UnifiedLossSums":
        """The sums of all ranks together, as a new object; this one keeps its own. Every rank must call it."""
        total = UnifiedLossSums(self.config, self.device)
        counts = torch.cat([self._num_correct, torch.tensor(self._num_targets, device=self.device)])
        total._losses, counts = accelerator.reduce(self._losses, "sum"), accelerator.reduce(counts, "sum")
        total._num_correct, total._num_targets = counts[:-2], counts[-2:].tolist()
        return total

    def compute(self) -> dict[str, float]:
        """
        Means over the targets, in nats: `loss`, the weighted sum of the three losses; `text_loss`, `text_perplexity` (e
        to it) and `text_accuracy`; of both kinds of codes `pixel_loss`, over the depths summed or averaged as
        `config.depth_reduction` says, `pixel_loss_depth_1`, `pixel_accuracy_depth_1` and so on; `num_text_targets` and
        `num_visual_targets`. What has no target is left out, and adds nothing to `loss`.
        """
        config, metrics, (num_text, num_visual) = self.config, {"loss": 0.0}, self._num_targets
        losses, num_correct = self._losses.cpu().double(), self._num_correct.cpu().double()
        if num_text:
            text_loss = losses[0] / num_text
            metrics["loss"] += config.text_loss_weight * text_loss.item()
            metrics["text_loss"] = text_loss.item()
            metrics["text_perplexity"] = text_loss.exp().item()
            metrics["text_accuracy"] = num_correct[0].item() / num_text
        if num_visual:
            shape = len(CODE_KINDS), config.num_depths
            by_depth = (losses[1:] / num_visual).view(shape), (num_correct[1:] / num_visual).view(shape)
            for kind, of_kind, right in zip(CODE_KINDS, *by_depth):
                loss = (of_kind.sum() if config.depth_reduction == "sum" else of_kind.mean()).item()
                metrics["loss"] += getattr(config, f"{kind}_loss_weight") * loss
                metrics[f"{kind}_loss"] = loss
                for depth, (of_depth, accuracy) in enumerate(zip(of_kind.tolist(), right.tolist()), start=1):
                    metrics[f"{kind}_loss_depth_{depth}"] = of_depth
                    metrics[f"{kind}_accuracy_depth_{depth}"] = accuracy
        return metrics | {"num_text_targets": num_text, "num_visual_targets": num_visual}
