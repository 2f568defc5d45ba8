"""Training: data sets, both trainers, and runs of the two scripts that are stopped and go on."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from tiny_models import lively_unified_model, tiny_quantizer_fields, tiny_tokenizer_config
from tiny_tokenizer import build_tiny_qwen2_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionModel,
    TrainerCallback,
    TrainingArguments,
)

from transformers_dualtoken import DualTokenImageProcessorPil, DualTokenProcessor, DualTokenVisionTokenizer
from transformers_dualtoken.training import (
    DEFAULT_LOSS_WEIGHTS,
    DualTokenChatDataset,
    DualTokenDataCollator,
    DualTokenImageDataset,
    DualTokenTrainer,
    DualTokenVisionTokenizerTrainer,
    collate_images,
    encode_images,
    find_checkpoint,
    set_trainable,
)


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import run_tokenizer  # noqa: E402
import run_unified  # noqa: E402


N = 9  # positions of an image of the tiny tokenizer
TOKENIZER_FIELDS = {
    name: getattr(tiny_tokenizer_config(), name)
    for name in (
        "pixel_layer",
        "semantic_layer",
        "shortcut_layer",
        "decoder_block_out_channels",
        "decoder_in_channels",
        "decoder_norm_num_groups",
        "decoder_latent_size",
    )
} | {f"{kind}_quantizer_config": tiny_quantizer_fields() for kind in ("pixel", "semantic")}


def quiet(**overrides) -> dict:
    """Training arguments of a short run on the CPU that leaves nothing but its checkpoints."""
    return {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "save_strategy": "no",
        "logging_steps": 1,
        **overrides,
    }


def noise(seed: int, size=(24, 24)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def say(role: str, *parts) -> dict:
    """A message; a string is text, a tuple of one name an image."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part[0]}
        for part in parts
    ]
    return {"role": role, "content": content}


def state_of(module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before: dict, after: dict) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.fixture(scope="module")
def text_tokenizer():
    return build_tiny_qwen2_tokenizer(["user assistant", "Draw it, please. What is in the picture? A blue one."])


@pytest.fixture(scope="module")
def processor(text_tokenizer):
    return DualTokenProcessor(DualTokenImageProcessorPil(size=24), text_tokenizer, num_image_tokens=N)


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory) -> Path:
    """A tiny SigLIP with its text tokenizer, as a checkpoint on disk."""
    torch.manual_seed(0)
    folder, config = tmp_path_factory.mktemp("siglip"), tiny_tokenizer_config()
    SiglipModel(
        SiglipConfig(vision_config=config.vision_config.to_dict(), text_config=config.text_config.to_dict())
    ).save_pretrained(folder)
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "<bos>": 1, "<eos>": 2, "a": 3}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def language_model_folder(tmp_path_factory, text_tokenizer) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("qwen2")
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(text_tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=None,
            eos_token_id=text_tokenizer.eos_token_id,
            pad_token_id=text_tokenizer.pad_token_id,
        )
    )
    model.generation_config = GenerationConfig(eos_token_id=text_tokenizer.eos_token_id)
    model.save_pretrained(folder)
    text_tokenizer.save_pretrained(folder)
    return folder


# Conversations


def make_codes(*keys) -> dict:
    generator = torch.Generator().manual_seed(2)
    return {key: torch.randint(24, (2, 3, 3, 3), generator=generator).unbind() for key in keys}


def test_chat_labels_are_what_the_assistant_says(processor):
    chat = [
        {"role": "system", "content": "Be brief."},
        say("user", ("b",), "What is it?", ("a",)),
        {"role": "assistant", "content": "A blue one."},
        say("user", "Draw it."),
        say("assistant", "Here: ", ("c",), " done."),
    ]
    codes = make_codes("a", "b", "c")
    dataset = DualTokenChatDataset([chat], processor, image_codes=codes, prompt_drop_probability=0)
    item = dataset[0]
    image = "<|vision_start|>" + N * "<|image_pad|>" + "<|vision_end|>"
    head = "<|im_start|>assistant\n"
    rendered = (
        f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{image}What is it?{image}<|im_end|>\n{head}"
        f"A blue one.<|im_end|>\n<|im_start|>user\nDraw it.<|im_end|>\n{head}Here: {image} done.<|im_end|>\n"
    )
    assert processor.decode(item["input_ids"]) == rendered
    is_target = item["labels"] != -100
    assert torch.equal(item["labels"][is_target], item["input_ids"][is_target])
    assert processor.decode(item["labels"][is_target]) == f"A blue one.<|im_end|>Here: {image} done.<|im_end|>"
    assert item["attention_mask"].all()
    # Reading order, whatever the order of the mapping.
    for index, name in enumerate(("pixel_codes", "semantic_codes")):
        assert torch.equal(item[name], torch.stack([codes[key][index] for key in "bac"]))


