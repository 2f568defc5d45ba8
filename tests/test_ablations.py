"""The ablations' parts on a handful of scenes; the proof of the experiments is their run, see docs/ablations.md."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch


ABLATIONS = Path(__file__).parents[1] / "examples" / "ablations"
sys.path.append(str(ABLATIONS))
import report  # noqa: E402
import scenes  # noqa: E402
import teacher  # noqa: E402
import train_variant  # noqa: E402


FEW = slice(0, 1437, 60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Scenes of few scans, and a teacher and a judge that have hardly learned."""
    folder = tmp_path_factory.mktemp("ablations")
    split = scenes.split_scans

    def few(validation=False):
        return tuple(
            tuple(part[FEW] if len(part) > 360 else part[::23] for part in pair) for pair in split(validation)
        )

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(scenes, "split_scans", few)
        scenes.write_scenes(folder, train_scenes=2)
    teacher.train_judge(folder, steps=2)
    teacher.train_teacher(folder, seed=0, steps=2)
    return folder


def build(folder: Path, variant: str):
    """An untrained variant in training mode."""
    settings = train_variant.variant_settings(variant)
    is_one = settings["kind"] == "one"
    model_class = train_variant.OneCodebookTokenizer if is_one else train_variant.DualTokenVisionTokenizer
    torch.manual_seed(0)
    return model_class.from_siglip_pretrained(folder / "teacher-0", **settings["config"]).train()


def test_heldout_scenes_share_neither_scans_nor_photographs():
    names = (set(scenes.TRAIN_PHOTOS), set(scenes.VALIDATION_PHOTOS), set(scenes.HELDOUT_PHOTOS))
    assert sum(map(len, names)) == len(set.union(*names))
    assert set.union(*names) == set(scenes.load_photos())
    for validation in (False, True):
        (train, _), (heldout, _) = scenes.split_scans(validation)
        assert not {scan.tobytes() for scan in train} & {scan.tobytes() for scan in heldout}


def test_scene_shows_the_photograph_around_the_digit():
    photo = scenes.Image.new("RGB", (200, 200), (200, 180, 160))
    stroke = np.zeros((32, 32), dtype=np.uint8)
    stroke[:, 12:20] = 255
    scene = scenes.draw_scene(scenes.Image.fromarray(stroke), photo, scenes.random.Random(0), varied=False)
    assert (scene[:, :12] == (200, 180, 160)).all() and (scene[:, 20:] == (200, 180, 160)).all()
    # Dark over a light photograph, of one colour.
    assert (scene[:, 12:20] <= 255 * scenes.TINT).all() and len(np.unique(scene[:, 12:20].reshape(-1, 3), axis=0)) == 1


def test_scenes_are_written_once(folder):
    before = (folder / "scenes.npz").stat().st_mtime_ns
    parts = np.load(scenes.write_scenes(folder))
    assert (folder / "scenes.npz").stat().st_mtime_ns == before
    assert parts["train_images"].shape == (48, 32, 32, 3) and parts["heldout_images"].shape == (64, 32, 32, 3)
    assert parts["heldout_photos"].max() == len(scenes.HELDOUT_PHOTOS) - 1


def test_one_codebook_serves_both_branches(folder):
    model = build(folder, "one-4")
    pixel_values = teacher.to_pixels(np.load(folder / "scenes.npz")["train_images"][:8])
    output = model(pixel_values)
    assert output.pixel_codes is output.semantic_codes and model.semantic_quantizer is model.pixel_quantizer
    assert not any(name.startswith("semantic_down_proj") for name, _ in model.named_parameters())
    assert not any(name.startswith("semantic_quantizer") for name, _ in model.named_buffers())
    # One forward moves the codebook once: the counts of one look-up, by hand.
    counts = torch.zeros(256)
    decay = model.pixel_quantizer.config.ema_decay
    fresh = build(folder, "one-4").pixel_quantizer.codebook
    for depth in range(4):
        new = torch.bincount(output.pixel_codes[..., depth].flatten(), minlength=256).float()
        counts = torch.where((mean := decay * counts + (1 - decay) * new) < 1, torch.ones(()), mean)
    torch.testing.assert_close(model.pixel_quantizer.codebook.cluster_size[0], counts)
    assert not torch.equal(model.pixel_quantizer.codebook.embeddings, fresh.embeddings)
    # Both losses reach the one way down to the codes.
    for loss in (output.reconstruction.square().mean(), output.pooler_output.square().mean()):
        (gradient,) = torch.autograd.grad(loss, model.pixel_down_proj.proj.weight, retain_graph=True)
        assert gradient.abs().max() > 0


def test_one_codebook_agrees_with_the_dual_forward(folder):
    """With equal weights in both branches, the dual tokenizer computes what the one with a single codebook does."""
    one, dual = build(folder, "one-4").eval(), build(folder, "dual-7").eval()
    dual.load_state_dict(one.state_dict())
    pixel_values = teacher.to_pixels(np.load(folder / "scenes.npz")["heldout_images"][:4])
    with torch.no_grad():
        ours, theirs = one(pixel_values), dual(pixel_values)
    for name in ("semantic_codes", "semantic_features", "pooler_output", "reconstruction"):
        torch.testing.assert_close(ours[name], theirs[name])


def test_one_codebook_takes_one_layer(folder):
    config = train_variant.variant_settings("dual-2")["config"]
    with pytest.raises(ValueError, match="must equal `semantic_layer`.*got 2, 7 and None"):
        train_variant.OneCodebookTokenizer.from_siglip_pretrained(folder / "teacher-0", **config)


@pytest.mark.parametrize("variant", ["dual", "dual-", "dual-two", "single-4"])
def test_unknown_variants_are_named(variant):
    with pytest.raises(ValueError, match=f"got '{variant}'"):
        train_variant.variant_settings(variant)


