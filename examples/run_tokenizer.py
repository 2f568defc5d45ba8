"""
Train a DualToken vision tokenizer on any images, starting from a SigLIP or SigLIP 2 checkpoint of fixed resolution.

One process:

    python examples/run_tokenizer.py --siglip_model_name_or_path google/siglip2-so400m-patch14-384 \\
        --train_dir path/to/images --output_dir tokenizer --max_steps 10000 --per_device_train_batch_size 8 --bf16

Several GPUs: the same after `torchrun --nproc_per_node 8`. Settings may also come from one JSON file, given as the only
argument. A run that was stopped goes on from its last checkpoint when started again with the same command.

Trained is everything but the text tower, with the paper's stage 1 losses except the perceptual and the adversarial.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoTokenizer, HfArgumentParser, SiglipModel, TrainingArguments, set_seed

from transformers_dualtoken import (
    DualTokenImageProcessorPil,
    DualTokenVisionTokenizer,
    DualTokenVisionTokenizerProcessor,
)
from transformers_dualtoken.training import (
    DualTokenImageDataset,
    DualTokenVisionTokenizerTrainer,
    collate_images,
    find_checkpoint,
)


@dataclass
class ModelArguments:
    siglip_model_name_or_path: str = field(
        metadata={"help": "SigLIP or SigLIP 2 checkpoint: start of the encoder, and the frozen teacher"}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "a tokenizer of this project to go on from, instead of a new one"}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "JSON object of DualTokenVisionTokenizerConfig fields, or the path of one, for a new model"},
    )
    loss_weights: str | None = field(
        default=None, metadata={"help": 'JSON object of loss terms and weights, e.g. {"reconstruction_mse": 10}'}
    )


@dataclass
class DataArguments:
    train_dir: str | None = field(default=None, metadata={"help": "folder of images, with or without sub-folders"})
    dataset_name: str | None = field(default=None, metadata={"help": "a data set of the Hub, instead of a folder"})
    dataset_split: str = field(default="train")
    image_column: str = field(default="image")
    crop_scale: list[float] = field(
        default_factory=lambda: [0.9, 1.0], metadata={"help": "range of the random crop's share of the area"}
    )
    max_train_samples: int | None = field(default=None)


@dataclass
class TokenizerTrainingArguments(TrainingArguments):
    output_dir: str = field(default="tokenizer")
    learning_rate: float = field(default=7.2e-5)
    adam_beta1: float = field(default=0.5)
    adam_beta2: float = field(default=0.9)
    weight_decay: float = field(default=1e-4)
    lr_scheduler_type: str = field(default="cosine")
    logging_steps: int = field(default=50)
    report_to: str = field(default="none")
    remove_unused_columns: bool = field(default=False)


def _json(text: str | None) -> dict:
    if text is None:
        return {}
    return json.loads(Path(text).read_text() if text.endswith(".json") else text)


def load_images(arguments: DataArguments):
    if (arguments.train_dir is None) == (arguments.dataset_name is None):
        raise ValueError("Give exactly one of --train_dir and --dataset_name.")
    if arguments.train_dir is not None:
        dataset = load_dataset("imagefolder", data_dir=arguments.train_dir, split="train", drop_labels=True)
    else:
        dataset = load_dataset(arguments.dataset_name, split=arguments.dataset_split)
    if arguments.max_train_samples is not None:
        dataset = dataset.select(range(min(arguments.max_train_samples, len(dataset))))
    return dataset


def main(argv: list[str] | None = None, callbacks: list | None = None) -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, TokenizerTrainingArguments))
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) == 1 and argv[0].endswith(".json"):
        model_arguments, data_arguments, training_arguments = parser.parse_json_file(argv[0])
    else:
        model_arguments, data_arguments, training_arguments = parser.parse_args_into_dataclasses(argv)
    set_seed(training_arguments.seed)

    images = load_images(data_arguments)
    if model_arguments.model_name_or_path is not None:
        if model_arguments.config_overrides is not None:
            raise ValueError("--config_overrides is for a new model; --model_name_or_path brings its own config.")
        model = DualTokenVisionTokenizer.from_pretrained(model_arguments.model_name_or_path, dtype=torch.float32)
    else:
        model = DualTokenVisionTokenizer.from_siglip_pretrained(
            model_arguments.siglip_model_name_or_path, **_json(model_arguments.config_overrides)
        )
    teacher = SiglipModel.from_pretrained(model_arguments.siglip_model_name_or_path, dtype=torch.float32).vision_model
    size = model.config.image_size
    processor = DualTokenVisionTokenizerProcessor(
        DualTokenImageProcessorPil(size={"height": size, "width": size}),
        AutoTokenizer.from_pretrained(model_arguments.siglip_model_name_or_path),
        text_length=model.config.text_config.max_position_embeddings,
    )
    dataset = DualTokenImageDataset(
        images,
        processor.image_processor,
        image_column=data_arguments.image_column,
        crop_scale=tuple(data_arguments.crop_scale),
        seed=training_arguments.seed,
    )
    trainer = DualTokenVisionTokenizerTrainer(
        model=model,
        args=training_arguments,
        teacher=teacher,
        loss_weights=_json(model_arguments.loss_weights),
        train_dataset=dataset,
        data_collator=collate_images,
        callbacks=callbacks,
    )
    result = trainer.train(resume_from_checkpoint=find_checkpoint(training_arguments))
    trainer.save_model()
    if trainer.is_world_process_zero():
        processor.save_pretrained(training_arguments.output_dir)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()


if __name__ == "__main__":
    main()
