"""Training of the vision tokenizer: the step of every stage, the adversary, checkpoints, runs that are stopped."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import datasets
import psutil
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from training_helpers import (
    RUN,
    TOKENIZER_FIELDS,
    FixedItems,
    Sigterm,
    Stop,
    Stopped,
    assert_equal,
    assert_same_run,
    changed,
    check_finished,
    check_resume,
    check_sigterm,
    check_sigterm_at_random,
    quiet,
    state_of,
    write_images,
)
from transformers import AutoConfig, SiglipModel, SiglipVisionModel, TrainerCallback, TrainingArguments

from transformers_dualtoken import DualTokenVisionTokenizer
from transformers_dualtoken.evaluation.pictures import reconstruction_grid
from transformers_dualtoken.training import (
    STAGE_LOSS_WEIGHTS,
    DualTokenVisionTokenizerRecipe,
    DualTokenVisionTokenizerTrainer,
    PatchDiscriminator,
    TrainingStopped,
    collate_images,
)
from transformers_dualtoken.training.vision_tokenizer.adversary import adaptive_weight
from transformers_dualtoken.training.vision_tokenizer.discriminator import discriminator_loss


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import run_tokenizer  # noqa: E402


# LPIPS needs torchvision, which most test environments lack; a stand-in takes its place where the term is wanted.
PLAIN = {"perceptual": 0, "generator": 0}
ADVERSARIAL = {"perceptual": 0}
ADVERSARY = {"discriminator_channels": 32, "discriminator_start_step": 0, "discriminator_warmup_steps": 2}


def tokenizer_trainer(
    folder, output_dir, loss_weights=None, dataset=None, config=None, recipe=None, stage=1, **overrides
) -> DualTokenVisionTokenizerTrainer:
    model = DualTokenVisionTokenizer.from_siglip_pretrained(folder, **{**TOKENIZER_FIELDS, **(config or {})})
    arguments = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3, **overrides}
    return DualTokenVisionTokenizerTrainer(
        model=model,
        args=TrainingArguments(str(output_dir), **quiet(**arguments)),
        teacher=SiglipModel.from_pretrained(folder).vision_model,
        recipe=DualTokenVisionTokenizerRecipe(
            stage=stage, loss_weights=PLAIN if loss_weights is None else loss_weights, **(recipe or {})
        ),
        train_dataset=dataset,
        data_collator=collate_images,
    )


def adversarial_trainer(folder, output_dir, recipe=None, **kwargs) -> DualTokenVisionTokenizerTrainer:
    return tokenizer_trainer(
        folder, output_dir, loss_weights=ADVERSARIAL, recipe={**ADVERSARY, **(recipe or {})}, **kwargs
    )


def pixel_items(count=4) -> FixedItems:
    values = torch.rand(count, 3, 24, 24, generator=torch.Generator().manual_seed(5)) * 2 - 1
    return FixedItems([{"pixel_values": value, "num_skipped": 0} for value in values])


class SquaredDistance(torch.nn.Module):
    """In the place of LPIPS: a distance per image that is not the squared error's mean."""

    def forward(self, first, second):
        return (first - second).square().square().mean((1, 2, 3), keepdim=True)


# The terms


