"""`run_unified.py` on tiny sizes: every way to bring data in, adapters, evaluation, and runs that are killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_models import lively_unified_model
from training_helpers import (
    RUN,
    Sigterm,
    Stop,
    Stopped,
    assert_same_run,
    build_tiny_processor,
    changed,
    check_finished,
    check_resume,
    check_sigterm,
    check_sigterm_at_random,
    say,
    write_images,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, Qwen2Model

from transformers_dualtoken.training import (
    ChatEncoder,
    DualTokenChatDataset,
    DualTokenTrainer,
    DualTokenTrainingArguments,
    TrainingStopped,
    set_trainable,
)


EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
import eval_tokenizer  # noqa: E402
import precompute_codes  # noqa: E402
import run_unified  # noqa: E402


@pytest.fixture(scope="module")
def unified_folder(tmp_path_factory) -> Path:
    """A unified model with its processor."""
    folder, processor = tmp_path_factory.mktemp("unified"), build_tiny_processor()
    model = lively_unified_model(
        text_config={**lively_unified_model().config.text_config.to_dict(), "vocab_size": len(processor.tokenizer)},
        image_start_token_id=processor.image_start_token_id,
        image_token_id=processor.image_token_id,
        image_end_token_id=processor.image_end_token_id,
    )
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def data(tmp_path) -> Path:
    """Drawings, questions, captions and text, and a mixture of them."""
    folder = tmp_path / "data"
    write_images(folder / "images", 8)
    write_lines(
        folder / "chat.jsonl",
        [
            {"messages": [say("user", f"Draw {n}."), say("assistant", (f"images/{n}.png",), "done " * (n % 3))]}
            for n in range(8)
        ]
        + [{"messages": [say("user", (f"images/{n}.png",), "What?"), say("assistant", f"A {n}.")]} for n in range(8)],
    )
    write_lines(
        folder / "images" / "metadata.jsonl", [{"file_name": f"{n}.png", "text": f"a blue {n}"} for n in range(8)]
    )
    write_lines(folder / "text.jsonl", [{"text": f"A blue one, {n}. " * (1 + n)} for n in range(6)])
    mixture = [
        {"path": "chat.jsonl", "weight": 2},
        {"path": "images", "format": "caption", "task": "both", "weight": 1},
        {"path": "text.jsonl", "weight": 1},
    ]
    (folder / "mixture.json").write_text(json.dumps(mixture))
    return folder


def arguments(unified_folder, dataset, output_dir=None, **options) -> list[str]:
    listed = [*RUN, "--model_name_or_path", str(unified_folder), "--train_dataset", str(dataset)]
    listed += ["--output_dir", str(output_dir)] if output_dir else []
    for name, value in options.items():
        listed += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return listed


def state_log(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


@pytest.mark.parametrize(
    "options",
    [
        {"packing": 1, "max_length": 100, "train_sampling_strategy": "group_by_length"},
        {"streaming": 1, "packing": 1, "max_length": 100, "dataloader_num_workers": 2, "shuffle_buffer_size": 5},
    ],
    ids=["table", "stream"],
)
def test_mixture_goes_on_where_it_was_stopped(unified_folder, data, tmp_path, options):
    """Packed rows, dropped prompts and the weights' draws included."""
    options = {"per_device_train_batch_size": 4, "prompt_drop_probability": 0.5, **options}
    listed = arguments(unified_folder, data / "mixture.json", **options)
    whole = check_resume(run_unified.main, listed, tmp_path)
    log = state_log(whole)
    assert log[0]["tokens_per_second"] > 0
    assert {"pixel_loss_depth_1", "semantic_accuracy_depth_3", "text_accuracy"} <= set().union(*log[:6])
    results = (whole / "train_results.json").read_bytes()
    check_finished(run_unified.main, listed, whole)
    assert (whole / "train_results.json").read_bytes() == results
    check_sigterm(run_unified.main, listed, whole, tmp_path / "sigterm")


def test_resumed_run_that_deletes_its_checkpoint(unified_folder, data, tmp_path):
    """The best checkpoint is kept and the last one deleted; metrics and card come all the same."""
    options = {"save_total_limit": 1, "load_best_model_at_end": 1, "eval_strategy": "steps", "eval_steps": 3}
    options |= {"eval_dataset": data / "chat.jsonl", "max_eval_samples": 4, "metric_for_best_model": "pixel_loss"}
    options["max_length"] = 100
    listed = arguments(unified_folder, data / "text.jsonl", tmp_path / "run", **options)
    with pytest.raises(Stopped):
        run_unified.main(listed, callbacks=[Stop(4)])
    with pytest.raises(TrainingStopped):
        run_unified.main(listed, callbacks=[Sigterm(5)])
    assert (tmp_path / "run/checkpoint-5/trainer_state.json").is_file()
    for _ in range(2):
        run_unified.main(listed)
        assert json.loads((tmp_path / "run/train_results.json").read_text())["train_samples"] == 6
        assert (tmp_path / "run/eval_results.json").is_file() and (tmp_path / "run/README.md").is_file()


