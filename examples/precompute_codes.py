"""
Turn any data set for unified training into one with codes: the encoder runs once, and training needs no images.

    python examples/precompute_codes.py --model_name_or_path path/to/model --dataset path/to/chats.jsonl \\
        --output_dir codes --num_workers 8 --bf16

The model is a vision tokenizer or a unified model; only its tokenizer is loaded. The data set is whatever
examples/run_unified.py takes: a file, a folder, a pattern, the name of a data set on the Hub, or a JSON or YAML file of
several. `--dataset_format` and `--dataset_options` say more of a single one:

    python examples/precompute_codes.py --model_name_or_path path/to/model --dataset 'shards/*.tar' \\
        --dataset_format caption --dataset_options '{"task": "both"}' --on_bad_sample skip --output_dir codes

Several GPUs: the same after `torchrun --nproc_per_node 8`; the result is the same, whatever their number. A run that
was stopped goes on after its last whole shards when started again with the same command. Settings may also come from
a JSON or YAML file, given as the first argument; options after it count before the file's.

The folder holds dualtoken_codes.json and parquet shards. It is given to examples/run_unified.py as
a data set, and is refused with another tokenizer than this one: `--dtype` and `--bf16` must be those of the training.
"""

from dataclasses import dataclass, field

import torch
from transformers import AutoProcessor

from transformers_dualtoken import DualTokenImageProcessorPil
from transformers_dualtoken.checkpoints import checkpoint_errors
from transformers_dualtoken.convert import is_official_folder, load_vision_tokenizer
from transformers_dualtoken.data import load_chat_sources, precompute_codes
from transformers_dualtoken.optional_libraries import needed_libraries
from transformers_dualtoken.recipe_files import parse_settings, run_script
from transformers_dualtoken.training.arguments import json_object


with needed_libraries("precompute_codes.py"):
    from accelerate import PartialState


@dataclass
class PrecomputeArguments:
    model_name_or_path: str = field(
        metadata={"help": "a vision tokenizer, a unified model, or a folder in the authors' format"}
    )
    dataset: str = field(
        metadata={"help": "file, folder, pattern, data set on the Hub, or JSON or YAML file of a mixture of sources"}
    )
    output_dir: str = field(metadata={"help": "a new folder, or one that the same command began"})
    dataset_format: str | None = field(
        default=None,
        metadata={"help": "messages, llava, caption, edit, text or interleaved; told from the columns if left out"},
    )
    dataset_options: dict | str | None = field(
        default=None, metadata={"help": "JSON object of the source's other settings, or the path of one"}
    )
    split: str = field(default="train")
    on_bad_sample: str = field(
        default="error",
        metadata={"help": "pass over samples that are faulty and count them, or end", "choices": ["error", "skip"]},
    )
    batch_size: int = field(default=64, metadata={"help": "images that are encoded at once, per process"})
    num_workers: int = field(default=4, metadata={"help": "processes that read images, per process that encodes"})
    samples_per_shard: int = field(default=2048, metadata={"help": "what a stopped process loses at most"})
    dtype: str = field(
        default="float32",
        metadata={"help": "of the weights", "choices": ["float32", "bfloat16", "float16"]},
    )
    bf16: bool = field(
        default=False, metadata={"help": "encode under bfloat16 autocast, as training with --bf16 does"}
    )
    use_cpu: bool = field(default=False)


def load_model(arguments: PrecomputeArguments):
    """The vision tokenizer and its image processor."""
    path = arguments.model_name_or_path
    model = load_vision_tokenizer(path, getattr(torch, arguments.dtype))
    if is_official_folder(path):
        size = model.config.image_size
        return model, DualTokenImageProcessorPil(size={"height": size, "width": size})
    with checkpoint_errors(path):
        return model, AutoProcessor.from_pretrained(path).image_processor


def load_sources(arguments: PrecomputeArguments) -> list:
    spec = arguments.dataset
    if arguments.dataset_format is not None or arguments.dataset_options is not None:
        spec = {"path": spec, **json_object(arguments.dataset_options, "dataset_options")}
        if arguments.dataset_format is not None:
            spec["format"] = arguments.dataset_format
    return load_chat_sources(spec, split=arguments.split)


def main(argv: list[str] | None = None) -> None:
    (arguments,) = parse_settings((PrecomputeArguments,), argv)

    # Without `cpu` accelerate takes several processes on a CPU for one.
    state = PartialState(cpu=arguments.use_cpu or not torch.cuda.is_available())
    model, image_processor = load_model(arguments)
    # One process of a machine copies the data set to the cache, the others find it.
    with state.local_main_process_first():
        sources = load_sources(arguments)
    description = precompute_codes(
        model.to(state.device),
        image_processor,
        sources,
        arguments.output_dir,
        batch_size=arguments.batch_size,
        samples_per_shard=arguments.samples_per_shard,
        bf16=arguments.bf16,
        on_bad_sample=arguments.on_bad_sample,
        num_workers=arguments.num_workers,
        rank=state.process_index,
        world_size=state.num_processes,
        show_progress=state.is_local_main_process,
    )
    if description is not None:  # of the process that was the last one
        print(
            f"{arguments.output_dir} is finished: {description['num_samples']:,} samples with "
            f"{description['num_images']:,} images in {description['num_shards']:,} shards; "
            f"{description['num_skipped']:,} samples skipped."
        )
    state.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
