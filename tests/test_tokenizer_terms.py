"""The step of every stage of tokenizer training: its terms, what moves, and what is refused."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_models import layout_of_2025
from tokenizer_training import (
    ADVERSARIAL,
    ADVERSARY,
    PLAIN,
    SquaredDistance,
    adversarial_trainer,
    pixel_items,
    tokenizer_trainer,
)
from training_helpers import TOKENIZER_FIELDS, changed, quiet, state_of
from transformers import SiglipVisionModel, TrainerCallback, TrainingArguments

from transformers_dualtoken import DualTokenVisionTokenizer
from transformers_dualtoken.training import (
    STAGE_LOSS_WEIGHTS,
    DualTokenVisionTokenizerRecipe,
    DualTokenVisionTokenizerTrainer,
    collate_images,
)
from transformers_dualtoken.training.vision_tokenizer import recipe as recipe_module
from transformers_dualtoken.training.vision_tokenizer.adversary import adaptive_weight


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


@pytest.mark.parametrize("config", [{}, layout_of_2025()], ids=["default", "layout of 2025"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_what_moves_in_each_stage(siglip_folder, tmp_path, stage, config):
    weights = PLAIN if stage < 2 else {}
    trainer = tokenizer_trainer(siglip_folder, tmp_path, weights, pixel_items(), config, stage=stage, weight_decay=0.1)
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


@pytest.mark.parametrize("branch, error", [("pooler", KeyError), ("pixel_codes", KeyError), ("image", ValueError)])
def test_a_term_that_is_listed_and_not_computed_is_an_error(siglip_folder, tmp_path, monkeypatch, branch, error):
    monkeypatch.setitem(recipe_module._TERMS, "new", (branch, 1.0, 1.0, 1.0))
    monkeypatch.setitem(STAGE_LOSS_WEIGHTS[1], "new", 1.0)
    with pytest.raises(error, match="new"):
        tokenizer_trainer(siglip_folder, tmp_path, dataset=pixel_items()).train()


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
        ({"stage": 3}, "`stage` must be one of 0, 1, 2, 'contrastive', got 3"),
        ({"loss_weights": {"perceptul": 1}}, "No such loss terms: perceptul; there are semantic_mse"),
        (
            {"loss_weights": {"generator": -1}},
            r"`loss_weights\['generator'\]` must be a number of at least 0 .*, got -1",
        ),
        ({"loss_weights": {"generator": math.nan}}, "must be a number of at least 0 .*, got nan"),
        ({"loss_weights": "{generator: 0}"}, "`loss_weights` must be a JSON object or the path of one"),
        ({"loss_weights": "[1]"}, "`loss_weights` must be a JSON object or the path of one"),
        ({"loss_weights": dict.fromkeys(STAGE_LOSS_WEIGHTS[1], 0)}, "so there is nothing to train"),
        ({"loss_weights": {"reconstruction_mse": 0, "perceptual": 0}}, "give one of them a weight"),
        ({"discriminator_loss": "vanilla"}, "must be 'leaky_hinge' or 'hinge', got 'vanilla'"),
        ({"weight_average_decay": 1.0}, "`weight_average_decay` must be above 0 and below 1, got 1.0"),
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


def test_step_that_fails_leaves_nothing_behind(siglip_folder, tmp_path, monkeypatch):
    """Neither a hook nor an activation, whose memory a smaller batch may need."""
    trainer = adversarial_trainer(siglip_folder, tmp_path, dataset=pixel_items())

    def out_of_memory(name, image, target):
        raise torch.OutOfMemoryError(name)

    monkeypatch.setattr(trainer, "image_term", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()
    assert not trainer.model.decoder.conv_out._forward_pre_hooks and trainer._last_input is None


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
