"""
Measure a DualToken vision tokenizer: rFID, PSNR, SSIM, LPIPS, zero-shot classification, image-text retrieval, and the
use of both codebooks, in one pass over any images.

    python examples/eval_tokenizer.py --model_name_or_path path/to/tokenizer --dataset path/to/images \\
        --output_dir evaluation

ImageNet's validation images, a folder per class, with the names of the classes in the order of the folders:

    python examples/eval_tokenizer.py --model_name_or_path path/to/tokenizer --dataset path/to/imagenet --split validation \\
        --label_column label --class_names imagenet_names.txt --dtype bfloat16 --output_dir evaluation

Captions, of which an image may have several:

    python examples/eval_tokenizer.py --model_name_or_path path/to/tokenizer --dataset path/to/flickr8k --split test \\
        --caption_column captions --metrics retrieval --output_dir evaluation

Several GPUs: the same after `torchrun --nproc_per_node 8`. Settings may also come from a JSON or YAML file, given
as the first argument; options after it count before the file's (examples/run_tokenizer.py says how its paths are read).
Metrics whose library or weights are missing are left out, with the reason in metrics.json, unless `--metrics` asks for
them. PSNR, SSIM, retrieval and the codebooks need the extra `train` or `demo`; rFID and zero-shot classification `eval`,
LPIPS `perceptual`, both with a torchvision that belongs to the installed torch.

Written are metrics.json, report.md, reconstructions.png and model_card_metadata.yaml.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoProcessor, AutoTokenizer

from transformers_dualtoken import DualTokenImageProcessorPil, DualTokenVisionTokenizerProcessor
from transformers_dualtoken.checkpoints import checkpoint_errors
from transformers_dualtoken.convert import is_official_folder, load_vision_tokenizer, official_siglip_path
from transformers_dualtoken.evaluation import (
    RECONSTRUCTION_METRICS,
    ImageBatches,
    MetricUnavailableError,
    ReconstructionMetrics,
    RetrievalRecall,
    TokenizerEvaluator,
    ZeroShotAccuracy,
    fid_metric,
    load_lpips,
    text_tokenizer,
    write_report,
    zero_shot_classifier,
)
from transformers_dualtoken.optional_libraries import MissingLibraryError, needed_libraries, require
from transformers_dualtoken.recipe_files import parse_settings, run_script


METRICS = (*RECONSTRUCTION_METRICS, "zero_shot", "retrieval", "codebook")


def option(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class EvaluationArguments:
    model_name_or_path: str = field(
        metadata={"help": "a vision tokenizer, a unified model, or a folder in the authors' format"}
    )
    dataset: str = field(
        metadata={"help": "folder of images or data files, pattern of files, saved data set, or name on the Hub"}
    )
    output_dir: str = field(metadata={"help": "where metrics.json, the report and the pictures go"})
    dataset_config_name: str | None = option(None, "configuration of a data set of the Hub")
    split: str = option("train", "split of the data set; files that name no split belong to train")
    streaming: bool = option(False, "read the data set as it comes, without preparing it")
    image_column: str = "image"
    label_column: str | None = option(None, "column of class indices, for zero-shot classification")
    class_names: str | None = option(
        None, "file of class names, one a line or a JSON list; by default the column's own"
    )
    caption_column: str | None = option(None, "column of captions, a text or a list of texts, for retrieval")
    num_samples: int | None = option(
        None, "evaluate the first rows only, of a stream as they come: of files sorted by class, the first classes"
    )
    metrics: list[str] | None = option(
        None, f"which of {', '.join(METRICS)}; by default all that the data and this machine allow"
    )
    text_tokenizer_name_or_path: str | None = option(
        None, "tokenizer of the text tower, where the model's folder has none"
    )
    processor_name_or_path: str | None = option(
        None, "folder with the image processor, where the model's folder has none"
    )
    inception_weights: str | None = option(
        None, "file of torch-fidelity's Inception weights; by default from torch hub's cache"
    )
    lpips_net: str = option("vgg", "network of LPIPS: vgg or alex")
    lpips_weights: str | None = option(
        None, "file of torchvision's weights of that network; by default from its cache"
    )
    batch_size: int = option(32, "images at a time in each process")
    dtype: str = option("float32", "float32, bfloat16 or float16; metrics are float32")
    num_workers: int = option(0, "processes that read images, for each process")
    num_shown: int = option(16, "images in the picture of reconstructions")
    use_cpu: bool = option(False, "even if there is a GPU")


def check(arguments: EvaluationArguments) -> None:
    """What can be known to be wrong before anything is loaded."""
    unknown = sorted(set(arguments.metrics or ()) - set(METRICS))
    if unknown:
        raise ValueError(f"--metrics holds {', '.join(unknown)}; there are {', '.join(METRICS)}.")
    if arguments.dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype must be float32, bfloat16 or float16, got {arguments.dtype!r}.")
    for name in ("class_names", "inception_weights", "lpips_weights"):
        path = getattr(arguments, name)
        if path is not None and not Path(path).is_file():
            raise FileNotFoundError(f"--{name} must be a file, and there is none at {path!r}.")
    for metric, column in (("zero_shot", "label_column"), ("retrieval", "caption_column")):
        if metric in (arguments.metrics or ()) and getattr(arguments, column) is None:
            raise ValueError(f"The metric {metric!r} needs --{column}, the name of a column of the data set.")
    if arguments.class_names is not None and arguments.label_column is None:
        raise ValueError("--class_names needs --label_column, the column of indices of these names.")


def load_rows(arguments: EvaluationArguments):
    """The data set: its images, undecoded, and the columns of labels and captions."""
    # After `--help`, which needs no extra.
    from transformers_dualtoken.training import load_image_dataset

    columns = (arguments.label_column, arguments.caption_column)
    return load_image_dataset(
        arguments.dataset,
        name=arguments.dataset_config_name,
        split=arguments.split,
        streaming=arguments.streaming,
        image_column=arguments.image_column,
        keep_columns=[column for column in columns if column is not None],
    )


def load_model(arguments: EvaluationArguments):
    """The vision tokenizer, its image processor and the tokenizer of its texts (`None` if there is none)."""
    path, text_path = arguments.model_name_or_path, arguments.text_tokenizer_name_or_path
    model, tokenizer = load_vision_tokenizer(path, getattr(torch, arguments.dtype)), None
    if is_official_folder(path):
        size = model.config.image_size
        image_processor = DualTokenImageProcessorPil(size={"height": size, "width": size})
        if arguments.label_column is not None or arguments.caption_column is not None:
            text_path = text_path or official_siglip_path(path)
    else:
        with checkpoint_errors(arguments.processor_name_or_path or path):
            processor = AutoProcessor.from_pretrained(arguments.processor_name_or_path or path)
        image_processor = processor.image_processor
        if isinstance(processor, DualTokenVisionTokenizerProcessor):
            tokenizer = processor.tokenizer
    if text_path is not None:
        with checkpoint_errors(text_path):
            tokenizer = AutoTokenizer.from_pretrained(text_path)
    return model, image_processor, tokenizer


def read_class_names(arguments: EvaluationArguments, dataset) -> list[str]:
    """The class names from the file, or from the data set's label column."""
    feature = (dataset.features or {}).get(arguments.label_column)
    own_names = getattr(feature, "names", None)
    if arguments.class_names is None:
        if own_names is None:
            raise ValueError(
                f"The column {arguments.label_column!r} does not name its classes: give --class_names, a file with one "
                "name a line."
            )
        return own_names
    text = Path(arguments.class_names).read_text(encoding="utf-8")
    names = json.loads(text) if arguments.class_names.endswith(".json") else text.strip().splitlines()
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(f"{arguments.class_names} must hold one class name a line, or be a JSON list of names.")
    if own_names is not None and len(names) != len(own_names):
        raise ValueError(
            f"{arguments.class_names} holds {len(names)} class names, but the column {arguments.label_column!r} has "
            f"{len(own_names)} classes."
        )
    return names


