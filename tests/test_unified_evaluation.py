"""Watching a unified training: exact evaluation, samples of what the model answers, throughput."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from PIL import Image
from tiny_models import lively_unified_model, tiny_quantizer_fields, tiny_tokenizer_config, tiny_unified_config
from tiny_tokenizer import build_tiny_qwen2_tokenizer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from training_helpers import FixedItems, noise, quiet, state_of
from transformers import TrainingArguments

from transformers_dualtoken import DualTokenImageProcessorPil, DualTokenProcessor
from transformers_dualtoken.depth_heads import DualTokenStackedLinear
from transformers_dualtoken.training.base_trainer import evaluation_batches
from transformers_dualtoken.training.unified.loss_sums import UnifiedLossSums
from transformers_dualtoken.training.unified.sample_generation import (
    SampleGenerationCallback,
    SamplePrompt,
    read_prompts,
)
from transformers_dualtoken.training.unified.throughput import (
    StepCounts,
    ThroughputMeter,
    TrainingFlops,
    find_peak_flops,
    peak_flops,
)
from transformers_dualtoken.training.unified.trainer import DualTokenTrainer, set_trainable


N, START, IMAGE, END, PAD = 9, 50, 51, 52, 0


def make_samples(draws=(True, False, True, True, False), num_codes=24) -> list[dict]:
    """Samples of several lengths: some draw an image, the others have one in the question, or none."""
    generator = torch.Generator().manual_seed(3)
    samples = []
    for index, draw in enumerate(draws):
        text = torch.randint(3, 50, (5 + 2 * index,), generator=generator)
        ids = torch.cat([text[:3], torch.tensor([START, *[IMAGE] * N, END]), text[3:]])
        labels = ids.clone()
        labels[: 3 if draw else 14] = -100
        sample = {"input_ids": ids, "labels": labels}
        if index == 4:
            sample = {"input_ids": text, "labels": text.clone()}
        else:
            for name in ("pixel_codes", "semantic_codes"):
                sample[name] = torch.randint(num_codes, (1, 3, 3, 3), generator=generator)
        samples.append(sample)
    return samples


def collate(samples: list[dict]) -> dict[str, torch.Tensor]:
    pad = torch.nn.utils.rnn.pad_sequence
    batch = {
        "input_ids": pad([s["input_ids"] for s in samples], batch_first=True, padding_value=PAD),
        "labels": pad([s["labels"] for s in samples], batch_first=True, padding_value=-100),
        "attention_mask": pad([torch.ones_like(s["input_ids"]) for s in samples], batch_first=True),
        # A reader's count, which is not the model's.
        "num_skipped": torch.zeros(1, dtype=torch.int64),
    }
    for name in ("pixel_codes", "semantic_codes"):
        codes = [s[name] for s in samples if name in s]
        if codes:
            batch[name] = torch.cat(codes)
    return batch


def make_trainer(tmp_path, model, samples=None, processor=None, **overrides) -> DualTokenTrainer:
    samples = make_samples() if samples is None else samples
    return DualTokenTrainer(
        model,
        TrainingArguments(output_dir=str(tmp_path), **quiet(**overrides)),
        train_dataset=FixedItems(samples),
        eval_dataset=FixedItems(samples),
        data_collator=collate,
        processing_class=processor,
    )


# Evaluation


@torch.no_grad()
def naive_metrics(model, samples) -> dict[str, float]:
    """From the full logits, one sample at a time."""
    config = model.config
    text_losses, text_right, visual_losses, visual_right = [], [], [], []
    for sample in samples:
        inputs = {name: value if "codes" in name else value[None] for name, value in sample.items()}
        labels = inputs.pop("labels")
        output = model(**inputs)
        hidden, targets = output.last_hidden_state[0, :-1], labels[0, 1:]
        is_text = (targets != -100) & (targets != IMAGE)
        logits = model.lm_head(hidden[is_text])
        text_losses.append(F.cross_entropy(logits, targets[is_text], reduction="none"))
        text_right.append(logits.argmax(-1) == targets[is_text])
        if (targets == IMAGE).any():
            codes = torch.stack([inputs["pixel_codes"], inputs["semantic_codes"]]).flatten(1, 3)
            logits = model.depth_heads.logits(
                hidden[targets == IMAGE],
                torch.stack([model.model.code_embeds(*codes)[index] for index in range(2)]),
            )
            visual_losses.append(F.cross_entropy(logits.flatten(0, 2), codes.flatten(), reduction="none"))
            visual_losses[-1] = visual_losses[-1].view(codes.shape)
            visual_right.append(logits.argmax(-1) == codes)
    text, right = torch.cat(text_losses), torch.cat(text_right).double()
    visual, visual_right = torch.cat(visual_losses, 1).double().mean(1), torch.cat(visual_right, 1).double().mean(1)
    metrics = {
        "text_loss": text.mean().item(),
        "text_perplexity": math.exp(text.double().mean()),
        "text_accuracy": right.mean().item(),
        "pixel_loss": visual[0].sum().item(),
        "semantic_loss": visual[1].sum().item(),
        "num_text_targets": len(text),
        "num_visual_targets": sum(map(len, [x[0] for x in visual_losses])),
    }
    for kind, losses, rights in zip(("pixel", "semantic"), visual.tolist(), visual_right.tolist()):
        for depth in range(3):
            metrics[f"{kind}_loss_depth_{depth + 1}"] = losses[depth]
            metrics[f"{kind}_accuracy_depth_{depth + 1}"] = rights[depth]
    weights = {kind: getattr(config, f"{kind}_loss_weight") for kind in ("text", "pixel", "semantic")}
    metrics["loss"] = sum(weight * metrics[f"{kind}_loss"] for kind, weight in weights.items())
    return metrics


@torch.no_grad()
def partly_right(model, samples) -> list[dict]:
    """The samples with every second text target, and the last codes of every image, as the model predicts them."""
    for sample in samples:
        inputs = {name: value if "codes" in name else value[None] for name, value in sample.items()}
        output = model(**inputs)
        labels = sample["labels"]
        is_text = (labels[1:] != -100) & (labels[1:] != IMAGE)
        chosen = is_text.nonzero()[::2, 0]
        labels[chosen + 1] = output.logits[0, chosen].argmax(-1)
        if "pixel_codes" in sample:
            before_last = output.last_hidden_state[:, 3 + N - 1]
            codes = model.depth_heads.sample(before_last, model.model.codebooks(), lambda logits: logits.argmax(-1))
            sample["pixel_codes"][0, -1, -1], sample["semantic_codes"][0, -1, -1] = codes[:, 0]
    return samples


def evaluated(metrics: dict) -> dict:
    others = ("runtime", "samples_per_second", "steps_per_second", "preparation_time", "epoch")
    return {name: value for name, value in metrics.items() if not name.endswith(others)}


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_evaluation_is_that_of_the_full_logits(tmp_path, batch_size):
    model = lively_unified_model(pixel_loss_weight=0.5, semantic_loss_weight=2.0)
    samples = partly_right(model, make_samples())
    trainer = make_trainer(tmp_path, model, samples, per_device_eval_batch_size=batch_size)
    metrics = evaluated(trainer.evaluate())
    expected = {f"eval_{name}": value for name, value in naive_metrics(model, samples).items()}
    assert metrics.keys() == expected.keys()
    accuracies = [value for name, value in expected.items() if "accuracy" in name]
    assert len(accuracies) == 7 and all(0 < accuracy < 1 for accuracy in accuracies)
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5), name
    assert trainer.predict(FixedItems(make_samples()[:2])).metrics["test_num_visual_targets"] == N


def test_evaluation_leaves_no_trace_in_training(tmp_path):
    model = lively_unified_model().train()
    trainer = make_trainer(tmp_path, model)
    state, before = torch.get_rng_state(), state_of(model)
    trainer.evaluate()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_two_ranks_evaluate_what_one_does(tmp_path):
    """Five samples in batches of one: the second rank makes up its last batch."""
    model = lively_unified_model()
    whole = make_trainer(tmp_path, model, per_device_eval_batch_size=1)
    expected = evaluated(whole.evaluate())
    calls, sums = [], []
    for rank in range(2):
        trainer = make_trainer(tmp_path, model, per_device_eval_batch_size=1)
        trainer.args = SimpleNamespace(
            **{name: getattr(whole.args, name) for name in ("eval_batch_size", "dataloader_num_workers")},
            dataloader_pin_memory=False,
            dataloader_prefetch_factor=None,
            process_index=rank,
            world_size=2,
        )
        trainer.check_ranks_agree = lambda dataset: None  # there is one process here
        loader = trainer.get_eval_dataloader()
        trainer._evaluation_sums, trainer._batches_to_count = UnifiedLossSums(model.config), loader.num_counted_batches
        trainer.args = whole.args
        for inputs in loader:
            trainer.prediction_step(model, inputs, True)
        calls.append(len(loader))
        sums.append(trainer._evaluation_sums)
    assert calls == [3, 3]

    # An all-reduce between the two.
    sent = {}
    for one in sums:
        one.reduce(
            SimpleNamespace(reduce=lambda tensor, how: sent.setdefault(tensor.dtype, []).append(tensor) or tensor)
        )
    joined = sums[0].reduce(SimpleNamespace(reduce=lambda tensor, how: sum(sent[tensor.dtype]))).compute()
    assert {f"eval_{name}" for name in joined} == expected.keys()
    for name, value in joined.items():
        assert value == pytest.approx(expected[f"eval_{name}"], rel=1e-6), name


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "num_ranks"), [(1, 1, 1), (5, 2, 2), (7, 3, 4), (2, 8, 4), (9, 2, 4), (16, 4, 4)]
)
def test_ranks_share_the_evaluation_set(num_samples, batch_size, num_ranks):
    shares = [evaluation_batches(num_samples, batch_size, rank, num_ranks) for rank in range(num_ranks)]
    assert len({len(batches) for batches, _ in shares}) == 1
    counted = [index for batches, count in shares for batch in batches[:count] for index in batch]
    assert sorted(counted) == list(range(num_samples))
    assert all(0 < len(batch) <= batch_size for batches, _ in shares for batch in batches)


def test_loss_sums_forget_and_leave_out_what_has_no_target():
    config = tiny_unified_config(depth_reduction="mean")
    sums = UnifiedLossSums(config)
    model, samples = lively_unified_model(depth_reduction="mean"), make_samples()
    sums.update(model(**{k: v for k, v in collate(samples).items() if k != "num_skipped"}))
    metrics = sums.compute()
    by_depth = [metrics[f"pixel_loss_depth_{depth}"] for depth in (1, 2, 3)]
    assert metrics["pixel_loss"] == pytest.approx(sum(by_depth) / 3)
    sums.reset()
    sums.update(model(input_ids=samples[4]["input_ids"][None], labels=samples[4]["labels"][None]))
    metrics = sums.compute()
    assert metrics["loss"] == metrics["text_loss"] and "pixel_loss" not in metrics
    assert metrics["num_visual_targets"] == 0 and metrics["num_text_targets"] == len(samples[4]["input_ids"]) - 1


def test_evaluation_refuses_what_it_cannot_do(tmp_path):
    trainer = make_trainer(tmp_path, lively_unified_model())
    with pytest.raises(ValueError, match="must have a length.*generator"):
        trainer.get_eval_dataloader(item for item in ())
    with pytest.raises(ValueError, match="holds no samples"):
        trainer.evaluate(FixedItems([]))
    silent = [{**sample, "labels": torch.full_like(sample["labels"], -100)} for sample in make_samples()]
    with pytest.raises(ValueError, match="No sample .* has a target"):
        trainer.evaluate(FixedItems(silent))
    trainer.compute_metrics = lambda prediction: {}
    with pytest.raises(ValueError, match="`compute_metrics` is not supported"):
        trainer.evaluate()
    trainer.eval_dataset = None
    with pytest.raises(ValueError, match="no evaluation set"):
        trainer.evaluate()


# Samples


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
    start, image, end = processor.image_tokens.ids[0], processor.image_token_id, processor.image_tokens.ids[-1]
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


# Throughput


def flops_model(**overrides):
    """Codebooks as large as the search pads them to, so that the counter counts the same."""
    quantizer = tiny_quantizer_fields(codebook_size=256)
    tokenizer = tiny_tokenizer_config(pixel_quantizer_config=quantizer, semantic_quantizer_config=quantizer)
    return lively_unified_model(vision_tokenizer_config=tokenizer.to_dict(), **overrides).train()


def flops_batch(pixels: bool) -> dict[str, torch.Tensor]:
    batch = collate(make_samples(draws=(True, False), num_codes=256))
    del batch["num_skipped"]
    if pixels:
        for name in ("pixel_codes", "semantic_codes"):
            del batch[name]
        batch["pixel_values"] = torch.rand(2, 3, 24, 24) * 2 - 1
    return batch


def addmm_flops(added, first, second, out_shape=None, **kwargs):
    return 2 * first[0] * first[1] * second[1]


def measured_flops(model, batch) -> int:
    """PyTorch's counter. It counts the masked half of attentions as well; in-place products it does not know."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops})
    with sdpa_kernel(SDPBackend.MATH), counter:
        loss = model(**batch).loss
        if loss.requires_grad:
            loss.backward()
    return counter.get_total_flops()