@pytest.mark.parametrize(("latent_size", "reconstruction_size"), [(12, 24), (8, 16)])
def test_terms_and_total_by_hand(siglip_folder, tmp_path, latent_size, reconstruction_size):
    weights = {**PLAIN, "pooler_mse": 2.5, "semantic_commitment": 0.0}
    trainer = tokenizer_trainer(
        siglip_folder, tmp_path, loss_weights=weights, config={"decoder_latent_size": latent_size}
    )
    model = trainer.model.eval()
    for kind in ("pixel", "semantic"):
        model.quantizer(kind).codebook.embeddings.normal_()
    pixel_values = torch.stack([item["pixel_values"] for item in pixel_items().items])
    with torch.no_grad():
        total, output = trainer.compute_loss(model, {"pixel_values": pixel_values}, return_outputs=True)
        target = trainer.target_images(pixel_values)
        terms = trainer.feature_terms(output, pixel_values)
        terms["reconstruction_mse"] = trainer.image_term("reconstruction_mse", output.reconstruction, target)
        # transformers' own forward of the teacher; its hidden states begin with the embeddings.
        reference = SiglipVisionModel.from_pretrained(siglip_folder)(pixel_values, output_hidden_states=True)
    hidden = reference.hidden_states[model.config.semantic_layer]

    assert output.reconstruction.shape[-1] == reconstruction_size
    resized = F.interpolate(pixel_values, size=(reconstruction_size,) * 2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(target, resized)

    def cosine(x, y):
        return ((x * y).sum(-1) / x.norm(dim=-1) / y.norm(dim=-1)).mean()

    expected = {
        "semantic_mse": (output.semantic_features - hidden).square().mean(),
        "semantic_cosine": -cosine(output.semantic_features, hidden),
        "pooler_mse": (output.pooler_output - reference.pooler_output).square().mean(),
        "pooler_cosine": -cosine(output.pooler_output, reference.pooler_output),
        "reconstruction_mse": (output.reconstruction - resized).square().mean(),
        "pixel_commitment": output.pixel_commitment_loss,
    }
    # A term of weight 0 is not even computed: neither this one, nor the two that are off.
    assert "semantic_commitment" not in terms and trainer.recipe.image_terms(adversarial=False) == [
        "reconstruction_mse"
    ]
    assert terms.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(terms[name], expected[name], rtol=1e-4, atol=1e-6)
    by_hand = sum({**STAGE_LOSS_WEIGHTS[1], **weights}[name] * term for name, term in expected.items())
    torch.testing.assert_close(total, by_hand, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_plain_total(siglip_folder, tmp_path, checkpointing):
    """
    The naive step: one graph of everything, with the adaptive weight from two extra differentiations. In float64: many
    gradients of an untrained decoder are what is left of large numbers that cancel.
    """
    trainer = adversarial_trainer(siglip_folder, tmp_path, dataset=pixel_items())
    trainer.perceptual_loss, trainer.loss_weights["perceptual"] = SquaredDistance(), 1.5
    trainer.create_scheduler(2, torch.optim.SGD(trainer.model.parameters(), 0.1))
    trainer.adversary.discriminator.main[5].weight.data.mul_(2)  # so that the adaptive weight is not clamped
    for module in (trainer.model, trainer.teacher, trainer.adversary.discriminator):
        module.double()
    model = trainer.model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for kind in ("pixel", "semantic"):
        model.quantizer(kind).codebook.embeddings.normal_(generator=torch.Generator().manual_seed(0))
        model.quantizer(kind).frozen = True
    pixel_values = torch.stack([item["pixel_values"] for item in pixel_items().items]).double()

    with trainer._watch_last_layer():
        loss = trainer.compute_loss(model, {"pixel_values": pixel_values})
    loss.backward()
    fast = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    logged = {name: float(value) for name, value in trainer._terms.items()}
    model.zero_grad()

    output = model(pixel_values)
    weights = trainer.loss_weights
    terms = trainer.feature_terms(output, pixel_values)
    for name in ("reconstruction_mse", "perceptual", "generator"):
        terms[name] = trainer.image_term(name, output.reconstruction, pixel_values)
    last = model.decoder.conv_out.weight
    norms = [
        torch.autograd.grad(part, last, retain_graph=True)[0].norm()
        for part in (terms["reconstruction_mse"] + terms["perceptual"], terms["generator"])
    ]
    weight = norms[0] / (norms[1] + 1e-4)
    assert 0.31 < weight < 9.9
    total = sum(weights[name] * term for name, term in terms.items() if name != "generator")
    total = total + weights["generator"] * weight.detach() * terms["generator"]
    total.backward()

    assert {*terms, "adaptive_weight", "adaptive_weight_unclamped"} == set(logged)
    assert logged["adaptive_weight"] == pytest.approx(float(weight), rel=1e-4)
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-6)
    slow = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert slow.keys() == fast.keys()
    for name in slow:
        assert (fast[name] - slow[name]).norm() <= 1e-4 * slow[name].norm() + 1e-8, name
    fast, slow = (torch.cat([g.flatten() for g in gradients.values()]) for gradients in (fast, slow))
    assert (fast - slow).norm() <= 1e-5 * slow.norm()


def test_adaptive_weight_is_clamped(siglip_folder, tmp_path):
    trainer = tokenizer_trainer(siglip_folder, tmp_path)
    layer = trainer.model.decoder.conv_out
    inputs, gradient = torch.randn(2, layer.in_channels, 24, 24), torch.randn(2, 3, 24, 24)
    for scale, expected in ((0.01, 0.3), (1.0, 1.0), (100.0, 10.0)):
        clamped, unclamped = adaptive_weight(inputs, layer, scale * gradient, gradient, trainer.accelerator)
        assert float(clamped) == pytest.approx(expected, rel=1e-4)
        assert float(unclamped) == pytest.approx(scale, rel=1e-4)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_what_moves_in_each_stage(siglip_folder, tmp_path, stage):
    weights = PLAIN if stage < 2 else {}
    trainer = tokenizer_trainer(siglip_folder, tmp_path, weights, pixel_items(), stage=stage, weight_decay=0.1)
    model, teacher = trainer.model, trainer.teacher
    before, teacher_before = state_of(model), state_of(teacher)
    trainer.train()
    moved = changed(before, state_of(model))
    assert not changed(teacher_before, state_of(teacher)) and not teacher.training
    vision = "siglip.vision_model."
    still = ["siglip.text_model.", "siglip.logit_scale", "siglip.logit_bias"]
    if stage == 0:  # the encoder up to the semantic layer, 3 of 4
        still += [f"{vision}embeddings.", *(f"{vision}encoder.layers.{i}." for i in range(3))]
    if stage == 2:  # what makes pixel codes and the image; the pixel layer is 2
        still += [f"{vision}embeddings.", *(f"{vision}encoder.layers.{i}." for i in range(2)), "decoder."]
        still += ["pixel_down_proj.", "shortcut_down_proj.", "pixel_up_proj.", "post_quantizer_block."]
        still += ["pixel_quantizer."]
    # Everything else moves, buffers of the codebooks included: no part is left out of the loss.
    expected = {name for name in before if not name.startswith(tuple(still)) and "position_ids" not in name}
    assert moved == expected


def test_stage_2_leaves_the_pixel_codes_alone(siglip_folder, tmp_path):
    trainer = tokenizer_trainer(siglip_folder, tmp_path, {}, pixel_items(), stage=2, learning_rate=0.05)
    pixel_values = pixel_items().items[0]["pixel_values"][None]
    trainer.model.pixel_quantizer.codebook.embeddings.normal_()
    with torch.no_grad():
        before = trainer.model.eval()(pixel_values)
    trainer.train()
    with torch.no_grad():
        after = trainer.model.eval()(pixel_values)
    assert torch.equal(before.pixel_codes, after.pixel_codes)
    assert torch.equal(before.reconstruction, after.reconstruction)
    assert not torch.equal(before.pooler_output, after.pooler_output)


@pytest.mark.parametrize(
    ("weights", "codes"),
    [
        (dict.fromkeys(("semantic_mse", "semantic_cosine", "pooler_mse", "pooler_cosine", "semantic_commitment"), 0),
         ("pixel",)),
        ({"reconstruction_mse": 0, "pixel_commitment": 0}, ("semantic",)),
    ],
)  # fmt: skip
def test_a_branch_without_weight_is_not_computed(siglip_folder, tmp_path, weights, codes):
    trainer = tokenizer_trainer(siglip_folder, tmp_path, {**PLAIN, **weights}, pixel_items())
    before = state_of(trainer.model)
    trainer.train()
    moved = changed(before, state_of(trainer.model))
    assert trainer.recipe.codes == codes
    other = "semantic" if codes == ("pixel",) else "pixel"
    assert any(name.startswith(f"{codes[0]}_down_proj") for name in moved)
    assert not any(name.startswith(other) for name in moved)
    assert f"{other}_codebook_usage" not in trainer.state.log_history[0]


def test_vectors_are_not_decayed(siglip_folder, tmp_path):
    trainer = tokenizer_trainer(siglip_folder, tmp_path, weight_decay=0.1)
    trainer.create_optimizer()
    groups = {group["weight_decay"]: group["params"] for group in trainer.optimizer.param_groups}
    assert groups.keys() == {0.0, 0.1}
    assert all(parameter.ndim < 2 for parameter in groups[0.0]) and all(p.ndim >= 2 for p in groups[0.1])
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert len(trained) == len(groups[0.0]) + len(groups[0.1])


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage": 3}, "`stage` must be one of 0, 1, 2, got 3"),
        ({"loss_weights": {"perceptul": 1}}, "No such loss terms: perceptul; there are semantic_mse"),
        ({"loss_weights": {"generator": -1}}, "at least 0, got generator = -1"),
        ({"loss_weights": {"generator": math.nan}}, "at least 0, got generator = nan"),
        ({"loss_weights": "{generator: 0}"}, "`loss_weights` must be a JSON object or the path of one"),
        ({"loss_weights": "[1]"}, "`loss_weights` must be a JSON object or the path of one"),
        ({"loss_weights": dict.fromkeys(STAGE_LOSS_WEIGHTS[1], 0)}, "so there is nothing to train"),
        ({"loss_weights": {"reconstruction_mse": 0, "perceptual": 0}}, "give one of them a weight"),
        ({"discriminator_loss": "vanilla"}, "must be one of leaky_hinge, hinge, got 'vanilla'"),
        ({"weight_average_decay": 1.0}, "`weight_average_decay` must lie between 0 and 1, got 1.0"),
        ({"discriminator_learning_rate": 0.0}, "`discriminator_learning_rate` must be above 0, got 0.0"),
        ({"grid_steps": 0}, "`grid_steps` must be at least 1, got 0"),
        ({"discriminator_start_step": -1}, "`discriminator_start_step` must be at least 0, got -1"),
    ],
)
def test_recipes_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        DualTokenVisionTokenizerRecipe(**settings)


