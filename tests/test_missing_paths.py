"""A checkpoint or data set that is not there: scripts and commands say so in a sentence, with the working directory."""

import importlib
import sys
from pathlib import Path

import pytest

from transformers_dualtoken import cli
from transformers_dualtoken.optional_libraries import MissingLibraryError
from transformers_dualtoken.recipe_files import run_script


EXAMPLES = Path(__file__).parents[1] / "examples"
MODEL = str(EXAMPLES / "digits" / "checkpoint" / "dualtoken")

NOWHERE = [
    ("run_tokenizer", "--siglip_model_name_or_path ./nope --train_dataset x --output_dir o --use_cpu"),
    (
        "run_tokenizer",
        "--siglip_model_name_or_path x --model_name_or_path no/pe --train_dataset x --output_dir o --use_cpu",
    ),
    ("run_unified", "--model_name_or_path nope --train_dataset x --output_dir o --use_cpu"),
    (
        "run_unified",
        "--vision_tokenizer_name_or_path ./nope --language_model_name_or_path x --train_dataset x --output_dir o "
        "--use_cpu",
    ),
    (
        "run_unified",
        f"--vision_tokenizer_name_or_path {MODEL} --language_model_name_or_path ./nope --train_dataset x "
        "--output_dir o --use_cpu",
    ),
    ("eval_tokenizer", f"--model_name_or_path {MODEL} --dataset ./nope --output_dir o --use_cpu"),
    ("precompute_codes", "--model_name_or_path no/pe --dataset x --output_dir o --use_cpu"),
    ("precompute_codes", f"--model_name_or_path {MODEL} --dataset nope.jsonl --output_dir o --use_cpu"),
    ("digits/measure", "--model ./nope --captions x --output_dir o"),
    ("digits/measure", f"--model {MODEL} --captions ./nope --output_dir o"),
    ("digits/finetune", "measure --models ./nope --output_dir o"),
    ("miniature/train_siglip", "--data_dir nope"),
]


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for folder in (EXAMPLES, EXAMPLES / "digits", EXAMPLES / "miniature"):
        monkeypatch.syspath_prepend(str(folder))


@pytest.mark.parametrize(("name", "arguments"), NOWHERE)
def test_scripts_say_what_is_not_there(offline, tmp_path, monkeypatch, name, arguments):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments.split()])
    script = importlib.import_module(name.rpartition("/")[2])
    with pytest.raises(SystemExit) as caught:
        run_script(script.main)
    message = caught.value.code
    assert message.startswith(f"{name.rpartition('/')[2]}.py: There is no "), message
    assert "nope" in message or "no/pe" in message
    assert str(tmp_path) in message


@pytest.mark.parametrize("options", [["./nope"], ["no/pe"]])
def test_merge_says_that_there_is_no_adapter(offline, tmp_path, capsys, options):
    assert cli.main(["merge", *options, "out"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"dualtoken: There is no folder {options[0]!r}") and str(tmp_path) in error


def test_other_errors_of_a_script_keep_their_traceback(monkeypatch):
    def fails():
        raise ValueError("a fault")

    def lacks():
        raise MissingLibraryError("A test", "peft")

    with pytest.raises(ValueError, match="a fault"):
        run_script(fails)
    with pytest.raises(SystemExit, match=r"A test needs peft: pip install 'transformers-dualtoken\[train\]'"):
        run_script(lacks)
