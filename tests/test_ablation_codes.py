"""The ablation of the codes on a handful of scans; the proof of the experiment is its run, see docs/ablations.md."""

import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch


ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples" / "ablations"))
import ablate_codes  # noqa: E402
import scenes  # noqa: E402
import teacher  # noqa: E402
import train_codes  # noqa: E402


FEW_STEPS = {"batch_size": 4, "eval_steps": 2, "max_steps": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Scenes of few scans, with a teacher, a judge and a tokenizer that have hardly learned; small settings."""
    folder = tmp_path_factory.mktemp("codes")
    split = scenes.split_scans

    def few(validation=False):
        return tuple(tuple(part[:24] if len(part) > 360 else part[:12] for part in pair) for pair in split(validation))

    with pytest.MonkeyPatch.context() as monkeypatch:
        for module in (scenes, train_codes):
            monkeypatch.setattr(module, "split_scans", few)
        monkeypatch.setattr(train_codes, "train_tokenizer", partial(train_codes.train_tokenizer, steps=2))
        for name, value in {
            "PICTURES": {"understanding": 3, "generation": 2},
            "VALIDATION_PICTURES": 1,
            "CURVE_DRAWINGS": 1,
            "FINAL_DRAWINGS": 1,
        }.items():
            monkeypatch.setattr(train_codes, name, value)
        monkeypatch.setattr(train_codes, "TRAINING", train_codes.TRAINING | FEW_STEPS)
        monkeypatch.setattr(train_codes, "HELDOUT_VIEWS", 6)
        scenes.write_scenes(folder, train_scenes=3)
        teacher.train_judge(folder, steps=2)
        teacher.train_teacher(folder, seed=0, steps=2)
        yield folder


@pytest.fixture(scope="module")
def conversations(folder):
    return train_codes.Conversations(folder, seed=0)


def test_brightest_corner():
    images = np.full((4, 32, 32, 3), 100, dtype=np.uint8)
    images[0, :8, -8:] = 120
    images[1, -8:, :8] = 120
    # Leads, but hardly; and another is nearly as bright.
    images[2, :8, :8] = 100 + train_codes.CORNER_LEAD - 1
    images[3, -8:, :8], images[3, -8:, -8:] = 150, 145
    assert train_codes.brightest_corner(images).tolist() == [1, 2, -1, -1]


def test_views_are_the_same_behind_every_digit():
    scans = np.zeros((40, 8, 8))
    drawn = train_codes.draw_views(scans, np.arange(40) % 10, count=2, seed=0)
    assert drawn["images"].shape == (80, 32, 32, 3) and drawn["digits"][:4].tolist() == [0, 0, 1, 1]
    for view in range(len(train_codes.VIEWS)):
        own = drawn["images"][drawn["views"] == view]
        assert len(own) > 1 and (own == own[0]).all()
    assert len({image.tobytes() for image in drawn["images"]}) == len(train_codes.VIEWS)


def scans_of(dataset, per_scan: dict[str, int]) -> set[int]:
    names = [example["id"].split("/") for example in dataset.sources[0].source.dataset]
    return {int(row) // per_scan[part] for part, row in names}


def batch_of(conversations, dataset, rows) -> dict[str, torch.Tensor]:
    collate = train_codes.DualTokenDataCollator(conversations.processor.tokenizer.pad_token_id)
    batch = collate([dataset[row] for row in rows])
    del batch["num_skipped"]
    return batch


def test_validation_pictures_are_of_other_scans(conversations):
    per_scan = {"train": 3, "train_views": 2}
    for task in train_codes.TASKS:
        validation = scans_of(conversations.validation[task], per_scan)
        assert validation == {0, 10, 20}
        assert scans_of(conversations.train[task], per_scan) == set(range(24)) - validation


@pytest.mark.parametrize("variant", train_codes.VARIANTS)
def test_variant_reads_and_learns_its_own_codes_only(conversations, variant):
    kinds = train_codes.VARIANTS[variant]
    model = train_codes.build_model(conversations, kinds, seed=0).train()
    asked = batch_of(conversations, conversations.questions["digit"], range(3))
    states = model(**asked).last_hidden_state
    for kind in ("pixel", "semantic"):
        changed = asked | {f"{kind}_codes": (asked[f"{kind}_codes"] + 1) % 256}
        assert torch.equal(model(**changed).last_hidden_state, states) == (kind not in kinds)
    model(**batch_of(conversations, conversations.train["generation"], [0])).loss.backward()
    for index, kind in enumerate(("pixel", "semantic")):
        assert bool(model.depth_heads.classifier.weight.grad[index].any()) == (kind in kinds)


def test_answer_accuracy_is_that_of_generated_answers(conversations):
    model = train_codes.build_model(conversations, ("pixel", "semantic"), seed=0).eval()
    processor, questions = conversations.processor, conversations.questions["digit"]
    collate = train_codes.DualTokenDataCollator(processor.tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    batch = batch_of(conversations, questions, range(6))
    for _ in range(40):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    right = []
    for row in range(len(questions)):
        sample = questions[row]
        is_answer = sample["labels"] != -100
        start = int(is_answer.nonzero()[0])
        answer = sample["labels"][is_answer]
        prompt = sample["input_ids"][None, :start]
        codes = {f"{kind}_codes": sample[f"{kind}_codes"] for kind in ("pixel", "semantic")}
        ids = model.generate(prompt, **codes, max_new_tokens=len(answer), do_sample=False)[0, start:]
        right.append(ids.tolist() == answer.tolist()[: len(ids)] and len(ids) == len(answer))
    accuracy = train_codes.answer_accuracy(model, questions, collate)
    assert accuracy == pytest.approx(np.mean(right)) and 0 < accuracy < 1


def test_semantic_codes_are_embedded_as_encode_does(conversations):
    tokenizer, images = conversations.vision_tokenizer, conversations.pictures["heldout"]["images"][:4]
    with torch.no_grad():
        encoded = tokenizer.encode(teacher.to_pixels(images))
    torch.testing.assert_close(
        train_codes.embed_semantic_codes(tokenizer, encoded.semantic_codes), encoded.pooler_output
    )
    torch.testing.assert_close(conversations.codes["heldout"][1][:4], encoded.semantic_codes)


def test_training_ends_at_the_last_plateau():
    training = train_codes.TRAINING
    model, control = torch.nn.Linear(1, 1), SimpleNamespace(should_training_stop=False)
    curve = train_codes.Curve(lambda model: {})
    rates = [training["learning_rate"] * training["factor"] ** cut for cut in range(training["cuts"] + 1)]
    weights = []

    def evaluate(loss: float, rate: float) -> bool:
        with torch.no_grad():
            model.weight.fill_(loss)
        weights.append(loss)
        optimizer = SimpleNamespace(param_groups=[{"lr": rate}])
        state = SimpleNamespace(global_step=len(weights))
        curve.on_evaluate(None, state, control, model=model, optimizer=optimizer, metrics={"eval_loss": loss})
        return control.should_training_stop

    # A plateau at a rate that can still be cut, progress at the lowest, and a plateau there, which takes patience.
    assert not evaluate(10.0, rates[0]) and not any(evaluate(11.0, rates[0]) for _ in range(4))
    assert not evaluate(8.0, rates[-1])
    assert not any(evaluate(8.5, rates[-1]) for _ in range(training["patience"]))
    assert evaluate(7.99, rates[-1]) and curve.converged
    assert weights[curve.best] == 7.99 and curve.weights["weight"].item() == pytest.approx(7.99)


@pytest.mark.slow
def test_seed_is_trained_measured_reported_and_kept(folder, monkeypatch, tmp_path):
    train_codes.train_seed(folder, 0, variants=("both", "semantic"))
    both, semantic = (
        json.loads((folder / "runs" / f"codes-{variant}-seed0.json").read_text()) for variant in ("both", "semantic")
    )
    for task, metrics in (("understanding", ablate_codes.UNDERSTANDING), ("generation", ablate_codes.GENERATION)):
        assert both[task]["last_step"] == 4 and not both[task]["converged"] and len(both[task]["curve"]) == 2
        assert set(both[task]["best"]) == set(both[task]["last"]) == set(metrics)
        assert all(np.isfinite(value) for value in both[task]["best"].values())
    # Without pixel codes there is no image to judge.
    assert set(semantic["generation"]["best"]) == {"drawn_semantics"}
    assert (folder / "runs" / "codes-both-seed0.png").exists()
    assert not (folder / "runs" / "codes-semantic-seed0.png").exists()

    def trained(*args, **kwargs):
        raise RuntimeError("trained")

    monkeypatch.setattr(train_codes, "train_variant", trained)
    train_codes.train_seed(folder, 0, variants=("both", "semantic"))
    with pytest.raises(RuntimeError, match="trained"):
        train_codes.train_seed(folder, 0)

    page = tmp_path / "page.md"
    page.write_text("before\n<!-- codes -->\nstale\n<!-- end of codes -->\nafter\n")
    ablate_codes.main(["--output_dir", str(folder), "--report_only", "--page", str(page)])
    text = page.read_text()
    assert text.startswith("before\n<!-- codes -->\n") and "stale" not in text
    for name in ablate_codes.PICTURES.values():
        assert (folder / name).exists() and f"](images/{name})" in text and (tmp_path / "images" / name).exists()


def test_tables(tmp_path):
    (tmp_path / "runs").mkdir()
    for variant, digit in (("both", 0.9), ("pixel", 0.7)):
        for seed in range(3):
            metrics = dict.fromkeys(ablate_codes.METRICS, 0.5) | {"digit": digit + seed / 100}
            of_task = {"best": metrics, "last": metrics, "core_seconds": 90.0}
            of_task |= {"best_step": 100 + seed, "last_step": 200, "converged": seed > 0}
            run = {"settings": {"seed": seed}, "tokenizer": metrics}
            run |= dict.fromkeys(train_codes.TASKS, of_task)
            (tmp_path / "runs" / f"codes-{variant}-seed{seed}.json").write_text(json.dumps(run))
    text = ablate_codes.write_tables(tmp_path)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    assert ["both, best", "3", "91.0 ± 1.0", "50.0 ± 0.0"] in rows
    assert ["semantic only, best", "0", "–", "–"] in rows
    assert next(row for row in rows if row[0] == "pixel only")[1] == "**-20.0 (-20.0 to -20.0)**"
    for path in (tmp_path / "runs").glob("*-seed[12].json"):
        path.unlink()
    assert "The difference from" in text and "The difference from" not in ablate_codes.write_tables(tmp_path)
    assert ["generation, both", "100, 101, 102", "200, 200, 200", "no, yes, yes", "1.5, 1.5, 1.5"] in rows