def test_codes_train_as_pixels_do(unified_folder, data, tmp_path):
    """In the order of the data, with dropped prompts, and without the encoder."""
    codes = tmp_path / "chat-codes"
    precompute_codes.main(
        ["--model_name_or_path", str(unified_folder), "--dataset", str(data / "chat.jsonl"), "--num_workers", "0"]
        + ["--output_dir", str(codes)]
    )
    runs = {}
    for name, dataset in (("pixels", data / "chat.jsonl"), ("codes", codes)):
        run_unified.main(arguments(unified_folder, dataset, tmp_path / name, prompt_drop_probability=0.5))
        runs[name] = load_file(tmp_path / name / "model.safetensors")
    assert changed(load_file(unified_folder / "model.safetensors"), runs["codes"])
    for name, weight in runs["pixels"].items():
        torch.testing.assert_close(runs["codes"][name], weight, rtol=1e-4, atol=1e-5)

    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(unified_folder)
    model.vision_tokenizer.pixel_quantizer.codebook.embeddings.mul_(1.1)
    model.save_pretrained(other)
    AutoProcessor.from_pretrained(unified_folder).save_pretrained(other)
    with pytest.raises(ValueError, match="Make them again with this tokenizer"):
        run_unified.main(arguments(other, codes, tmp_path / "refused"))


def test_evaluation_samples_and_card(unified_folder, data, tmp_path):
    prompts = [
        {"messages": [say("user", "Draw 1.")], "mode": "image", "guidance_scale": 2.0},
        {"messages": [say("user", (str(data / "images" / "1.png"),), "What?")], "mode": "text", "max_new_tokens": 4},
    ]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    run_unified.main(
        arguments(
            unified_folder,
            data / "chat.jsonl",
            tmp_path / "run",
            eval_dataset=data / "chat.jsonl",
            eval_strategy="steps",
            eval_steps=3,
            max_eval_samples=5,
            sample_prompts=tmp_path / "prompts.json",
            learning_rates='{"heads": 1e-4, "projector": 0}',
        )
    )
    run = tmp_path / "run"
    metrics = json.loads((run / "eval_results.json").read_text())
    assert metrics["eval_text_perplexity"] > 1 and metrics["eval_num_visual_targets"] == 45
    assert {"eval_pixel_loss_depth_1", "eval_semantic_accuracy_depth_3"} <= set(metrics)
    samples = sorted((run / "samples").iterdir())
    assert len(samples) >= 2
    pictures = list(samples[-1].glob("*.png"))
    assert pictures and all(Image.open(path).size[0] > 0 for path in pictures)
    card = (run / "README.md").read_text()
    assert "any-to-any" in card and "dualtoken" in card
    moved = changed(load_file(unified_folder / "model.safetensors"), load_file(run / "model.safetensors"))
    assert {name.split(".")[0 if name.startswith(("depth", "lm_head")) else 1] for name in moved} == {
        "depth_heads",
        "language_model",
        "lm_head",
    }
    for folder in (run, run / "checkpoint-6"):
        assert AutoProcessor.from_pretrained(folder).num_image_tokens == 9
        # They load without this package.
        assert "AutoModelForMultimodalLM" in AutoConfig.from_pretrained(folder).auto_map
        assert (folder / "modeling_dualtoken.py").is_file()