def test_loss_weights_from_text_and_file(tmp_path):
    (tmp_path / "weights.json").write_text('{"generator": 0.5}')
    for value in ('{"generator": 0.5}', str(tmp_path / "weights.json"), {"generator": 0.5}):
        recipe = DualTokenVisionTokenizerRecipe(loss_weights=value)
        assert recipe.loss_weights == {**STAGE_LOSS_WEIGHTS[1], "generator": 0.5}
    with pytest.raises(FileNotFoundError, match="no-such.json"):
        DualTokenVisionTokenizerRecipe(loss_weights="no-such.json")


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("is_fsdp_enabled", True, "trains with DDP"),
        ("is_deepspeed_enabled", True, "trains with DDP"),
        ("accelerator.state._mixed_precision", "fp16", "use `bf16`"),
    ],
)
def test_unsuitable_engines_are_refused(siglip_folder, tmp_path, setting, value, message):
    """Whoever asked for them: `TrainingArguments` or the settings of `accelerate launch`."""
    trainer = tokenizer_trainer(siglip_folder, tmp_path)
    *path, name = setting.split(".")
    holder = trainer
    for part in path:
        holder = getattr(holder, part)
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        with pytest.raises(ValueError, match=message):
            trainer._check_engine()
    finally:
        setattr(holder, name, before)


