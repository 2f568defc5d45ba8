"""What the model answers to fixed prompts during training: on disk, in the tracker, and without a trace."""

import json
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from tiny_models import lively_unified_model, tiny_unified_config
from tiny_tokenizer import build_tiny_qwen2_tokenizer
from training_helpers import noise, state_of
from unified_training import N, make_trainer

from transformers_dualtoken import DualTokenImageProcessorPil, DualTokenProcessor
from transformers_dualtoken.training.unified.sample_generation import (
    SampleGenerationCallback,
    SamplePrompt,
    read_prompts,
)


@pytest.fixture(scope="module")
def processor():
    tokenizer = build_tiny_qwen2_tokenizer(["user assistant", "Draw it, please. What is in the picture? A blue one."])
    return DualTokenProcessor(DualTokenImageProcessorPil(size=24), tokenizer, num_image_tokens=N)


def model_of(processor, **overrides):
    fields = tiny_unified_config().text_config.to_dict()
    tokenizer = processor.tokenizer
    fields |= {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    fields |= {"bos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    model = lively_unified_model(
        text_config=fields,
        image_start_token_id=processor.image_start_token_id,
        image_token_id=processor.image_token_id,
        image_end_token_id=processor.image_end_token_id,
        **overrides,
    )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def user(*parts) -> list[dict]:
    return [{"role": "user", "content": list(parts)}]


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def prompts(folder) -> list[dict]:
    picture = folder / "one.png"
    noise(0).save(picture)
    return [
        {
            "messages": user({"type": "image", "image": str(picture)}, text("What is it?")),
            "max_new_tokens": 6,
            "do_sample": True,
        },
        {"messages": user(text("Draw it.")), "mode": "image", "guidance_scale": 2.0, "num_return_sequences": 3},
        {"messages": user(text("Draw.")), "mode": "interleaved", "max_new_tokens": 40, "do_sample": True},
    ]


class _Board:
    def __init__(self):
        self.shown = []

    def add_image(self, name, picture, step, dataformats):
        assert dataformats == "HWC"
        self.shown.append((name, step, picture.shape))

    def add_text(self, name, value, step):
        self.shown.append((name, step, value))


class TensorBoardCallback(SampleGenerationCallback):
    """Known to the senders by its name alone."""

    def __init__(self):
        self.tb_writer = _Board()

    def on_step_end(self, *args, **kwargs):
        pass

    def on_evaluate(self, *args, **kwargs):
        pass


def samples_of(processor, count=2) -> list[dict]:
    ids = torch.tensor(processor.tokenizer("A blue one. What is in the picture?")["input_ids"])
    return [{"input_ids": ids, "labels": ids}] * count


def test_samples_are_written_at_every_evaluation(tmp_path, processor):
    trainer = make_trainer(
        tmp_path,
        model_of(processor).train(),
        samples_of(processor, 8),
        processor,
        eval_strategy="steps",
        eval_steps=2,
        max_steps=4,
        gradient_checkpointing=True,
        # Text, images and codes must come out the same next time.
        learning_rate=0.0,
    )
    board = TensorBoardCallback()
    trainer.add_callback(SampleGenerationCallback(trainer, prompts(tmp_path)))
    trainer.add_callback(board)
    trainer.train()
    folders = sorted((tmp_path / "samples").iterdir())
    assert [folder.name for folder in folders] == ["step-000002", "step-000004"]
    first, second = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in folders)
    for files in (first, second):
        del files["samples.md"]  # it names the step
    assert first == second
    samples = json.loads(first["samples.json"])
    assert [sample["mode"] for sample in samples] == ["text", "image", "interleaved"]
    asked, drawn, both = samples
    assert asked["messages"][0]["content"][0] == {"type": "image", "image": str(tmp_path / "one.png")}
    assert [part["type"] for part in asked["answers"][0]["content"]] == ["text"]
    assert drawn["guidance_scale"] == 2.0
    names = [answer["content"][0]["image"] for answer in drawn["answers"]]
    assert names == [f"prompt-2-image-{index}.png" for index in (1, 2, 3)]
    pictures = [Image.open(folders[0] / name) for name in names]
    assert len({picture.tobytes() for picture in pictures}) == 3
    count = len([part for part in both["answers"][0]["content"] if part["type"] == "image"])
    width, height = pictures[0].size
    grid = Image.open(folders[0] / "grid.png")
    assert grid.size == (width * min(4, 3 + count), height * math.ceil((3 + count) / 4))
    assert np.array_equal(np.asarray(grid)[:height, width : 2 * width], np.asarray(pictures[1]))
    shown = [(name, step) for name, step, _ in board.tb_writer.shown]
    assert shown == [(name, step) for step in (2, 4) for name in ("samples_text", "samples")]
    assert "![prompt-2-image-1.png](prompt-2-image-1.png)" in board.tb_writer.shown[0][2]


