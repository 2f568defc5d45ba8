"""Text answers to questions with images, learned by TRL's SFTTrainer."""

import importlib.util
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny_models import lively_unified_model, tiny_unified_config
from training_helpers import build_tiny_processor, noise


pytestmark = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
IMAGE = 51


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    return importlib.import_module("sft_trl")


def test_images_among_text_targets_are_refused(script):
    labels = torch.tensor([[-100, 5, -100], [5, IMAGE, 6]])
    collator = script.TextAnswerCollator(lambda samples: {"labels": labels[samples]}, IMAGE)
    assert collator([0])["labels"].shape == (1, 3)
    with pytest.raises(ValueError, match=r"The samples \[1\] of this batch have images among their targets"):
        collator([0, 1])


def test_sft_on_questions_with_images(script, tmp_path):
    processor = build_tiny_processor()
    text_config = {**tiny_unified_config().text_config.to_dict(), "vocab_size": 400}
    text_config["eos_token_id"] = processor.tokenizer.eos_token_id
    ids = {name: getattr(processor, name) for name in ("image_start_token_id", "image_token_id", "image_end_token_id")}
    model = lively_unified_model(text_config=text_config, **ids)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    question, answer = ("What is in the picture?", "A blue one.")

    def part(kind, text=None, index=None):
        """As a parquet file has it, whose parts all have the same fields."""
        return {"type": kind, "text": text, "index": index}

    rows = [
        {
            "messages": [
                {"role": "user", "content": [part("image", index=0)] * bool(index) + [part("text", text=question)]},
                {"role": "assistant", "content": [part("text", text=answer)]},
            ],
            # One without an image: a batch may mix them.
            "images": [noise(index)] if index else [],
        }
        for index in range(4)
    ]
    (tmp_path / "data").mkdir()
    Dataset.from_list(rows[1:] + rows[:1]).to_parquet(tmp_path / "data" / "train.parquet")
    arguments = ["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "data")]
    arguments += ["--output_dir", str(tmp_path / "out"), "--max_steps", "6", "--per_device_train_batch_size", "4"]
    arguments += ["--learning_rate", "1e-2", "--use_cpu", "1", "--bf16", "0", "--report_to", "none", "--use_peft"]
    arguments += ["--logging_steps", "1", "--save_strategy", "no", "--disable_tqdm", "1", "--lora_dropout", "0"]
    trainer = script.main(arguments)
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < losses[0] - 0.1

    batch = trainer.data_collator([dict(row) for row in rows])
    for labels in batch["labels"]:
        assert processor.tokenizer.decode(labels[labels != -100]) == answer + "<|im_end|>"
    # TRL's loss, made by itself, is the model's own text loss.
    torch.testing.assert_close(losses[0], model.eval()(**batch).text_loss.item(), atol=1e-4, rtol=1e-4)
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"adapter_model.safetensors", "adapter_config.json"}

    drawing = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Draw it, please."}]},
            {"role": "assistant", "content": [{"type": "image"}]},
        ],
        "images": [noise(9)],
    }
    with pytest.raises(ValueError, match=r"\[1\] .* images among their targets"):
        trainer.data_collator([dict(rows[1]), drawing])
