"""
Train the unified DualToken model on conversations with images: understanding and generation together.

From a trained vision tokenizer and a language model:

    python examples/run_unified.py --vision_tokenizer_name_or_path tokenizer --language_model_name_or_path \\
        Qwen/Qwen2.5-0.5B --train_file chat.jsonl --output_dir unified --max_steps 10000 --bf16

or on from a unified model (`--model_name_or_path unified`), with `--train_parts projector`, `heads` or
`language_model` for the paper's stages. Each line of the train file is
`{"messages": [{"role": ..., "content": [{"type": "text", "text": ...}, {"type": "image", "image": "path.png"}]}]}`,
paths relative to the file. Everything the assistant says is learned, images included.

Several GPUs: the same after `torchrun --nproc_per_node 8`. Settings may also come from one JSON file, given as the only
argument. A run that was stopped goes on from its last checkpoint when started again with the same command.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    HfArgumentParser,
    TrainingArguments,
    set_seed,
)

from transformers_dualtoken import (
    DualTokenForCausalLM,
    DualTokenImageProcessorPil,
    DualTokenProcessor,
    DualTokenVisionTokenizer,
)
from transformers_dualtoken.training import (
    DualTokenChatDataset,
    DualTokenDataCollator,
    DualTokenTrainer,
    encode_images,
    find_checkpoint,
    set_trainable,
)


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(default=None, metadata={"help": "a unified model to go on from"})
    vision_tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "vision tokenizer of a new unified model"}
    )
    language_model_name_or_path: str | None = field(
        default=None, metadata={"help": "language model of a new unified model, with its tokenizer"}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "JSON object of DualTokenConfig fields, or the path of one, for a new model"}
    )
    train_parts: list[str] = field(
        default_factory=lambda: ["projector", "language_model", "heads"],
        metadata={"help": "what is trained: any of projector, language_model, heads"},
    )


@dataclass
class DataArguments:
    train_file: str = field(metadata={"help": "JSON lines of conversations"})
    precompute_codes: bool = field(
        default=True, metadata={"help": "encode all images once, before training, rather than in every step"}
    )
    prompt_drop_probability: float = field(
        default=0.1, metadata={"help": "share of drawing samples that forget their prompt, for guidance"}
    )
    max_length: int | None = field(default=None, metadata={"help": "longer samples are an error"})
    max_train_samples: int | None = field(default=None)


@dataclass
class UnifiedTrainingArguments(TrainingArguments):
    output_dir: str = field(default="unified")
    learning_rate: float = field(default=2e-5)
    lr_scheduler_type: str = field(default="cosine")
    logging_steps: int = field(default=50)
    report_to: str = field(default="none")
    remove_unused_columns: bool = field(default=False)


def _json(text: str | None) -> dict:
    if text is None:
        return {}
    return json.loads(Path(text).read_text() if text.endswith(".json") else text)


def load_model(arguments: ModelArguments) -> tuple[DualTokenForCausalLM, DualTokenProcessor]:
    parts = (arguments.vision_tokenizer_name_or_path, arguments.language_model_name_or_path)
    if arguments.model_name_or_path is not None:
        if any(parts):
            raise ValueError("Give either --model_name_or_path or the two parts of a new model, not both.")
        if arguments.config_overrides is not None:
            raise ValueError("--config_overrides is for a new model; --model_name_or_path brings its own config.")
        model = AutoModelForCausalLM.from_pretrained(arguments.model_name_or_path, dtype=torch.float32)
        return model, AutoProcessor.from_pretrained(arguments.model_name_or_path)
    if not all(parts):
        raise ValueError(
            "A new model needs --vision_tokenizer_name_or_path and --language_model_name_or_path; to go on from a "
            "unified model give --model_name_or_path."
        )
    vision_tokenizer = DualTokenVisionTokenizer.from_pretrained(parts[0])
    text_tokenizer = AutoTokenizer.from_pretrained(parts[1])
    config = vision_tokenizer.config
    processor = DualTokenProcessor(
        DualTokenImageProcessorPil(size={"height": config.image_size, "width": config.image_size}),
        text_tokenizer,
        num_image_tokens=config.num_positions,
    )
    token_ids = {
        name: getattr(processor, name) for name in ("image_start_token_id", "image_token_id", "image_end_token_id")
    }
    model = DualTokenForCausalLM.from_pretrained_parts(
        vision_tokenizer,
        AutoModelForCausalLM.from_pretrained(parts[1], dtype=torch.float32),
        **{**token_ids, **_json(arguments.config_overrides)},
    )
    return model, processor


def load_data(arguments: DataArguments, model, processor, seed: int) -> DualTokenChatDataset:
    train_file = Path(arguments.train_file)
    with train_file.open(encoding="utf-8") as lines:
        conversations = [json.loads(line)["messages"] for line in lines if line.strip()]
    conversations = conversations[: arguments.max_train_samples]

    def load_image(path: str) -> torch.Tensor:
        image = Image.open(train_file.parent / path)
        return processor.image_processor(images=image, return_tensors="pt").pixel_values[0]

    codes = None
    if arguments.precompute_codes:
        paths = [
            part["image"]
            for messages in conversations
            for message in messages
            if not isinstance(message["content"], str)
            for part in message["content"]
            if part["type"] == "image"
        ]
        codes = encode_images(model, load_image, paths)
    return DualTokenChatDataset(
        conversations,
        processor,
        image_codes=codes,
        load_image=None if arguments.precompute_codes else load_image,
        max_length=arguments.max_length,
        prompt_drop_probability=arguments.prompt_drop_probability,
        seed=seed,
    )


def main(argv: list[str] | None = None, callbacks: list | None = None) -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, UnifiedTrainingArguments))
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) == 1 and argv[0].endswith(".json"):
        model_arguments, data_arguments, training_arguments = parser.parse_json_file(argv[0])
    else:
        model_arguments, data_arguments, training_arguments = parser.parse_args_into_dataclasses(argv)
    set_seed(training_arguments.seed)

    model, processor = load_model(model_arguments)
    set_trainable(model, model_arguments.train_parts)
    # Before the Trainer would: the images are encoded first.
    model.to(training_arguments.device)
    trainer = DualTokenTrainer(
        model=model,
        args=training_arguments,
        train_dataset=load_data(data_arguments, model, processor, training_arguments.seed),
        data_collator=DualTokenDataCollator(processor.tokenizer.pad_token_id),
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
