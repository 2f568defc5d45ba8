"""
Train the unified DualToken model on conversations, captions, documents and text: understanding and generation together.

A new model from a trained vision tokenizer and a language model:

    python examples/run_unified.py --vision_tokenizer_name_or_path tokenizer --language_model_name_or_path \\
        Qwen/Qwen2.5-0.5B --train_dataset chat.jsonl --output_dir unified --max_steps 10000 --bf16

On from a unified model, all of it, parts of it (the paper's stages: examples/configs/unified_stage1.json to 4), or by LoRA,
on one GPU also with a 4-bit language model (`--quantization 4`):

    python examples/run_unified.py --model_name_or_path unified --train_dataset chat.jsonl --output_dir adapter \\
        --lora --learning_rate 1e-4 --num_train_epochs 1 --bf16

Several GPUs: the same after `torchrun --nproc_per_node 8`, with `--deepspeed examples/deepspeed/zero3.json` where the
model does not fit, or after `accelerate launch --config_file examples/accelerate/fsdp2.yaml`. Settings may also come
from a JSON or YAML file, given as the first argument; options after it count before the file's. Relative paths in it
are looked for beside it and then in the working directory. A run that was stopped goes on from its last whole checkpoint
when started again with the same command; SIGTERM makes it save one after the step at hand and exit with status 0.

`--train_dataset` is a file, folder, pattern or Hub data set of chat messages, LLaVA conversations, image-caption pairs,
image edits, interleaved documents, plain text or precomputed codes (examples/precompute_codes.py), or a JSON or YAML file
with a weighted mixture of them.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    set_seed,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging as transformers_logging

from transformers_dualtoken import (
    DualTokenForCausalLM,
    DualTokenImageProcessorPil,
    DualTokenProcessor,
    DualTokenVisionTokenizer,
)
from transformers_dualtoken.checkpoints import checkpoint_errors
from transformers_dualtoken.recipe_files import parse_settings, run_script
from transformers_dualtoken.remote_code import carry_code
from transformers_dualtoken.training import (
    ChatEncoder,
    DualTokenChatDataset,
    DualTokenChatStream,
    DualTokenDataCollator,
    DualTokenTrainer,
    DualTokenTrainingArguments,
    SampleGenerationCallback,
    find_checkpoint,
    load_chat_sources,
    load_code_source,
    precompute_codes,
    read_prompts,
    set_trainable,
    tokenizer_fingerprint,
    use_cpu_threads,
)
from transformers_dualtoken.training.arguments import json_object
from transformers_dualtoken.training.checkpoints import step_of


logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(default=None, metadata={"help": "a unified model to go on from"})
    vision_tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "vision tokenizer of a new unified model"}
    )
    language_model_name_or_path: str | None = field(
        default=None, metadata={"help": "language model of a new unified model, with its tokenizer"}
    )
    config_overrides: dict | str | None = field(
        default=None, metadata={"help": "JSON object of DualTokenConfig fields, or the path of one, for a new model"}
    )
    model_revision: str = field(default="main", metadata={"help": "branch, tag or commit of --model_name_or_path"})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "such as flash_attention_2, which suits packed samples; sdpa by default"}
    )
    train_parts: list[str] = field(
        default_factory=lambda: ["projector", "language_model", "heads"],
        metadata={"help": "what is trained: any of projector, language_model, heads"},
    )
    learning_rates: dict | str | None = field(
        default=None,
        metadata={"help": 'JSON object of rates that differ from --learning_rate, such as {"projector": 1e-3}'},
    )
    lora: bool = field(default=False, metadata={"help": "train an adapter (PEFT) rather than the model itself"})
    lora_r: int = field(default=16)
    lora_alpha: float = field(default=32)
    lora_dropout: float = field(default=0.05)
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "adapted layers of the language model's blocks; all by default"}
    )
    lora_train_in_full: list[str] = field(
        default_factory=lambda: ["projector", "heads", "image_tokens"],
        metadata={
            "help": "what the adapter trains in full, of projector, heads, image_tokens and embeddings (of all tokens: for "
            "words the language model has never seen); 'none' for nothing"
        },
    )
    quantization: int | None = field(
        default=None, metadata={"help": "4 or 8: bits of the frozen language model under --lora (bitsandbytes)"}
    )


@dataclass
class DataArguments:
    train_dataset: str = field(
        metadata={"help": "file, folder, pattern or Hub data set, or a JSON or YAML file with a mixture"}
    )
    eval_dataset: str | None = field(default=None, metadata={"help": "like --train_dataset, for the evaluation"})
    train_split: str = field(default="train")
    eval_split: str = field(default="validation")
    dataset_options: dict | str | None = field(
        default=None,
        metadata={"help": 'JSON object with "format" and what it takes, where --train_dataset is a single source'},
    )
    streaming: bool = field(default=False, metadata={"help": "read the training data while training"})
    shuffle_buffer_size: int = field(default=1000, metadata={"help": "rows that a stream shuffles at a time"})
    precompute_codes: bool = field(
        default=False,
        metadata={"help": "encode all images once, into OUTPUT_DIR/_codes, rather than in every step"},
    )
    max_length: int | None = field(default=None, metadata={"help": "tokens a sample may have"})
    cut_long_samples: bool = field(
        default=False, metadata={"help": "cut samples at --max_length, never within an image; else they are bad ones"}
    )
    on_bad_sample: str = field(
        default="error",
        metadata={"help": "error: stop and name it; skip: pass it over, count it and name the first few"},
    )
    packing: bool = field(
        default=False,
        metadata={
            "help": "let the short samples of a batch share rows of up to --max_length tokens; none sees another"
        },
    )
    prompt_drop_probability: float = field(
        default=0.1, metadata={"help": "share of drawing samples that forget their prompt, for guidance"}
    )
    preprocessing_num_workers: int = field(
        default=0, metadata={"help": "processes that tokenise or encode beforehand"}
    )
    max_train_samples: int | None = field(
        default=None,
        metadata={"help": "take only so many of each source; the first ones, but of a stream some of every shard"},
    )
    max_eval_samples: int | None = field(default=None)
    sample_prompts: str | None = field(
        default=None, metadata={"help": "JSON file of prompts whose answers are written down at every evaluation"}
    )
    sample_steps: int | None = field(default=None, metadata={"help": "or every so many steps instead"})

    def spec(self, which: str) -> str | None:
        """What was given for the `"train"` or the `"eval"` set."""
        return getattr(self, f"{which}_dataset")

    def __post_init__(self):
        if self.packing and self.max_length is None:
            raise ValueError("--packing needs --max_length, how many tokens a row may have.")
        if self.streaming and self.precompute_codes:
            raise ValueError(
                "--precompute_codes reads all data before training, --streaming while training. Run "
                "examples/precompute_codes.py first, and stream what it wrote."
            )
        if self.sample_steps is not None and self.sample_prompts is None:
            raise ValueError("--sample_steps needs --sample_prompts, a JSON file of prompts.")
        if self.sample_prompts is not None and self.sample_steps is None and self.eval_dataset is None:
            raise ValueError(
                "--sample_prompts are answered at every evaluation, for which there is no --eval_dataset, or every "
                "--sample_steps: give one of the two."
            )


def load_model(arguments: ModelArguments, training) -> tuple[DualTokenForCausalLM, DualTokenProcessor]:
    """The model to train, adapted where it is to be, and the processor that is saved with it."""
    parts = (arguments.vision_tokenizer_name_or_path, arguments.language_model_name_or_path)
    options = {} if arguments.attn_implementation is None else {"attn_implementation": arguments.attn_implementation}
    if arguments.quantization is not None and not (arguments.lora and arguments.model_name_or_path):
        raise ValueError("--quantization freezes the language model: it needs --lora and --model_name_or_path.")
    if arguments.model_name_or_path is not None:
        if any(parts):
            raise ValueError("Give either --model_name_or_path or the two parts of a new model, not both.")
        if arguments.config_overrides is not None:
            raise ValueError("--config_overrides is for a new model; --model_name_or_path brings its own config.")
        options["revision"] = arguments.model_revision
        with checkpoint_errors(arguments.model_name_or_path):
            processor = AutoProcessor.from_pretrained(arguments.model_name_or_path, revision=arguments.model_revision)
        if arguments.quantization is not None:
            from transformers_dualtoken.training.unified.low_bit import load_quantized

            model = load_quantized(arguments.model_name_or_path, bits=arguments.quantization, **options)
        else:
            # An adapter's base stays as it is, so that it may be stored as it is computed with.
            dtype = torch.bfloat16 if arguments.lora and training.bf16 else torch.float32
            model = AutoModelForCausalLM.from_pretrained(arguments.model_name_or_path, dtype=dtype, **options)
    else:
        if not all(parts):
            raise ValueError(
                "A new model needs --vision_tokenizer_name_or_path and --language_model_name_or_path; to go on from a "
                "unified model give --model_name_or_path."
            )
        model, processor = assemble(*parts, json_object(arguments.config_overrides, "config_overrides"), options)
    if arguments.lora:
        from transformers_dualtoken.training.unified.adapters import add_lora

        in_full = [part for part in arguments.lora_train_in_full if part != "none"]
        model = add_lora(
            model,
            r=arguments.lora_r,
            alpha=arguments.lora_alpha,
            dropout=arguments.lora_dropout,
            target_modules=arguments.lora_target_modules,
            train_in_full=in_full,
            revision=None if arguments.model_name_or_path is None else arguments.model_revision,
        )
    else:
        set_trainable(model, arguments.train_parts)
        carry_code(model, processor)
    return model, processor


def assemble(
    vision_tokenizer_path: str, language_model_path: str, config_overrides: dict, options: dict
) -> tuple[DualTokenForCausalLM, DualTokenProcessor]:
    """A new unified model of two checkpoints."""
    vision_tokenizer = DualTokenVisionTokenizer.from_pretrained(vision_tokenizer_path)
    config = vision_tokenizer.config
    with checkpoint_errors(language_model_path):
        tokenizer = AutoTokenizer.from_pretrained(language_model_path)
    processor = DualTokenProcessor(
        DualTokenImageProcessorPil(size={"height": config.image_size, "width": config.image_size}),
        tokenizer,
        num_image_tokens=config.num_positions,
    )
    token_ids = {
        name: getattr(processor, name) for name in ("image_start_token_id", "image_token_id", "image_end_token_id")
    }
    model = DualTokenForCausalLM.from_pretrained_parts(
        vision_tokenizer,
        AutoModelForCausalLM.from_pretrained(language_model_path, dtype=torch.float32, **options),
        **{**token_ids, **config_overrides},
    )
    return model, processor


def read_sources(data: DataArguments, which: str, fingerprint: str) -> list:
    """The sources of `"train"` or `"eval"`, cut to the number of samples asked for."""
    spec, limit = data.spec(which), getattr(data, f"max_{which}_samples")
    options = json_object(data.dataset_options, "dataset_options")
    streaming = data.streaming and which == "train"
    sources = load_chat_sources(
        {"path": spec, **options} if options else spec,
        split=getattr(data, f"{which}_split"),
        streaming=streaming,
        fingerprint=fingerprint,
    )
    if limit is not None:
        for source in sources:
            dataset = source.dataset
            source.dataset = dataset.take(limit) if streaming else dataset.select(range(min(limit, len(dataset))))
    return sources


def load_data(data: DataArguments, model, processor, training):
    """The training set, a data set or a stream, and the evaluation set or `None`."""
    vision_tokenizer = model.vision_tokenizer
    fingerprint = tokenizer_fingerprint(vision_tokenizer, processor.image_processor)
    settings = {"max_length": data.max_length, "cut_long_samples": data.cut_long_samples}
    encoder = ChatEncoder(processor, prompt_drop_probability=data.prompt_drop_probability, **settings)

    # One process of a machine reads and tokenises, the others find the result in the cache.
    with training.main_process_first(desc="reading the data"):
        sources = {name: read_sources(data, name, fingerprint) for name in ("train", "eval") if data.spec(name)}
    if data.precompute_codes:
        sources = {
            name: encode_once(data, name, listed, vision_tokenizer, processor, training)
            for name, listed in sources.items()
        }
    if data.streaming:
        train_dataset = DualTokenChatStream(
            sources["train"],
            encoder,
            on_bad_sample=data.on_bad_sample,
            seed=training.seed,
            shuffle_buffer_size=data.shuffle_buffer_size,
            rank=training.process_index,
            world_size=training.world_size,
        )
    else:
        with training.main_process_first(desc="tokenising"):
            train_dataset = DualTokenChatDataset(
                sources["train"], encoder, training.seed, data.on_bad_sample, data.preprocessing_num_workers
            )
    eval_dataset = None
    if "eval" in sources:
        # Every sample counts once: nothing is drawn, no source is weighted, and no sample stands in for a broken one.
        for source in sources["eval"]:
            source.weight = None
        eval_encoder = ChatEncoder(processor, prompt_drop_probability=0.0, **settings)
        with training.main_process_first(desc="tokenising"):
            eval_dataset = DualTokenChatDataset(
                sources["eval"], eval_encoder, num_workers=data.preprocessing_num_workers
            )
    return train_dataset, eval_dataset


def encode_once(data: DataArguments, name: str, sources: list, vision_tokenizer, processor, training) -> list:
    """The same sources with codes for images, each from a folder of its own, made now or by an earlier run."""
    vision_tokenizer.to(training.device)
    encoded = []
    for number, source in enumerate(sources):
        folder = Path(training.output_dir, "_codes", f"{name}-{number}")
        precompute_codes(
            vision_tokenizer,
            processor.image_processor,
            [source],
            folder,
            # As a forward on pixels would make them.
            bf16=training.bf16,
            on_bad_sample=data.on_bad_sample,
            num_workers=data.preprocessing_num_workers,
            rank=training.process_index,
            world_size=training.world_size,
            show_progress=not training.disable_tqdm,
        )
        training.distributed_state.wait_for_everyone()
        encoded.append(load_code_source(folder, weight=source.weight))
    return encoded


def main(argv: list[str] | None = None, callbacks: list | None = None) -> None:
    model_arguments, data_arguments, training_arguments = parse_settings(
        (ModelArguments, DataArguments, DualTokenTrainingArguments), argv
    )
    if data_arguments.streaming and training_arguments.max_steps < 1:
        raise ValueError("A stream has no length, so --streaming needs --max_steps.")
    logging.basicConfig(level=logging.INFO if training_arguments.should_log else logging.WARNING)
    transformers_logging.set_verbosity(training_arguments.get_process_log_level())
    if data_arguments.precompute_codes and is_deepspeed_zero3_enabled():
        raise ValueError(
            "--precompute_codes does not run under ZeRO-3, which splits the tokenizer over the ranks. Run "
            "examples/precompute_codes.py first, and train on what it wrote."
        )
    if training_arguments.cpu_threads is not None:
        print(use_cpu_threads(training_arguments.cpu_threads))
    set_seed(training_arguments.seed)

    model, processor = load_model(model_arguments, training_arguments)
    attention = model.config.text_config._attn_implementation
    if data_arguments.packing and not any(name in attention for name in ("flash", "flex")):
        logger.warning(
            "Samples packed into a row are kept apart by masks of %d x %d with --attn_implementation %s; "
            "flash_attention_2 needs none.",
            data_arguments.max_length,
            data_arguments.max_length,
            attention,
        )
    train_dataset, eval_dataset = load_data(data_arguments, model, processor, training_arguments)
    trainer = DualTokenTrainer(
        model=model,
        args=training_arguments,
        learning_rates=json_object(model_arguments.learning_rates, "learning_rates"),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=DualTokenDataCollator(
            processor.tokenizer.pad_token_id,
            packed_length=data_arguments.max_length if data_arguments.packing else None,
        ),
        processing_class=processor,
        callbacks=callbacks,
    )
    if data_arguments.sample_prompts is not None:
        prompts = read_prompts(data_arguments.sample_prompts)
        trainer.add_callback(SampleGenerationCallback(trainer, prompts, steps=data_arguments.sample_steps))

    checkpoint = find_checkpoint(training_arguments)
    first_step = step_of(checkpoint)
    if checkpoint is not None:
        logger.info("Going on from %s.", checkpoint)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    if 0 < result.global_step == first_step and Path(training_arguments.output_dir, "train_results.json").is_file():
        # The metrics of the run that did the work stay as they are.
        logger.info("Training was finished already, after %d steps.", result.global_step)
    else:
        metrics = result.metrics | trainer.sample_counts()
        if not data_arguments.streaming:
            metrics["train_samples"] = len(train_dataset)
            # Those that were found before training.
            metrics["samples_skipped"] += train_dataset.num_skipped
            metrics["samples_cut"] += train_dataset.num_cut
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()
    if eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)

    card = {
        "model_name": Path(training_arguments.output_dir).name,
        "finetuned_from": model_arguments.model_name_or_path or model_arguments.language_model_name_or_path,
        "tags": ["any-to-any", "dualtoken", "multimodal", "image-generation"],
        "dataset": data_arguments.train_dataset,
    }
    if training_arguments.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)


if __name__ == "__main__":
    run_script(main)