def find_parts(arguments: EvaluationArguments, tokenize, dataset) -> tuple[dict, dict[str, str]]:
    """
    What every metric is made of, and why others that nobody asked for are left out. Libraries and networks are looked
    up, and downloaded; no process waits for another.
    """

    def check_texts(column: str) -> None:
        if getattr(arguments, column) is None:
            raise MetricUnavailableError(f"--{column} is not given.")
        if tokenize is None:
            raise MetricUnavailableError(
                "The model's folder has no tokenizer of its texts: give --text_tokenizer_name_or_path."
            )

    def zero_shot() -> list[str]:
        check_texts("label_column")
        for library in ("open_clip", "torchmetrics.classification"):
            require(library, "Zero-shot classification")
        return read_class_names(arguments, dataset)

    def retrieval() -> RetrievalRecall:
        check_texts("caption_column")
        return RetrievalRecall()

    builders = {
        "lpips": lambda: load_lpips(arguments.lpips_net, arguments.lpips_weights),
        "rfid": lambda: fid_metric(weights=arguments.inception_weights),
        "zero_shot": zero_shot,
        "retrieval": retrieval,
    }
    parts, skipped = {}, {}
    for name in METRICS if arguments.metrics is None else arguments.metrics:
        try:
            parts[name] = builders[name]() if name in builders else None
        except (MetricUnavailableError, MissingLibraryError) as error:
            if arguments.metrics is not None:
                raise
            skipped[name] = str(error)
    return parts, skipped