def step_counts(batch, encoded_images=0) -> StepCounts:
    labels, (rows, length) = batch["labels"][:, 1:], batch["input_ids"].shape
    visual = int((labels == IMAGE).sum())
    return StepCounts(
        tokens=rows * length,
        attention_pairs=rows * length**2,
        text_targets=int((labels != -100).sum()) - visual,
        visual_targets=visual,
        images=2,
        encoded_images=encoded_images,
    )


@pytest.mark.parametrize(
    "parts",
    [
        [],
        ["projector"],
        ["heads"],
        ["language_model"],
        ["projector", "heads"],
        ["projector", "heads", "language_model"],
        "last block",
        "lora",
    ],
    ids=str,
)
def test_flops_are_those_that_run(parts):
    model = flops_model()
    if parts == "lora":
        targets = r".*language_model.*(q_proj|o_proj|up_proj)"
        model = get_peft_model(
            model, LoraConfig(r=4, target_modules=targets, modules_to_save=["visual_projector", "depth_heads"])
        )
    elif parts == "last block":
        model.requires_grad_(False)
        model.model.language_model.layers[-1].mlp.requires_grad_(True)
    elif parts:
        set_trainable(model, parts)
    else:
        model.requires_grad_(False)
    flops = TrainingFlops(model)
    for pixels in (False, True):
        batch = flops_batch(pixels)
        assert flops(step_counts(batch, 2 * pixels)) == pytest.approx(measured_flops(model, batch), rel=0.015)


