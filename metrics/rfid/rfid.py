"""Frechet Inception distance of reconstructions, for `evaluate`.

evaluate.load("metrics/rfid").compute(predictions=images, references=originals)
"""

import datasets
import evaluate
import torch

from transformers_dualtoken.evaluation import ReconstructionMetrics, fid_metric


# A picture (3, H, W).
IMAGE = datasets.Sequence(datasets.Sequence(datasets.Sequence(datasets.Value("float32"))))


def _batch(images) -> torch.Tensor:
    return torch.stack([torch.as_tensor(image) for image in images])


class Rfid(evaluate.Metric):
    """Frechet distance between the Inception features of reconstructions and of their originals, as torch-fidelity's."""

    def _info(self):
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description=self._compute.__doc__,
            features=datasets.Features({"predictions": IMAGE, "references": IMAGE}),
        )

    def _compute(self, predictions, references, weights=None, feature=None):
        """
        Args:
            predictions, references: images `(3, H, W)` in [0, 1], of one size.
            weights: path of torch-fidelity's Inception weights; by default torch hub's cache.
            feature: a module to use instead, images `(B, 3, H, W)` in [0, 1] -> `(B, F)`.

        Returns:
            `rfid`: 0 for equal sets.
        """
        metric = ReconstructionMetrics(("rfid",), fid=fid_metric(feature, weights))
        for prediction, reference in zip(_batch(predictions).split(32), _batch(references).split(32)):
            metric.update(prediction * 2 - 1, reference * 2 - 1)
        return metric.compute()
