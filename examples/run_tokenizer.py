"""
Train a DualToken vision tokenizer on any images.

From a SigLIP or SigLIP 2 checkpoint of fixed resolution, with all terms of the paper's stage 1 (the perceptual one needs
the extra `perceptual`):

    python examples/run_tokenizer.py --siglip_model_name_or_path google/siglip2-so400m-patch14-384 \\
        --train_dataset path/to/images --output_dir tokenizer --max_steps 10000 --per_device_train_batch_size 8 --bf16

Without LPIPS and adversary: `--loss_weights '{"perceptual": 0, "generator": 0}'`. The other stages: `--stage 0`, then
`--stage 1`, `--stage 2` with `--model_name_or_path` of the stage before. Several GPUs: the same after
`torchrun --nproc_per_node 8`, or after `accelerate launch`. Settings may also come from a JSON or YAML file, given as the
first argument; options after it count before the file's. Relative paths in it are looked for beside it and then in the
working directory. examples/configs/ holds the paper's.

The semantic codes may then learn from captions, against those of the other images of a batch on all GPUs; pixel codes
and reconstructions stay as they are, bit for bit, and no teacher is needed:

    python examples/run_tokenizer.py --stage contrastive --model_name_or_path tokenizer --train_dataset 'pairs/*.tar' \\
        --caption_column txt --output_dir tokenizer-contrastive --max_steps 5000 --per_device_train_batch_size 128 --bf16

Images: a folder, parquet files, webdataset shards, or a data set of the Hub; with `--streaming` they are read while
training. Captions: a column of them, of a folder of images in its `metadata.jsonl`, of a webdataset a key such as `txt`
or a field of its `json`. A run that was stopped goes on from its last checkpoint when started again with the same command; SIGTERM makes
it save one after the step at hand and exit with status 0.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    SiglipModel,
    SiglipVisionModel,
    TrainingArguments,
    set_seed,
)

from transformers_dualtoken import (
    DualTokenImageProcessorPil,
    DualTokenVisionTokenizer,
    DualTokenVisionTokenizerProcessor,
)
from transformers_dualtoken.checkpoints import checkpoint_errors
from transformers_dualtoken.convert import is_official_folder, load_vision_tokenizer, official_siglip_path
from transformers_dualtoken.evaluation.zero_shot import text_tokenizer
from transformers_dualtoken.recipe_files import parse_settings, run_script
from transformers_dualtoken.remote_code import carry_code
from transformers_dualtoken.training import (
    DualTokenImageDataset,
    DualTokenImageStream,
    DualTokenVisionTokenizerRecipe,
    DualTokenVisionTokenizerTrainer,
    DualTokenVisionTokenizerTrainingArguments,
    collate_images,
    find_checkpoint,
    load_image_dataset,
    use_cpu_threads,
)
from transformers_dualtoken.training.arguments import json_object
from transformers_dualtoken.training.checkpoints import step_of


@dataclass
class ModelArguments:
    siglip_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "SigLIP or SigLIP 2 checkpoint: the frozen teacher, which --stage contrastive does without, and the "
            "start of a new encoder"
        },
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "a tokenizer to go on from instead of a new one: this project's, or a folder in the authors' "
            "format, which names its own teacher"
        },
    )
    config_overrides: dict | str | None = field(
        default=None,
        metadata={"help": "JSON object of DualTokenVisionTokenizerConfig fields, or the path of one, for a new model"},
    )


@dataclass
class DataArguments:
    train_dataset: str = field(
        metadata={
            "help": "folder of images (with or without sub-folders), folder, file or pattern of parquet files or "
            "webdataset shards (.tar), folder of save_to_disk, or name of a data set on the Hub"
        }
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "configuration of a data set on the Hub"})
    train_split: str = field(default="train")
    eval_dataset: str | None = field(default=None, metadata={"help": "like --train_dataset, for the evaluation"})
    eval_split: str = field(default="validation")
    image_column: str = field(default="image")
    caption_column: str | None = field(
        default=None, metadata={"help": "column of captions, a text or a list of texts, for --stage contrastive"}
    )
    streaming: bool = field(default=False, metadata={"help": "read the training images while training"})
    shuffle_buffer_size: int = field(default=1000, metadata={"help": "images that a stream shuffles at a time"})
    crop_scale: list[float] = field(
        default_factory=lambda: [0.9, 1.0], metadata={"help": "range of the random crop's share of the area"}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "take only the first so many images"})
    max_eval_samples: int | None = field(default=None)


def load_model(
    arguments: ModelArguments, needs_teacher: bool = True
) -> tuple[DualTokenVisionTokenizer, SiglipVisionModel | None, DualTokenVisionTokenizerProcessor]:
    """The tokenizer to train, its teacher if one is needed, and the processor that is saved with it."""
    start, siglip = arguments.model_name_or_path, arguments.siglip_model_name_or_path
    if siglip is None and start is not None and is_official_folder(start):
        siglip = official_siglip_path(start)
    if siglip is None and (needs_teacher or start is None):
        raise ValueError("The frozen teacher is missing: give --siglip_model_name_or_path, a SigLIP checkpoint.")
    if start is not None and arguments.config_overrides is not None:
        raise ValueError("--config_overrides is for a new model; --model_name_or_path brings its own config.")
    if start is None:
        model = DualTokenVisionTokenizer.from_siglip_pretrained(
            siglip, **json_object(arguments.config_overrides, "config_overrides")
        )
    else:
        model = load_vision_tokenizer(start)
    teacher = load_teacher(siglip, model, start) if needs_teacher else None
    size, text_path = model.config.image_size, start if siglip is None else siglip
    with checkpoint_errors(text_path):
        tokenizer = AutoTokenizer.from_pretrained(text_path)
    processor = DualTokenVisionTokenizerProcessor(
        DualTokenImageProcessorPil(size={"height": size, "width": size}),
        tokenizer,
        text_length=model.config.text_config.max_position_embeddings,
    )
    carry_code(model, processor)
    return model, teacher, processor


def load_teacher(siglip: str, model: DualTokenVisionTokenizer, start: str | None) -> SiglipVisionModel:
    with checkpoint_errors(siglip):
        teacher = SiglipModel.from_pretrained(siglip, dtype=torch.float32).vision_model
    for name in ("hidden_size", "image_size", "patch_size", "num_hidden_layers"):
        ours, theirs = (getattr(config, name) for config in (model.config.vision_config, teacher.config))
        if ours != theirs:
            raise ValueError(
                f"The tokenizer {start!r} does not fit its teacher {siglip!r}: {name} is {ours} in the one and "
                f"{theirs} in the other. Give the SigLIP checkpoint that it was built on."
            )
    return teacher


def caption_settings(data: DataArguments, processor: DualTokenVisionTokenizerProcessor) -> dict:
    """How a data set makes `input_ids` of captions, where there are any."""
    tokenize = text_tokenizer(processor.tokenizer, processor.text_length)
    return {} if data.caption_column is None else {"caption_column": data.caption_column, "tokenize": tokenize}


def load_train_images(data: DataArguments, processor, training: TrainingArguments):
    image_processor, captions = processor.image_processor, caption_settings(data, processor)
    images = load_image_dataset(
        data.train_dataset,
        name=data.dataset_config_name,
        split=data.train_split,
        streaming=data.streaming,
        image_column=data.image_column,
        keep_columns=filter(None, [data.caption_column]),
    )
    settings = {"image_column": data.image_column, "crop_scale": tuple(data.crop_scale), "seed": training.seed}
    settings |= captions
    if data.streaming:
        if data.max_train_samples is not None:
            images = images.take(data.max_train_samples)
        return DualTokenImageStream(
            images,
            image_processor,
            **settings,
            shuffle_buffer_size=data.shuffle_buffer_size,
            rank=training.process_index,
            world_size=training.world_size,
        )
    return DualTokenImageDataset(_first(images, data.max_train_samples), image_processor, **settings)


def load_eval_images(data: DataArguments, processor):
    if data.eval_dataset is None:
        return None
    images = load_image_dataset(
        data.eval_dataset,
        name=data.dataset_config_name,
        split=data.eval_split,
        image_column=data.image_column,
        keep_columns=filter(None, [data.caption_column]),
    )
    images = _first(images, data.max_eval_samples)
    settings = {"image_column": data.image_column, **caption_settings(data, processor)}
    return DualTokenImageDataset(images, processor.image_processor, crop_scale=(1, 1), reducing_gap=None, **settings)


def _first(images, count: int | None):
    return images if count is None else images.select(range(min(count, len(images))))


def main(argv: list[str] | None = None, callbacks: list | None = None) -> None:
    model_arguments, data_arguments, recipe, training_arguments = parse_settings(
        (ModelArguments, DataArguments, DualTokenVisionTokenizerRecipe, DualTokenVisionTokenizerTrainingArguments),
        argv,
    )
    if data_arguments.streaming and training_arguments.max_steps < 1:
        raise ValueError("A stream has no length, so --streaming needs --max_steps.")
    if recipe.is_contrastive != (data_arguments.caption_column is not None):
        raise ValueError("--caption_column names the captions of --stage contrastive: give both or neither.")
    if training_arguments.cpu_threads is not None:
        print(use_cpu_threads(training_arguments.cpu_threads))
    set_seed(training_arguments.seed)

    model, teacher, processor = load_model(model_arguments, bool(recipe.teacher_terms))
    trainer = DualTokenVisionTokenizerTrainer(
        model=model,
        args=training_arguments,
        teacher=teacher,
        recipe=recipe,
        train_dataset=load_train_images(data_arguments, processor, training_arguments),
        eval_dataset=load_eval_images(data_arguments, processor),
        data_collator=collate_images,
        processing_class=processor,
        callbacks=callbacks,
    )
    checkpoint = find_checkpoint(training_arguments)
    first_step = step_of(checkpoint)
    if checkpoint is not None and trainer.is_world_process_zero():
        print(f"Going on from {checkpoint}.")
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    if (
        not 0 < result.global_step == first_step
        or not Path(training_arguments.output_dir, "train_results.json").is_file()
    ):
        # Of a run that was finished already, the metrics of the one that did the work stay as they are.
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if trainer.eval_dataset is not None:
        trainer.save_metrics("eval", trainer.evaluate())


if __name__ == "__main__":
    run_script(main)
