"""Operations of a training step against those that run, peaks of devices, and the meter."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import layout_of_2025, lively_unified_model, tiny_quantizer_fields, tiny_tokenizer_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from unified_training import IMAGE, PAD, collate, make_samples, naive_metrics

from transformers_dualtoken.depth_heads import DualTokenStackedLinear
from transformers_dualtoken.training.unified.throughput import (
    StepCounts,
    ThroughputMeter,
    TrainingFlops,
    peak_flops,
)
from transformers_dualtoken.training.unified.trainer import set_trainable


def flops_model(**overrides):
    """Codebooks as large as the search pads them to, so that the counter counts the same."""
    quantizer = tiny_quantizer_fields(codebook_size=256)
    tokenizer = tiny_tokenizer_config(pixel_quantizer_config=quantizer, semantic_quantizer_config=quantizer)
    return lively_unified_model(vision_tokenizer_config=tokenizer.to_dict(), **overrides).train()


def flops_batch(pixels: bool) -> dict[str, torch.Tensor]:
    batch = collate(make_samples(draws=(True, False), num_codes=256))
    del batch["num_skipped"]
    if pixels:
        for name in ("pixel_codes", "semantic_codes"):
            del batch[name]
        batch["pixel_values"] = torch.rand(2, 3, 24, 24) * 2 - 1
    return batch


def addmm_flops(added, first, second, out_shape=None, **kwargs):
    return 2 * first[0] * first[1] * second[1]


def measured_flops(model, batch) -> int:
    """PyTorch's counter. It counts the masked half of attentions as well; in-place products it does not know."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops})
    with sdpa_kernel(SDPBackend.MATH), counter:
        loss = model(**batch).loss
        if loss.requires_grad:
            loss.backward()
    return counter.get_total_flops()


def step_counts(batch, encoded_images=0) -> StepCounts:
    labels, (rows, length) = batch["labels"][:, 1:], batch["input_ids"].shape
    visual = int((labels == IMAGE).sum())
    return StepCounts(
        tokens=rows * length,
        attention_pairs=rows * length**2,
        text_targets=int((labels != -100).sum()) - visual,
        visual_targets=visual,
        images=2,
        encoded_images=encoded_images,
    )


@pytest.mark.parametrize(
    "parts",
    [
        [],
        ["projector"],
        ["heads"],
        ["language_model"],
        ["projector", "heads"],
        ["projector", "heads", "language_model"],
        "last block",
        "lora",
    ],
    ids=str,
)
def test_flops_are_those_that_run(parts):
    model = flops_model()
    if parts == "lora":
        targets = r".*language_model.*(q_proj|o_proj|up_proj)"
        model = get_peft_model(
            model, LoraConfig(r=4, target_modules=targets, modules_to_save=["visual_projector", "depth_heads"])
        )
    elif parts == "last block":
        model.requires_grad_(False)
        model.model.language_model.layers[-1].mlp.requires_grad_(True)
    elif parts:
        set_trainable(model, parts)
    else:
        model.requires_grad_(False)
    flops = TrainingFlops(model)
    for pixels in (False, True):
        batch = flops_batch(pixels)
        assert flops(step_counts(batch, 2 * pixels)) == pytest.approx(measured_flops(model, batch), rel=0.015)


def test_flops_of_a_tokenizer_with_convolutions():
    config = tiny_tokenizer_config(**layout_of_2025(codebook_size=256))
    model = lively_unified_model(vision_tokenizer_config=config.to_dict()).train().requires_grad_(False)
    batch = flops_batch(pixels=True)
    expected = pytest.approx(measured_flops(model, batch), rel=0.015)
    assert TrainingFlops(model)(step_counts(batch, 2)) == expected


