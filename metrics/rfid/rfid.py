"""Frechet Inception distance of reconstructions, for `evaluate`.

evaluate.load("metrics/rfid").compute(predictions=images, references=originals)
"""

from transformers_dualtoken.evaluation import ReconstructionMetrics, fid_metric, metric_modules


class Rfid(metric_modules.ImageMetric):
    """Frechet distance between the Inception features of reconstructions and of their originals, as torch-fidelity's."""

    def _compute(self, predictions, references, weights=None, feature=None):
        """
        All images are held in memory: of large sets, TokenizerEvaluator measures the same in one pass.

        Args:
            predictions, references: images `(3, H, W)` in [0, 1], of one size; predictions are clamped.
            weights: path of torch-fidelity's Inception weights; by default torch hub's cache.
            feature: a module to use instead, images `(B, 3, H, W)` in [0, 1] -> `(B, F)`.

        Returns:
            `rfid`: 0 for equal sets, up to rounding (see `fid_metric`).
        """
        return self.measure(
            ReconstructionMetrics(("rfid",), fid=fid_metric(feature, weights)), predictions, references
        )