def test_samples_do_not_disturb_training(tmp_path, processor):
    model = get_peft_model(
        model_of(processor),
        LoraConfig(r=4, lora_dropout=0.5, target_modules=r".*language_model.*q_proj", modules_to_save=["depth_heads"]),
    )
    weights = state_of(model)
    ends = []
    for sampling in (False, True):
        model.load_state_dict(weights)
        torch.manual_seed(0)
        trainer = make_trainer(tmp_path, model, samples_of(processor, 4), processor, max_steps=2, learning_rate=1e-2)
        if sampling:
            trainer.add_callback(SampleGenerationCallback(trainer, prompts(tmp_path), steps=1, seed=7))
        trainer.train()
        assert model.training
        ends.append(state_of(model))
    changed = [name for name in weights if not torch.equal(ends[0][name], weights[name])]
    assert changed and all("lora" in name or "modules_to_save" in name for name in changed)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in weights)
    assert len(list((tmp_path / "samples").iterdir())) == 2


def test_samples_are_made_in_the_precision_of_training(tmp_path, processor):
    model = model_of(processor).train()
    trainer = make_trainer(tmp_path, model, samples_of(processor), processor, bf16=True)
    seen = set()
    layer = model.depth_heads.input_fc1
    layer.register_forward_hook(lambda layer, inputs, output: seen.add((output.dtype, layer.training)))
    SampleGenerationCallback(trainer, prompts(tmp_path)).generate()
    # And without dropout.
    assert seen == {(torch.bfloat16, False)} and model.training
    assert (tmp_path / "samples" / "step-000000" / "grid.png").is_file()


def test_answers_are_split_into_texts_and_images(processor):
    callback = SampleGenerationCallback.__new__(SampleGenerationCallback)
    callback.processor = processor
    start, image, end = processor.image_start_token_id, processor.image_token_id, processor.image_end_token_id
    words = processor.tokenizer("A blue one.")["input_ids"]
    drawn = [start, *[image] * N, end]
    ids = [*words, *drawn, *drawn, *words, processor.tokenizer.eos_token_id]
    parts = callback._parts(ids, iter(["first", "second"]))
    pictures = [{"type": "image", "image": name} for name in ("first", "second")]
    assert parts == [text("A blue one."), *pictures, text("A blue one.")]


def test_prompts_are_read_and_checked_at_once(tmp_path, processor):
    file = tmp_path / "prompts.json"
    content = prompts(tmp_path)
    content[0]["messages"][0]["content"][0]["image"] = "one.png"
    file.write_text(json.dumps(content))
    read = read_prompts(file)
    assert read[0]["messages"][0]["content"][0]["image"] == str(tmp_path / "one.png") and read[1:] == content[1:]
    prompt = SamplePrompt(read[0], processor, 1)
    assert prompt.inputs["pixel_values"].shape == (1, 3, 24, 24)
    assert SamplePrompt(read[1], processor, 2).inputs["input_ids"][0, -1] == processor.image_start_token_id

    file.write_text("{}")
    with pytest.raises(ValueError, match="must hold a list of prompts, got dict"):
        read_prompts(file)
    trainer = make_trainer(tmp_path, model_of(processor), samples_of(processor), processor)
    missing = {"messages": user({"type": "image", "image": str(tmp_path / "none.png")}, text("?"))}
    for wrong, message in (
        ([], "at least one sample prompt"),
        ([read[1], {"mode": "image"}], "Sample prompt 2 must be a dict with 'messages'"),
        ([{**read[1], "mode": "draw"}], "sample prompt 1 must be one of 'text', 'image', 'interleaved', got 'draw'"),
        ([missing], "Sample prompt 1 cannot be used: The image .*none.png' cannot be used: the file cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            SampleGenerationCallback(trainer, wrong)
    trainer.processing_class = None
    with pytest.raises(ValueError, match="need a DualTokenProcessor"):
        SampleGenerationCallback(trainer, read)
    with pytest.raises(ValueError, match="`steps` must be at least 1"):
        SampleGenerationCallback(trainer, read, processor, steps=0)


def test_a_generation_that_fails_names_its_prompt(tmp_path, processor):
    model = model_of(processor).train()
    trainer = make_trainer(tmp_path, model, samples_of(processor), processor)
    wrong = {"messages": user(text("Draw it.")), "mode": "image", "guidance": 3.0}
    callback = SampleGenerationCallback(trainer, [wrong])
    with pytest.raises(RuntimeError, match=r"failed for sample prompt 1 \(image\): 'Draw it.'") as caught:
        callback.generate()
    assert "guidance" in str(caught.value.__cause__)
    assert model.training
