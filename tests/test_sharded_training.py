"""Training whose weights are split over ranks, by DeepSpeed and by FSDP2: the same as in one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from sharded_run import (
    ACCUMULATION,
    EXAMPLES,
    FEW_STEPS,
    RANKS,
    SAVED_AT,
    STEPS,
    arguments,
    generate,
    load,
    losses,
    make_trainer,
    save_models,
)
from tiny_models import tiny_unified_config
from torch import nn
from transformers import Qwen2ForCausalLM, set_seed
from transformers.integrations.deepspeed import is_deepspeed_available

from transformers_dualtoken import DualTokenForCausalLM
from transformers_dualtoken.sharding import copy_weights, is_sharded


DEEPSPEED_FILES = sorted((EXAMPLES / "deepspeed").glob("*.json"))
FSDP_FILE = EXAMPLES / "accelerate" / "fsdp2.yaml"
TIMEOUT = 240  # seconds; ranks that do not run the same modules wait for each other for ever
needs_deepspeed = pytest.mark.skipif(not is_deepspeed_available(), reason="deepspeed is not installed")


def test_deepspeed_files_are_complete():
    assert {path.stem for path in DEEPSPEED_FILES} == {"zero2", "zero2_offload", "zero3", "zero3_offload"}
    for path in DEEPSPEED_FILES:
        config = json.loads(path.read_text())
        zero = config["zero_optimization"]
        assert zero["stage"] == int(path.stem[4])
        assert ("offload_optimizer" in zero) == path.stem.endswith("offload")
        assert ("offload_param" in zero) == (path.stem == "zero3_offload")
        assert zero.get("stage3_gather_16bit_weights_on_model_save", False) == (zero["stage"] == 3)
        # Of its own, DeepSpeed would have one learning rate for all parameters.
        assert "optimizer" not in config and "scheduler" not in config


@needs_deepspeed
@pytest.mark.parametrize("path", DEEPSPEED_FILES, ids=lambda path: path.stem)
def test_deepspeed_knows_every_key(path, monkeypatch, tmp_path):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from transformers.integrations import deepspeed as integration

    # What it notes for `from_pretrained` must not outlive this test.
    monkeypatch.setattr(integration, "_hf_deepspeed_config_weak_ref", None)
    args, model = arguments(tmp_path), DualTokenForCausalLM(tiny_unified_config())
    filled = integration.HfTrainerDeepSpeedConfig(str(path))
    filled.trainer_config_process(args)
    filled.trainer_config_finalize(args, model, 10)
    # The Trainer has a value for every "auto", and DeepSpeed takes no key that it does not know.
    assert "auto" not in json.dumps(filled.config)
    assert DeepSpeedZeroConfig(**filled.config["zero_optimization"]).stage == int(path.stem[4])


def test_fsdp_file_fits_accelerate_and_the_model():
    from accelerate.commands.config.config_args import ClusterConfig
    from accelerate.commands.launch import launch_command_parser

    config = yaml.safe_load(FSDP_FILE.read_text())
    options = {action.dest for action in launch_command_parser()._actions}
    assert config["fsdp_config"].keys() <= options
    assert config.keys() <= ClusterConfig.__dataclass_fields__.keys()
    model = DualTokenForCausalLM(tiny_unified_config())
    classes = {type(module).__name__ for module in model.modules()}
    assert set(config["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"].split(",")) <= classes


def test_one_process_is_not_sharded():
    assert not is_sharded(DualTokenForCausalLM(tiny_unified_config()))


def test_copied_weights_are_exact_and_must_fit():
    source, target = (Qwen2ForCausalLM(tiny_unified_config().text_config) for _ in range(2))
    copy_weights(source, target)
    assert all(torch.equal(value, target.state_dict()[name]) for name, value in source.state_dict().items())
    with pytest.raises(ValueError, match="in one only"):
        copy_weights(source.model, target)
    with pytest.raises(ValueError, match="has the shape"):
        copy_weights(nn.Linear(2, 3), nn.Linear(3, 3))


def test_text_head_makes_its_loss_after_a_resize():
    model = DualTokenForCausalLM(tiny_unified_config())
    hidden_states, targets = torch.randn(5, 32), torch.tensor([1, 5, 9, 0, 61])
    model.resize_token_embeddings(64)
    loss_sum, num_correct = model.lm_head(hidden_states, targets)
    logits = model.lm_head(hidden_states)
    torch.testing.assert_close(loss_sum, nn.functional.cross_entropy(logits, targets, reduction="sum"))
    assert num_correct == (logits.argmax(-1) == targets).sum()


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """Models to begin with in `models/`, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("sharded")
    save_models(folder / "models")
    # On one rank the ranks' micro-batches come one after the other.
    for name, start, steps in (("whole", "unified", STEPS), ("tied", "tied", FEW_STEPS), ("lora", "lora", FEW_STEPS)):
        set_seed(0)
        args = arguments(folder / name, max_steps=steps, gradient_accumulation_steps=RANKS * ACCUMULATION)
        trainer = make_trainer(load(folder / "models", start), args)
        trainer.train()
        trainer.save_model(folder / name)
        (folder / name / "losses.json").write_text(json.dumps(losses(trainer)))
    return folder


@pytest.fixture(
    scope="module",
    params=[pytest.param("zero2", marks=needs_deepspeed), pytest.param("zero3", marks=needs_deepspeed), "fsdp2"],
)
def run(request, reference) -> Path:
    """The folder of two ranks' results; its name is the engine's."""
    folder = reference / request.param
    folder.mkdir()
    launch(request.param, reference / "models", folder)
    return folder