def test_flops_of_the_usual_formula():
    """All weights of a large backbone trained: 6 operations per token and weight, 12 per attended pair and width."""
    model = flops_model()
    weights = sum(p.numel() for n, p in model.model.language_model.layers.named_parameters() if "proj.weight" in n)
    flops = TrainingFlops(model)
    assert flops.per_token == 6 * weights
    assert flops.per_attention_pair == 12 * 32 * 2
    assert flops.per_text_target == 6 * 60 * 32
    stacked = [m for m in model.depth_heads.modules() if isinstance(m, DualTokenStackedLinear)]
    assert flops.per_visual_target > 6 * sum(m.weight.numel() for m in stacked)


def test_peaks():
    for name, peak in (
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
    ):
        assert find_peak_flops(name) == peak * 1e12, name
    assert find_peak_flops("NVIDIA GeForce RTX 4090 Laptop GPU") is None
    assert find_peak_flops("Tesla T4") is None
    assert peak_flops("cpu") is None and peak_flops("cpu", 2.5) == 2.5e12
    with pytest.raises(ValueError, match="`peak_tflops` must be positive"):
        peak_flops("cpu", 0)


class _Clock:
    now = 100.0

    def perf_counter(self):
        return self.now


def make_meter(monkeypatch, num_ranks=1, **kwargs):
    clock = _Clock()
    monkeypatch.setattr("transformers_dualtoken.training.unified.throughput.time", clock)
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), num_processes=num_ranks, reduce=lambda tensor, how: num_ranks * tensor
    )
    return ThroughputMeter(accelerator, IMAGE, PAD, **kwargs), clock


