"""The evaluation against other implementations; needs the extras `perceptual` and `eval`: `make test-extras`."""

import hashlib
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from transformers_dualtoken import evaluation
from transformers_dualtoken.evaluation import (
    METRIC_MODULE,
    MetricUnavailableError,
    ReconstructionMetrics,
    ZeroShotAccuracy,
    fid_metric,
    load_lpips,
    psnr_per_image,
    ssim_per_image,
    zero_shot_classifier,
)


try:
    import evaluate
    import lpips
    import open_clip
    import torch_fidelity.feature_extractor_inceptionv3 as fidelity_inception
    import torchvision
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
    from torchmetrics.image import fid  # noqa: F401
except (ImportError, RuntimeError) as missing:
    pytest.skip(f"needs the extras perceptual and eval, see `make test-extras`: {missing}", allow_module_level=True)

pytestmark = pytest.mark.extras

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "examples" / "digits" / "checkpoint"


def pictures(count: int, height: int = 40, width: int = 32, seed: int = 0) -> torch.Tensor:
    """Smooth pictures with noise `(count, 3, height, width)` in [0, 1]; one in four has a flat black half."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 4, generator=generator)
    images = F.interpolate(coarse, size=(height, width), mode="bicubic")
    images = (images + 0.05 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    images[::4, :, : height // 2] = 0
    return images


def disturbed(images: torch.Tensor, strength: float = 0.1) -> torch.Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    return (0.9 * images + strength * noise).clamp(0, 1)


class Features(nn.Module):
    """A small feature network for FID."""

    num_features = 12

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.convolution = nn.Conv2d(3, 12, 5, stride=2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 10 * self.convolution(images).relu().mean((2, 3))


# Reconstructions


def test_rfid_of_one_image():
    metrics = ReconstructionMetrics(("rfid",), fid=fid_metric(Features()))
    metrics.update(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="rFID cannot be computed: More than one sample"):
        metrics.compute()


def test_rfid_agrees_with_torch_fidelity_and_is_zero_for_the_same_set():
    images = pictures(40)
    made = disturbed(images, 0.3)
    features = Features()
    with torch.no_grad():
        statistics = [fid_features_to_statistics(features(batch)) for batch in (images, made)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
    metrics = ReconstructionMetrics(("rfid",), fid=fid_metric(features))
    for part in (slice(0, 7), slice(7, 40)):
        metrics.update(made[part] * 2 - 1, images[part] * 2 - 1)
    assert expected > 0.1
    assert metrics.compute()["rfid"] == pytest.approx(expected, abs=1e-3)

    same = ReconstructionMetrics(("rfid",), fid=fid_metric(features))
    same.update(images * 2 - 1, images * 2 - 1)
    assert same.compute()["rfid"] == pytest.approx(0, abs=1e-3)


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory) -> Path:
    """A file in the format of torch-fidelity's Inception weights, with random ones."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity_inception, "load_state_dict_from_url", lambda *args, **kwargs: None)
        patch.setattr(fidelity_inception.FeatureExtractorInceptionV3, "load_state_dict", lambda *args: None)
        network = fidelity_inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    for parameter in network.parameters():
        # At PyTorch's own initialisation the features of all images are alike.
        if parameter.ndim == 4:
            nn.init.kaiming_normal_(parameter)
    torch.save(network.state_dict(), path)
    return path


@pytest.mark.slow
def test_inception_is_torch_fidelitys(inception_weights):
    images = pictures(6, 80, 80)
    made = disturbed(images)
    metric = fid_metric(weights=inception_weights)
    theirs = fidelity_inception.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(inception_weights)
    )
    statistics = []
    for batch in (images, made):
        levels = (batch * 255).round().to(torch.uint8)
        (features,) = theirs(levels)
        torch.testing.assert_close(metric.inception(levels), features)
        statistics.append(fid_features_to_statistics(features))
    metrics = ReconstructionMetrics(("rfid",), fid=metric)
    metrics.update(made * 2 - 1, images * 2 - 1)
    expected = fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
    assert expected > 0.1
    assert metrics.compute()["rfid"] == pytest.approx(expected, abs=1e-3, rel=1e-4)