def test_chat_images_are_loaded_where_there_are_no_codes(processor):
    chats = [[say("user", ("x",), ("y",)), say("assistant", "ok")], [say("user", "a"), say("assistant", "b")]]
    dataset = DualTokenChatDataset(chats, processor, load_image=lambda key: torch.full((3, 24, 24), float(key == "y")))
    assert torch.equal(dataset[0]["pixel_values"].mean((1, 2, 3)), torch.tensor([0.0, 1.0]))
    assert not {"pixel_values", "pixel_codes"} & set(dataset[1])
    with pytest.raises(ValueError, match="Exactly one of `image_codes` and `load_image`"):
        DualTokenChatDataset(chats, processor)


def drawing_chats() -> list[list[dict]]:
    drawing = [say("user", ("a",), "Draw it."), say("assistant", "Here: ", ("b",), "and", ("a",))]
    answer = [say("user", ("a",), "What is it?"), say("assistant", "A blue one.")]
    return [drawing, answer] * 20


def test_dropped_prompt_leaves_the_first_drawn_image_at_the_start(processor):
    codes = make_codes("a", "b")
    whole, dropped = (
        DualTokenChatDataset(drawing_chats()[:2], processor, image_codes=codes, prompt_drop_probability=share)
        for share in (0, 1)
    )
    before, after = whole[0], dropped[0]
    start = int((before["labels"] == processor.image_start_token_id).nonzero()[0])
    assert after["attention_mask"].tolist() == [0] * start + [1] * (len(before["input_ids"]) - start)
    # Nothing predicts what now comes first.
    assert (after["labels"][: start + 1] == -100).all()
    assert torch.equal(after["labels"][start + 1 :], before["labels"][start + 1 :])
    assert int(after["labels"][start + 1]) == processor.image_token_id
    for name in ("input_ids", "pixel_codes", "semantic_codes"):
        assert torch.equal(after[name], before[name])
    # Input images alone are no drawing; and the shared sample was not changed in place.
    assert all(torch.equal(whole[1][name], dropped[1][name]) for name in whole[1])
    dropped.prompt_drop_probability = 0
    assert all(torch.equal(before[name], dropped[0][name]) for name in before)


def test_dropped_prompt_predicts_as_an_empty_context(processor):
    """Masked before `<image_start>` is the same to the model as generation's unconditional context."""
    model = lively_unified_model(
        text_config={**lively_unified_model().config.text_config.to_dict(), "vocab_size": 400},
        image_start_token_id=processor.image_start_token_id,
        image_token_id=processor.image_token_id,
        image_end_token_id=processor.image_end_token_id,
    )
    dataset = DualTokenChatDataset(
        drawing_chats()[:1], processor, image_codes=make_codes("a", "b"), prompt_drop_probability=1
    )
    batch = DualTokenDataCollator(0)([dataset[0]])
    start = int(batch["attention_mask"].argmax())
    with torch.no_grad():
        masked = model(**batch)
        alone = model(
            batch["input_ids"][:, start:],
            labels=batch["labels"][:, start:],
            pixel_codes=batch["pixel_codes"][1:],
            semantic_codes=batch["semantic_codes"][1:],
        )
    for name in ("text_loss", "pixel_loss", "semantic_loss"):
        torch.testing.assert_close(masked[name], alone[name], rtol=1e-4, atol=1e-4)


def test_prompt_drop_depends_on_seed_epoch_and_index_only(processor):
    def drops(seed, epoch, order):
        dataset = DualTokenChatDataset(
            drawing_chats(), processor, make_codes("a", "b"), prompt_drop_probability=0.5, seed=seed
        )
        dataset.set_epoch(epoch)
        torch.rand(seed + epoch)  # global random state plays no part
        found = {index: not dataset[index]["attention_mask"].all() for index in order}
        return [found[index] for index in range(40)]

    first = drops(0, 0, range(40))
    assert first == drops(0, 0, reversed(range(40)))
    assert first != drops(1, 0, range(40)) and first != drops(0, 1, range(40))
    assert 4 <= sum(first) <= 16 and not any(first[1::2])


