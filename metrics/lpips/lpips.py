"""Perceptual distance LPIPS of images, for `evaluate`.

evaluate.load("metrics/lpips").compute(predictions=images, references=originals)
"""

from transformers_dualtoken.evaluation import ReconstructionMetrics, lpips_metric, metric_modules


class Lpips(metric_modules.ImageMetric):
    """Mean over images of the learned perceptual distance LPIPS."""

    def _compute(self, predictions, references, net="vgg", weights=None, network=None):
        """
        All images are held in memory: of large sets, TokenizerEvaluator measures the same in one pass.

        Args:
            predictions, references: images `(3, H, W)` in [0, 1], of one size; predictions are clamped.
            net: `"vgg"` or `"alex"`.
            weights: path of that network's weights; by default torchvision's cache.
            network: a module to use instead, two batches in [-1, 1] -> `(B, ...)`.

        Returns:
            `lpips`: 0 for equal images.
        """
        network = lpips_metric(net, weights) if network is None else network
        return self.measure(ReconstructionMetrics(("lpips",), lpips=network), predictions, references)
