"""Peak signal-to-noise ratio of images, for `evaluate`.

evaluate.load("metrics/psnr").compute(predictions=images, references=originals)
"""

from transformers_dualtoken.evaluation import ReconstructionMetrics, metric_modules


class Psnr(metric_modules.ImageMetric):
    """Mean over images of the PSNR in dB, over all pixels and channels of an image, data range 1."""

    def _compute(self, predictions, references):
        """
        All images are held in memory: of large sets, TokenizerEvaluator measures the same in one pass.

        Args:
            predictions, references: images `(3, H, W)` in [0, 1], of one size; predictions are clamped.

        Returns:
            `psnr`: in dB, of the images that are not reproduced exactly; NaN if all are. `exact_images`: how many are.
        """
        return self.measure(ReconstructionMetrics(("psnr",)), predictions, references)
