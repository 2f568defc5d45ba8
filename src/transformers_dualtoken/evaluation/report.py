"""What an evaluation leaves behind: metrics.json, pictures, a Markdown report and a model card's metadata."""

import json
import math
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import EvalResult, ModelCardData

from .codebook_statistics import CodebookUsage
from .evaluator import CONVENTIONS
from .optional_libraries import MetricUnavailableError, require
from .pictures import reconstruction_grid, usage_figure


class Description(NamedTuple):
    """What a report says of a metric; one without a task is no result for the model card."""

    title: str
    unit: str
    convention: str
    task: str | None
    format: str


DESCRIPTIONS = {
    "rfid": Description("rFID", "lower is better", "rfid", "image-to-image", "{:.3f}"),
    "psnr": Description("PSNR", "dB", "psnr", "image-to-image", "{:.2f}"),
    "exact_images": Description("Images reproduced exactly", "left out of PSNR", "psnr", None, "{}"),
    "ssim": Description("SSIM", "0 to 1", "ssim", "image-to-image", "{:.3f}"),
    "lpips": Description("LPIPS", "lower is better", "lpips", "image-to-image", "{:.4f}"),
    **{
        f"zero_shot_top{k}": Description(
            f"Zero-shot top-{k}", "share", "zero_shot", "zero-shot-image-classification", "{:.4f}"
        )
        for k in (1, 5)
    },
    **{
        f"{direction}_recall_at_{k}": Description(
            f"{title} R@{k}", "share", "recall", "image-text-retrieval", "{:.4f}"
        )
        for direction, title in (("image_to_text", "Image to text"), ("text_to_image", "Text to image"))
        for k in (1, 5, 10)
    },
    **{
        f"{kind}_codebook_{name}": Description(
            f"{kind.capitalize()} codebook {name}", unit, "codebook", "image-feature-extraction", form
        )
        for kind in ("pixel", "semantic")
        for name, unit, form in (
            ("usage", "share", "{:.4f}"),
            ("perplexity", "codes", "{:.1f}"),
            ("entropy", "bits", "{:.3f}"),
        )
    },
}
_LIBRARIES = (
    "transformers-dualtoken",
    "torch",
    "transformers",
    "datasets",
    "torchmetrics",
    "torch-fidelity",
    "open_clip_torch",
    "lpips",
)


