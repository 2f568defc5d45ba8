"""
How well a vision tokenizer reconstructs, classifies, retrieves, and uses its codebooks.

Importable with the core installation; what needs more (extras `eval` and `perceptual`) is imported when it is used, and
`MissingLibraryError` says what is missing. `METRIC_MODULE` is the path of the metrics for `evaluate.load`.
"""

from pathlib import Path

from .codebook_statistics import CodebookUsage
from .evaluator import TokenizerEvaluator
from .image_batches import ImageBatches
from .image_metrics import RECONSTRUCTION_METRICS, ReconstructionMetrics, psnr_per_image, ssim_per_image
from .perceptual import MetricUnavailableError, fid_metric, load_lpips
from .pictures import reconstruction_grid
from .report import CONVENTIONS, write_report
from .retrieval import RetrievalRecall
from .zero_shot import ZeroShotAccuracy, text_tokenizer, zero_shot_classifier


METRIC_MODULE = str(Path(__file__).with_name("metric_module.py"))

__all__ = [
    "CONVENTIONS",
    "CodebookUsage",
    "ImageBatches",
    "METRIC_MODULE",
    "MetricUnavailableError",
    "RECONSTRUCTION_METRICS",
    "ReconstructionMetrics",
    "RetrievalRecall",
    "TokenizerEvaluator",
    "ZeroShotAccuracy",
    "fid_metric",
    "load_lpips",
    "psnr_per_image",
    "reconstruction_grid",
    "ssim_per_image",
    "text_tokenizer",
    "write_report",
    "zero_shot_classifier",
]
