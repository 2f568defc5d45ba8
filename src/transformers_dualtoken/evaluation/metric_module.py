"""
The metrics for `evaluate` (extra `eval`): `evaluate.load(METRIC_MODULE, "psnr")`, where `METRIC_MODULE`, of
`transformers_dualtoken.evaluation`, is the path of this file. By the second argument:

- `psnr`, `ssim`, `lpips` (options of `load_lpips`), `rfid` (options of `fid_metric`): predictions and references are
  images `(3, H, W)` in [0, 1], all of one size; predictions are clamped. As `ReconstructionMetrics`.
- `codebook_usage` (options `codebook_size`, `shared_codebook`): predictions are codes `(H, W, D)`. As `CodebookUsage`.
- `retrieval_recall` (option `ks`): predictions are image embeddings `(hidden_size,)`, references the embeddings
  `(captions, hidden_size)` of each image's captions; both are brought to length 1. As `RetrievalRecall`.

All are held in memory: of large sets, `TokenizerEvaluator` measures the same in one pass.
"""

import datasets
import evaluate
import torch
import torch.nn.functional as F

from transformers_dualtoken import evaluation


def _nested(dtype: str, dimensions: int):
    return datasets.Sequence(_nested(dtype, dimensions - 1)) if dimensions else datasets.Value(dtype)


_FEATURES = {
    **dict.fromkeys(evaluation.RECONSTRUCTION_METRICS, (_nested("float32", 3), _nested("float32", 3))),
    "codebook_usage": (_nested("int64", 3),),
    "retrieval_recall": (_nested("float32", 1), _nested("float32", 2)),
}
_BATCH_SIZE = 32


class DualTokenMetric(evaluate.Metric):
    def _info(self):
        if self.config_name not in _FEATURES:
            raise ValueError(f"Name one of {', '.join(_FEATURES)} after the module, got {self.config_name!r}.")
        features = datasets.Features(zip(("predictions", "references"), _FEATURES[self.config_name]))
        info = evaluate.MetricInfo(description=__doc__, citation="", features=features)
        # As lists of Python numbers images would take many times the memory. The constructor takes a format for flat
        # columns only, though `datasets` has it for all.
        info.format = "torch"
        return info

    def _compute(self, predictions, references=None, **options):
        if not len(predictions):
            raise ValueError("There is nothing to measure: `predictions` is empty.")
        if self.config_name == "codebook_usage":
            usage = evaluation.CodebookUsage(predictions[0].shape[-1], **options)
            for codes in predictions:
                usage.update(codes)
            return {**usage.compute(), "per_depth": usage.compute_per_depth()}
        if self.config_name == "retrieval_recall":
            recall = evaluation.RetrievalRecall(**options)
            for image, texts in zip(predictions, references):
                recall.update(F.normalize(image[None], dim=-1), F.normalize(texts, dim=-1), [len(texts)])
            return recall.compute()
        if self.config_name == "lpips":
            options = {"lpips": evaluation.load_lpips(**options)}
        elif self.config_name == "rfid":
            options = {"fid": evaluation.fid_metric(**options)}
        metric = evaluation.ReconstructionMetrics((self.config_name,), **options)
        for start in range(0, len(predictions), _BATCH_SIZE):
            made, given = (
                torch.stack(list(column[start : start + _BATCH_SIZE])) for column in (predictions, references)
            )
            if given.min() < 0 or given.max() > 1:
                raise ValueError(
                    f"Images must lie in [0, 1]; a reference goes from {float(given.min())} to {float(given.max())}."
                )
            metric.update(made * 2 - 1, given * 2 - 1)
        return metric.compute()
