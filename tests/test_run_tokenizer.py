"""Runs of examples/run_tokenizer.py that are stopped and go on, follow each other, and share ranks."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import datasets
import psutil
import pytest
import torch
from safetensors.torch import load_file
from tokenizer_training import ADVERSARIAL, PLAIN
from training_helpers import (
    RUN,
    TOKENIZER_FIELDS,
    Sigterm,
    Stop,
    Stopped,
    assert_equal,
    assert_same_run,
    changed,
    check_finished,
    check_resume,
    check_sigterm,
    check_sigterm_at_random,
    write_images,
)
from transformers import AutoConfig

from transformers_dualtoken.training import TrainingStopped


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import run_tokenizer  # noqa: E402


@pytest.fixture
def no_dataset_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def run_arguments(siglip_folder, tmp_path, images=6) -> list[str]:
    write_images(tmp_path / "images", images)
    return [
        *RUN,
        *("--siglip_model_name_or_path", str(siglip_folder), "--train_dataset", str(tmp_path / "images")),
        *("--config_overrides", json.dumps(TOKENIZER_FIELDS), "--loss_weights", json.dumps(ADVERSARIAL)),
        *("--discriminator_channels", "32", "--weight_average_decay", "0.9"),
    ]


def test_a_stream_needs_the_length_of_an_epoch(siglip_folder, tmp_path, no_dataset_cache):
    arguments = run_arguments(siglip_folder, tmp_path)
    with pytest.raises(ValueError, match="the length of a stream is unknown: give `steps_per_epoch`"):
        run_tokenizer.main([*arguments, "--streaming", "1", "--output_dir", str(tmp_path / "run")])


def assert_same_adversary(one: Path, other: Path) -> None:
    first, second = (load_file(path / "checkpoint-6" / "discriminator.safetensors") for path in (one, other))
    assert not changed(first, second)
    for name in ("discriminator_optimizer.pt", "weight_average.pt"):
        first, second = (torch.load(path / "checkpoint-6" / name, weights_only=True) for path in (one, other))
        assert_equal(first, second, name)


@pytest.mark.parametrize(
    ("images", "extra"),
    [(4, []), (6, []), (6, ["--streaming", "1", "--shuffle_buffer_size", "4", "--steps_per_epoch", "3"])],
    ids=["within an epoch", "between two epochs", "stream"],
)
def test_run_goes_on_where_it_was_stopped(siglip_folder, tmp_path, no_dataset_cache, images, extra):
    arguments = [*run_arguments(siglip_folder, tmp_path, images), *extra]
    folder = check_resume(run_tokenizer.main, arguments, tmp_path)
    assert_same_adversary(folder, tmp_path / "stopped")
    assert (folder / "modeling_vision_tokenizer.py").is_file() and AutoConfig.from_pretrained(folder).auto_map
    results = (folder / "train_results.json").read_bytes()
    check_finished(run_tokenizer.main, arguments, folder)
    assert (folder / "train_results.json").read_bytes() == results
    # Also where transformers' own way of saving is asked for, which saves within a step.
    jit = ["--enable_jit_checkpoint", "1"] if images == 4 else []
    check_sigterm(run_tokenizer.main, [*arguments, *jit], folder, tmp_path / "sigterm")
    assert_same_adversary(folder, tmp_path / "sigterm")


def test_resumed_run_that_deletes_its_checkpoint(siglip_folder, tmp_path, no_dataset_cache):
    arguments = [*run_arguments(siglip_folder, tmp_path), "--eval_dataset", str(tmp_path / "images")]
    arguments += ["--eval_split", "train", "--save_total_limit", "1", "--load_best_model_at_end", "1"]
    arguments += ["--eval_strategy", "steps", "--eval_steps", "3", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(Stopped):
        run_tokenizer.main(arguments, callbacks=[Stop(4)])
    with pytest.raises(TrainingStopped):
        run_tokenizer.main(arguments, callbacks=[Sigterm(5)])
    assert (tmp_path / "run/checkpoint-5/trainer_state.json").is_file()
    for _ in range(2):
        run_tokenizer.main(arguments)
        assert (tmp_path / "run/train_results.json").is_file() and (tmp_path / "run/eval_results.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(("streaming", "ranks"), [(False, 1), (True, 1), (True, 2)])
def test_killed_run_goes_on(siglip_folder, tmp_path, streaming, ranks):
    """SIGKILL at some moment after the first checkpoint, then the same command: bit-identical to a run left alone."""
    arguments = run_arguments(siglip_folder, tmp_path, images=24)
    if streaming:
        arguments += ["--streaming", "1", "--shuffle_buffer_size", "5", "--steps_per_epoch", "6"]
        arguments += ["--dataloader_num_workers", "2"]
    command = [sys.executable, run_tokenizer.__file__]
    if ranks > 1:
        arguments += ["--gradient_accumulation_steps", "2", "--ddp_backend", "gloo"]
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        command = [sys.executable, *launch, run_tokenizer.__file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}

    def start(folder):
        return subprocess.Popen(
            [*command, *arguments, "--output_dir", str(folder)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(whole)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    process = start(killed)
    deadline = time.monotonic() + 300
    while not (killed / "checkpoint-3" / "trainer_state.json").is_file() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    # The launcher, its ranks and their workers.
    launched = psutil.Process(process.pid)
    for victim in (*launched.children(recursive=True), launched):
        victim.kill()
    process.communicate()
    assert not (killed / "checkpoint-6" / "trainer_state.json").exists()
    process = start(killed)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    assert_same_adversary(whole, killed)
    if ranks == 1:
        assert_same_run(whole, killed)
        return
    assert not changed(*(load_file(folder / "model.safetensors") for folder in (whole, killed)))
    for rank in range(ranks):
        first, second = (
            json.loads((folder / "checkpoint-6" / f"data_state_{rank}.json").read_text()) for folder in (whole, killed)
        )
        assert first == second and first["stream"]["positions"]


@pytest.mark.slow
@pytest.mark.parametrize(("streaming", "ranks"), [(False, 1), (True, 1), (False, 2)])
def test_sigterm_at_any_moment_saves_and_goes_on_in_the_same_bits(
    siglip_folder, tmp_path, monkeypatch, streaming, ranks
):
    """Also where one of two ranks gets the signal."""
    arguments = [*run_arguments(siglip_folder, tmp_path, images=24), "--max_steps", "30", "--save_steps", "10"]
    arguments += ["--gradient_accumulation_steps", "2", "--save_total_limit", "1"]
    if streaming:
        arguments += ["--streaming", "1", "--shuffle_buffer_size", "5", "--steps_per_epoch", "6"]
        arguments += ["--dataloader_num_workers", "2"]
    command = [sys.executable, run_tokenizer.__file__]
    if ranks > 1:
        arguments += ["--ddp_backend", "gloo"]
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        command = [sys.executable, *launch, run_tokenizer.__file__]
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    check_sigterm_at_random([*command, *arguments], tmp_path, last_step=30, ranks=ranks)


def test_stages_follow_each_other(siglip_folder, tmp_path, no_dataset_cache):
    common = run_arguments(siglip_folder, tmp_path)[:-6]
    common = [a for a in common if a not in ("--config_overrides", json.dumps(TOKENIZER_FIELDS))]
    plain = ["--loss_weights", json.dumps(PLAIN), "--max_steps", "2"]
    folders = [tmp_path / f"stage{stage}" for stage in range(3)]
    for stage, folder in enumerate(folders):
        start = ["--config_overrides", json.dumps(TOKENIZER_FIELDS)]
        if stage:
            start = ["--model_name_or_path", str(folders[stage - 1])]
        weights = plain if stage < 2 else plain[2:]
        run_tokenizer.main([*common, *start, *weights, "--stage", str(stage), "--output_dir", str(folder)])
    states = [load_file(folder / "model.safetensors") for folder in folders]
    assert any(name.startswith("decoder.") for name in changed(states[0], states[1]))
    assert not any(name.startswith("decoder.") for name in changed(states[1], states[2]))


def test_run_from_a_tokenizer_that_does_not_fit_its_teacher(siglip_folder, tmp_path, make_tokenizer):
    make_tokenizer(vision_config={**_vision_fields(), "num_hidden_layers": 5}).save_pretrained(tmp_path / "deeper")
    arguments = ["--siglip_model_name_or_path", str(siglip_folder), "--model_name_or_path", str(tmp_path / "deeper")]
    with pytest.raises(ValueError, match="num_hidden_layers is 5 in the one and 4 in the other"):
        run_tokenizer.main([*arguments, "--train_dataset", "images", "--output_dir", str(tmp_path), "--use_cpu", "1"])


def test_run_from_a_siglip_as_if_it_were_a_tokenizer(siglip_folder, tmp_path):
    arguments = ["--siglip_model_name_or_path", str(siglip_folder), "--model_name_or_path", str(siglip_folder)]
    with pytest.raises(ValueError, match="is of type 'siglip': a new vision tokenizer starts from it"):
        run_tokenizer.main([*arguments, "--train_dataset", "images", "--output_dir", str(tmp_path), "--use_cpu", "1"])


def _vision_fields() -> dict:
    from tiny_models import tiny_tokenizer_config

    return {
        name: getattr(tiny_tokenizer_config().vision_config, name)
        for name in ("hidden_size", "intermediate_size", "num_attention_heads", "image_size", "patch_size")
    }


@pytest.mark.slow
def test_two_ranks_train_as_one(siglip_folder, tmp_path, no_dataset_cache):
    """
    Codebook statistics, gradients, the adaptive weight and the discriminator are those of the whole batch.

    Codes restart at vectors of rank 0, so restarts are off here; test_vector_quantization.py has those of two ranks.
    """
    arguments = run_arguments(siglip_folder, tmp_path, images=16)
    quantizers = {
        name: {**TOKENIZER_FIELDS[name], "restart_unused_codes": False}
        for name in ("pixel_quantizer_config", "semantic_quantizer_config")
    }
    arguments += ["--config_overrides", json.dumps({**TOKENIZER_FIELDS, **quantizers})]
    arguments += ["--max_steps", "4", "--save_steps", "4", "--max_grad_norm", "0", "--discriminator_start_step", "0"]
    arguments += ["--discriminator_warmup_steps", "2", "--optim", "sgd"]
    one, two = tmp_path / "one", tmp_path / "two"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    runs = [
        ([sys.executable], ["--output_dir", str(one), "--per_device_train_batch_size", "4"]),
        (launch, ["--output_dir", str(two), "--ddp_backend", "gloo"]),
    ]
    for command, extra in runs:
        result = subprocess.run(
            [*command, run_tokenizer.__file__, *arguments, *extra], capture_output=True, text=True, env=environment
        )
        assert result.returncode == 0, result.stderr[-4000:]
    first, second = (load_file(folder / "checkpoint-4" / "model.safetensors") for folder in (one, two))
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=1e-3, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}")
    # Where a gradient is next to nothing, rounding turns its sign, which is all that Adam's first steps look at.
    first, second = (load_file(folder / "checkpoint-4" / "discriminator.safetensors") for folder in (one, two))
    for key in first:
        if key.endswith("weight"):
            assert (first[key] - second[key]).abs().gt(1e-4).float().mean() < 0.01, key
    logs = [json.loads((folder / "trainer_state.json").read_text())["log_history"][:4] for folder in (one, two)]
    for name in ("loss", "reconstruction_mse", "adaptive_weight", "discriminator", "pixel_codebook_perplexity"):
        for first, second in zip(*logs):
            assert first[name] == pytest.approx(second[name], rel=1e-3), name


@pytest.mark.slow
def test_ranks_that_start_unequal_become_equal(siglip_folder, tmp_path):
    """Without restarts a new codebook is random; every rank here draws its own, and sees other images."""
    script = tmp_path / "train.py"
    script.write_text(f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from pathlib import Path
from tokenizer_training import pixel_items, tokenizer_trainer
from training_helpers import TOKENIZER_FIELDS
rank = int(os.environ["RANK"])
torch.manual_seed(rank)
fields = {{f"{{kind}}_quantizer_config": {{**TOKENIZER_FIELDS[f"{{kind}}_quantizer_config"],
          "restart_unused_codes": kind == "pixel"}} for kind in ("pixel", "semantic")}}
trainer = tokenizer_trainer(Path({str(siglip_folder)!r}), {str(tmp_path / "out")!r}, dataset=pixel_items(), config=fields,
                            ddp_backend="gloo")
torch.save(trainer.model.semantic_quantizer.codebook.embeddings, {str(tmp_path)!r} + f"/start-{{rank}}.pt")
trainer.train()
torch.save(trainer.model.state_dict(), {str(tmp_path)!r} + f"/end-{{rank}}.pt")
torch.distributed.barrier(); torch.distributed.destroy_process_group()
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    starts = [torch.load(tmp_path / f"start-{rank}.pt") for rank in range(2)]
    assert not torch.equal(*starts)
    assert not changed(*(torch.load(tmp_path / f"end-{rank}.pt") for rank in range(2)))