def test_meter_counts_neither_padding_nor_pauses(monkeypatch):
    flops = TrainingFlops(flops_model())
    meter, clock = make_meter(monkeypatch, flops=flops, peak=1e9)
    batch = collate(make_samples())  # lengths 16, 18, 20, 22 and 13
    meter.update(batch)
    clock.now += 2
    with meter.paused():
        clock.now += 20
        with meter.paused():
            clock.now += 10
    numbers = meter.compute()
    assert numbers["tokens_per_second"] == 89 / 2 and numbers["images_per_second"] == 2
    assert numbers["padding_share"] == pytest.approx(1 - 89 / 110)
    pairs = sum(length * (length + 1) // 2 for length in (16, 18, 20, 22, 13))
    naive = naive_metrics(lively_unified_model(), make_samples())
    expected = StepCounts(89, pairs, naive["num_text_targets"], naive["num_visual_targets"], 4, 0)
    assert numbers["model_flops_utilization"] == pytest.approx(flops(expected) / 2e9)
    assert meter.compute() == {}  # it forgot


def test_meter_of_several_ranks_and_of_pixels(monkeypatch):
    flops = TrainingFlops(flops_model())
    numbers = []
    for ranks, pixels in ((1, False), (2, False), (2, True)):
        meter, clock = make_meter(monkeypatch, num_ranks=ranks, flops=flops, peak=1e9)
        meter.update(flops_batch(pixels))
        clock.now += 1
        numbers.append(meter.compute())
    one, two, encoded = numbers
    assert two["tokens_per_second"] == 2 * one["tokens_per_second"]
    assert two["padding_share"] == one["padding_share"]
    assert two["model_flops_utilization"] == one["model_flops_utilization"]
    more = encoded["model_flops_utilization"] - two["model_flops_utilization"]
    assert more == pytest.approx(2 * flops.per_encoded_image / 1e9)


def test_meter_of_packed_samples(monkeypatch):
    """Two samples in a row, the second with a pad token within and at its end; padding in the first row only."""
    meter, clock = make_meter(monkeypatch)
    ids = torch.tensor([[7, 8, 9, 7, PAD, 9, PAD, PAD, PAD], [7] * 5 + [8] * 3 + [PAD]])
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 4, 0, 1, 2, 3]])
    meter.update({"input_ids": ids, "labels": ids.masked_fill(ids == PAD, -100), "position_ids": position_ids})
    tokens, pairs, text_targets, visual_targets = meter._on_device.tolist()
    lengths = (3, 4, 5, 4)
    assert tokens == sum(lengths) and pairs == sum(length * (length + 1) // 2 for length in lengths)
    assert (text_targets, visual_targets) == (11, 0)
    clock.now += 1
    assert "model_flops_utilization" not in meter.compute()