def test_chat_errors_name_the_sample(processor):
    good = [say("user", "a"), say("assistant", "b")]
    length = len(DualTokenChatDataset([good], processor, {})[0]["input_ids"])
    DualTokenChatDataset([good], processor, {}, max_length=length)
    with pytest.raises(ValueError, match=f"Sample 1 has .* tokens, more than `max_length` = {length}"):
        DualTokenChatDataset([good, [say("user", "a b c"), say("assistant", "b")]], processor, {}, max_length=length)
    with pytest.raises(ValueError, match="Sample 1 has no assistant message"):
        DualTokenChatDataset([good, good[:1]], processor, {})


def test_collator_pads_on_the_right_and_joins_images():
    def sample(length, images):
        item = {"input_ids": torch.arange(length), "labels": torch.arange(length)}
        item["attention_mask"] = torch.ones(length, dtype=torch.long)
        return {**item, "pixel_codes": torch.full((images, 3, 3, 3), length)} if images else item

    batch = DualTokenDataCollator(99, pad_to_multiple_of=4)([sample(2, 1), sample(5, 0), sample(3, 2)])
    assert batch["input_ids"][0].tolist() == [0, 1] + [99] * 6
    assert batch["labels"][2].tolist() == [0, 1, 2] + [-100] * 5
    assert batch["attention_mask"].sum(1).tolist() == [2, 5, 3]
    assert batch["pixel_codes"][:, 0, 0, 0].tolist() == [2, 3, 3]
    assert set(batch) == {"input_ids", "labels", "attention_mask", "pixel_codes"}


def test_encode_images_encodes_equal_keys_once():
    model, loaded = lively_unified_model(), []

    def load_image(key):
        loaded.append(key)
        return torch.full((3, 24, 24), key / 10)

    codes = encode_images(model, load_image, [3, 1, 3, 2], batch_size=2)
    assert loaded == [3, 1, 2] and list(codes) == [3, 1, 2]
    pixel, semantic = model.model.get_image_codes(torch.full((1, 3, 24, 24), 0.2))
    assert torch.equal(codes[2][0], pixel[0]) and torch.equal(codes[2][1], semantic[0])
    assert encode_images(model, load_image, []) == {}


# Images


@pytest.fixture
def image_processor():
    return DualTokenImageProcessorPil(size=24)


def table(*images) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"image": list(images)}, features=datasets.Features({"image": datasets.Image()}))


def test_crop_depends_on_seed_epoch_and_index_only(image_processor):
    def pixels(seed, epoch, index):
        dataset = DualTokenImageDataset(table(noise(0), noise(0)), image_processor, seed=seed)
        dataset.set_epoch(epoch)
        return dataset[index]["pixel_values"]

    reference = pixels(0, 0, 0)
    assert reference.shape == (3, 24, 24) and -1 <= reference.min() and reference.max() <= 1
    assert torch.equal(reference, pixels(0, 0, 0))
    assert not any(torch.equal(reference, pixels(*other)) for other in ((1, 0, 0), (0, 1, 0), (0, 0, 1)))


def test_crop_keeps_its_share_of_the_area(image_processor):
    columns, rows = np.meshgrid(np.arange(200), np.arange(100))
    ramp = Image.fromarray(np.stack([columns, rows, rows], axis=-1).astype(np.uint8))
    dataset = DualTokenImageDataset(table(ramp), image_processor, crop_scale=(0.5, 0.6))
    areas, ratios = [], []
    for seed in range(50):
        values = np.asarray(dataset._random_crop(ramp, random.Random(seed))).astype(float)
        assert values.shape == (100, 200, 3)
        width, height = (np.ptp(values[..., channel]) + 1 for channel in (0, 1))
        areas.append(width * height / (200 * 100))
        ratios.append(width / height)
    # Read off the ramp to about a pixel. Half the ratios do not fit the picture: the area is kept all the same.
    assert 0.48 < min(areas) < 0.52 and 0.58 < max(areas) < 0.62
    assert min(ratios) < 1.2


def test_crop_never_leaves_the_picture(image_processor):
    picture = noise(0, size=(7, 3))
    dataset = DualTokenImageDataset(table(picture), image_processor, crop_scale=(0.99, 1.0))
    for seed in range(300):
        assert dataset._random_crop(picture, random.Random(seed)).size == (7, 3)


