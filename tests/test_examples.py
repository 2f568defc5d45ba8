"""The command lines of the example scripts; what they train is tested in test_trainers.py and test_demo.py."""

import importlib
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from transformers_dualtoken.training.arguments import json_object, use_cpu_threads


EXAMPLES = Path(__file__).parents[1] / "examples"
# What is only imported by others has no command.
SCRIPTS = [path for path in sorted(EXAMPLES.glob("**/*.py")) if "__main__" in path.read_text()]


@pytest.fixture
def as_script(monkeypatch):
    """A function that runs a script as `python SCRIPT ARGUMENTS` would, but in this process."""
    # The scripts put folders on the path, and import each other by names that are not theirs alone.
    monkeypatch.setattr(sys, "path", list(sys.path))
    modules = dict(sys.modules)

    def run(script: Path, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [str(script), *arguments])
        runpy.run_path(str(script), run_name="__main__")

    yield run
    for name, module in list(sys.modules.items()):
        if name not in modules and str(EXAMPLES) in str(getattr(module, "__file__", None)):
            del sys.modules[name]


@pytest.fixture
def load(monkeypatch):
    """A function that imports a script of the examples' top folder, `main` not run."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_help_and_the_command_on_top(script, as_script, capsys):
    if script.name == "sft_trl.py":
        pytest.importorskip("trl", reason="needs TRL, of the extra dev")
    with pytest.raises(SystemExit) as exit_info:
        as_script(script, "--help")
    shown = capsys.readouterr().out
    assert exit_info.value.code == 0 and "usage:" in shown
    text = script.read_text()
    command = f"python {script.relative_to(EXAMPLES.parent)}"
    docstring = text.split('"""')[1]
    assert command in docstring
    # Every option that the head of the file speaks of exists; torchrun's is its own.
    known = set(re.findall(r"--\w+", shown)) | {"--config_file", "--nproc_per_node"}
    assert set(re.findall(r"--\w+", docstring)) <= known


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("run_tokenizer.py", "required: --train_dataset"),
        ("run_unified.py", "required: --train_dataset"),
        ("precompute_codes.py", "required: --model_name_or_path"),
        ("digits/data.py", "required: --output_dir"),
        ("miniature/train_siglip.py", "required: --data_dir"),
        ("miniature/build_language_model.py", "required: --data_dir, --output_dir"),
        ("digits/measure.py", "required: --model, --captions, --output_dir"),
    ],
)
def test_missing_arguments_are_named(as_script, capsys, script, message):
    with pytest.raises(SystemExit) as exit_info:
        as_script(EXAMPLES / script)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_demo_leaves_other_folders_alone(as_script, capsys, tmp_path):
    (tmp_path / "thesis.tex").write_text("the only copy")
    with pytest.raises(SystemExit):
        as_script(EXAMPLES / "digits" / "run_demo.py", "--output_dir", str(tmp_path))
    assert "holds files that are not a demo's" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "the only copy"


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ([], "give --siglip_model_name_or_path"),
        (
            ["--siglip_model_name_or_path", "a", "--model_name_or_path", "b", "--config_overrides", "{}"],
            "is for a new",
        ),
        (["--siglip_model_name_or_path", "a", "--streaming", "1"], "--streaming needs --max_steps"),
    ],
)
def test_tokenizer_needs_one_start(load, tmp_path, start, message):
    arguments = ["--train_dataset", "images", "--output_dir", str(tmp_path), "--use_cpu", "1"]
    with pytest.raises(ValueError, match=message):
        load("run_tokenizer").main([*arguments, *start])


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([], "A new model needs --vision_tokenizer_name_or_path and --language_model_name_or_path"),
        (["--vision_tokenizer_name_or_path", "tokenizer"], "A new model needs"),
        (["--model_name_or_path", "a", "--language_model_name_or_path", "b"], "either --model_name_or_path or"),
    ],
)
def test_unified_needs_one_start(load, tmp_path, models, message):
    arguments = ["--train_dataset", "chat.jsonl", "--output_dir", str(tmp_path), "--use_cpu", "1"]
    with pytest.raises(ValueError, match=message):
        load("run_unified").main([*arguments, *models])