def test_inception_from_the_usual_cache_only(inception_weights, monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    name = fidelity_inception.URL_INCEPTION_V3.rpartition("/")[2]
    with pytest.raises(
        MetricUnavailableError, match=f"{name}.* not in the usual cache.*no network.*`inception_weights`"
    ):
        fid_metric()
    (tmp_path / "checkpoints" / name).symlink_to(inception_weights)
    state = torch.load(inception_weights, weights_only=True)
    metric = fid_metric()
    assert torch.equal(metric.inception.Mixed_7c.branch1x1.conv.weight, state["Mixed_7c.branch1x1.conv.weight"])
    assert metric.weights_sha256 == hashlib.sha256(inception_weights.read_bytes()).hexdigest()


@pytest.mark.parametrize("content", ["text", "nothing", "tensors", "list", "cut off"])
def test_inception_weights_that_are_none(tmp_path, content):
    path = tmp_path / "weights.pth"
    torch.save([torch.zeros(2)] if content == "list" else {"weight": torch.zeros(2)}, path)
    if content == "text":
        path.write_text("an error page")
    elif content == "nothing":
        path.write_bytes(b"")
    elif content == "cut off":
        path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match="weights.pth' of torch-fidelity's Inception weights .* cannot be read"):
        fid_metric(weights=path)


def test_other_failures_are_not_blamed_on_the_weights(inception_weights, monkeypatch):
    def fail(*args, **kwargs):
        raise MemoryError("too little")

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(MemoryError, match="too little"):
        fid_metric(weights=inception_weights)


def test_lpips_is_the_packages(tmp_path):
    torch.manual_seed(0)
    features = torchvision.models.alexnet(weights=None).features
    torch.save({f"features.{name}": tensor for name, tensor in features.state_dict().items()}, tmp_path / "alex.pth")
    network = load_lpips("alex", tmp_path / "alex.pth")
    reference = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    own = {f"features.{name.split('.', 1)[1]}": tensor for name, tensor in reference.net.named_parameters()}
    with torch.no_grad():
        for name, tensor in torch.load(tmp_path / "alex.pth", weights_only=True).items():
            own[name].copy_(tensor)
    images = pictures(3, 64, 64) * 2 - 1
    made = images + 0.3 * torch.randn_like(images)
    metrics = ReconstructionMetrics(("lpips",), lpips=network)
    for part in (slice(0, 1), slice(1, 3)):
        metrics.update(made[part], images[part])
    with torch.no_grad():
        expected = reference.eval()(made.clamp(-1, 1), images).mean()
    assert expected > 1e-4
    assert metrics.compute()["lpips"] == pytest.approx(float(expected), rel=1e-4)


def test_lpips_without_weights(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "no-such-folder")
    monkeypatch.setattr(os, "makedirs", lambda *args, **kwargs: None)
    with pytest.raises(MetricUnavailableError, match="no network.*`lpips_weights`"):
        load_lpips("alex")


# Zero-shot classification


def tokenize(texts: list[str]) -> torch.LongTensor:
    """Any function of the letters will do: ids `(T, 8)` below 64."""
    return torch.tensor([[3 + (sum(map(ord, text)) * (place + 1)) % 61 for place in range(8)] for text in texts])


NAMES = ["cat", "dog", "a long name", "tree", "house", "sea"]


def test_classifier_is_the_mean_of_80_templates(tokenizer):
    names = NAMES[:4]
    assert len(open_clip.OPENAI_IMAGENET_TEMPLATES) == 80
    classifier = zero_shot_classifier(tokenizer, tokenize, names)
    for index, name in enumerate(names):
        with torch.no_grad():
            sentences = tokenize([template(name) for template in open_clip.OPENAI_IMAGENET_TEMPLATES])
            features = tokenizer.get_text_features(sentences).pooler_output
        mean = F.normalize(features, dim=-1).mean(0)
        torch.testing.assert_close(classifier[:, index], mean / mean.norm(), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"at least two class names, got \['cat'\]"):
        zero_shot_classifier(tokenizer, tokenize, ["cat"])


def test_accuracy_agrees_with_a_hand_count():
    classifier = F.normalize(torch.randn(6, 9), dim=0)
    embeds = F.normalize(torch.randn(50, 6), dim=-1)
    labels = torch.randint(0, 9, (50,))
    accuracy = ZeroShotAccuracy(classifier)
    for part in (slice(0, 20), slice(20, 50)):
        accuracy.update(embeds[part], labels[part])
    first = among_five = 0
    for embed, label in zip(embeds, labels):
        ranked = sorted(range(9), key=lambda index: -float(embed @ classifier[:, index]))
        first += ranked[0] == int(label)
        among_five += int(label) in ranked[:5]
    assert 0 < first < among_five < 50
    assert accuracy.compute() == pytest.approx({"zero_shot_top1": first / 50, "zero_shot_top5": among_five / 50})