def library_versions() -> dict[str, str]:
    """Versions of the libraries the numbers come from, those that are installed."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def model_card_metadata(results: dict) -> ModelCardData:
    """
    The metadata block of a model card with every number, as the Hub shows them.

    Args:
        results (`dict`): what `write_report` gets.
    """
    data = results["data"]
    source = str(data["source"])
    # Nobody else has this machine's folders.
    dataset = Path(source).name if Path(source).exists() else source
    return ModelCardData(
        library_name="transformers",
        tags=["dualtoken", "vision-tokenizer"],
        pipeline_tag="image-feature-extraction",
        model_name=Path(str(results["model"])).name,
        eval_results=[
            EvalResult(
                task_type=DESCRIPTIONS[name].task,
                dataset_type=dataset,
                dataset_name=dataset,
                dataset_config=data.get("config"),
                dataset_split=data.get("split"),
                metric_type=name,
                metric_name=DESCRIPTIONS[name].title,
                metric_value=round(value, 6),
            )
            for name, value in results["metrics"].items()
            if name in DESCRIPTIONS and DESCRIPTIONS[name].task is not None and math.isfinite(value)
        ],
    )


def _finite(value):
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def markdown_report(results: dict, has_pictures: bool = True, has_histograms: bool = True) -> str:
    """The report as Markdown; `reconstructions.png` and `codebook_usage.png` lie beside it if there are any."""
    metrics, data = results["metrics"], results["data"]
    lines = [
        f"# Evaluation of {Path(str(results['model'])).name}",
        "",
        f"{metrics['num_images']} images of `{data['source']}`"
        + (f", split `{data['split']}`" if data.get("split") else "")
        + ".",
        "",
        "| metric | value | |",
        "| --- | ---: | --- |",
    ]
    for name, about in DESCRIPTIONS.items():
        if name in metrics:
            lines.append(f"| {about.title} | {about.format.format(metrics[name])} | {about.unit} |")
    if results.get("skipped"):
        lines += ["", "## Not measured", ""]
        lines += [f"- {name}: {reason}" for name, reason in results["skipped"].items()]
    if has_pictures:
        lines += ["", "## Reconstructions", "", "Originals, and below each its reconstruction.", ""]
        lines += ["![reconstructions](reconstructions.png)"]
    if "per_depth" in metrics:
        lines += ["", "## Codebooks", ""]
        lines += ["![codebook usage](codebook_usage.png)", ""] if has_histograms else []
        columns = list(metrics["per_depth"])
        lines += ["| depth | " + " | ".join(name.replace("_codebook_", " ") for name in columns) + " |"]
        lines += ["| ---: " * (len(columns) + 1) + "|"]
        depth_rows = max(len(values) for values in metrics["per_depth"].values())
        for depth in range(depth_rows):
            cells = [
                DESCRIPTIONS[name].format.format(values[depth]) if depth < len(values) else ""
                for name, values in metrics["per_depth"].items()
            ]
            lines.append(f"| {depth + 1} | " + " | ".join(cells) + " |")
    lines += ["", "## How it was measured", ""]
    lines += [f"- {name}: {text}." for name, text in results["conventions"].items()]
    lines += [f"- {name} {number}" for name, number in results["versions"].items()]
    return "\n".join(lines) + "\n"


def write_report(
    output_dir: str | Path,
    metrics: dict,
    model: str,
    data: dict,
    shown: list[tuple[torch.Tensor, torch.Tensor]],
    usages: dict[str, CodebookUsage] | None = None,
    skipped: dict[str, str] | None = None,
    settings: dict | None = None,
) -> dict:
    """
    Write `metrics.json`, `report.md`, `reconstructions.png`, `codebook_usage.png` and `model_card_metadata.yaml`.

    Args:
        output_dir (`str` or `Path`): made if it does not exist; files of these names in it are replaced, or removed
            where there is no such picture now. Pictures are drawn last, when the numbers are safe.
        metrics (`dict`): from `TokenizerEvaluator.compute`.
        model (`str`): its name or path.
        data (`dict`): at least `source`, and what else describes the images, such as `split`.
        shown: from `TokenizerEvaluator.shown`.
        usages (*optional*): codebook name -> counts over all processes, `TokenizerEvaluator.total_usage`.
        skipped (*optional*): metric -> why it was not measured; `codebook_usage.png` joins them where matplotlib is
            missing.
        settings (*optional*): anything else the numbers depend on.

    Returns:
        `dict`: the contents of `metrics.json`; a value that is not finite is `null` there.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    skipped, can_plot = dict(skipped or {}), bool(usages)
    if usages:
        try:
            require("matplotlib.figure", "The picture of codebook usage")
        except MetricUnavailableError as error:
            skipped["codebook_usage.png"], can_plot = str(error), False
    conventions = {"images", *(about.convention for name, about in DESCRIPTIONS.items() if name in metrics)}
    results = {
        "model": str(model),
        "data": data,
        "metrics": metrics,
        "skipped": skipped,
        "settings": settings or {},
        "conventions": {name: text for name, text in CONVENTIONS.items() if name in conventions},
        "versions": library_versions(),
    }
    (output_dir / "metrics.json").write_text(json.dumps(_finite(results), indent=2, allow_nan=False) + "\n")
    (output_dir / "report.md").write_text(markdown_report(results, has_pictures=bool(shown), has_histograms=can_plot))
    (output_dir / "model_card_metadata.yaml").write_text(model_card_metadata(results).to_yaml() + "\n")
    # An earlier run's pictures would pass for this one's.
    for name in ("reconstructions.png", "codebook_usage.png"):
        (output_dir / name).unlink(missing_ok=True)
    if shown:
        reconstruction_grid(*map(torch.stack, zip(*shown))).save(output_dir / "reconstructions.png")
    if can_plot:
        usage_figure(usages).savefig(output_dir / "codebook_usage.png", dpi=100)
    return _finite(results)


__all__ = [
    "library_versions",
    "markdown_report",
    "model_card_metadata",
    "write_report",
]