@pytest.mark.parametrize(
    ("script", "function", "settings"),
    [
        (
            "run_tokenizer",
            "load_model",
            {"siglip_model_name_or_path": "a", "model_name_or_path": "b", "train_dataset": "c"},
        ),
        ("run_unified", "load_model", {"train_dataset": "a", "model_name_or_path": "b", "train_parts": ["heads"]}),
    ],
)
def test_settings_from_one_json_file(load, monkeypatch, tmp_path, script, function, settings):
    class Reached(Exception):
        pass

    def stop(arguments, *others):
        raise Reached(arguments)

    module, path = load(script), tmp_path / "settings.json"
    monkeypatch.setattr(module, function, stop)
    path.write_text(json.dumps({**settings, "output_dir": str(tmp_path), "use_cpu": True}))
    with pytest.raises(Reached) as reached:
        module.main([str(path)])
    arguments = vars(reached.value.args[0])
    expected = {name: value for name, value in settings.items() if name in arguments}
    assert len(expected) == 2
    assert {name: arguments[name] for name in expected} == expected

    path.write_text(json.dumps({**settings, "output_dir": str(tmp_path), "trian_dir": "b"}))
    with pytest.raises(ValueError, match="trian_dir"):
        module.main([str(path)])


def test_settings_that_are_json_objects(tmp_path):
    (tmp_path / "fields.json").write_text('{"semantic_layer": 3}')
    assert json_object(None, "config_overrides") == {}
    for value in ('{"semantic_layer": 3}', str(tmp_path / "fields.json")):
        assert json_object(value, "config_overrides") == {"semantic_layer": 3}
    (tmp_path / "folder.json").mkdir()
    for name in ("gone.json", "folder.json"):  # in a sentence, by `run_script`
        with pytest.raises(FileNotFoundError, match=f"`config_overrides` names the file .*{name}', which"):
            json_object(str(tmp_path / name), "config_overrides")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--packing", "1"], "--packing needs --max_length"),
        (["--streaming", "1", "--max_steps", "1", "--precompute_codes", "1"], "stream what it wrote"),
        (["--streaming", "1"], "--streaming needs --max_steps"),
        (["--sample_steps", "5"], "--sample_steps needs --sample_prompts"),
        (["--sample_prompts", "prompts.json"], "at every evaluation, for which there is no --eval_dataset"),
        (["--quantization", "4"], "needs --lora and --model_name_or_path"),
    ],
)
def test_unified_settings_that_exclude_each_other(load, tmp_path, options, message):
    arguments = ["--train_dataset", "chat.jsonl", "--output_dir", str(tmp_path), "--use_cpu", "1"]
    with pytest.raises(ValueError, match=message):
        load("run_unified").main([*arguments, *options])


@pytest.fixture
def threads():
    """Puts back the number of threads."""
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


def test_threads_are_set_unless_the_user_has_set_them(threads, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert use_cpu_threads(2) == "Computing with 2 CPU threads (OMP_NUM_THREADS sets another number)."
    assert torch.get_num_threads() == 2
    assert use_cpu_threads(1).startswith("Computing with 1 CPU thread (")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert use_cpu_threads(2) == "Computing with 1 CPU thread (as OMP_NUM_THREADS says)."
    with pytest.raises(ValueError, match="`cpu_threads` must be at least 1, got 0"):
        use_cpu_threads(0)


@pytest.mark.parametrize("recipe", ["tokenizer", "finetune"])
def test_miniature_recipes_take_one_thread(recipe):
    assert json.loads((EXAMPLES / "digits" / f"{recipe}.json").read_text())["cpu_threads"] == 1