def build_evaluator(model, tokenize, parts: dict, num_shown: int) -> TokenizerEvaluator:
    """The evaluator from `find_parts`, by all processes together: they share the classes of zero-shot classification."""
    names = [name for name in RECONSTRUCTION_METRICS if name in parts]
    zero_shot = None
    if "zero_shot" in parts:
        zero_shot = ZeroShotAccuracy(zero_shot_classifier(model, tokenize, parts["zero_shot"]))
    return TokenizerEvaluator(
        model,
        ReconstructionMetrics(names, lpips=parts.get("lpips"), fid=parts.get("rfid")) if names else None,
        zero_shot,
        parts.get("retrieval"),
        codebooks="codebook" in parts,
        num_shown=num_shown,
    )


def main(argv: list[str] | None = None) -> dict:
    (arguments,) = parse_settings((EvaluationArguments,), argv)
    check(arguments)

    # After `--help`, as above.
    with needed_libraries("eval_tokenizer.py"):
        from accelerate import PartialState
        from accelerate.utils import gather_object, reduce

    # Metrics are float64, which not every accelerator has; and without `cpu` accelerate takes several processes for one.
    state = PartialState(cpu=arguments.use_cpu or not torch.cuda.is_available())
    dataset = load_rows(arguments)
    model, image_processor, tokenizer = load_model(arguments)
    model = model.to(state.device).eval()
    tokenize = None
    if tokenizer is not None:
        tokenize = text_tokenizer(tokenizer, model.config.text_config.max_position_embeddings)
    # One process of a machine downloads what is missing, the others find it.
    with state.local_main_process_first():
        parts, skipped = find_parts(arguments, tokenize, dataset)
    if len(set(gather_object([tuple(skipped)]))) > 1:
        raise RuntimeError(
            f"The machines do not have the same libraries and weights: this one cannot measure {sorted(skipped)}, "
            "another one can. Mend that, or name the --metrics."
        )
    evaluator = build_evaluator(model, tokenize, parts, arguments.num_shown)
    batches = ImageBatches(
        dataset,
        image_processor,
        batch_size=arguments.batch_size,
        image_column=arguments.image_column,
        label_column=arguments.label_column if evaluator.zero_shot is not None else None,
        caption_column=arguments.caption_column if evaluator.retrieval is not None else None,
        tokenize=tokenize,
        num_samples=arguments.num_samples,
        num_workers=arguments.num_workers,
    )
    metrics = evaluator.run(tqdm(batches, unit="batch", disable=not state.is_main_process))
    num_skipped = int(reduce(torch.tensor(batches.num_skipped, device=state.device), reduction="sum"))
    results = {}
    if state.is_main_process:
        results = write_report(
            arguments.output_dir,
            metrics,
            model=arguments.model_name_or_path,
            data={
                "source": arguments.dataset,
                "config": arguments.dataset_config_name,
                "split": arguments.split,
                "unreadable_images_skipped": num_skipped,
            },
            shown=evaluator.shown,
            skipped=skipped,
            settings={
                **asdict(arguments),
                "num_processes": state.num_processes,
                "inception_weights_sha256": getattr(
                    evaluator.reconstruction and evaluator.reconstruction.fid, "weights_sha256", None
                ),
            },
        )
        print(Path(arguments.output_dir, "report.md").read_text())
    state.wait_for_everyone()
    state.destroy_process_group()
    return results


if __name__ == "__main__":
    run_script(main)
