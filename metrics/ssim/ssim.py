"""Structural similarity of images, for `evaluate`.

evaluate.load("metrics/ssim").compute(predictions=images, references=originals)
"""

from transformers_dualtoken.evaluation import ReconstructionMetrics, metric_modules


class Ssim(metric_modules.ImageMetric):
    """Mean over images of the SSIM: Gaussian window of sigma 1.5 (11 x 11) within the image, data range 1."""

    def _compute(self, predictions, references):
        """
        All images are held in memory: of large sets, TokenizerEvaluator measures the same in one pass.

        Args:
            predictions, references: images `(3, H, W)` in [0, 1], of one size; predictions are clamped.

        Returns:
            `ssim`: at most 1.
        """
        return self.measure(ReconstructionMetrics(("ssim",)), predictions, references)