def test_rates_of_parts(unified_folder, data, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(unified_folder)
    training = DualTokenTrainingArguments(str(tmp_path), use_cpu=True, learning_rate=1e-3, weight_decay=0.1)
    trainer = DualTokenTrainer(model, training, learning_rates={"heads": 1e-4})
    trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen = set()
    for group in trainer.optimizer.param_groups:
        of_heads = {names[id(p)].startswith("depth_heads.") for p in group["params"]}
        assert len(of_heads) == 1 and group["lr"] == (1e-4 if of_heads.pop() else 1e-3)
        seen |= {(group["lr"], group["weight_decay"])} | {id(p) for p in group["params"]}
    assert {(1e-3, 0.1), (1e-3, 0.0), (1e-4, 0.1), (1e-4, 0.0)} <= seen
    assert {id(p) for p in model.parameters() if p.requires_grad} <= seen
    with pytest.raises(ValueError, match="must name parts of projector, language_model, heads, got head"):
        DualTokenTrainer(model, training, learning_rates={"head": 1e-4})
    set_trainable(model, ["heads"])
    with pytest.raises(ValueError, match="names parts that are not trained: projector"):
        DualTokenTrainer(model, training, learning_rates={"projector": 1e-4}).create_optimizer()
    training.label_smoothing_factor = 0.1
    with pytest.raises(ValueError, match="`label_smoothing_factor` must be 0"):
        DualTokenTrainer(model, training)


def test_the_tokenizer_of_a_unified_model_is_measured_without_its_language_model(unified_folder, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the language model was made")

    expected = AutoModelForCausalLM.from_pretrained(unified_folder).vision_tokenizer.state_dict()
    monkeypatch.setattr(Qwen2Model, "__init__", refuse)
    settings = eval_tokenizer.EvaluationArguments(str(unified_folder), "images", "out")
    model, image_processor, _ = eval_tokenizer.load_model(settings)
    assert not changed(expected, model.state_dict()) and image_processor.size["height"] == 24


def test_a_tokenizer_larger_than_the_vocabulary_is_named(unified_folder, tmp_path):
    model, processor = AutoModelForCausalLM.from_pretrained(unified_folder), build_tiny_processor()
    processor.tokenizer.add_tokens(["<more>"])
    training = DualTokenTrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="The tokenizer has .* tokens and the model .*: ids would lie outside"):
        DualTokenTrainer(model, training, processing_class=processor)


def test_ranks_with_different_data_are_told(unified_folder, tmp_path, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(unified_folder)
    training = DualTokenTrainingArguments(str(tmp_path), use_cpu=True)
    dataset = DualTokenChatDataset([{"content": "A blue one."}] * 3, ChatEncoder(build_tiny_processor()))
    trainer = DualTokenTrainer(model, training, train_dataset=dataset)
    monkeypatch.setattr(DualTokenTrainingArguments, "world_size", 2)
    others = torch.tensor([[3, dataset.digest]])
    monkeypatch.setattr(trainer.accelerator, "gather", lambda mine: torch.cat([mine, others]))
    trainer.check_ranks_agree(dataset)
    for others in (torch.tensor([[2, dataset.digest]]), torch.tensor([[3, dataset.digest + 1]])):
        monkeypatch.setattr(trainer.accelerator, "gather", lambda mine, others=others: torch.cat([mine, others]))
        with pytest.raises(ValueError, match="The ranks have different data .*Do all machines see the same files"):
            trainer.check_ranks_agree(dataset)


def test_lora_run_is_merged_and_loaded(unified_folder, data, tmp_path):
    from transformers_dualtoken.training.unified.adapters import merge_adapter

    listed = arguments(unified_folder, data / "chat.jsonl", tmp_path / "adapter", lora=1, lora_r=4, learning_rate=1e-3)
    run_unified.main(listed)
    adapter = tmp_path / "adapter"
    assert (adapter / "adapter_model.safetensors").is_file() and not (adapter / "model.safetensors").exists()
    assert not list(adapter.glob("*.py"))
    assert state_log(adapter)[-2]["loss"] < state_log(adapter)[0]["loss"]
    model = merge_adapter(adapter, tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not changed(model.state_dict(), loaded.state_dict())
    moved = changed(load_file(unified_folder / "model.safetensors"), load_file(tmp_path / "merged/model.safetensors"))
    assert not any("vision_tokenizer" in name for name in moved)
    assert any("depth_heads" in name for name in moved) and any("q_proj" in name for name in moved)


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [0, 1])
def test_killed_at_any_moment_a_run_ends_in_the_same_bits(unified_folder, data, tmp_path, streaming):
    """SIGKILL while it saves, before the first whole checkpoint, and between two."""
    options = {"max_steps": 9, "save_steps": 3, "max_length": 100, "packing": 1, "prompt_drop_probability": 0.5}
    options |= {"streaming": streaming, "shuffle_buffer_size": 5} if streaming else {}
    script = str(EXAMPLES / "run_unified.py")

    def start(output_dir):
        listed = arguments(unified_folder, data / "mixture.json", output_dir, **options)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, script, *listed], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
        )

    def finish(process):
        output = process.communicate(timeout=300)[0].decode()
        assert process.returncode == 0, output[-3000:]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(whole))
    # When these appear: the first weights of a checkpoint that is being written, and a whole one.
    for moment in ("checkpoint-3/model.safetensors", "checkpoint-6/trainer_state.json"):
        process = start(killed)
        deadline = time.monotonic() + 120
        while not (killed / moment).exists():
            assert process.poll() is None and time.monotonic() < deadline, moment
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(start(killed))
    assert_same_run(whole, killed, last_step=9)


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [0, 1])
def test_sigterm_at_any_moment_saves_and_goes_on_in_the_same_bits(unified_folder, data, tmp_path, streaming):
    options = {"max_steps": 30, "save_steps": 10, "max_length": 100, "packing": 1, "prompt_drop_probability": 0.5}
    options |= {"gradient_accumulation_steps": 2, "save_total_limit": 1}
    options |= {"streaming": streaming, "shuffle_buffer_size": 5, "dataloader_num_workers": 1} if streaming else {}
    listed = arguments(unified_folder, data / "mixture.json", **options)
    check_sigterm_at_random([sys.executable, str(EXAMPLES / "run_unified.py"), *listed], tmp_path, last_step=30)