def test_every_variant_of_the_report_can_be_trained():
    variants = {variant.run for experiment in report.EXPERIMENTS.values() for variant in experiment.variants}
    bits = {name: train_variant.bits_per_position(train_variant.variant_settings(name)) for name in variants}
    depths = train_variant.NUM_DEPTHS
    assert bits[f"one-{2 * depths}"] == bits["dual-2"] == 2 * bits[f"one-{depths}"] == 2 * bits["reconstruction-7"]


@pytest.mark.parametrize("variant", ["dual-2", "reconstruction-2", "one-4"])
def test_variant_is_trained_measured_and_kept(folder, variant, monkeypatch):
    result = train_variant.train_variant(folder, variant, seed=0, steps=2)
    metrics = result["metrics"]
    assert ("zero_shot" in metrics) == (not variant.startswith("reconstruction"))
    assert all(np.isfinite(value) for value in metrics.values())
    assert metrics["psnr"] > 3 and metrics["frechet"] > 0
    kept = json.loads((folder / "runs" / f"{variant}-seed0.json").read_text())
    assert kept == result

    # Started again, it is not trained again; with other settings it is.
    def trained(*args, **kwargs):
        raise RuntimeError("trained")

    monkeypatch.setattr(train_variant, "DualTokenVisionTokenizerTrainer", trained)
    assert train_variant.train_variant(folder, variant, seed=0, steps=2) == kept
    with pytest.raises(RuntimeError, match="trained"):
        train_variant.train_variant(folder, variant, seed=0, steps=3)


def test_frechet_distance_of_known_gaussians():
    generator = np.random.default_rng(0)
    first = generator.normal(size=(200_000, 3)) * (1, 2, 3)
    second = generator.normal(size=(200_000, 3)) * (2, 2, 1) + (1, 0, 0)
    # Diagonal covariances: the sum of (m - m')^2 + (s - s')^2.
    assert train_variant.frechet_distance(first, second) == pytest.approx(1 + 1 + 0 + 4, abs=0.05)
    assert train_variant.frechet_distance(first, first) == pytest.approx(0, abs=1e-6)


def write_run(folder: Path, variant: str, seed: int, **metrics: float) -> None:
    run = {"settings": {"variant": variant, "seed": seed}, "metrics": {"bits": 28.0, **metrics}}
    (folder / "runs").mkdir(exist_ok=True)
    (folder / "runs" / f"{variant}-seed{seed}.json").write_text(json.dumps(run))


def test_tables_and_page(tmp_path):
    for seed in range(3):
        common = {"ssim": 0.5, "frechet": 1.0, "teacher_zero_shot": 0.9}
        write_run(tmp_path, "dual-2", seed, zero_shot=0.8 + seed / 10, psnr=20.0 + seed, **common)
        write_run(tmp_path, "one-4", seed, zero_shot=0.8, psnr=18.0 + seed, **common)
        write_run(tmp_path, "reconstruction-2", seed, psnr=20.0, **common)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- objectives -->\nstale\n<!-- end of objectives -->\nafter\n")
    report.write_report(tmp_path, "objectives", page)
    report.write_report(tmp_path, "objectives", page)
    text = page.read_text()
    assert text.startswith("before\n<!-- objectives -->\n") and text.endswith("<!-- end of objectives -->\nafter\n")
    assert "stale" not in text and text.count("Ours, mean") == 1
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    # Three tables: ours (title, bits, seeds, zero-shot, PSNR ...), differences, the paper's.
    starts = [index for index, row in enumerate(rows) if row[0] == ""]
    ours, differences, paper = ({row[0]: row for row in rows[a:b]} for a, b in zip(starts, [*starts[1:], None]))
    assert ours["dual: shallow pixels, deep semantics"][1:5] == ["28", "3", "90.0 ± 10.0", "21.00 ± 1.00"]
    assert ours["reconstruction only, shallow"][3] == "–" and ours["reconstruction only, deep"][1:4] == ["–", "0", "–"]
    assert paper["one deep codebook, both losses"][1:] == ["72.3", "12.64", "0.574", "3.86"]
    # Less the reference of the same seed: 80 - 80, 80 - 90 and 80 - 100; every PSNR is 2 dB lower.
    assert differences["one deep codebook, both losses"][1] == "-10.0 (-20.0 to +0.0)"
    assert differences["one deep codebook, both losses"][2] == "**-2.00 (-2.00 to -2.00)**"
    assert (tmp_path / "ablation_objectives.png").exists() and (
        tmp_path / "images" / "ablation_objectives.png"
    ).exists()


def test_differences_are_bold_where_the_seeds_agree():
    reference = {0: 1.0, 1: 2.0, 2: 3.0}
    assert report.difference({0: 2.0, 1: 4.0}, reference, 1) == "**+1.5 (+1.0 to +2.0)**"
    assert report.difference({0: 2.0, 1: 1.0}, reference, 1) == "+0.0 (-1.0 to +1.0)"
    assert report.difference({}, reference, 1) == "–"


def test_page_without_markers_is_left_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("nothing here")
    with pytest.raises(ValueError, match="must hold the markers <!-- pixel_layer -->"):
        report.fill_page(page, "pixel_layer", "table")
    assert page.read_text() == "nothing here"


def test_failed_run_shows_its_log(tmp_path, monkeypatch):
    (tmp_path / "teacher.py").write_text("import sys; sys.exit('no such photograph')")
    monkeypatch.setattr(report, "HERE", tmp_path)
    with pytest.raises(RuntimeError, match="no such photograph"):
        report.run_variants(tmp_path / "out", ["dual-2"], [0], 1)
