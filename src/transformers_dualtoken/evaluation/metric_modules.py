"""What the image metrics for `evaluate` in `metrics/` share. It imports `evaluate`, and nothing of the package imports it."""

import torch

from ..optional_libraries import needed_libraries
from .image_metrics import ReconstructionMetrics


with needed_libraries("The metrics for `evaluate`"):
    import datasets
    import evaluate


# A picture (3, H, W).
_IMAGE = datasets.Sequence(datasets.Sequence(datasets.Sequence(datasets.Value("float32"))))
_BATCH_SIZE = 32


class ImageMetric(evaluate.Metric):
    """An `evaluate` metric of pairs of images, measured in one loop with what `TokenizerEvaluator` measures."""

    def _info(self):
        info = evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description=self._compute.__doc__,
            features=datasets.Features({"predictions": _IMAGE, "references": _IMAGE}),
        )
        # As lists of Python numbers the images would take many times the memory. The constructor takes a format for
        # flat columns only, though `datasets` has it for all.
        info.format = "torch"
        return info

    @staticmethod
    def measure(metric: ReconstructionMetrics, predictions, references) -> dict[str, float]:
        """
        `metric` of images `(3, H, W)` in [0, 1], all of one size, in small batches.

        Raises:
            ValueError: if there are none, or a reference lies outside [0, 1].
        """
        if len(predictions) == 0:
            raise ValueError("There are no images to measure: `predictions` and `references` are empty.")
        for start in range(0, len(predictions), _BATCH_SIZE):
            made, given = (
                torch.stack(list(images[start : start + _BATCH_SIZE])) for images in (predictions, references)
            )
            if given.min() < 0 or given.max() > 1:
                raise ValueError(
                    f"Images must lie in [0, 1]; a reference goes from {float(given.min())} to {float(given.max())}."
                )
            metric.update(made * 2 - 1, given * 2 - 1)
        return metric.compute()


__all__ = ["ImageMetric"]