def test_labels_without_a_class_name():
    accuracy = ZeroShotAccuracy(torch.eye(3))
    for label in (3, -1):
        with pytest.raises(ValueError, match=r"but there are 3 class names: labels must lie in 0..2"):
            accuracy.update(torch.eye(3)[:1], torch.tensor([label]))
    accuracy.update(torch.eye(3), torch.tensor([0, 1, 1]))
    # There is no top-5 of three classes.
    assert accuracy.compute() == pytest.approx({"zero_shot_top1": 2 / 3})


# evaluate.load


def load_metric(name: str):
    return evaluate.load(METRIC_MODULE, name)


def test_image_modules(tmp_path, monkeypatch):
    images, made = pictures(4, 24, 20), disturbed(pictures(4, 24, 20))
    # What the evaluator measures: clamped, and without an image that is exact.
    made[1] = images[1]
    beyond = made.where(made < 1, 3)
    result = load_metric("psnr").compute(predictions=beyond, references=images)
    assert result == {
        "psnr": pytest.approx(float(psnr_per_image(made, images)[[0, 2, 3]].mean())),
        "exact_images": 1,
    }
    result = load_metric("ssim").compute(predictions=beyond, references=images)
    assert result == {"ssim": pytest.approx(float(ssim_per_image(made, images).mean()))}
    distance = nn.PairwiseDistance()
    monkeypatch.setattr(evaluation, "load_lpips", lambda net: {"alex": distance}[net])
    result = load_metric("lpips").compute(predictions=made, references=images, net="alex")
    assert result["lpips"] == pytest.approx(float(2 * distance(made, images).mean()), rel=1e-4)
    metrics = ReconstructionMetrics(("rfid",), fid=fid_metric(Features()))
    metrics.update(made * 2 - 1, images * 2 - 1)
    module = load_metric("rfid")
    for image, other in zip(images, made):
        module.add(prediction=other, reference=image)
    assert module.compute(feature=Features())["rfid"] == pytest.approx(metrics.compute()["rfid"], abs=1e-4)


def test_image_modules_go_through_their_images_in_batches(monkeypatch):
    sizes, update = [], ReconstructionMetrics.update

    def count(self, reconstruction, images):
        sizes.append(len(images))
        update(self, reconstruction, images)

    monkeypatch.setattr(ReconstructionMetrics, "update", count)
    images = pictures(70, 12, 11)
    result = load_metric("ssim").compute(predictions=disturbed(images), references=images)
    assert sizes == [32, 32, 6]
    assert result == {"ssim": pytest.approx(float(ssim_per_image(disturbed(images), images).mean()))}
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]; a reference goes from 0.0 to 255.0"):
        load_metric("psnr").compute(predictions=images[:1], references=255 * images[:1].round())
    with pytest.raises(ValueError, match="`predictions` is empty"):
        load_metric("psnr").compute(predictions=[], references=[])


def test_other_modules():
    codes = torch.tensor([[[[0, 1], [0, 2]]], [[[3, 1], [0, 1]]]])
    result = load_metric("codebook_usage").compute(predictions=codes, codebook_size=8)
    assert result["usage"] == 0.5 and result["per_depth"]["usage"] == [0.25, 0.25]
    with pytest.raises(ValueError, match="`predictions` is empty"):
        load_metric("codebook_usage").compute(predictions=[], codebook_size=8)
    embeds = torch.eye(4)
    result = load_metric("retrieval_recall").compute(
        predictions=3 * embeds, references=[embeds[[0, 1]], embeds[[2]], embeds[[2]], embeds[[3]]], ks=[1]
    )
    with pytest.raises(ValueError, match="Name one of psnr, ssim, .* got 'fvd'"):
        load_metric("fvd")
    # Of the second and the third image, which share a caption, only the third finds it; neither is found by the first's.
    assert result == {"image_to_text_recall_at_1": 0.5, "text_to_image_recall_at_1": pytest.approx(0.6)}


# The script