def launch(engine: str, models: Path, folder: Path) -> None:
    tests = Path(__file__).parent
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tests), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONWARNINGS": "ignore::FutureWarning",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS)]
    command += [str(tests / "sharded_run.py"), engine, str(models), str(folder)]
    log = folder / "log.txt"
    with log.open("wb") as stream:
        process = psutil.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
        try:
            code = process.wait(TIMEOUT)
        except psutil.TimeoutExpired:
            code = f"none after {TIMEOUT} s"
        finally:
            # The ranks have sessions of their own: they outlive torchrun.
            family = process.children(recursive=True) if process.is_running() else []
            for member in [*family, process]:
                if member.is_running():
                    member.kill()
    assert code == 0, f"Exit status: {code}\n{log.read_text()[-6000:]}"


def has_fsdp_plan() -> bool:
    try:
        from transformers.distributed import DistributedConfig
    except ImportError:
        return False
    return "fsdp_size" in getattr(DistributedConfig, "__dataclass_fields__", {})


@pytest.mark.slow
@pytest.mark.skipif(not has_fsdp_plan(), reason="this transformers splits no weights while it loads them")
def test_tied_embeddings_under_the_plan_of_transformers(reference):
    """As Qwen2.5-3B's are: the weight takes the gradients of both its uses, and is updated once."""
    folder = reference / "plan"
    folder.mkdir()
    launch("plan", reference / "models", folder)
    expected = json.loads((reference / "tied" / "losses.json").read_text())
    for term, values in results(folder)["tied"].items():
        tolerance = 1e-3 if term == "grad_norm" else 1e-4
        assert values == pytest.approx(expected[term], rel=0, abs=tolerance), term
    trained, whole = torch.load(folder / "weights.pt"), load_file(reference / "tied" / "model.safetensors")
    assert "model.language_model.embed_tokens.weight" in trained and "lm_head.weight" not in trained
    for name, value in trained.items():
        assert (value - whole[name]).abs().max() <= 1e-3, name


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    if (folder / "adapter_model.safetensors").exists():
        return load_file(folder / "adapter_model.safetensors")
    stored = load_file(folder / "model.safetensors")
    # FSDP2 gathers a tied weight by both of its names.
    if json.loads((folder / "config.json").read_text())["tie_word_embeddings"] and "lm_head.weight" in stored:
        assert torch.equal(stored.pop("lm_head.weight"), stored["model.language_model.embed_tokens.weight"])
    return stored


def assert_close(first: Path, second: Path, tolerance: float) -> None:
    """The two checkpoints hold the same weights by the same names."""
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype
        assert (value - second[name]).abs().max() <= tolerance, name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["whole", "tied", "lora"])
def test_ranks_train_as_one_process(run, reference, name):
    expected = json.loads((reference / name / "losses.json").read_text())
    for term, values in results(run)[name].items():
        # The norm of a gradient is a sum over all of its numbers.
        tolerance = 1e-3 if term == "grad_norm" else 1e-4
        assert values == pytest.approx(expected[term], rel=0, abs=tolerance), term
    assert_close(run / name, reference / name, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "start"), [("whole", "unified"), ("tied", "tied")])
def test_everything_but_the_vision_tokenizer_moves(run, reference, name, start):
    before, after = weights(reference / "models" / start), weights(run / name)
    for key, value in before.items():
        assert torch.equal(value, after[key]) == ("vision_tokenizer" in key), key


@pytest.mark.slow
def test_a_resumed_run_is_the_same(run):
    whole, resumed = (results(run)[name] for name in ("whole", "resumed"))
    for term, values in resumed.items():
        assert values[SAVED_AT:] == pytest.approx(whole[term][SAVED_AT:], rel=1e-6), term
    assert_close(run / "whole", run / "resumed", 1e-6)


@pytest.mark.slow
def test_saved_weights_come_back(run, reference):
    for folder in (run / "whole", run / "whole" / f"checkpoint-{STEPS}", run / "tied", run / "half"):
        model, report = DualTokenForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    stored = load_file(run / "half" / "model.safetensors")
    codebooks = {name: value for name, value in stored.items() if "codebook" in name}
    first = load_file(reference / "models" / "tokenizer" / "model.safetensors")
    assert len(codebooks) == 6
    for name, value in codebooks.items():
        assert torch.equal(value, first[name.removeprefix("model.vision_tokenizer.")]), name


@pytest.mark.slow
def test_ranks_evaluate_and_generate_as_one_process(run, reference, tmp_path):
    model = DualTokenForCausalLM.from_pretrained(run / "whole")
    assert results(run)["generated"] == generate(model)
    alone = make_trainer(model, arguments(tmp_path)).evaluate()
    assert results(run)["eval_loss"] == pytest.approx(alone["eval_loss"], abs=1e-4)


@pytest.mark.slow
def test_zero_to_fp32_makes_the_gathered_weights(run, tmp_path):
    if run.name == "fsdp2":
        pytest.skip("a script of DeepSpeed's")
    checkpoint = run / "whole" / f"checkpoint-{STEPS}"
    script = [sys.executable, str(checkpoint / "zero_to_fp32.py"), str(checkpoint), str(tmp_path)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    subprocess.run([*script, "--safe_serialization"], check=True, env=environment, timeout=TIMEOUT)
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    assert_close(tmp_path, run / "whole", 0)
    DualTokenForCausalLM.from_pretrained(tmp_path)