def test_foreign_streams_are_refused(siglip_folder, tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(pixel_items().items)

    with pytest.raises(ValueError, match="must be a SampleStream such as DualTokenImageStream.*got Stream"):
        tokenizer_trainer(siglip_folder, tmp_path, dataset=Stream())


def test_missing_teacher_is_named(siglip_folder, tmp_path):
    model = DualTokenVisionTokenizer.from_siglip_pretrained(siglip_folder, **TOKENIZER_FIELDS)
    recipe = DualTokenVisionTokenizerRecipe(loss_weights=PLAIN)
    with pytest.raises(ValueError, match="semantic_mse.* compare with a teacher, but `teacher` is None"):
        DualTokenVisionTokenizerTrainer(model, TrainingArguments(str(tmp_path), **quiet()), recipe=recipe)


def test_missing_lpips_is_named(siglip_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(
        ImportError, match=r"set the weight of the perceptual term to 0.*transformers-dualtoken\[perceptual\]"
    ):
        tokenizer_trainer(siglip_folder, tmp_path, {"generator": 0})


@pytest.mark.parametrize("term", ["reconstruction_mse", "semantic_mse", "pixel_commitment"])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(siglip_folder, tmp_path, term):
    class Poison(TrainerCallback):
        """After the checkpoint of step 2 the term's branch is broken."""

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                parts = {"semantic_mse": model.semantic_up_proj.proj, "pixel_commitment": model.pixel_down_proj.proj}
                parts.get(term, model.decoder.conv_out).bias.data.fill_(math.nan)

    trainer = tokenizer_trainer(
        siglip_folder, tmp_path, dataset=pixel_items(), max_steps=6, save_strategy="steps", save_steps=2
    )
    trainer.add_callback(Poison())
    with pytest.raises(FloatingPointError, match=f"stopped at step 3: the loss is not finite .*{term} = nan"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    weights = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.parametrize("part", ["decoder.conv_out", "discriminator.main.5"])
def test_broken_weights_are_not_saved(siglip_folder, tmp_path, part):
    class Poison(TrainerCallback):
        """As if the optimizer's step had gone wrong right before a checkpoint."""

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 4:
                broken = trainer.adversary.discriminator.main[5] if "discriminator" in part else model.decoder.conv_out
                broken.bias.data.fill_(math.inf)

    trainer = adversarial_trainer(
        siglip_folder, tmp_path, dataset=pixel_items(), max_steps=6, save_strategy="steps", save_steps=2
    )
    trainer.add_callback(Poison())
    with pytest.raises(FloatingPointError, match=f"before its checkpoint was written: 1 weights.*{part}.bias"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_stages_on_one_model(siglip_folder, tmp_path):
    """What an earlier stage held still moves again; no hook and no trainer stays behind on the model."""
    first = tokenizer_trainer(siglip_folder, tmp_path, {}, pixel_items(), stage=2)
    first.train()
    second = DualTokenVisionTokenizerTrainer(
        first.model,
        TrainingArguments(str(tmp_path), **quiet(max_steps=1, per_device_train_batch_size=2)),
        teacher=first.teacher,
        recipe=DualTokenVisionTokenizerRecipe(loss_weights=ADVERSARIAL, **ADVERSARY),
        train_dataset=pixel_items(),
        data_collator=collate_images,
    )
    before = state_of(second.model)
    second.train()
    moved = changed(before, state_of(second.model))
    assert {"decoder.conv_out.weight", "pixel_quantizer.codebook.embeddings"} <= moved
    assert not second.model.decoder.conv_out._forward_pre_hooks and second._last_input is None


@pytest.mark.parametrize(
    ("off", "still"),
    [
        (("pooler_mse", "pooler_cosine"), ("siglip.vision_model.encoder.layers.3.", "siglip.vision_model.head.")),
        (("reconstruction_mse",), ("decoder.", "pixel_up_proj.", "post_quantizer_block.")),
        (("semantic_mse", "semantic_cosine", "pooler_mse", "pooler_cosine"), ("semantic_up_proj.",)),
    ],
)
def test_every_trained_parameter_is_reached(siglip_folder, tmp_path, off, still):
    """DDP is told so in the recipes at full size, and would fail at the second step otherwise."""
    trainer = tokenizer_trainer(siglip_folder, tmp_path, {**PLAIN, **dict.fromkeys(off, 0)}, pixel_items())
    trainer.compute_loss(trainer.model.train(), collate_images(pixel_items(2).items)).backward()
    for name, parameter in trainer.model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert not (name.startswith(still) and parameter.requires_grad), name


# The discriminator


def test_discriminator_has_the_recorded_shape():
    """Code: 64, 128, 256, 512 channels, a logit for every 8 x 8 pixels."""
    model = PatchDiscriminator()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if name.endswith("weight") and p.ndim == 4}
    assert shapes == {
        "main.0.weight": (64, 3, 3, 3),
        "main.2.conv1.weight": (128, 64, 3, 3),
        "main.2.nin_shortcut.weight": (128, 64, 1, 1),
        "main.3.conv1.weight": (256, 128, 3, 3),
        "main.3.nin_shortcut.weight": (256, 128, 1, 1),
        "main.4.conv1.weight": (512, 256, 3, 3),
        "main.4.nin_shortcut.weight": (512, 256, 1, 1),
        "main.5.weight": (1, 512, 3, 3),
    }
    assert model(torch.randn(2, 3, 48, 40)).shape == (2, 1, 6, 5)
    assert model.main[2].conv1.weight.detach().std() == pytest.approx(0.02, rel=0.05)
    with pytest.raises(ValueError, match="multiple of 32, got 48"):
        PatchDiscriminator(48)


def test_discriminator_losses_by_hand():
    real, fake = torch.tensor([0.5, 3.0]), torch.tensor([-2.0, 0.25])
    # 1 - real = 0.5, -2; 1 + fake = -1, 1.25
    assert float(discriminator_loss(real, fake, "hinge")) == pytest.approx(0.5 * (0.25 + 0.625))
    leaky = 0.5 * ((0.5 - 0.02) / 2 + (-0.01 + 1.25) / 2)
    assert float(discriminator_loss(real, fake, "leaky_hinge")) == pytest.approx(leaky)


def test_discriminator_learns_and_the_generator_leaves_it_alone(siglip_folder, tmp_path):
    trainer = adversarial_trainer(siglip_folder, tmp_path, dataset=pixel_items(), max_steps=1)
    trainer.create_scheduler(1, torch.optim.SGD(trainer.model.parameters(), 0.1))
    with trainer._watch_last_layer():
        trainer.compute_loss(trainer.model.train(), {"pixel_values": torch.zeros(2, 3, 24, 24)}).backward()
    assert all(p.grad is None for p in trainer.adversary.discriminator.parameters())
    before = state_of(trainer.adversary.discriminator)
    trainer.train()
    # A new adversary, of the same seed, that has learned.
    moved = changed(before, state_of(trainer.adversary.discriminator))
    assert {name for name in before if name.endswith("weight")} <= moved


def test_start_weight_and_rate_of_the_adversary(siglip_folder, tmp_path):
    """Eight images in batches of two: an epoch of four steps; the adversary begins with the third."""
    recipe = {"discriminator_start_step": None, "discriminator_warmup_steps": None}
    trainer = adversarial_trainer(
        siglip_folder, tmp_path, recipe=recipe, dataset=pixel_items(8), max_steps=8, learning_rate=1e-3
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["adaptive_weight"] > 0 for log in logs] == [False] * 2 + [True] * 6
    assert [log["discriminator"] > 0 for log in logs] == [False] * 2 + [True] * 6
    # Warm-up over half an epoch of its own steps, then a cosine to 4e-5 at the end.
    peak, end = 1e-3, 4e-5
    cosine = [end + (peak - end) * 0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(5)]
    # The rate of the step to come is what is logged.
    expected = [peak / 2, peak / 2, peak, *cosine]
    assert [log["discriminator_learning_rate"] for log in logs] == pytest.approx(expected)


def test_discriminator_is_drawn_anew(siglip_folder, tmp_path):
    recipe = {"discriminator_restart_steps": 2, "discriminator_start_step": 1}
    seen = []

    class Record(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.append((trainer.adversary.restarts, trainer.adversary.scheduler.last_epoch))

    trainer = adversarial_trainer(siglip_folder, tmp_path, recipe=recipe, dataset=pixel_items(8), max_steps=6)
    trainer.add_callback(Record())
    trainer.train()
    # Before the steps 0 to 5: how often it was drawn anew, and how many steps it has made since.
    assert seen == [(0, 0), (0, 0), (0, 1), (0, 2), (1, 1), (1, 2)]


def test_a_stream_needs_the_length_of_an_epoch(siglip_folder, tmp_path, no_dataset_cache):
    arguments = run_arguments(siglip_folder, tmp_path)
    with pytest.raises(ValueError, match="the length of a stream is unknown: give `steps_per_epoch`"):
        run_tokenizer.main([*arguments, "--streaming", "1", "--output_dir", str(tmp_path / "run")])


# Accumulation, logs, evaluation, averaged weights, pictures


def test_accumulation_does_not_change_the_step(siglip_folder, tmp_path, monkeypatch):
    """With codebooks at rest and one adaptive weight, which else belongs to a micro-batch, 2 x 2 images are 1 x 4."""
    monkeypatch.setattr("transformers_dualtoken.training.vision_tokenizer.adversary.ADAPTIVE_WEIGHT_RANGE", (0.5, 0.5))

    def run(batch_size, accumulation):
        config = {
            f"{kind}_quantizer_config": {**TOKENIZER_FIELDS[f"{kind}_quantizer_config"], "restart_unused_codes": False}
            for kind in ("pixel", "semantic")
        }
        torch.manual_seed(3)
        trainer = adversarial_trainer(
            siglip_folder,
            tmp_path,
            config=config,
            dataset=pixel_items(),
            max_steps=1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0,
            lr_scheduler_type="constant",
            recipe={"discriminator_learning_rate": 1e-3},
        )
        for kind in ("pixel", "semantic"):
            trainer.model.quantizer(kind).codebook.embeddings.normal_(generator=torch.Generator().manual_seed(1))
            trainer.model.quantizer(kind).frozen = True
        trainer.train()
        return trainer

    one, two = run(4, 1), run(2, 2)
    logs = [trainer.state.log_history[0] for trainer in (one, two)]
    for name in ("loss", "discriminator", "reconstruction_mse", "semantic_mse"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-5)
    for (name, p), q in zip(one.model.named_parameters(), two.model.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    # Adam's first step is about the sign of a gradient alone, which rounding turns where it is next to nothing.
    states = [trainer.adversary.discriminator.state_dict() for trainer in (one, two)]
    for name in states[0]:
        if name.endswith("weight"):
            assert (states[0][name] - states[1][name]).abs().gt(1e-5).float().mean() < 0.01, name


@pytest.mark.parametrize(("batch_size", "accumulation"), [(2, 1), (1, 2)])
def test_logged_terms_add_up(siglip_folder, tmp_path, batch_size, accumulation):
    trainer = tokenizer_trainer(
        siglip_folder,
        tmp_path,
        dataset=pixel_items(),
        logging_steps=2,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
    )
    trainer.train()
    log = next(log for log in trainer.state.log_history if "loss" in log)
    total = sum(weight * log[name] for name, weight in trainer.loss_weights.items() if name in log)
    assert log["loss"] == pytest.approx(total, rel=1e-4)


def test_logged_codebooks_and_skipped_images(siglip_folder, tmp_path):
    items = pixel_items()
    items.items[1]["num_skipped"] = 3
    trainer = tokenizer_trainer(siglip_folder, tmp_path, dataset=items, logging_steps=2, max_steps=4)
    seen = []
    forward = trainer.model.encode

    def encode(*args, **kwargs):
        output = forward(*args, **kwargs)
        seen.append(output.semantic_codes)
        return output

    trainer.model.encode = encode
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["images_skipped"] for log in logs] == [3, 6]
    for window, log in enumerate(logs):
        codes = torch.cat([codes.flatten() for codes in seen[2 * window : 2 * window + 2]])
        share = codes.bincount(minlength=24) / len(codes)
        assert log["semantic_codebook_usage"] == pytest.approx(float((share > 0).float().mean()))
        perplexity = math.exp(-sum(p * math.log(p) for p in share.tolist() if p))
        assert log["semantic_codebook_perplexity"] == pytest.approx(perplexity, rel=1e-4)
        assert log["images_per_second"] > 0


def test_evaluation_reports_every_term(siglip_folder, tmp_path):
    trainer = adversarial_trainer(siglip_folder, tmp_path, dataset=pixel_items(), per_device_eval_batch_size=2)
    before = state_of(trainer.model)
    metrics = trainer.evaluate(pixel_items(3))
    assert not changed(before, state_of(trainer.model))
    trainer.model.eval()
    with torch.no_grad():
        batches = [
            trainer.compute_loss(trainer.model.eval(), collate_images(pixel_items(3).items[part])).item()
            for part in (slice(0, 2), slice(2, 3))
        ]
    names = [name for name in trainer.loss_weights if f"eval_{name}" in metrics]
    assert names == [name for name, weight in trainer.loss_weights.items()
                     if weight and name not in ("generator", "discriminator")]  # fmt: skip
    assert metrics["eval_loss"] == pytest.approx((2 * batches[0] + batches[1]) / 3, rel=1e-4)
    total = sum(trainer.loss_weights[name] * metrics[f"eval_{name}"] for name in names)
    assert total == pytest.approx((2 * batches[0] + batches[1]) / 3, rel=1e-4)


def test_averaged_weights_are_evaluated_and_saved(siglip_folder, tmp_path):
    trainer = tokenizer_trainer(
        siglip_folder,
        tmp_path,
        dataset=pixel_items(),
        recipe={"weight_average_decay": 0.5},
        max_steps=3,
        save_strategy="steps",
        save_steps=3,
    )
    seen = []

    class Record(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(model.decoder.conv_out.weight.detach().clone())

    trainer.add_callback(Record())
    trainer.train()
    trainer.save_model(tmp_path / "final")
    average = seen[0]
    for weight in seen[1:]:
        average = 0.5 * average + 0.5 * weight
    name = "decoder.conv_out.weight"
    torch.testing.assert_close(load_file(tmp_path / "final" / "model.safetensors")[name], average)
    assert torch.equal(load_file(tmp_path / "checkpoint-3" / "model.safetensors")[name], seen[-1])
    assert torch.equal(trainer.model.decoder.conv_out.weight, seen[-1])


def test_the_best_model_is_evaluated_and_saved(siglip_folder, tmp_path):
    class WorseLater(DualTokenVisionTokenizerTrainer):
        """The first evaluation counts as the best."""

        def evaluate(self, *args, **kwargs):
            metrics = super().evaluate(*args, **kwargs)
            metrics["eval_made_up"] = float(self.state.global_step)
            return metrics

    settings = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "made_up", "greater_is_better": False}
    trainer = WorseLater(
        DualTokenVisionTokenizer.from_siglip_pretrained(siglip_folder, **TOKENIZER_FIELDS),
        TrainingArguments(str(tmp_path), per_device_train_batch_size=2, **quiet(**settings, **best)),
        teacher=SiglipModel.from_pretrained(siglip_folder).vision_model,
        recipe=DualTokenVisionTokenizerRecipe(loss_weights=PLAIN, weight_average_decay=0.5),
        train_dataset=pixel_items(),
        eval_dataset=pixel_items(3),
        data_collator=collate_images,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    logged = next(log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(logged, rel=1e-6)
    average = torch.load(tmp_path / "checkpoint-2" / "weight_average.pt", weights_only=True)
    trainer.save_model(tmp_path / "best")
    weight = load_file(tmp_path / "best" / "model.safetensors")["decoder.conv_out.weight"]
    assert any(torch.equal(weight, value) for value in average.values())


def test_evaluation_leaves_the_training_alone(siglip_folder, tmp_path):
    """With evaluations in between, and with the averaged weights lent to the model for them."""
    states = []
    for name, settings in (("plain", {}), ("evaluated", {"eval_strategy": "steps", "eval_steps": 1})):
        torch.manual_seed(0)
        trainer = tokenizer_trainer(
            siglip_folder, tmp_path / name, dataset=pixel_items(), recipe={"weight_average_decay": 0.5}, max_steps=4
        )
        for key, value in settings.items():
            setattr(trainer.args, key, value)
        trainer.state.compute_steps(trainer.args, 4)
        trainer.eval_dataset = pixel_items(3)
        trainer.train()
        states.append(state_of(trainer.model))
    assert not changed(*states)
    assert sum("eval_loss" in log for log in trainer.state.log_history) == 4


def test_pictures_of_reconstructions(siglip_folder, tmp_path):
    trainer = tokenizer_trainer(
        siglip_folder, tmp_path, dataset=pixel_items(), recipe={"grid_steps": 2, "grid_images": 3}, max_steps=4
    )
    trainer.train()
    pictures = sorted((tmp_path / "grids").glob("*.png"))
    assert [path.name for path in pictures] == ["step-00000002.png", "step-00000004.png"]
    images = torch.stack([item["pixel_values"] for item in pixel_items().items[:3]])
    with torch.no_grad():
        expected = reconstruction_grid(images, trainer.model.eval()(images).reconstruction)
    with Image.open(pictures[1]) as picture:
        assert picture.size == expected.size and picture.tobytes() == expected.tobytes()


def test_pictures_reach_the_tracker(siglip_folder, tmp_path):
    sent = []

    class TensorBoardCallback(TrainerCallback):
        """As transformers' own, which is recognised by its name; tensorboard itself is not installed for the tests."""

        class tb_writer:
            @staticmethod
            def add_image(name, array, step, dataformats):
                sent.append((name, array.shape, step, dataformats))

    trainer = tokenizer_trainer(siglip_folder, tmp_path, dataset=pixel_items(), recipe={"grid_steps": 1}, max_steps=2)
    trainer.add_callback(TensorBoardCallback())
    trainer.train()
    with Image.open(tmp_path / "grids" / "step-00000001.png") as picture:
        shape = (picture.height, picture.width, 3)
    assert sent == [("reconstructions", shape, 1, "HWC"), ("reconstructions", shape, 2, "HWC")]


def test_bf16_and_checkpointing_train(siglip_folder, tmp_path):
    """On a CPU too: autocast with float32 weights; the loss is near the float32 one."""
    losses = {}
    for name, settings in (("plain", {}), ("bf16", {"bf16": True, "gradient_checkpointing": True})):
        torch.manual_seed(0)
        trainer = adversarial_trainer(siglip_folder, tmp_path, dataset=pixel_items(), max_steps=2, **settings)
        trainer.train()
        losses[name] = trainer.state.log_history[0]
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    for term in ("semantic_mse", "reconstruction_mse", "discriminator", "pixel_commitment"):
        assert losses["bf16"][term] == pytest.approx(losses["plain"][term], rel=0.05)
        assert losses["bf16"][term] != losses["plain"][term]


@pytest.mark.slow
def test_compiled_training_is_the_same(siglip_folder, tmp_path):
    """Without restarts: a compiled graph draws other random numbers than torch does outside of one."""
    config = {
        f"{kind}_quantizer_config": {**TOKENIZER_FIELDS[f"{kind}_quantizer_config"], "restart_unused_codes": False}
        for kind in ("pixel", "semantic")
    }
    logs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        trainer = adversarial_trainer(
            siglip_folder, tmp_path, config=config, dataset=pixel_items(), max_steps=2, torch_compile=compiled
        )
        trainer.train()
        logs.append(trainer.state.log_history[:2])
    # Rounding turns the sign of next to nothing, which Adam makes a whole step of: the second step is near only.
    for plain, compiled, tolerance in zip(*logs, (1e-4, 2e-2)):
        for term in ("loss", "reconstruction_mse", "semantic_mse", "generator", "adaptive_weight", "discriminator"):
            assert compiled[term] == pytest.approx(plain[term], rel=tolerance)


# The epoch reaches the data set, also within an epoch that a resumed run takes up


class EpochRecorder(FixedItems):
    epoch = None

    def __init__(self, items):
        super().__init__(items)
        self.seen = []

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, index):
        self.seen.append((self.epoch, index))
        return super().__getitem__(index)


def test_epoch_reaches_the_dataset(siglip_folder, tmp_path):
    def run(resume=None, **overrides):
        dataset = EpochRecorder(pixel_items(6).items)
        arguments = {"max_steps": 9, "save_strategy": "steps", "save_steps": 4, **overrides}
        trainer = tokenizer_trainer(siglip_folder, tmp_path, dataset=dataset, **arguments)
        trainer.train(resume_from_checkpoint=resume)
        return dataset.seen

    whole = run()
    assert [epoch for epoch, _ in whole] == [0] * 6 + [1] * 6 + [2] * 6
    resumed = run(resume=str(tmp_path / "checkpoint-4"))
    assert resumed == whole[8:]


def test_epoch_reaches_the_dataset_when_ranks_share_it(siglip_folder, tmp_path):
    """On several ranks accelerate wraps the batch sampler, and leaves the data set alone."""
    from accelerate.data_loader import prepare_data_loader

    dataset = EpochRecorder(pixel_items(8).items)
    trainer = tokenizer_trainer(siglip_folder, tmp_path, dataset=dataset, num_train_epochs=3, max_steps=-1)
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, shuffle=True, collate_fn=collate_images)
    trainer.get_train_dataloader = lambda: prepare_data_loader(
        loader, num_processes=2, process_index=1, rng_types=[], use_seedable_sampler=True
    )
    trainer.train()
    assert [epoch for epoch, _ in dataset.seen] == [0] * 4 + [1] * 4 + [2] * 4


# Runs of the script, stopped and started again


@pytest.fixture
def no_dataset_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def run_arguments(siglip_folder, tmp_path, images=6) -> list[str]:
    write_images(tmp_path / "images", images)
    return [
        *RUN,
        *("--siglip_model_name_or_path", str(siglip_folder), "--train_dataset", str(tmp_path / "images")),
        *("--config_overrides", json.dumps(TOKENIZER_FIELDS), "--loss_weights", json.dumps(ADVERSARIAL)),
        *("--discriminator_channels", "32", "--weight_average_decay", "0.9"),
    ]


def assert_same_adversary(one: Path, other: Path) -> None:
    first, second = (load_file(path / "checkpoint-6" / "discriminator.safetensors") for path in (one, other))
    assert not changed(first, second)
    for name in ("discriminator_optimizer.pt", "weight_average.pt"):
        first, second = (torch.load(path / "checkpoint-6" / name, weights_only=True) for path in (one, other))
        assert_equal(first, second, name)


@pytest.mark.parametrize(
    ("images", "extra"),
    [(4, []), (6, []), (6, ["--streaming", "1", "--shuffle_buffer_size", "4", "--steps_per_epoch", "3"])],
    ids=["within an epoch", "between two epochs", "stream"],
)
def test_run_goes_on_where_it_was_stopped(siglip_folder, tmp_path, no_dataset_cache, images, extra):
    arguments = [*run_arguments(siglip_folder, tmp_path, images), *extra]
    folder = check_resume(run_tokenizer.main, arguments, tmp_path)
    assert_same_adversary(folder, tmp_path / "stopped")
    assert (folder / "modeling_vision_tokenizer.py").is_file() and AutoConfig.from_pretrained(folder).auto_map
    results = (folder / "train_results.json").read_bytes()
    check_finished(run_tokenizer.main, arguments, folder)
    assert (folder / "train_results.json").read_bytes() == results
    # Also where transformers' own way of saving is asked for, which saves within a step.
    jit = ["--enable_jit_checkpoint", "1"] if images == 4 else []
    check_sigterm(run_tokenizer.main, [*arguments, *jit], folder, tmp_path / "sigterm")
    assert_same_adversary(folder, tmp_path / "sigterm")


def test_resumed_run_that_deletes_its_checkpoint(siglip_folder, tmp_path, no_dataset_cache):
    arguments = [*run_arguments(siglip_folder, tmp_path), "--eval_dataset", str(tmp_path / "images")]
    arguments += ["--eval_split", "train", "--save_total_limit", "1", "--load_best_model_at_end", "1"]
    arguments += ["--eval_strategy", "steps", "--eval_steps", "3", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(Stopped):
        run_tokenizer.main(arguments, callbacks=[Stop(4)])
    with pytest.raises(TrainingStopped):
        run_tokenizer.main(arguments, callbacks=[Sigterm(5)])
    assert (tmp_path / "run/checkpoint-5/trainer_state.json").is_file()
    for _ in range(2):
        run_tokenizer.main(arguments)
        assert (tmp_path / "run/train_results.json").is_file() and (tmp_path / "run/eval_results.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(("streaming", "ranks"), [(False, 1), (True, 1), (True, 2)])
def test_killed_run_goes_on(siglip_folder, tmp_path, streaming, ranks):
    """SIGKILL at some moment after the first checkpoint, then the same command: bit-identical to a run left alone."""
    arguments = run_arguments(siglip_folder, tmp_path, images=24)
    if streaming:
        arguments += ["--streaming", "1", "--shuffle_buffer_size", "5", "--steps_per_epoch", "6"]
        arguments += ["--dataloader_num_workers", "2"]
    command = [sys.executable, run_tokenizer.__file__]
    if ranks > 1:
        arguments += ["--gradient_accumulation_steps", "2", "--ddp_backend", "gloo"]
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        command = [sys.executable, *launch, run_tokenizer.__file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}

    def start(folder):
        return subprocess.Popen(
            [*command, *arguments, "--output_dir", str(folder)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(whole)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    process = start(killed)
    deadline = time.monotonic() + 300
    while not (killed / "checkpoint-3" / "trainer_state.json").is_file() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    # The launcher, its ranks and their workers.
    launched = psutil.Process(process.pid)
    for victim in (*launched.children(recursive=True), launched):
        victim.kill()
    process.communicate()
    assert not (killed / "checkpoint-6" / "trainer_state.json").exists()
    process = start(killed)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    assert_same_adversary(whole, killed)
    if ranks == 1:
        assert_same_run(whole, killed)
        return
    assert not changed(*(load_file(folder / "model.safetensors") for folder in (whole, killed)))
    for rank in range(ranks):
        first, second = (
            json.loads((folder / "checkpoint-6" / f"data_state_{rank}.json").read_text()) for folder in (whole, killed)
        )
        assert first == second and first["stream"]["positions"]


@pytest.mark.slow
@pytest.mark.parametrize(("streaming", "ranks"), [(False, 1), (True, 1), (False, 2)])
def test_sigterm_at_any_moment_saves_and_goes_on_in_the_same_bits(
    siglip_folder, tmp_path, monkeypatch, streaming, ranks
):
    """Also where one of two ranks gets the signal."""
    arguments = [*run_arguments(siglip_folder, tmp_path, images=24), "--max_steps", "30", "--save_steps", "10"]
    arguments += ["--gradient_accumulation_steps", "2", "--save_total_limit", "1"]
    if streaming:
        arguments += ["--streaming", "1", "--shuffle_buffer_size", "5", "--steps_per_epoch", "6"]
        arguments += ["--dataloader_num_workers", "2"]
    command = [sys.executable, run_tokenizer.__file__]
    if ranks > 1:
        arguments += ["--ddp_backend", "gloo"]
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        command = [sys.executable, *launch, run_tokenizer.__file__]
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    check_sigterm_at_random([*command, *arguments], tmp_path, last_step=30, ranks=ranks)


def test_stages_follow_each_other(siglip_folder, tmp_path, no_dataset_cache):
    common = run_arguments(siglip_folder, tmp_path)[:-6]
    common = [a for a in common if a not in ("--config_overrides", json.dumps(TOKENIZER_FIELDS))]
    plain = ["--loss_weights", json.dumps(PLAIN), "--max_steps", "2"]
    folders = [tmp_path / f"stage{stage}" for stage in range(3)]
    for stage, folder in enumerate(folders):
        start = ["--config_overrides", json.dumps(TOKENIZER_FIELDS)]
        if stage:
            start = ["--model_name_or_path", str(folders[stage - 1])]
        weights = plain if stage < 2 else plain[2:]
        run_tokenizer.main([*common, *start, *weights, "--stage", str(stage), "--output_dir", str(folder)])
    states = [load_file(folder / "model.safetensors") for folder in folders]
    assert any(name.startswith("decoder.") for name in changed(states[0], states[1]))
    assert not any(name.startswith("decoder.") for name in changed(states[1], states[2]))


def test_run_from_a_tokenizer_that_does_not_fit_its_teacher(siglip_folder, tmp_path, make_tokenizer):
    make_tokenizer(vision_config={**_vision_fields(), "num_hidden_layers": 5}).save_pretrained(tmp_path / "deeper")
    arguments = ["--siglip_model_name_or_path", str(siglip_folder), "--model_name_or_path", str(tmp_path / "deeper")]
    with pytest.raises(ValueError, match="num_hidden_layers is 5 in the one and 4 in the other"):
        run_tokenizer.main([*arguments, "--train_dataset", "images", "--output_dir", str(tmp_path), "--use_cpu", "1"])


def test_run_from_a_siglip_as_if_it_were_a_tokenizer(siglip_folder, tmp_path):
    arguments = ["--siglip_model_name_or_path", str(siglip_folder), "--model_name_or_path", str(siglip_folder)]
    with pytest.raises(ValueError, match="is of type 'siglip': a new vision tokenizer starts from it"):
        run_tokenizer.main([*arguments, "--train_dataset", "images", "--output_dir", str(tmp_path), "--use_cpu", "1"])


def _vision_fields() -> dict:
    from tiny_models import tiny_tokenizer_config

    return {
        name: getattr(tiny_tokenizer_config().vision_config, name)
        for name in ("hidden_size", "intermediate_size", "num_attention_heads", "image_size", "patch_size")
    }


@pytest.mark.slow
def test_two_ranks_train_as_one(siglip_folder, tmp_path, no_dataset_cache):
    """
    Codebook statistics, gradients, the adaptive weight and the discriminator are those of the whole batch.

    Codes restart at vectors of rank 0, so restarts are off here; test_vector_quantization.py has those of two ranks.
    """
    arguments = run_arguments(siglip_folder, tmp_path, images=16)
    quantizers = {
        name: {**TOKENIZER_FIELDS[name], "restart_unused_codes": False}
        for name in ("pixel_quantizer_config", "semantic_quantizer_config")
    }
    arguments += ["--config_overrides", json.dumps({**TOKENIZER_FIELDS, **quantizers})]
    arguments += ["--max_steps", "4", "--save_steps", "4", "--max_grad_norm", "0", "--discriminator_start_step", "0"]
    arguments += ["--discriminator_warmup_steps", "2", "--optim", "sgd"]
    one, two = tmp_path / "one", tmp_path / "two"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    runs = [
        ([sys.executable], ["--output_dir", str(one), "--per_device_train_batch_size", "4"]),
        (launch, ["--output_dir", str(two), "--ddp_backend", "gloo"]),
    ]
    for command, extra in runs:
        result = subprocess.run(
            [*command, run_tokenizer.__file__, *arguments, *extra], capture_output=True, text=True, env=environment
        )
        assert result.returncode == 0, result.stderr[-4000:]
    first, second = (load_file(folder / "checkpoint-4" / "model.safetensors") for folder in (one, two))
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=1e-3, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}")
    # Where a gradient is next to nothing, rounding turns its sign, which is all that Adam's first steps look at.
    first, second = (load_file(folder / "checkpoint-4" / "discriminator.safetensors") for folder in (one, two))
    for key in first:
        if key.endswith("weight"):
            assert (first[key] - second[key]).abs().gt(1e-4).float().mean() < 0.01, key
    logs = [json.loads((folder / "trainer_state.json").read_text())["log_history"][:4] for folder in (one, two)]
    for name in ("loss", "reconstruction_mse", "adaptive_weight", "discriminator", "pixel_codebook_perplexity"):
        for first, second in zip(*logs):
            assert first[name] == pytest.approx(second[name], rel=1e-3), name


@pytest.mark.slow
def test_ranks_that_start_unequal_become_equal(siglip_folder, tmp_path):
    """Without restarts a new codebook is random; every rank here draws its own, and sees other images."""
    script = tmp_path / "train.py"
    script.write_text(f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from pathlib import Path
from test_tokenizer_trainer import TOKENIZER_FIELDS, tokenizer_trainer, pixel_items
rank = int(os.environ["RANK"])
torch.manual_seed(rank)
fields = {{f"{{kind}}_quantizer_config": {{**TOKENIZER_FIELDS[f"{{kind}}_quantizer_config"],
          "restart_unused_codes": kind == "pixel"}} for kind in ("pixel", "semantic")}}
trainer = tokenizer_trainer(Path({str(siglip_folder)!r}), {str(tmp_path / "out")!r}, dataset=pixel_items(), config=fields,
                            ddp_backend="gloo")
torch.save(trainer.model.semantic_quantizer.codebook.embeddings, {str(tmp_path)!r} + f"/start-{{rank}}.pt")
trainer.train()
torch.save(trainer.model.state_dict(), {str(tmp_path)!r} + f"/end-{{rank}}.pt")
torch.distributed.barrier(); torch.distributed.destroy_process_group()
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    starts = [torch.load(tmp_path / f"start-{rank}.pt") for rank in range(2)]
    assert not torch.equal(*starts)
    assert not changed(*(torch.load(tmp_path / f"end-{rank}.pt") for rank in range(2)))
