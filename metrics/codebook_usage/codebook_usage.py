"""How evenly the codes of images use a codebook, for `evaluate`.

evaluate.load("metrics/codebook_usage").compute(predictions=codes, codebook_size=16384)
"""

import datasets
import evaluate
import torch

from transformers_dualtoken.evaluation import CodebookUsage


class CodebookUsageMetric(evaluate.Metric):
    """Share of the codes that occur, and perplexity and entropy (bits) of their frequencies."""

    def _info(self):
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description=self._compute.__doc__,
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Sequence(datasets.Sequence(datasets.Value("int64"))))}
            ),
        )

    def _compute(self, predictions, codebook_size, shared_codebook=True):
        """
        Args:
            predictions: codes `(H, W, D)` of images, in 0..codebook_size-1.
            codebook_size: codes of a codebook.
            shared_codebook: whether all D depths use one codebook; if not, the means over the depths are given.

        Returns:
            `usage` in 0..1, `perplexity`, `entropy`, and the same as lists over the depths in `per_depth`.
        """
        if len(predictions) == 0:
            raise ValueError("There are no codes to count: `predictions` is empty.")
        usage = None
        for codes in predictions:
            codes = torch.as_tensor(codes)
            usage = usage or CodebookUsage(codes.shape[-1], codebook_size, shared_codebook)
            usage.update(codes)
        return {**usage.compute(), "per_depth": usage.compute_per_depth()}
