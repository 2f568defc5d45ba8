"""
How well a vision tokenizer reconstructs, classifies, retrieves, and uses its codebooks.

Importable with the core installation; what needs more (extras `eval` and `perceptual`) is imported when it is used, and
[`MetricUnavailableError`] says what is missing.
"""

from .codebook_statistics import CodebookUsage
from .evaluator import CONVENTIONS, TokenizerEvaluator
from .image_batches import ImageBatches
from .image_metrics import (
    RECONSTRUCTION_METRICS,
    ReconstructionMetrics,
    fid_metric,
    lpips_metric,
    psnr_per_image,
    ssim_per_image,
)
from .optional_libraries import MetricUnavailableError
from .pictures import reconstruction_grid, usage_figure
from .report import write_report
from .retrieval import RetrievalRecall
from .zero_shot import ZeroShotAccuracy, text_tokenizer, zero_shot_classifier


__all__ = [
    "CONVENTIONS",
    "CodebookUsage",
    "ImageBatches",
    "MetricUnavailableError",
    "RECONSTRUCTION_METRICS",
    "ReconstructionMetrics",
    "RetrievalRecall",
    "TokenizerEvaluator",
    "ZeroShotAccuracy",
    "fid_metric",
    "lpips_metric",
    "psnr_per_image",
    "reconstruction_grid",
    "ssim_per_image",
    "text_tokenizer",
    "usage_figure",
    "write_report",
    "zero_shot_classifier",
]
