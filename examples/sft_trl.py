"""
Fine-tune a unified model on text answers to questions with images, by TRL's SFTTrainer and LoRA.

    python examples/sft_trl.py --model_name_or_path unified --dataset_name HuggingFaceH4/llava-instruct-mix-vsft \\
        --output_dir sft --use_peft --learning_rate 1e-4 --bf16

The data set, from the Hub or a folder of parquet files, has the columns `messages` and `images` as all of TRL's. Only the
assistant's text is learned; a sample with an image in an answer is an error, since TRL learns text only
(`run_unified.py` learns both). Without `--lora_target_modules` the adapter lies on the language model alone.
`dualtoken merge sft merged` makes one model of it and the base model.

Needs the extra `trl`.
"""

import sys
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, AutoProcessor

import transformers_dualtoken  # noqa: F401  (registers the model)
from transformers_dualtoken.checkpoints import checkpoint_errors
from transformers_dualtoken.optional_libraries import needed_libraries
from transformers_dualtoken.recipe_files import run_script


with needed_libraries("Training by TRL"):
    from datasets import load_dataset
    from trl import (
        ModelConfig,
        ScriptArguments,
        SFTConfig,
        SFTTrainer,
        TrlParser,
        get_peft_config,
        get_quantization_config,
    )


class TextAnswerCollator:
    """
    Another collator, `samples -> batch`, whose `labels` (B, L) are checked: no image may be a target.

    TRL's `SFTTrainer` computes the loss itself, over every label, by the text head: it would teach the text head to
    say `<image_pad>`, and the depth heads nothing.
    """

    def __init__(self, collator: Callable, image_token_id: int):
        self.collator, self.image_token_id = collator, image_token_id

    def __call__(self, samples: list) -> dict[str, torch.Tensor]:
        batch = self.collator(samples)
        rows = (batch["labels"] == self.image_token_id).any(-1).nonzero().flatten().tolist()
        if rows:
            raise ValueError(
                f"The samples {rows} of this batch have images among their targets, but only text is learned here. "
                "Images in questions: set `assistant_only_loss=True`. Images in answers: train with DualTokenTrainer."
            )
        return batch


def main(argv: list[str] | None = None) -> SFTTrainer:
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig))
    parser.set_defaults(assistant_only_loss=True, max_length=None)
    script_arguments, training_arguments, model_arguments = parser.parse_args_and_config(
        sys.argv[1:] if argv is None else argv
    )
    revision = model_arguments.model_revision
    with checkpoint_errors(model_arguments.model_name_or_path):
        model = AutoModelForCausalLM.from_pretrained(
            model_arguments.model_name_or_path,
            revision=revision,
            dtype=model_arguments.dtype,
            attn_implementation=model_arguments.attn_implementation,
            # `--load_in_4bit` or `--load_in_8bit`: of the language model alone.
            quantization_config=get_quantization_config(model_arguments),
        )
    dataset = load_dataset(script_arguments.dataset_name, name=script_arguments.dataset_config)
    trainer = SFTTrainer(
        model=model,
        args=training_arguments,
        train_dataset=dataset[script_arguments.dataset_train_split],
        eval_dataset=dataset[script_arguments.dataset_test_split]
        if training_arguments.eval_strategy != "no"
        else None,
        processing_class=AutoProcessor.from_pretrained(model_arguments.model_name_or_path, revision=revision),
        peft_config=get_peft_config(model_arguments),
    )
    trainer.data_collator = TextAnswerCollator(trainer.data_collator, model.config.image_token_id)
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    run_script(main)
