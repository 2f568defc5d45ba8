"""Perceptual distance LPIPS of images, for `evaluate`.

evaluate.load("metrics/lpips").compute(predictions=images, references=originals)
"""

import datasets
import evaluate
import torch

from transformers_dualtoken.evaluation import ReconstructionMetrics, lpips_metric


# A picture (3, H, W).
IMAGE = datasets.Sequence(datasets.Sequence(datasets.Sequence(datasets.Value("float32"))))


def _batch(images) -> torch.Tensor:
    return torch.stack([torch.as_tensor(image) for image in images])


class Lpips(evaluate.Metric):
    """Mean over images of the learned perceptual distance LPIPS."""

    def _info(self):
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description=self._compute.__doc__,
            features=datasets.Features({"predictions": IMAGE, "references": IMAGE}),
        )

    def _compute(self, predictions, references, net="vgg", weights=None, network=None):
        """
        Args:
            predictions, references: images `(3, H, W)` in [0, 1], of one size.
            net: `"vgg"` or `"alex"`.
            weights: path of that network's weights; by default torchvision's cache.
            network: a module to use instead, two batches in [-1, 1] -> `(B, ...)`.

        Returns:
            `lpips`: 0 for equal images.
        """
        metric = ReconstructionMetrics(("lpips",), lpips=lpips_metric(net, weights) if network is None else network)
        for prediction, reference in zip(_batch(predictions).split(32), _batch(references).split(32)):
            metric.update(prediction * 2 - 1, reference * 2 - 1)
        return metric.compute()
