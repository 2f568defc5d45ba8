"""The evaluation of the tokenizer, as far as the core and `train` installations go; the rest: test_evaluation_extras.py."""

import importlib.metadata
import json
import math
import pickle
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import skimage.metrics
import torch
import torch.nn.functional as F
import yaml
from official_format import write_golden_folder
from PIL import Image
from transformers import AutoTokenizer

from transformers_dualtoken import DualTokenImageProcessorPil
from transformers_dualtoken.evaluation import (
    CodebookUsage,
    ImageBatches,
    ReconstructionMetrics,
    RetrievalRecall,
    TokenizerEvaluator,
    fid_metric,
    image_batches,
    psnr_per_image,
    reconstruction_grid,
    ssim_per_image,
    text_tokenizer,
    write_report,
)
from transformers_dualtoken.optional_libraries import MissingLibraryError


EXAMPLES = Path(__file__).parents[1] / "examples"


def test_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(MissingLibraryError, match=r"rFID needs torchmetrics: .*transformers-dualtoken\[eval\]"):
        fid_metric()


# Reconstructions


@pytest.fixture
def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Reconstructions and their images `(3, 3, 24, 20)` in [0, 1], one half black."""
    images = torch.rand(3, 3, 24, 20, generator=torch.Generator().manual_seed(0))
    images[0, :, :12] = 0
    return (images * 0.8 + 0.1).clamp(0, 1), images


def test_psnr_and_ssim_agree_with_scikit_image(pairs):
    made, images = pairs
    arrays = list(zip(images.double().numpy(), made.double().numpy()))
    psnr = [skimage.metrics.peak_signal_noise_ratio(*pair, data_range=1) for pair in arrays]
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    ssim = [skimage.metrics.structural_similarity(*pair, data_range=1, channel_axis=0, **window) for pair in arrays]
    assert psnr_per_image(made, images).tolist() == pytest.approx(psnr, abs=1e-5)
    assert ssim_per_image(made, images).tolist() == pytest.approx(ssim, abs=1e-9)
    assert psnr_per_image(images, images).isinf().all() and ssim_per_image(images, images).tolist() == [1, 1, 1]
    metrics = ReconstructionMetrics(("psnr", "ssim"))
    # Of different sizes of batch, in [-1, 1].
    for part in (slice(0, 1), slice(1, 3)):
        metrics.update(made[part] * 2 - 1, images[part] * 2 - 1)
    assert metrics.compute() == pytest.approx({"psnr": np.mean(psnr), "ssim": np.mean(ssim), "exact_images": 0}, 1e-5)


def test_reconstructions_are_clamped_and_exact_ones_counted(pairs):
    made, images = pairs
    made[1] = images[1]
    made[2, 0], made[2, 1] = 1, 0
    beyond = made * 2 - 1
    beyond[made == 1] = 7.0
    beyond[made == 0] = -7.0
    metrics = ReconstructionMetrics(("psnr", "ssim"))
    metrics.update(beyond, images * 2 - 1)
    result = metrics.compute()
    expected = psnr_per_image(made, images)
    assert expected[1].isinf() and result["exact_images"] == 1
    assert result["psnr"] == pytest.approx(float(expected[[0, 2]].mean()))


def test_reconstruction_metrics_refuse():
    with pytest.raises(ValueError, match="Unknown metric 'fvd'; there are psnr, ssim, lpips, rfid"):
        ReconstructionMetrics(("fvd",))
    with pytest.raises(ValueError, match="'rfid' needs its network"):
        ReconstructionMetrics(("rfid",))
    metrics = ReconstructionMetrics(("ssim",))
    with pytest.raises(ValueError, match="must have one shape"):
        metrics.update(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 24, 24))
    with pytest.raises(ValueError, match="SSIM needs images of at least 11 pixels a side, got 8 x 16"):
        metrics.update(torch.zeros(1, 3, 8, 16), torch.zeros(1, 3, 8, 16))
    with pytest.raises(ValueError, match="A reconstruction holds NaN"):
        metrics.update(torch.full((1, 3, 16, 16), torch.nan), torch.zeros(1, 3, 16, 16))


# Codebooks


def naive_usage(codes: list[int], codebook_size: int) -> tuple[float, float]:
    """Share of codes used and entropy in bits."""
    shares = [codes.count(code) / len(codes) for code in range(codebook_size)]
    return sum(share > 0 for share in shares) / codebook_size, -sum(p * math.log2(p) for p in shares if p > 0)


@pytest.mark.parametrize("shared", [True, False])
def test_codebook_usage_equals_counting(shared):
    codes = torch.randint(0, 5, (4, 2, 3, 3)).clamp(max=torch.tensor([1, 3, 4]))
    usage = CodebookUsage(num_depths=3, codebook_size=7, shared_codebook=shared)
    for batch in codes.split([1, 3]):
        usage.update(batch)
    depths = [naive_usage(codes[..., depth].flatten().tolist(), 7) for depth in range(3)]
    per_depth = usage.compute_per_depth()
    assert per_depth["usage"] == pytest.approx([used for used, _ in depths])
    assert per_depth["entropy"] == pytest.approx([bits for _, bits in depths])
    assert per_depth["perplexity"] == pytest.approx([2**bits for _, bits in depths])
    expected = naive_usage(codes.flatten().tolist(), 7) if shared else tuple(np.mean(depths, axis=0))
    assert usage.compute() == pytest.approx(
        {"usage": expected[0], "entropy": expected[1], "perplexity": 2 ** expected[1]}
    )
    assert usage.counts.dtype == torch.int64 and usage.counts.sum() == codes.numel()


def test_codebook_usage_ends_of_the_scale():
    usage = CodebookUsage(2, 16)
    assert all(math.isnan(value) for value in usage.compute().values())
    usage.update(torch.arange(16).repeat_interleave(2).view(16, 2))
    assert usage.compute() == pytest.approx({"usage": 1.0, "perplexity": 16.0, "entropy": 4.0})
    total = usage.reduce()
    usage.reset()
    assert math.isnan(usage.compute()["usage"])
    # Without several processes the sum is a copy, which the reset leaves alone.
    assert total.compute()["usage"] == 1
    usage.update(torch.full((5, 2), 3))
    assert usage.compute() == pytest.approx({"usage": 1 / 16, "perplexity": 1.0, "entropy": 0.0})


def test_codebook_usage_refuses_what_it_cannot_count():
    usage = CodebookUsage(2, 4)
    with pytest.raises(ValueError, match=r"2 depths in the last dimension, got shape \(5, 3\)"):
        usage.update(torch.zeros(5, 3, dtype=torch.int64))
    with pytest.raises(RuntimeError):
        usage.update(torch.tensor([[0, 4]]))
    with pytest.raises(ValueError, match="`codebook_size` must be at least 1, got 0"):
        CodebookUsage(2, 0)


# Retrieval


def naive_recall(images, texts, owners, k):
    """Sort everything for every query."""
    hits_of_images = []
    for index, image in enumerate(images):
        ranked = sorted(range(len(texts)), key=lambda text: -float(image @ texts[text]))
        hits_of_images.append(any(owners[text] == index for text in ranked[:k]))
    hits_of_texts = []
    for text, owner in zip(texts, owners):
        ranked = sorted(range(len(images)), key=lambda index: -float(text @ images[index]))
        hits_of_texts.append(owner in ranked[:k])
    return np.mean(hits_of_images), np.mean(hits_of_texts)


@pytest.mark.parametrize("chunk_size", [4, 1000])
def test_retrieval_recall_equals_sorting(chunk_size):
    counts = [1, 3, 2, 1, 4, 2, 1, 1, 2, 3]
    owners = [index for index, count in enumerate(counts) for _ in range(count)]
    images = F.normalize(torch.randn(len(counts), 6), dim=-1)
    texts = F.normalize(images[owners] + 0.7 * torch.randn(len(owners), 6), dim=-1)
    recall = RetrievalRecall(ks=(1, 2, 5), chunk_size=chunk_size)
    for first, last in ((0, 3), (3, 10)):
        start, stop = sum(counts[:first]), sum(counts[:last])
        recall.update(images[first:last], texts[start:stop], counts[first:last])
    result = recall.compute()
    for k in (1, 2, 5):
        expected = naive_recall(images, texts, owners, k)
        assert (result[f"image_to_text_recall_at_{k}"], result[f"text_to_image_recall_at_{k}"]) == expected
    assert 0 < result["text_to_image_recall_at_1"] < 1


def test_equal_embeddings_retrieve_nothing():
    recall = RetrievalRecall(ks=(1, 10))
    same = F.normalize(torch.ones(20, 4), dim=-1)
    recall.update(same, same, [1] * 20)
    assert set(recall.compute().values()) == {0.0}


def test_retrieval_recall_without_images_and_with_wrong_counts():
    recall = RetrievalRecall()
    assert all(math.isnan(value) for value in recall.compute().values())
    for counts in ([2, 0], [1, 2], [2]):
        with pytest.raises(ValueError, match="at least one of the 2 captions, got"):
            recall.update(torch.ones(2, 3), torch.ones(2, 3), counts)


# The pass


@pytest.fixture
def images() -> torch.Tensor:
    """Ten images `(10, 3, 24, 24)` in [-1, 1]."""
    return torch.rand(10, 3, 24, 24, generator=torch.Generator().manual_seed(2)) * 2 - 1


def test_evaluator_counts_both_codebooks_and_retrieves(tokenizer, images):
    input_ids = torch.randint(3, 64, (15, 8))
    captions = [2, 1] * 5
    evaluator = TokenizerEvaluator(tokenizer.train(), retrieval=RetrievalRecall(ks=(1,)), num_shown=4)
    before = {name: buffer.clone() for name, buffer in tokenizer.named_buffers()}
    metrics = evaluator.run(
        {
            "pixel_values": images[first:last],
            "input_ids": input_ids[sum(captions[:first]) : sum(captions[:last])],
            "captions_per_image": captions[first:last],
        }
        for first, last in ((0, 3), (3, 10))
    )
    # No codebook moved.
    assert all(torch.equal(before[name], buffer) for name, buffer in tokenizer.named_buffers())
    assert metrics["num_images"] == 10
    with torch.no_grad():
        output = tokenizer(images, input_ids=input_ids)
    for kind in ("pixel", "semantic"):
        used, bits = naive_usage(output[f"{kind}_codes"].flatten().tolist(), 24)
        assert metrics[f"{kind}_codebook_usage"] == pytest.approx(used)
        assert metrics[f"{kind}_codebook_entropy"] == pytest.approx(bits)
        assert len(metrics["per_depth"][f"{kind}_codebook_perplexity"]) == 3
    owners = [index for index, count in enumerate(captions) for _ in range(count)]
    expected = naive_recall(output.image_embeds, output.text_embeds, owners, 1)
    assert metrics["image_to_text_recall_at_1"] == pytest.approx(expected[0])
    assert metrics["text_to_image_recall_at_1"] == pytest.approx(expected[1])
    shown, made = (torch.stack(tensors) for tensors in zip(*evaluator.shown))
    assert torch.equal(shown, images[:4])
    torch.testing.assert_close(made, output.reconstruction[:4], atol=1e-4, rtol=1e-4)


@pytest.fixture
def calls(tokenizer, monkeypatch) -> list:
    """What the tokenizer is asked to make: (number of images, codes, features), or (number of images,) decoded."""
    made, encode, decode = [], tokenizer.encode, tokenizer.decode

    def count_encoded(pixel_values, codes, features):
        made.append((len(pixel_values), *codes, features))
        return encode(pixel_values, codes=codes, features=features)

    def count_decoded(pixel_codes):
        made.append((len(pixel_codes),))
        return decode(pixel_codes=pixel_codes)

    monkeypatch.setattr(tokenizer, "encode", count_encoded)
    monkeypatch.setattr(tokenizer, "decode", count_decoded)
    return made


def test_codebooks_alone_need_no_features(tokenizer, images, calls):
    evaluator = TokenizerEvaluator(tokenizer, num_shown=5)
    metrics = evaluator.run({"pixel_values": batch} for batch in images.split(4))
    both = ("pixel", "semantic", False)
    assert calls == [(4, *both), (4,), (4, *both), (1,), (2, *both)]
    assert len(evaluator.shown) == 5 and {"pixel_codebook_usage", "semantic_codebook_usage"} <= set(metrics)


def test_retrieval_alone_needs_no_pixel_codes(tokenizer, images, calls):
    captions = {"input_ids": torch.randint(3, 64, (4, 8)), "captions_per_image": [1] * 4}
    batches = [{"pixel_values": images[:4], **captions}, {"pixel_values": images[4:8], **captions}]
    evaluator = TokenizerEvaluator(tokenizer, retrieval=RetrievalRecall(ks=(1,)), codebooks=False, num_shown=3)
    metrics = evaluator.run(batches)
    assert calls == [(4, "pixel", "semantic", True), (3,), (4, "semantic", True)]
    assert set(metrics) == {"num_images", "image_to_text_recall_at_1", "text_to_image_recall_at_1"}
    calls.clear()
    assert TokenizerEvaluator(tokenizer, codebooks=False, num_shown=0).run(batches[:1]) == {"num_images": 4}
    assert calls == []


def test_images_are_resized_bilinearly_to_the_reconstructions(make_tokenizer, images):
    tokenizer = make_tokenizer(decoder_latent_size=18)
    evaluator = TokenizerEvaluator(tokenizer, num_shown=2)
    evaluator.update(images)
    for image, (shown, made) in zip(images, evaluator.shown):
        assert made.shape == (3, 36, 36)
        # Enlarging, PIL's triangle is bilinear interpolation.
        planes = [np.asarray(Image.fromarray(plane.numpy()).resize((36, 36), Image.BILINEAR)) for plane in image]
        np.testing.assert_allclose(shown, np.stack(planes), atol=1e-5)


def test_evaluator_says_what_is_missing(tokenizer, images):
    with pytest.raises(ValueError, match="RetrievalRecall needs `captions_per_image` with every batch"):
        TokenizerEvaluator(tokenizer, retrieval=RetrievalRecall()).update(images, input_ids=torch.ones(1, 8))
    with pytest.raises(ValueError, match="There was no image to evaluate"):
        TokenizerEvaluator(tokenizer).run([])


def test_inception_weights_that_do_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file of .*`inception_weights`.* at '.*missing.pth'"):
        fid_metric(weights=tmp_path / "missing.pth")


# Data


def image_table(count: int = 11, **columns) -> datasets.Dataset:
    """Grey images whose level is their number."""
    pictures = [Image.new("RGB", (24, 24), (10 * number,) * 3) for number in range(count)]
    table = datasets.Dataset.from_dict({"image": pictures, **columns}, features=None)
    return table.cast_column("image", datasets.Image())


PROCESSOR = DualTokenImageProcessorPil(size={"height": 24, "width": 24})


def numbers(batches) -> list[int]:
    """Which images of `image_table` were seen."""
    return [round(float(image.mean() + 1) * 12.75) for batch in batches for image in batch["pixel_values"]]


@pytest.mark.parametrize("num_samples", [None, 7])
@pytest.mark.parametrize("num_shards", [0, 1, 4])
@pytest.mark.parametrize(("num_processes", "num_workers"), [(1, 0), (2, 0), (3, 0), (2, 2)])
def test_every_image_comes_once(num_processes, num_workers, num_shards, num_samples, monkeypatch):
    table = image_table()
    if num_shards:
        table = table.to_iterable_dataset(num_shards)
    seen = []
    for rank in range(num_processes):
        monkeypatch.setattr(image_batches, "rank_and_number", lambda rank=rank: (rank, num_processes))
        batches = ImageBatches(table, PROCESSOR, batch_size=2, num_samples=num_samples, num_workers=num_workers)
        seen += numbers(batches)
    assert sorted(seen) == list(range(num_samples or 11))


def test_labels_captions_and_damaged_images():
    table = image_table(3, label=[2, 0, 1], captions=[["a", "b"], ["c"], ["d"]])
    rows = table.cast_column("image", datasets.Image(decode=False)).to_list()
    rows[1]["image"]["bytes"] = rows[1]["image"]["bytes"][:60]
    table = datasets.Dataset.from_list(rows)
    batches = ImageBatches(
        table,
        PROCESSOR,
        label_column="label",
        caption_column="captions",
        tokenize=lambda texts: torch.tensor([[ord(text)] for text in texts]),
    )
    (batch,) = batches
    assert batches.num_skipped == 1
    assert numbers([batch]) == [0, 2] and batch["labels"].tolist() == [2, 1]
    assert batch["captions_per_image"] == [2, 1]
    assert batch["input_ids"].flatten().tolist() == [ord("a"), ord("b"), ord("d")]


def test_other_columns_are_left_alone_and_images_may_be_bytes(tmp_path):
    table = image_table(2)
    files = [row["bytes"] for row in table.cast_column("image", datasets.Image(decode=False))["image"]]
    damaged = [{"bytes": b"none", "path": None}] * 2
    table = table.add_column("mask", damaged, feature=datasets.Image()).add_column("file", files)
    assert numbers(ImageBatches(table, PROCESSOR)) == [0, 1]
    assert numbers(ImageBatches(table, PROCESSOR, image_column="file")) == [0, 1]
    assert numbers(ImageBatches(table.to_iterable_dataset(), PROCESSOR)) == [0, 1]


def test_batches_can_be_sent_to_spawned_workers(siglip_folder):
    tokenize = text_tokenizer(AutoTokenizer.from_pretrained(siglip_folder), 5)
    table = image_table(2, text=["a", "a a"])
    batches = ImageBatches(table, PROCESSOR, caption_column="text", tokenize=tokenize)
    (batch,) = pickle.loads(pickle.dumps(batches))
    assert batch["input_ids"].tolist() == [[3, 0, 0, 0, 0], [3, 3, 0, 0, 0]]


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({}, {"label_column": "class"}, r"no column 'class'; it has \['image'\]"),
        ({}, {"num_samples": 0}, "`num_samples` must be at least 1, got 0"),
        ({}, {"caption_column": "image"}, "`caption_column` needs `tokenize`"),
        ({"label": ["cat"] * 2}, {"label_column": "label"}, "must be integers.*'label' holds 'cat'"),
        ({"text": ["cat", ""]}, {"caption_column": "text", "tokenize": len}, "at least one caption.*'text' holds ''"),
        ({"text": [["cat"], []]}, {"caption_column": "text", "tokenize": len}, r"at least one caption.*holds \[\]"),
    ],
)
def test_bad_columns_are_named(columns, settings, message):
    with pytest.raises(ValueError, match=message):
        list(ImageBatches(image_table(2, **columns), PROCESSOR, batch_size=1, **settings))


# The report


def test_report(tmp_path, images):
    usage = CodebookUsage(2, 8, shared_codebook=False)
    usage.update(torch.randint(0, 8, (30, 2)))
    metrics = {"num_images": 10, "psnr": float("nan"), "exact_images": 10, "ssim": 0.5}
    metrics["text_to_image_recall_at_5"] = 0.25
    metrics |= {f"pixel_codebook_{name}": value for name, value in usage.compute().items()}
    metrics["per_depth"] = {f"pixel_codebook_{name}": value for name, value in usage.compute_per_depth().items()}
    shown = list(zip(images[:3], images[:3] * 2))
    results = write_report(
        tmp_path / "out",
        metrics,
        model="somewhere/tokenizer",
        data={"source": "someone/pictures", "split": "test"},
        shown=shown,
        skipped={"rfid": "no weights"},
    )
    written = json.loads((tmp_path / "out" / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert written == results
    assert written["metrics"]["psnr"] is None and written["metrics"]["ssim"] == 0.5
    assert set(written["conventions"]) == {"images", "psnr", "ssim", "recall", "codebook"}
    assert written["versions"]["torch"] == importlib.metadata.version("torch")
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| SSIM | 0.5000 |" in report and "| PSNR (dB) | not finite |" in report and "- rfid: no weights" in report
    assert "| Images reproduced exactly, left out of PSNR | 10 |" in report
    card = yaml.safe_load((tmp_path / "out" / "model_card_metadata.yaml").read_text())
    found = {
        metric["type"]: (result["task"]["type"], metric["value"])
        for result in card["model-index"][0]["results"]
        for metric in result["metrics"]
    }
    assert found["ssim"] == ("image-to-image", 0.5) and not {"psnr", "exact_images"} & set(found)
    assert found["text_to_image_recall_at_5"] == ("image-text-retrieval", 0.25)
    assert card["model-index"][0]["name"] == "tokenizer"


def test_report_explains_what_was_measured(tmp_path):
    (tmp_path / "reconstructions.png").write_text("of an earlier run")
    metrics = {"num_images": 1, "pixel_codebook_usage": 0.5, "per_depth": {"pixel_codebook_usage": [0.5]}}
    results = write_report(tmp_path, metrics, model="tokenizer", data={"source": "pictures"}, shown=[])
    assert results["metrics"]["pixel_codebook_usage"] == 0.5
    assert set(results["conventions"]) == {"images", "codebook"}
    report = (tmp_path / "report.md").read_text()
    assert "(reconstructions.png)" not in report and "| 1 | 0.5000 |" in report
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "report.md", "model_card_metadata.yaml"}


def test_grid_holds_the_pixels_themselves(images):
    grid = np.asarray(reconstruction_grid(images[:3], -images[:3], images_per_row=2, side=24))
    gap = 2
    expected = ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    # The third original: second row of pairs, first column.
    top = gap + 2 * 24 + 3 * gap
    assert np.array_equal(grid[top : top + 24, gap : gap + 24], expected[2])
    made = ((-images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(grid[gap + 24 + gap : gap + 24 + gap + 24, gap + 24 + gap : gap + 24 + gap + 24], made[1])


# The script


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module("eval_tokenizer")
    from accelerate.state import PartialState

    # Tests that train find it as they expect it.
    PartialState._reset_state()


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "images").mkdir()
    for number, row in enumerate(image_table(5)):
        row["image"].save(tmp_path / "images" / f"{number}.png")
    return tmp_path / "images"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--metrics", "psnr", "fvd"], ValueError, "--metrics holds fvd; there are psnr, ssim, lpips, rfid"),
        (["--metrics", "zero_shot"], ValueError, "'zero_shot' needs --label_column"),
        (["--metrics", "retrieval"], ValueError, "'retrieval' needs --caption_column"),
        (["--inception_weights", "none.pth"], FileNotFoundError, "--inception_weights must be a file.*'none.pth'"),
        (["--lpips_weights", "none.pth"], FileNotFoundError, "--lpips_weights must be a file.*'none.pth'"),
        (["--class_names", "none.txt"], FileNotFoundError, "--class_names must be a file.*'none.txt'"),
        (["--dtype", "int8"], ValueError, "--dtype must be float32, bfloat16 or float16, got 'int8'"),
    ],
)
def test_script_refuses_bad_arguments(script, tmp_path, arguments, error, message):
    # Before anything is loaded: there is no such model.
    common = ["--model_name_or_path", "none", "--dataset", "none", "--output_dir", str(tmp_path)]
    with pytest.raises(error, match=message):
        script.main([*common, *arguments])


def test_script_measures_what_it_can(script, folder, tmp_path, monkeypatch):
    # As where the extra is not installed.
    absent = ("torchmetrics", "torch_fidelity", "open_clip", "lpips")
    for name in {*absent, *(name for name in sys.modules if name.startswith(absent))}:
        monkeypatch.setitem(sys.modules, name, None)
    common = ["--model_name_or_path", str(EXAMPLES / "digits" / "checkpoint" / "dualtoken"), "--dataset", str(folder)]
    common += ["--output_dir", str(tmp_path / "out"), "--use_cpu", "1", "--batch_size", "2"]
    results = script.main(common)
    assert results["metrics"]["num_images"] == 5
    assert 0 < results["metrics"]["semantic_codebook_usage"] < 1
    assert set(results["skipped"]) == {"lpips", "rfid", "zero_shot", "retrieval"}
    assert 10 < results["metrics"]["psnr"] < 40 and 0 < results["metrics"]["ssim"] < 1
    assert "pip install 'transformers-dualtoken[eval]'" in results["skipped"]["rfid"]
    assert "pip install 'transformers-dualtoken[perceptual]'" in results["skipped"]["lpips"]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "metrics.json",
        "report.md",
        "reconstructions.png",
        "model_card_metadata.yaml",
    }
    with pytest.raises(MissingLibraryError, match="rFID needs torchmetrics"):
        script.main([*common, "--metrics", "rfid"])


def test_script_reads_labels_from_any_source(script, folder, tmp_path, monkeypatch):
    def load(source, split="train", streaming=False, column="label"):
        arguments = script.EvaluationArguments("m", str(source), "o", label_column=column, split=split)
        arguments.streaming = streaming
        return script.load_rows(arguments)

    for number in range(5):
        name = "even" if number % 2 == 0 else "odd"
        (tmp_path / "classes" / name).mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").rename(tmp_path / "classes" / name / f"{number}.png")
    table = image_table(3, label=[1, 0, 1]).cast_column("label", datasets.ClassLabel(names=["even", "odd"]))
    table.to_parquet(tmp_path / "table.parquet")
    datasets.DatasetDict({"test": table}).save_to_disk(tmp_path / "saved")
    monkeypatch.setenv("HOME", str(tmp_path))
    for source, split, labels in (
        ("~/classes", "train", [0, 0, 0, 1, 1]),
        (tmp_path / "classes" / "*" / "*.png", "train", [0, 0, 0, 1, 1]),
        (tmp_path / "table.parquet", "train", [1, 0, 1]),
        (tmp_path / "saved", "test", [1, 0, 1]),
    ):
        for streaming in (False, True):
            rows = load(source, split, streaming)
            assert isinstance(rows, datasets.IterableDataset) == streaming
            assert sorted(rows.column_names) == ["image", "label"]
            assert rows.features["label"].names == ["even", "odd"]
            assert [row["label"] for row in rows] == labels
            assert len(numbers(ImageBatches(rows, PROCESSOR, label_column="label"))) == len(labels)
    with pytest.raises(ValueError, match="has no split 'train'; it has .*'test'"):
        load(tmp_path / "saved")
    with pytest.raises(ValueError, match="no column 'class'"):
        load(tmp_path / "table.parquet", column="class")


def test_script_reads_class_names(script, tmp_path):
    def read(names: str, feature, file="names.txt"):
        (tmp_path / file).write_text(names)
        table = datasets.Dataset.from_dict({"label": [0]}, features=datasets.Features({"label": feature}))
        path = str(tmp_path / file) if names else None
        return script.read_class_names(
            script.EvaluationArguments("m", "d", "o", label_column="label", class_names=path), table
        )

    own = datasets.ClassLabel(names=["cat", "dog"])
    assert read("", own) == ["cat", "dog"]
    assert read("tabby cat\ngolden retriever\n", own) == ["tabby cat", "golden retriever"]
    assert read('["a", "b", "c"]', datasets.Value("int64"), "names.json") == ["a", "b", "c"]
    with pytest.raises(ValueError, match="holds 3 class names, but the column 'label' has 2 classes"):
        read("a\nb\nc", own)
    with pytest.raises(ValueError, match="does not name its classes: give --class_names"):
        read("", datasets.Value("int64"))


def test_script_loads_the_authors_format(script, tmp_path, monkeypatch):
    write_golden_folder(tmp_path)
    monkeypatch.setattr(script.AutoTokenizer, "from_pretrained", lambda path: path)
    model, image_processor, tokenizer_path = script.load_model(
        script.EvaluationArguments(str(tmp_path), "d", "o", dtype="bfloat16", label_column="label")
    )
    assert model.dtype == torch.bfloat16 and model.pixel_quantizer.codebook.embeddings.dtype == torch.float32
    assert image_processor.size["height"] == model.config.image_size == 24
    assert Path(tokenizer_path) == tmp_path / "siglip"
