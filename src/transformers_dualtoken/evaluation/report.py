"""What an evaluation leaves behind: metrics.json, pictures, a Markdown report and a model card's metadata."""

import json
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCardData

from ..configuration_dualtoken import CODE_KINDS
from .pictures import reconstruction_grid


# How the numbers are made, by families of metrics, which are parts of the metrics' names; written beside them.
CONVENTIONS = {
    "images": "as the checkpoint's image processor resizes them, and bilinearly to the reconstruction's size where that is "
    "another; reconstructions are decoded from the codes; compared as float32 tensors, clamped, no file format between",
    "psnr": "dB, mean over images of the PSNR over all pixels and channels, data range 1; images reproduced exactly "
    "(exact_images) are left out",
    "ssim": "mean over images, RGB channels and inner positions; Gaussian window of sigma 1.5 (11 x 11), data range 1",
    "lpips": "mean over images, in [-1, 1], network given as lpips_net",
    "rfid": "Frechet distance of torch-fidelity's Inception features (2048), images at the nearest of 256 levels and "
    "resized as torch-fidelity does; of the evaluated images against their reconstructions; of equal sets 0 up to "
    "rounding, which may be negative",
    "zero_shot": "share of images whose class is first (top1) or among the first five (top5) by the mean of open_clip's "
    "80 templates; embeddings of length 1",
    "recall": "share of images with one of their captions (image_to_text), and of captions with their image "
    "(text_to_image), among the k nearest of all evaluated; ties count against the right answer",
    "codebook": "usage: share of codes that occurred; entropy in bits of the codes' frequencies; perplexity: 2 to the "
    "entropy; a shared codebook over all depths together, others as the mean of their depths",
}
# Of a family without one, nothing goes into a model card.
_TASKS = {
    **dict.fromkeys(("psnr", "ssim", "lpips", "rfid"), "image-to-image"),
    "zero_shot": "zero-shot-image-classification",
    "recall": "image-text-retrieval",
    "codebook": "image-feature-extraction",
}
_DIRECTIONS = {"image_to_text": "Image to text", "text_to_image": "Text to image"}
_TITLES = {
    "rfid": "rFID (lower is better)",
    "psnr": "PSNR (dB)",
    "exact_images": "Images reproduced exactly, left out of PSNR",
    "ssim": "SSIM",
    "lpips": "LPIPS (lower is better)",
    **{f"zero_shot_top{k}": f"Zero-shot top-{k}" for k in (1, 5)},
    **{f"{name}_recall_at_{k}": f"{title} R@{k}" for name, title in _DIRECTIONS.items() for k in (1, 5, 10)},
    **{
        f"{kind}_codebook_{name}": f"{kind.capitalize()} codebook {name}"
        for kind in CODE_KINDS
        for name in ("usage", "perplexity", "entropy")
    },
}
_LIBRARIES = (
    "transformers-dualtoken torch transformers datasets torchmetrics torch-fidelity open_clip_torch lpips".split()
)


def _family(name: str) -> str:
    return next(family for family in CONVENTIONS if family in name)


def _model_card_metadata(results: dict) -> ModelCardData:
    """The metadata block of a model card with every finite number, as the Hub shows them."""
    data = results["data"]
    source = str(data["source"])
    # Nobody else has this machine's folders.
    dataset = Path(source).name if Path(source).exists() else source
    return ModelCardData(
        library_name="transformers",
        tags=["dualtoken", "vision-tokenizer"],
        pipeline_tag="image-feature-extraction",
        model_name=Path(results["model"]).name,
        eval_results=[
            EvalResult(
                task_type=_TASKS[_family(name)],
                dataset_type=dataset,
                dataset_name=dataset,
                dataset_config=data.get("config"),
                dataset_split=data.get("split"),
                metric_type=name,
                metric_name=title,
                metric_value=round(results["metrics"][name], 6),
            )
            for name, title in _TITLES.items()
            if results["metrics"].get(name) is not None and _family(name) in _TASKS
        ],
    )


def _shown(value: float | int | str | None) -> str:
    return "not finite" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _markdown_report(results: dict, has_pictures: bool) -> str:
    """`reconstructions.png` lies beside the report if there are any pictures."""
    metrics, data = results["metrics"], results["data"]
    split = f", split `{data['split']}`" if data.get("split") else ""
    lines = [f"# Evaluation of {Path(results['model']).name}", ""]
    lines += [f"{metrics['num_images']} images of `{data['source']}`{split}.", ""]
    lines += ["| metric | value |", "| --- | ---: |"]
    lines += [f"| {title} | {_shown(metrics[name])} |" for name, title in _TITLES.items() if name in metrics]
    if results["skipped"]:
        lines += ["", "## Not measured", ""]
        lines += [f"- {name}: {reason}" for name, reason in results["skipped"].items()]
    if has_pictures:
        lines += ["", "## Reconstructions", "", "Originals, and below each its reconstruction.", ""]
        lines += ["![reconstructions](reconstructions.png)"]
    if "per_depth" in metrics:
        lines += ["", "## Codebooks", ""]
        columns = metrics["per_depth"]
        lines += ["| depth | " + " | ".join(name.replace("_codebook_", " ") for name in columns) + " |"]
        lines += ["| ---: " * (len(columns) + 1) + "|"]
        rows = enumerate(zip_longest(*columns.values(), fillvalue=""), start=1)
        lines += [f"| {depth} | " + " | ".join(map(_shown, row)) + " |" for depth, row in rows]
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
    skipped: dict[str, str] | None = None,
    settings: dict | None = None,
) -> dict:
    """
    Write `metrics.json`, `report.md`, `model_card_metadata.yaml` and, last, `reconstructions.png`, whose file from an
    earlier run is removed where no images are shown now.

    Args:
        metrics, shown: `compute()` and `shown` of a [`TokenizerEvaluator`].
        model (`str`): its name or path.
        data (`dict`): at least `source`, and what else describes the images, such as `split`.
        skipped (*optional*): metric -> why it was not measured.
        settings (*optional*): anything else the numbers depend on.

    Returns:
        `dict`: the contents of `metrics.json`; a value that is not finite is `null` there.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    families, versions = {"images", *(_family(name) for name in _TITLES if name in metrics)}, {}
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    results = {
        "model": str(model),
        "data": data,
        "metrics": metrics,
        "skipped": skipped or {},
        "settings": settings or {},
        "conventions": {family: text for family, text in CONVENTIONS.items() if family in families},
        "versions": versions,
    }
    # JSON has no NaN and no infinity.
    results = json.loads(json.dumps(results), parse_constant=lambda _: None)
    (output_dir / "metrics.json").write_text(json.dumps(results, indent=2) + "\n")
    (output_dir / "report.md").write_text(_markdown_report(results, bool(shown)))
    (output_dir / "model_card_metadata.yaml").write_text(_model_card_metadata(results).to_yaml() + "\n")
    # An earlier run's picture would pass for this one's.
    (output_dir / "reconstructions.png").unlink(missing_ok=True)
    if shown:
        reconstruction_grid(*map(torch.stack, zip(*shown))).save(output_dir / "reconstructions.png")
    return results