@pytest.mark.parametrize("crop_scale", [(1, 1), (0.9, 1.0)])
def test_images_of_all_modes_are_seen_as_by_the_image_processor(image_processor, crop_scale):
    grey = noise(0).convert("L")
    transparent = Image.new("RGBA", (24, 24), (0, 0, 0, 0))  # black, were transparency ignored
    deep = Image.fromarray(np.full((24, 24), 32896, dtype=np.uint16))  # half of 16 bits
    dataset = DualTokenImageDataset(table(grey, transparent, deep), image_processor, crop_scale=crop_scale)
    pixels = [dataset[index]["pixel_values"] for index in range(3)]
    assert torch.equal(pixels[0][0], pixels[0][1]) and pixels[0].std() > 0.1
    assert (pixels[1] == 1).all()
    torch.testing.assert_close(pixels[2], torch.full((3, 24, 24), 128 / 127.5 - 1))
    if crop_scale == (1, 1):
        expected = image_processor(images=[grey, transparent, deep], return_tensors="pt").pixel_values
        assert torch.equal(torch.stack(pixels), expected)


@pytest.mark.parametrize("crop_scale", [(0, 1), (0.9, 0.8), (0.9, 1.1)])
def test_crop_scale_is_checked(image_processor, crop_scale):
    with pytest.raises(ValueError, match="`crop_scale` must be a range within"):
        DualTokenImageDataset(table(noise(0)), image_processor, crop_scale=crop_scale)


def test_missing_image_column_is_named(image_processor):
    with pytest.raises(ValueError, match=r"no column 'picture'; it has \['image'\]"):
        DualTokenImageDataset(table(noise(0)), image_processor, image_column="picture")


# The unified trainer