def test_flops_of_the_usual_formula():
    """All weights of a large backbone trained: 6 operations per token and weight, 12 per attended pair and width."""
    model = flops_model()
    weights = sum(p.numel() for n, p in model.model.language_model.layers.named_parameters() if "proj.weight" in n)
    flops = TrainingFlops(model)
    assert flops.per_token == 6 * weights
    assert flops.per_attention_pair == 12 * 32 * 2
    assert flops.per_text_target == 6 * 60 * 32
    stacked = [m for m in model.depth_heads.modules() if isinstance(m, DualTokenStackedLinear)]
    assert flops.per_visual_target > 6 * sum(m.weight.numel() for m in stacked)


def test_peaks():
    for name, peak in (
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
    ):
        assert peak_flops(name) == peak * 1e12, name
    assert peak_flops("NVIDIA GeForce RTX 4090 Laptop GPU") is None
    assert peak_flops("Tesla T4") is None


class _Clock:
    now = 100.0

    def perf_counter(self):
        return self.now


def make_meter(monkeypatch, num_ranks=1, **kwargs):
    clock = _Clock()
    monkeypatch.setattr("transformers_dualtoken.training.unified.throughput.time", clock)
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), num_processes=num_ranks, reduce=lambda tensor, how: num_ranks * tensor
    )
    return ThroughputMeter(accelerator, IMAGE, PAD, **kwargs), clock


def test_meter_counts_neither_padding_nor_pauses(monkeypatch):
    flops = TrainingFlops(flops_model())
    meter, clock = make_meter(monkeypatch, flops=flops, peak=1e9)
    batch = collate(make_samples())  # lengths 16, 18, 20, 22 and 13
    meter.update(batch)
    clock.now += 2
    with meter.paused():
        clock.now += 20
        with meter.paused():
            clock.now += 10
    numbers = meter.compute()
    assert numbers["tokens_per_second"] == 89 / 2 and numbers["images_per_second"] == 2
    assert numbers["padding_share"] == pytest.approx(1 - 89 / 110)
    pairs = sum(length * (length + 1) // 2 for length in (16, 18, 20, 22, 13))
    naive = naive_metrics(lively_unified_model(), make_samples())
    expected = StepCounts(89, pairs, naive["num_text_targets"], naive["num_visual_targets"], 4, 0)
    assert numbers["model_flops_utilization"] == pytest.approx(flops(expected) / 2e9)
    assert meter.compute() == {}  # it forgot


def test_meter_of_several_ranks_and_of_pixels(monkeypatch):
    flops = TrainingFlops(flops_model())
    numbers = []
    for ranks, pixels in ((1, False), (2, False), (2, True)):
        meter, clock = make_meter(monkeypatch, num_ranks=ranks, flops=flops, peak=1e9)
        meter.update(flops_batch(pixels))
        clock.now += 1
        numbers.append(meter.compute())
    one, two, encoded = numbers
    assert two["tokens_per_second"] == 2 * one["tokens_per_second"]
    assert two["padding_share"] == one["padding_share"]
    assert two["model_flops_utilization"] == one["model_flops_utilization"]
    more = encoded["model_flops_utilization"] - two["model_flops_utilization"]
    assert more == pytest.approx(2 * flops.per_encoded_image / 1e9)


def test_meter_of_packed_samples(monkeypatch):
    """Two samples in a row, the second with a pad token within and at its end; padding in the first row only."""
    meter, clock = make_meter(monkeypatch)
    ids = torch.tensor([[7, 8, 9, 7, PAD, 9, PAD, PAD, PAD], [7] * 5 + [8] * 3 + [PAD]])
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 4, 0, 1, 2, 3]])
    meter.update({"input_ids": ids, "labels": ids.masked_fill(ids == PAD, -100), "position_ids": position_ids})
    tokens, pairs, text_targets, visual_targets = meter._on_device.tolist()
    lengths = (3, 4, 5, 4)
    assert tokens == sum(lengths) and pairs == sum(length * (length + 1) // 2 for length in lengths)
    assert (text_targets, visual_targets) == (11, 0)
    clock.now += 1
    assert "model_flops_utilization" not in meter.compute()