@pytest.fixture
def digits_folder(tmp_path, monkeypatch) -> Path:
    """Held-out digits, 24 of them, in folders of their classes."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "digits"))
    data = importlib.import_module("data")
    _, (scans, digits) = data.split_scans()
    rows = []
    for index in range(24):
        data.scan_to_image(scans[index]).save(tmp_path / f"{index:02}.png")
        captions = [caption.format(data.NAMES[digits[index]]) for caption in data.CAPTIONS[:2]]
        rows.append({"file_name": f"{index:02}.png", "label": int(digits[index]), "captions": captions})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "names.txt").write_text("\n".join(data.NAMES))
    yield tmp_path
    del sys.modules["data"]


def evaluate_digits(folder: Path, output_dir: Path, processes: int = 1, *arguments: str) -> dict:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += ["-m", "torchvision_shim", str(ROOT / "examples" / "eval_tokenizer.py")]
    command += ["--model_name_or_path", str(DIGITS / "dualtoken"), "--dataset", str(folder), "--use_cpu", "1"]
    command += ["--text_tokenizer_name_or_path", str(DIGITS / "captions"), "--label_column", "label"]
    command += ["--class_names", str(folder / "names.txt"), "--caption_column", "captions", "--batch_size", "5"]
    command += ["--output_dir", str(output_dir), *arguments]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run(command, env=environment, check=True, timeout=300)
    return json.loads((output_dir / "metrics.json").read_text())


@pytest.mark.slow
def test_two_processes_measure_what_one_does(digits_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    one = evaluate_digits(digits_folder, out / "one")
    two = evaluate_digits(digits_folder, out / "two", 2)
    streamed = evaluate_digits(digits_folder, out / "streamed", 2, "--streaming", "1")
    assert one["metrics"]["num_images"] == 24
    # An ordinary tokenizer of the demo.
    assert one["metrics"]["zero_shot_top1"] > 0.9 and one["metrics"]["psnr"] > 24
    assert one["metrics"]["text_to_image_recall_at_10"] > 0.9
    assert set(one["skipped"]) == {"lpips", "rfid"}
    for other in (two, streamed):
        per_depth = {name: pytest.approx(values) for name, values in one["metrics"]["per_depth"].items()}
        assert other["metrics"].pop("per_depth") == per_depth
        expected = {name: value for name, value in one["metrics"].items() if name != "per_depth"}
        assert other["metrics"] == pytest.approx(expected, rel=1e-5)


WORKER = """
import json, sys, torch, torchvision_shim
import torch.distributed as dist
from pathlib import Path
from test_evaluation_extras import Features, disturbed, pictures
from transformers_dualtoken.evaluation import CodebookUsage, ReconstructionMetrics, RetrievalRecall, fid_metric

dist.init_process_group("gloo")
rank, results = dist.get_rank(), []
images, made = pictures(9) * 2 - 1, disturbed(pictures(9)) * 2 - 1
codes = torch.arange(9 * 8).view(9, 4, 2) % 13
embeds = torch.nn.functional.normalize(images.flatten(1), dim=-1), torch.nn.functional.normalize(made.flatten(1), dim=-1)
# Uneven shares, then everything on one process.
for shares in ([0, 1, 2, 3, 4, 5], [6, 7, 8], []), (list(range(9)), [], []):
    own = shares[rank]
    reconstruction = ReconstructionMetrics(("psnr", "ssim", "rfid"), fid=fid_metric(Features()))
    usage, recall = CodebookUsage(2, 16), RetrievalRecall(ks=(1, 3))
    if own:
        reconstruction.update(made[own], images[own])
        usage.update(codes[own])
        recall.update(embeds[0][own], embeds[1][own], [1] * len(own))
    results.append({**reconstruction.compute(), **usage.reduce().compute(), **recall.compute()})
Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(results))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_metrics_add_up_over_processes(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run([*command, str(tmp_path / "worker.py"), str(tmp_path)], env=environment, check=True, timeout=300)
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert results[0] == results[1] == results[2]
    uneven, alone = results[0]
    assert uneven == pytest.approx(alone, rel=1e-4)
    images, made = pictures(9) * 2 - 1, disturbed(pictures(9)) * 2 - 1
    here = ReconstructionMetrics(("psnr", "ssim", "rfid"), fid=fid_metric(Features()))
    here.update(made, images)
    assert {name: alone[name] for name in here.compute()} == pytest.approx(here.compute(), rel=1e-4)
    assert alone["usage"] == 13 / 16