class FixedItems(torch.utils.data.Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def unequal_items() -> FixedItems:
    """Eight samples with 0 to 2 drawn images, and with 3 to 23 text targets."""
    generator, items = torch.Generator().manual_seed(3), []
    for index in range(8):
        images = (1, 0, 2, 1)[index % 4]
        ids = torch.randint(3, 50, (4 + 3 * index,), generator=generator)
        image = torch.tensor([50] + [51] * N + [52])
        input_ids = torch.cat([ids] + [image] * images)
        labels = input_ids.clone()
        labels[: 1 + index % 3] = -100
        item = {"input_ids": input_ids, "labels": labels, "attention_mask": torch.ones_like(input_ids)}
        if images:
            for name in ("pixel_codes", "semantic_codes"):
                item[name] = torch.randint(24, (images, 3, 3, 3), generator=generator)
        items.append(item)
    return FixedItems(items)


class Recorder(DualTokenTrainer):
    """Keeps the gradients of every optimizer step, and the counts the model was given."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gradients, self.counts = [], []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.counts.append(num_items_in_batch.tolist())
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _get_grad_norm(self, model, *args, **kwargs):
        self.gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        return super()._get_grad_norm(model, *args, **kwargs)


def train_unified(output_dir, batch_size=4, accumulation=1, model=None, **overrides) -> Recorder:
    arguments = {"max_steps": 2, "optim": "sgd", "learning_rate": 1e-4, "max_grad_norm": 0, **overrides}
    trainer = Recorder(
        model or lively_unified_model(text_loss_weight=0.5, pixel_loss_weight=2.0, semantic_loss_weight=0.25),
        TrainingArguments(
            str(output_dir),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            **quiet(**arguments),
        ),
        train_dataset=unequal_items(),
        data_collator=DualTokenDataCollator(0),
    )
    trainer.train()
    return trainer


def test_accumulation_does_not_change_the_training(tmp_path):
    runs = [train_unified(tmp_path, batch, steps) for batch, steps in ((4, 1), (1, 4), (2, 2))]
    reference = runs[0]
    for run, accumulation in zip(runs, (1, 4, 2)):
        # Every micro-batch is told the targets of the whole step: text, visual.
        assert run.counts == [pair for pair in reference.counts for _ in range(accumulation)]
    totals = [sum(column) for column in zip(*reference.counts)]
    labels = [item["labels"][1:] for item in unequal_items().items]
    visual = sum(int((row == 51).sum()) for row in labels)
    assert totals == [sum(int((row != -100).sum()) for row in labels) - visual, visual]
    for run in runs[1:]:
        for one, other in zip(reference.gradients, run.gradients):
            assert one.keys() == other.keys()
            for name in one:
                scale = one[name].abs().max().clamp(min=1e-3)
                assert (one[name] - other[name]).abs().max() / scale < 1e-4, name
        for name, value in reference.model.state_dict().items():
            torch.testing.assert_close(run.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    logs = [[log["loss"] for log in run.state.log_history if "loss" in log] for run in runs]
    np.testing.assert_allclose(logs[1:], [logs[0]] * 2, rtol=1e-4)

    # What the pair is for: means of micro-batches would be something else.
    model, collate = lively_unified_model(), DualTokenDataCollator(0)
    items = unequal_items().items[:4]
    with torch.no_grad():
        whole = model(**collate(items)).loss
        of_means = torch.stack([model(**collate([item])).loss for item in items]).mean()
    assert abs(whole - of_means) > 0.05 * whole


@pytest.mark.parametrize("logging_steps", [1, 2])
def test_logged_losses_add_up(tmp_path, logging_steps):
    trainer = train_unified(tmp_path, 2, 2, logging_steps=logging_steps)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2 // logging_steps
    for log in logs:
        total = 0.5 * log["text_loss"] + 2 * log["pixel_loss"] + 0.25 * log["semantic_loss"]
        assert log["loss"] == pytest.approx(total, rel=1e-4)


def test_evaluation_counts_and_does_not_log_terms(tmp_path):
    model = lively_unified_model()
    trainer = Recorder(
        model,
        TrainingArguments(str(tmp_path), per_device_eval_batch_size=8, **quiet()),
        eval_dataset=unequal_items(),
        data_collator=DualTokenDataCollator(0),
    )
    loss = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        assert loss == pytest.approx(float(model(**DualTokenDataCollator(0)(unequal_items().items)).loss), rel=1e-5)
    assert trainer._term_count == 0


def test_vision_tokenizer_does_not_move(tmp_path):
    model = lively_unified_model()
    before = state_of(model)
    trainer = train_unified(tmp_path, model=model, optim="adamw_torch", weight_decay=0.1)
    moved = changed(before, state_of(model))
    assert not any("vision_tokenizer" in name for name in moved)
    assert any("codebook" in name for name in before)
    assert {name.split(".")[0 if "model." not in name else 1] for name in moved} == {
        "visual_projector",
        "language_model",
        "lm_head",
        "depth_heads",
    }
    assert model.training and not model.vision_tokenizer.training
    assert not any("vision_tokenizer" in name for gradients in trainer.gradients for name in gradients)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (["projector"], {"model.visual_projector"}),
        (["heads"], {"depth_heads"}),
        (["language_model"], {"model.language_model", "lm_head"}),
        (["projector", "heads"], {"model.visual_projector", "depth_heads"}),
    ],
)
def test_set_trainable(tmp_path, parts, expected):
    model = lively_unified_model()
    set_trainable(model, parts)
    before = state_of(model)
    train_unified(tmp_path, model=model, max_steps=1)
    moved = {
        ".".join(name.split(".")[: 2 if name.startswith("model.") else 1]) for name in changed(before, state_of(model))
    }
    assert moved == expected


@pytest.mark.parametrize("parts", [[], ["projector", "head"]])
def test_set_trainable_names_the_parts(parts):
    with pytest.raises(ValueError, match="must name some of projector, language_model, heads"):
        set_trainable(lively_unified_model(), parts)


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="torchrun"):
        train_unified(tmp_path)


# The tokenizer's trainer


def tokenizer_trainer(folder, output_dir, loss_weights=None, dataset=None, config=None, **overrides):
    model = DualTokenVisionTokenizer.from_siglip_pretrained(folder, **{**TOKENIZER_FIELDS, **(config or {})})
    arguments = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3, **overrides}
    return DualTokenVisionTokenizerTrainer(
        model=model,
        args=TrainingArguments(str(output_dir), **quiet(**arguments)),
        teacher=SiglipModel.from_pretrained(folder).vision_model,
        loss_weights=loss_weights,
        train_dataset=dataset,
        data_collator=collate_images,
    )


def pixel_items(count=4) -> FixedItems:
    values = torch.rand(count, 3, 24, 24, generator=torch.Generator().manual_seed(5)) * 2 - 1
    return FixedItems([{"pixel_values": value} for value in values])


@pytest.mark.parametrize(("latent_size", "reconstruction_size"), [(12, 24), (8, 16)])
def test_terms_and_total_by_hand(siglip_folder, tmp_path, latent_size, reconstruction_size):
    weights = {"pooler_mse": 2.5, "semantic_commitment": 0.0}
    trainer = tokenizer_trainer(
        siglip_folder, tmp_path, loss_weights=weights, config={"decoder_latent_size": latent_size}
    )
    model = trainer.model.eval()
    for kind in ("pixel", "semantic"):
        model.quantizer(kind).codebook.embeddings.normal_()
    pixel_values = torch.stack([item["pixel_values"] for item in pixel_items().items])
    with torch.no_grad():
        total, output = trainer.compute_loss(model, {"pixel_values": pixel_values}, return_outputs=True)
        terms = trainer.loss_terms(model, output, pixel_values)
        # transformers' own forward of the teacher; its hidden states begin with the embeddings.
        reference = SiglipVisionModel.from_pretrained(siglip_folder)(pixel_values, output_hidden_states=True)
    hidden = reference.hidden_states[model.config.semantic_layer]

    assert output.reconstruction.shape[-1] == reconstruction_size
    target = F.interpolate(pixel_values, size=(reconstruction_size,) * 2, mode="bilinear", align_corners=False)

    def cosine(x, y):
        return ((x * y).sum(-1) / x.norm(dim=-1) / y.norm(dim=-1)).mean()

    expected = {
        "semantic_mse": (output.semantic_features - hidden).square().mean(),
        "semantic_cosine": -cosine(output.semantic_features, hidden),
        "pooler_mse": (output.pooler_output - reference.pooler_output).square().mean(),
        "pooler_cosine": -cosine(output.pooler_output, reference.pooler_output),
        "reconstruction_mse": (output.reconstruction - target).square().mean(),
        "pixel_commitment": output.pixel_commitment_loss,
        "semantic_commitment": output.semantic_commitment_loss,
    }
    assert terms.keys() == expected.keys() == DEFAULT_LOSS_WEIGHTS.keys()
    for name in expected:
        torch.testing.assert_close(terms[name], expected[name], rtol=1e-4, atol=1e-6)
    by_hand = sum({**DEFAULT_LOSS_WEIGHTS, **weights}[name] * term for name, term in expected.items())
    torch.testing.assert_close(total, by_hand, rtol=1e-4, atol=1e-5)


def test_what_moves_in_tokenizer_training(siglip_folder, tmp_path):
    trainer = tokenizer_trainer(siglip_folder, tmp_path, dataset=pixel_items(), weight_decay=0.1)
    model, teacher = trainer.model, trainer.teacher
    before, teacher_before = state_of(model), state_of(teacher)
    trainer.train()
    moved = changed(before, state_of(model))
    assert not changed(teacher_before, state_of(teacher)) and not teacher.training
    frozen = ("siglip.text_model.", "siglip.logit_scale", "siglip.logit_bias")
    assert not any(name.startswith(frozen) for name in moved)
    for kind in ("pixel", "semantic"):
        for buffer in ("embeddings", "cluster_size", "embedding_sum"):
            assert f"{kind}_quantizer.codebook.{buffer}" in moved
    # Everything else gets a gradient: no part is left out of the loss.
    still = {name for name in before if name not in moved and not name.startswith(frozen)}
    assert not {name for name in still if "position_ids" not in name}


def test_vectors_are_not_decayed(siglip_folder, tmp_path):
    trainer = tokenizer_trainer(siglip_folder, tmp_path, weight_decay=0.1)
    trainer.create_optimizer()
    groups = {group["weight_decay"]: group["params"] for group in trainer.optimizer.param_groups}
    assert groups.keys() == {0.0, 0.1}
    assert all(parameter.ndim < 2 for parameter in groups[0.0]) and all(p.ndim >= 2 for p in groups[0.1])
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert len(trained) == len(groups[0.0]) + len(groups[0.1])


def test_unknown_loss_term_is_named(siglip_folder, tmp_path):
    with pytest.raises(ValueError, match="No such loss terms: perceptual; there are semantic_mse"):
        tokenizer_trainer(siglip_folder, tmp_path, loss_weights={"perceptual": 1.0, "pooler_mse": 1.0})


@pytest.mark.parametrize(("batch_size", "accumulation"), [(2, 1), (1, 2)])
def test_logged_terms_add_up(siglip_folder, tmp_path, batch_size, accumulation):
    trainer = tokenizer_trainer(
        siglip_folder,
        tmp_path,
        dataset=pixel_items(),
        logging_steps=2,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
    )
    trainer.train()
    log = next(log for log in trainer.state.log_history if "loss" in log)
    total = sum(weight * log[name] for name, weight in DEFAULT_LOSS_WEIGHTS.items())
    assert log["loss"] == pytest.approx(total, rel=1e-4)


# The epoch reaches the data set, also within an epoch that a resumed run takes up


class EpochRecorder(FixedItems):
    epoch = None

    def __init__(self, items):
        super().__init__(items)
        self.seen = []

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, index):
        self.seen.append((self.epoch, index))
        return super().__getitem__(index)


def test_epoch_reaches_the_dataset(siglip_folder, tmp_path):
    def run(resume=None, **overrides):
        dataset = EpochRecorder(pixel_items(6).items)
        arguments = {"max_steps": 9, "save_strategy": "steps", "save_steps": 4, **overrides}
        trainer = tokenizer_trainer(siglip_folder, tmp_path, dataset=dataset, **arguments)
        trainer.train(resume_from_checkpoint=resume)
        return dataset.seen

    whole = run()
    assert [epoch for epoch, _ in whole] == [0] * 6 + [1] * 6 + [2] * 6
    resumed = run(resume=str(tmp_path / "checkpoint-4"))
    assert resumed == whole[8:]


def test_epoch_reaches_the_dataset_when_ranks_share_it(siglip_folder, tmp_path):
    """On several ranks accelerate wraps the batch sampler, and leaves the data set alone."""
    from accelerate.data_loader import prepare_data_loader

    dataset = EpochRecorder(pixel_items(8).items)
    trainer = tokenizer_trainer(siglip_folder, tmp_path, dataset=dataset, num_train_epochs=3, max_steps=-1)
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, shuffle=True, collate_fn=collate_images)
    trainer.get_train_dataloader = lambda: prepare_data_loader(
        loader, num_processes=2, process_index=1, rng_types=[], use_seedable_sampler=True
    )
    trainer.train()
    assert [epoch for epoch, _ in dataset.seen] == [0] * 4 + [1] * 4 + [2] * 4


# Runs of the scripts, stopped and started again


class Stopped(Exception):
    pass


class Stop(TrainerCallback):
    """As if the process had ended after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Stopped


@pytest.fixture
def no_dataset_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_images(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for index in range(count):
        noise(index, size=(30, 26)).save(folder / f"{index}.png")


RUN = [
    *("--use_cpu", "1", "--disable_tqdm", "1", "--logging_steps", "1", "--learning_rate", "1e-3"),
    *("--per_device_train_batch_size", "2", "--max_steps", "6", "--save_steps", "3"),
]


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, buffers, optimizer, schedule, random states and logs are bit-identical."""
    for folder in ("", "checkpoint-6"):
        first, second = (load_file(path / folder / "model.safetensors") for path in (one, other))
        assert not changed(first, second)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        first, second = (torch.load(path / "checkpoint-6" / name, weights_only=False) for path in (one, other))
        assert_equal(first, second, name)
    logs = [json.loads((path / "trainer_state.json").read_text())["log_history"] for path in (one, other)]
    assert len(logs[0]) == 7  # six steps and the summary, whose times differ
    assert logs[0][:6] == logs[1][:6]


def assert_equal(first, second, where):
    if isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_equal(first[key], second[key], f"{where}/{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for index, pair in enumerate(zip(first, second)):
            assert_equal(*pair, f"{where}/{index}")
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, np.ndarray):
        assert np.array_equal(first, second), where
    else:
        assert first == second, where


def check_resume(main, arguments, tmp_path):
    """Runs without a stop, and with one in the step after the checkpoint of step 3."""
    whole, stopped = tmp_path / "new" / "whole", tmp_path / "stopped"
    stopped.mkdir()
    main([*arguments, "--output_dir", str(whole)])
    with pytest.raises(Stopped):
        main([*arguments, "--output_dir", str(stopped)], callbacks=[Stop(4)])
    assert [path.name for path in stopped.glob("checkpoint-*")] == ["checkpoint-3"]
    # What a run leaves that was stopped while it wrote a checkpoint.
    (stopped / "checkpoint-5").mkdir()
    (stopped / "checkpoint-5" / "model.safetensors").write_bytes(b"")
    main([*arguments, "--output_dir", str(stopped)])
    assert_same_run(whole, stopped)
    return whole


def check_finished(main, arguments, folder):
    before = load_file(folder / "model.safetensors")
    main([*arguments, "--output_dir", str(folder)])
    assert not changed(before, load_file(folder / "model.safetensors"))
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 6


@pytest.mark.parametrize("images", [4, 6], ids=["within an epoch", "between two epochs"])
def test_tokenizer_run_goes_on_where_it_was_stopped(siglip_folder, tmp_path, no_dataset_cache, images):
    write_images(tmp_path / "images", images)
    arguments = [*RUN, "--siglip_model_name_or_path", str(siglip_folder), "--train_dir", str(tmp_path / "images")]
    arguments += ["--config_overrides", json.dumps(TOKENIZER_FIELDS)]
    folder = check_resume(run_tokenizer.main, arguments, tmp_path)
    check_finished(run_tokenizer.main, arguments, folder)


@pytest.fixture
def vision_tokenizer_folder(siglip_folder, tmp_path) -> Path:
    model = DualTokenVisionTokenizer.from_siglip_pretrained(siglip_folder, **TOKENIZER_FIELDS)
    for kind in ("pixel", "semantic"):
        model.quantizer(kind).codebook.embeddings.normal_()
    model.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def unified_arguments(tmp_path, vision_tokenizer_folder, language_model_folder, samples=4) -> list[str]:
    write_images(tmp_path / "images", samples)
    lines = [
        [say("user", f"Draw {index}.\u2028"), say("assistant", (f"images/{index}.png",), "done")]
        for index in range(samples)
    ]
    text = "".join(json.dumps({"messages": line}, ensure_ascii=False) + "\n" for line in lines)
    (tmp_path / "chat.jsonl").write_text(text + "\n", encoding="utf-8")
    head = {"hidden_size": 16, "num_hidden_layers": 1, "head_dim": 8, "intermediate_size": 32, "input_hidden_size": 24}
    return [
        *RUN,
        *("--train_file", str(tmp_path / "chat.jsonl"), "--prompt_drop_probability", "0.5"),
        *("--vision_tokenizer_name_or_path", str(vision_tokenizer_folder)),
        *("--language_model_name_or_path", str(language_model_folder)),
        *("--config_overrides", json.dumps({"depth_head_config": head})),
    ]


def test_unified_run_goes_on_where_it_was_stopped(vision_tokenizer_folder, language_model_folder, tmp_path):
    # Four steps an epoch, so that the run ends within one.
    arguments = unified_arguments(tmp_path, vision_tokenizer_folder, language_model_folder, samples=8)
    folder = check_resume(run_unified.main, arguments, tmp_path)
    check_finished(run_unified.main, arguments, folder)


def test_unified_run_from_pixels_and_on_from_a_unified_model(vision_tokenizer_folder, language_model_folder, tmp_path):
    arguments = unified_arguments(tmp_path, vision_tokenizer_folder, language_model_folder)
    arguments += ["--max_steps", "1", "--save_strategy", "no"]
    runs = tmp_path / "codes", tmp_path / "pixels"
    run_unified.main([*arguments, "--output_dir", str(runs[0])])
    run_unified.main([*arguments, "--output_dir", str(runs[1]), "--precompute_codes", "0"])
    first, second = (load_file(folder / "model.safetensors") for folder in runs)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-5)

    go_on = [*RUN, "--train_file", str(tmp_path / "chat.jsonl"), "--model_name_or_path", str(runs[0])]
    go_on += ["--train_parts", "heads", "--max_steps", "1", "--output_dir", str(tmp_path / "heads")]
    run_unified.main(go_on)
    moved = changed(first, load_file(tmp_path / "heads" / "model.safetensors"))
    assert {name.split(".")[0] for name in moved} == {"depth_heads"}


def test_last_whole_checkpoint_is_found(tmp_path):
    def arguments(**overrides):
        return TrainingArguments(str(tmp_path / "run"), **quiet(**overrides))

    assert find_checkpoint(arguments()) is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-best", "checkpoint-11"):
        (tmp_path / "run" / name).mkdir(parents=True)
        if name != "checkpoint-11":
            (tmp_path / "run" / name / "trainer_state.json").write_text("{}")
    assert find_checkpoint(arguments()) == str(tmp_path / "run" / "checkpoint-10")
    assert find_checkpoint(arguments(resume_from_checkpoint="elsewhere")) == "elsewhere"


@pytest.mark.slow
def test_two_ranks_train_as_one(vision_tokenizer_folder, language_model_folder, tmp_path):
    arguments = unified_arguments(tmp_path, vision_tokenizer_folder, language_model_folder, samples=8)
    with (tmp_path / "chat.jsonl").open("a", encoding="utf-8") as file:
        # Long texts without images, so that the ranks have unequal numbers of targets.
        chat = [say("user", "What is it?"), say("assistant", "A blue one. " * 9)]
        file.writelines(json.dumps({"messages": chat}) + "\n" for _ in range(8))
    arguments += ["--optim", "sgd", "--max_grad_norm", "0", "--max_steps", "4", "--save_strategy", "no"]
    one, two = tmp_path / "one", tmp_path / "two"
    run_unified.main([*arguments, "--output_dir", str(one), "--per_device_train_batch_size", "4"])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = Path(run_unified.__file__)
    result = subprocess.run(
        [*launch, str(script), *arguments, "--output_dir", str(two), "--ddp_backend", "gloo"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-4000:]
    first, second = (load_file(folder / "model.safetensors") for folder in (one, two))
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-5)
    logs = [json.loads((folder / "trainer_state.json").read_text())["log_history"][:4] for folder in (one, two)]
    for name in ("loss", "text_loss", "pixel_loss", "semantic_loss"):
        np.testing.assert_allclose(*([log[name] for log in run] for run in logs), rtol=1e-4, err_msg=name)
