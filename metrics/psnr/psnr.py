"""Peak signal-to-noise ratio of images, for `evaluate`.

evaluate.load("metrics/psnr").compute(predictions=images, references=originals)
"""

import datasets
import evaluate
import torch

from transformers_dualtoken.evaluation import psnr_per_image


# A picture (3, H, W).
IMAGE = datasets.Sequence(datasets.Sequence(datasets.Sequence(datasets.Value("float32"))))


def _batch(images) -> torch.Tensor:
    return torch.stack([torch.as_tensor(image) for image in images])


class Psnr(evaluate.Metric):
    """Mean over images of the PSNR in dB, over all pixels and channels of an image, data range 1."""

    def _info(self):
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description=self._compute.__doc__,
            features=datasets.Features({"predictions": IMAGE, "references": IMAGE}),
        )

    def _compute(self, predictions, references):
        """
        Args:
            predictions, references: images `(3, H, W)` in [0, 1], of one size.

        Returns:
            `psnr`: in dB; infinite if an image is reproduced exactly.
        """
        return {"psnr": float(psnr_per_image(_batch(predictions), _batch(references)).mean())}
