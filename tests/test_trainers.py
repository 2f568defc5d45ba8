"""Training of the unified model: conversations, the trainer, and runs that are stopped and go on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import lively_unified_model
from training_helpers import (
    RUN,
    TINY_IMAGE_POSITIONS,
    TOKENIZER_FIELDS,
    FixedItems,
    build_tiny_processor,
    changed,
    check_finished,
    check_resume,
    quiet,
    say,
    state_of,
    write_images,
)
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainingArguments,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from transformers_dualtoken import DualTokenVisionTokenizer
from transformers_dualtoken.training import (
    DualTokenDataCollator,
    DualTokenTrainer,
    find_checkpoint,
    set_trainable,
)


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import run_unified  # noqa: E402


N = TINY_IMAGE_POSITIONS


@pytest.fixture(scope="module")
def processor():
    return build_tiny_processor()


@pytest.fixture(scope="module")
def text_tokenizer(processor):
    return processor.tokenizer


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


# The unified trainer


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


def test_liger_is_refused_that_would_change_nothing(tmp_path):
    with pytest.raises(ValueError, match="`use_liger_kernel` would change nothing.*apply_liger_kernel_to_qwen2"):
        train_unified(tmp_path, use_liger_kernel=True)


# Runs of the scripts, stopped and started again


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
        *("--train_dataset", str(tmp_path / "chat.jsonl"), "--prompt_drop_probability", "0.5"),
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
    run_unified.main([*arguments, "--output_dir", str(runs[0]), "--precompute_codes", "1"])
    run_unified.main([*arguments, "--output_dir", str(runs[1])])
    first, second = (load_file(folder / "model.safetensors") for folder in runs)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-5)

    go_on = [*RUN, "--train_dataset", str(tmp_path / "chat.jsonl"), "--model_name_or_path", str(runs[0])]
    go_on += ["--train_parts", "heads", "--max_steps", "1", "--output_dir", str(tmp_path / "heads")]
    run_unified.main(go_on)
    moved = changed(first, load_file(tmp_path / "heads" / "model.safetensors"))
    assert {name.split(".")[0] for name in moved} == {"depth_heads"}


@pytest.mark.parametrize("attention, says_so", [("eager", True), ("counting_flex", False)])
def test_attention_of_a_new_unified_model(
    vision_tokenizer_folder, language_model_folder, tmp_path, attention, says_so, caplog
):
    """`--attn_implementation` is the language model's, and where packed rows need masks the run says so."""
    lengths = []

    def counting(module, query, key, value, attention_mask, **kwargs):
        lengths.append(query.shape[2])
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("counting_flex", counting)
    AttentionMaskInterface.register("counting_flex", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    arguments = unified_arguments(tmp_path, vision_tokenizer_folder, language_model_folder)
    arguments += ["--packing", "1", "--max_length", "128", "--attn_implementation", attention]
    arguments += ["--max_steps", "1", "--save_strategy", "no", "--output_dir", str(tmp_path / "run")]
    run_unified.main(arguments)
    assert bool(lengths) != says_so
    assert ("masks of 128 x 128 with --attn_implementation eager" in caplog.text) == says_so


def test_last_whole_checkpoint_is_found(tmp_path):
    def arguments(**overrides):
        return TrainingArguments(str(tmp_path / "run"), **quiet(**overrides))

    assert find_checkpoint(arguments()) is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-best", "checkpoint-11"):
        (tmp_path / "run" / name).mkdir(parents=True)
        if name != "checkpoint-11":
            (tmp_path / "run" / name / "trainer_state.json").write_text("{}")
    assert find_checkpoint(arguments()) == str(tmp_path / "run" / "checkpoint-10")
    assert find_checkpoint(arguments(resume_from_checkpoint="true")) == str(tmp_path / "run" / "checkpoint-10")
    assert find_checkpoint(arguments(resume_from_checkpoint="false")) is None
    whole = str(tmp_path / "run" / "checkpoint-9")
    assert find_checkpoint(arguments(resume_from_checkpoint=whole)) == whole
    for name in ("checkpoint-11", "elsewhere"):
        with pytest.raises(ValueError, match=f"names '.*{name}', which is no whole checkpoint"):
            find_checkpoint(arguments(resume_from_checkpoint=str(tmp_path / "run" / name)))
    (tmp_path / "run" / "checkpoint-10" / "trainer_state.json").write_text("{")
    assert find_checkpoint(arguments()) == whole
    with pytest.raises(ValueError, match="asks for the last checkpoint, but .* holds no whole one"):
        find_checkpoint(TrainingArguments(str(tmp_path / "none"), **quiet(resume_from_checkpoint="True")))


def test_half_written_checkpoint_over_an_old_one_is_not_whole(tmp_path, monkeypatch):
    """A run that begins anew in a folder with checkpoints of an earlier one, and is stopped while it saves."""
    train_unified(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    arguments = TrainingArguments(str(tmp_path), **quiet())
    assert find_checkpoint(arguments) == str(tmp_path / "checkpoint-1")

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Recorder, "_save_optimizer_and_scheduler", stop)
    with pytest.raises(KeyboardInterrupt):
        train_unified(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    assert (tmp_path / "checkpoint-1" / "model.safetensors").is_file() and find_checkpoint(arguments) is None


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
