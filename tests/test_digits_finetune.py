"""Fine-tuning the digits' model by LoRA: what it learns, and what it does not forget."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import nn

from transformers_dualtoken.cli import main as dualtoken
from transformers_dualtoken.training import load_chat_sources


EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "digits")]
import data  # noqa: E402
import finetune  # noqa: E402
import measure  # noqa: E402
import run_unified  # noqa: E402


CHECKPOINT = EXAMPLES / "digits" / "checkpoint" / "dualtoken"
NEW = ("german_answer_accuracy", "german_drawing_accuracy", "bold_drawing_accuracy")
OLD = tuple(name for name in finetune.EXPLANATIONS if name not in NEW)


@pytest.fixture
def few_scans(monkeypatch):
    """Three scans of each digit to train on, one to hold out, and one drawing of each."""
    every = data.split_scans()

    def split_scans(validation: bool = False):
        chosen = []
        for (scans, digits), count in zip(every, (3, 1)):
            rows = np.concatenate([np.flatnonzero(digits == digit)[:count] for digit in range(10)])
            chosen.append((scans[rows], digits[rows]))
        return tuple(chosen)

    for module in (data, measure, finetune):
        monkeypatch.setattr(module, "split_scans", split_scans)
    monkeypatch.setattr(finetune, "DRAWINGS_PER_DIGIT", 1)


def settings(folder: Path, **overrides) -> str:
    """finetune.json with the model's path as seen from anywhere, and other settings."""
    kept = json.loads((EXAMPLES / "digits" / "finetune.json").read_text())
    path = folder / "finetune.json"
    path.write_text(json.dumps({**kept, "model_name_or_path": str(CHECKPOINT), **overrides}))
    return str(path)


def test_data_is_new_and_old(few_scans, tmp_path):
    finetune.main(["data", "--output_dir", str(tmp_path)])
    sources = load_chat_sources(str(tmp_path / "mixture.json"))
    assert [source.name for source in sources] == ["german.jsonl", "bold.jsonl", "chat.jsonl"]
    assert [source.weight for source in sources] == list(finetune.WEIGHTS.values())
    german, bold, old = ([source.to_example(row)["messages"] for row in source.dataset] for source in sources)
    assert (len(german), len(bold)) == (60, 30)
    assert german[0][1]["content"] == "Das ist eine Null." and german[59][0]["content"] == "Zeichne eine Neun."
    assert bold[29][0]["content"] == "Draw a bold nine."
    assert {"Draw an eight.", "Invert this picture."} <= {question["content"][-1].get("text") for question, _ in old}

    plain, thick = (Image.open(chat[1]["content"][0]["image"]) for chat in (german[1], bold[0]))
    assert np.array_equal(thick, finetune.embolden(plain)) and np.mean(thick) > 1.3 * np.mean(plain)


def test_judge_tells_bold_from_plain():
    evaluation = finetune.FinetuningEvaluation(nn.Identity(), None)
    for images, expected in (
        (evaluation.images, evaluation.digits),
        ([finetune.embolden(image) for image in evaluation.images], evaluation.digits + 10),
    ):
        classes = evaluation.bold_judge.predict(evaluation.as_scans(images))
        assert (classes == expected).mean() > 0.94
        assert (classes // 10 == expected // 10).mean() > 0.98


def test_two_steps_and_everything_after_them(few_scans, tmp_path, capsys):
    finetune.main(["data", "--output_dir", str(tmp_path / "new")])
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    run_unified.main(
        [
            settings(
                tmp_path,
                train_dataset=str(tmp_path / "new" / "mixture.json"),
                output_dir=str(adapter),
                max_steps=2,
                warmup_steps=0,
                per_device_train_batch_size=4,
                disable_tqdm=True,
            )
        ]
    )
    assert dualtoken(["merge", str(adapter), str(merged), "--dtype", "float32"]) == 0
    capsys.readouterr()
    results = finetune.main(
        ["measure", "--models", str(adapter), str(merged), "--output_dir", str(tmp_path / "results")]
    )
    printed = capsys.readouterr().out
    assert results["adapter"] == results["merged"]
    assert results["adapter"]["german_answer_accuracy"] == 0 and results["adapter"]["answer_accuracy"] >= 0.8
    for name, text in finetune.EXPLANATIONS.items():
        shown = f"{100 * results['adapter'][name]:.1f} %"
        assert any(line.startswith(text) and shown in line for line in printed.splitlines())
    for name in results:
        assert json.loads((tmp_path / "results" / name / "metrics.json").read_text()) == results[name]
        assert np.asarray(Image.open(tmp_path / "results" / name / "requests.png").convert("L")).std() > 10


def test_models_of_one_name_are_refused(capsys):
    with pytest.raises(SystemExit):
        finetune.main(["measure", "--models", "one/adapter", "other/adapter", "--output_dir", "results"])
    assert "different names" in capsys.readouterr().err


@pytest.mark.slow
def test_new_is_learned_and_old_is_kept(tmp_path):
    """The commands of the README, from data to the table."""
    (tmp_path / "examples").symlink_to(EXAMPLES)
    base = "examples/digits/checkpoint/dualtoken"
    for command in (
        ["examples/digits/finetune.py", "data", "--output_dir", "digits-new"],
        ["examples/run_unified.py", "examples/digits/finetune.json"],
        ["-m", "transformers_dualtoken.cli", "merge", "digits-adapter", "digits-merged"],
        ["examples/digits/finetune.py", "measure", "--models", base, "digits-merged", "--output_dir", "results"],
    ):
        result = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-4000:]
    before, after = (
        json.loads((tmp_path / "results" / name / "metrics.json").read_text())
        for name in ("dualtoken", "digits-merged")
    )
    assert max(before[name] for name in NEW) < 0.2
    assert {name: after[name] for name in NEW if after[name] < 0.85} == {}
    # Inversions are 100: three seeds lie up to three points below the base model, with as much chance again.
    assert {name: (before[name], after[name]) for name in OLD if after[name] < before[name] - 0.07} == {}
