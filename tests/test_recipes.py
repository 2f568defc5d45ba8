"""The full-size recipes of examples/configs: their settings, the models they build, and the script that estimates."""

import importlib
import json
from pathlib import Path

import pytest
import torch
import yaml
from tiny_models import tiny_tokenizer_config
from transformers import HfArgumentParser

from transformers_dualtoken import DualTokenVisionTokenizerConfig
from transformers_dualtoken.training.data.chat_sources import _check_keys


EXAMPLES = Path(__file__).parents[1] / "examples"
RECIPES = sorted((EXAMPLES / "configs").glob("tokenizer_*.json"))
# Of the paper's table: what is trained, rate, batch.
STAGES = {
    1: (["projector"], 1e-3, 64),
    2: (["language_model", "projector"], 2e-5, 256),
    3: (["heads"], 1e-4, 128),
    4: (["projector", "heads", "language_model"], 1e-5, 512),
}
# Positions, residual codes of a kind, layers (pixel, shortcut, semantic), side of the decoder's latent; parameters of
# the tokenizer and how many of them are trained in stage 1.
LAYOUTS = {
    "tokenizer_so400m_384": (729, 8, (6, 4, 26), 24, 1_347_264_469, 639_481_571),
    "tokenizer_so400m_256": (256, 4, (6, 4, 26), 16, 1_346_926_933, 639_144_035),
    "tokenizer_l_256": (256, 4, (6, 4, 23), 16, 855_637_925, 519_443_363),
}


@pytest.fixture
def estimate(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES / "configs"))
    return importlib.import_module("estimate")


def test_every_layout_has_a_recipe():
    assert {path.stem for path in RECIPES} == set(LAYOUTS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_settings_are_the_papers(path, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    script = importlib.import_module("run_tokenizer")
    parser = HfArgumentParser(
        (script.ModelArguments, script.DataArguments, script.DualTokenVisionTokenizerRecipe)
        + (script.DualTokenVisionTokenizerTrainingArguments,)
    )
    here = {"output_dir": str(tmp_path), "use_cpu": True}
    # An unknown name is an error.
    model, data, recipe, training = parser.parse_dict({**json.loads(path.read_text()), **here})
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps * 8 == 256
    assert recipe.steps_per_epoch == 10_000_000 // 256 and training.max_steps == 20 * recipe.steps_per_epoch
    assert (training.learning_rate, training.adam_beta1, training.adam_beta2) == (7.2e-5, 0.5, 0.9)
    assert (training.weight_decay, training.warmup_steps, training.lr_scheduler_type) == (1e-4, 10_000, "cosine")
    assert training.bf16 and data.crop_scale == [0.9, 1.0] and data.streaming
    assert recipe.stage == 1 and recipe.perceptual_net == "vgg" and recipe.discriminator_start_step is None
    assert model.siglip_model_name_or_path.startswith("google/siglip")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_build_at_full_size(path, estimate):
    positions, depths, layers, latent, parameters, trained = LAYOUTS[path.stem]
    config = estimate.tokenizer_config(json.loads(path.read_text()))
    assert config.num_positions == positions and config.decoder_latent_size == latent
    assert config.reconstruction_size == config.image_size
    assert (config.pixel_layer, config.shortcut_layer, config.semantic_layer) == layers
    # What a run without overrides would choose.
    layers_for = DualTokenVisionTokenizerConfig.layers_for(config.vision_config.num_hidden_layers)
    assert all(getattr(config, name) == layer for name, layer in layers_for.items())
    for quantizer in (config.pixel_quantizer_config, config.semantic_quantizer_config):
        assert (quantizer.codebook_size, quantizer.code_dim, quantizer.num_depths) == (16384, 32, depths)
    models = estimate.build_models(config)
    assert all(p.device.type == "meta" for model in models.values() for p in model.parameters())
    assert estimate.count(models["tokenizer"]) == parameters
    assert estimate.count(models["tokenizer"], trained=True) == trained
    assert estimate.count(models["LPIPS"]) == 14_714_688  # torchvision's VGG-16 without its classifier


def test_live_bytes_of_a_step(estimate):
    before = torch.empty(100, device="meta")
    with estimate.LiveBytes() as memory:
        first = before * 2
        view, _ = first.view(10, 10), before.add_(1)
        assert memory.live == 400 and memory.peak == 400
        second = torch.empty(50, dtype=torch.bfloat16, device="meta")
        assert memory.live == memory.peak == 500
        del first
        assert memory.live == 500  # the view holds it
        del view
        assert memory.live == 100 and memory.peak == 500
        del second
    assert memory.live == 0


def test_estimate_of_a_tiny_model(estimate):
    config = tiny_tokenizer_config()
    two, four = (estimate.step_cost(config, images, checkpointing=False) for images in (2, 4))
    assert two["operations"] == four["operations"] and two["search"] == four["search"]
    quantizer = config.pixel_quantizer_config
    codes = -(-quantizer.codebook_size // 128) * 128
    # Two kinds of codes; three products each, which TF32 asks for.
    search = 2 * quantizer.num_depths * config.num_positions * codes * 2 * (3 * quantizer.code_dim)
    assert two["search"] == search
    again = estimate.step_cost(config, 4, checkpointing=True)
    assert again["operations"] > four["operations"] > 0
    models = estimate.build_models(config)
    gradients = 4 * sum(estimate.count(model, trained=True) for model in models.values())
    assert gradients < two["peak"] < four["peak"] < 2 * two["peak"]
    alone, several = (estimate.standing_bytes(models, ranks) for ranks in (1, 8))
    assert sum(several.values()) - sum(alone.values()) == gradients


@pytest.mark.parametrize("stage", STAGES)
def test_unified_stages_are_the_papers(stage, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    script = importlib.import_module("run_unified")
    settings = json.loads((EXAMPLES / "configs" / f"unified_stage{stage}.json").read_text())
    engine = settings.pop("deepspeed", None)
    assert engine is None or (EXAMPLES.parent / engine).is_file()
    parser = HfArgumentParser((script.ModelArguments, script.DataArguments, script.DualTokenTrainingArguments))
    # An unknown name is an error.
    model, data, training = parser.parse_dict({**settings, "output_dir": str(tmp_path), "use_cpu": True})
    parts, rate, batch = STAGES[stage]
    assert model.train_parts == parts and training.learning_rate == rate
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps * 8 == batch
    assert training.bf16 and data.streaming and data.packing and data.on_bad_sample == "skip"
    # Each stage begins where the one before ended.
    before = f"unified_stage{stage - 1}" if stage > 1 else None
    assert model.model_name_or_path == before and settings["output_dir"] == f"unified_stage{stage}"
    sources = yaml.safe_load((EXAMPLES.parent / data.train_dataset).read_text())["sources"]
    for source in sources:
        _check_keys(source)
        assert source["weight"] > 0
