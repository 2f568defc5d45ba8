"""The full-size recipes of examples/configs: their settings, the models they build, and the script that estimates."""

import dataclasses
import importlib
import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from tiny_models import tiny_tokenizer_config, tiny_unified_config
from transformers import HfArgumentParser

from transformers_dualtoken import DualTokenVisionTokenizerConfig
from transformers_dualtoken.data.sources import _check_spec
from transformers_dualtoken.recipe_files import SettingsError, parse_settings, run_script
from transformers_dualtoken.training.unified.throughput import StepCounts, TrainingFlops


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


# Language model with both ends, one head, projector; tokenizer as above.
UNIFIED = {
    "unified_stage1": (3_085_938_688, 257_989_632, 4_329_472),
    "unified_7b_stage1": (7_615_616_512, 276_864_000, 13_081_600),
}


@pytest.mark.parametrize("name", UNIFIED)
def test_unified_models_at_full_size(name, estimate):
    recipe = estimate._read_recipe(name)
    model = estimate.build_unified(recipe)
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    text, config = model.config.text_config, model.config
    assert config.num_positions == 729 and config.num_depths == 8 and config.codebook_size == 16384
    assert (
        config.depth_head_config.input_hidden_size == text.hidden_size and config.depth_head_config.hidden_size == 1024
    )
    if "7b" in name:
        sizes = (text.hidden_size, text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads)
        assert (*sizes, text.intermediate_size, text.vocab_size) == (3584, 28, 28, 4, 18944, 152064)
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert tied == ("7b" not in name) and config.tie_word_embeddings == tied
    language_model = estimate.count(model.model.language_model) + (0 if tied else estimate.count(model.lm_head))
    found = language_model, estimate.count(model.depth_heads) // 2, estimate.count(model.model.visual_projector)
    assert found == UNIFIED[name]
    assert estimate.count(model) == found[0] + 2 * found[1] + found[2] + LAYOUTS["tokenizer_so400m_384"][4]
    assert estimate.count(model, trained=True) == found[2]
    numbers = " | ".join(f"{number / 1e6:.1f}" for number in (estimate.count(model), *found))
    assert (
        f"{recipe['language_model_name_or_path'].partition('/')[2]} | {numbers} |"
        in (EXAMPLES / "configs" / "README.md").read_text()
    )


@pytest.mark.slow
def test_tables_of_unified_models_are_what_the_script_writes(estimate):
    recipes = {path.stem: json.loads(path.read_text()) for path in (EXAMPLES / "configs").glob("unified_*stage1.json")}
    written = (EXAMPLES / "configs" / "README.md").read_text()
    for line in estimate.unified_tables(recipes, 8, 989e12 * 0.35).splitlines():
        assert line in written


def test_estimate_of_a_tiny_unified_model(estimate, monkeypatch):
    """Operations are those that training reports as model FLOPs, and what checkpointing computes again."""
    monkeypatch.setattr(estimate, "unified_config", lambda recipe: tiny_unified_config())
    for parts in (["projector"], ["language_model", "projector"], ["projector", "heads", "language_model"]):
        recipe = {"train_parts": parts}
        flops = TrainingFlops(estimate.build_unified(recipe))
        two, four = (estimate.unified_step_cost(recipe, samples, text_tokens=5) for samples in (2, 4))
        # The angles of the positions are made once for all samples.
        assert two["operations"] == pytest.approx(four["operations"], rel=1e-3) and two["peak"] < four["peak"]
        draws = "heads" in parts
        counts = StepCounts(14, 14 * 15 // 2, 0 if draws else 5, 9 if draws else 0, images=1, encoded_images=1)
        assert 1.1 < two["operations"] / flops(counts) < 1.6, parts
        # Sharded, the weights and what passes through them have two bytes.
        sharded = estimate.unified_step_cost({**recipe, "deepspeed": "zero2.json"}, 4, text_tokens=5)
        assert sharded["operations"] == four["operations"] and sharded["peak"] < four["peak"]
    model = estimate.build_unified(recipe)
    trained, everything = estimate.count(model, trained=True), estimate.count(model)
    for stage, weights, optimizer in ((0, 4 * everything, 8), (2, 2 * everything, 1.5), (3, everything / 4, 1.5)):
        standing = estimate.unified_standing_bytes(model, stage, 8)
        assert standing["optimizer"] == int(optimizer * trained)
        assert 0 <= standing["weights"] - int(weights) <= 64 * 1024  # codebooks


def test_tables_are_written_between_their_marks(estimate, monkeypatch, tmp_path):
    monkeypatch.setattr(estimate, "FOLDER", tmp_path)
    (tmp_path / "README.md").write_text(f"a\n{estimate._BEGIN}\nold\n{estimate._END}\nb\n")
    for text in ("new", "newer"):
        estimate.write_into_readme(text)
        assert (tmp_path / "README.md").read_text() == f"a\n{estimate._BEGIN}\n{text}\n{estimate._END}\nb\n"


@pytest.mark.parametrize("size", ["", "7b_"])
@pytest.mark.parametrize("stage", STAGES)
def test_unified_stages_are_the_papers(stage, size, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    script = importlib.import_module("run_unified")
    settings = json.loads((EXAMPLES / "configs" / f"unified_{size}stage{stage}.json").read_text())
    engine = settings.pop("deepspeed", None)
    assert engine is None or (EXAMPLES / "configs" / engine).is_file()
    parser = HfArgumentParser((script.ModelArguments, script.DataArguments, script.DualTokenTrainingArguments))
    # An unknown name is an error.
    model, data, training = parser.parse_dict({**settings, "output_dir": str(tmp_path), "use_cpu": True})
    parts, rate, batch = STAGES[stage]
    assert model.train_parts == parts and training.learning_rate == rate
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps * 8 == batch
    assert training.bf16 and data.streaming and data.packing and data.on_bad_sample == "skip"
    # Each stage begins where the one before ended.
    before = f"unified_{size}stage{stage - 1}" if stage > 1 else None
    assert model.model_name_or_path == before and settings["output_dir"] == f"unified_{size}stage{stage}"
    sources = yaml.safe_load((EXAMPLES / "configs" / data.train_dataset).read_text())["sources"]
    for source in sources:
        _check_spec(source)
        assert source["weight"] > 0


# Recipes of one's own


@dataclasses.dataclass
class Settings:
    train_dataset: str
    eval_dataset: str | None = None
    dataset_options: dict | str | None = None
    config_overrides: dict | str | None = None
    learning_rates: dict | str | None = None
    rate: float = 1.0
    steps: int = 1
    limit: int | None = None
    parts: list[str] = dataclasses.field(default_factory=list)
    streaming: bool = False


def recipe(folder: Path, ending=".json", **settings) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"recipe{ending}"
    path.write_text(json.dumps(settings) if ending == ".json" else yaml.safe_dump(settings))
    return str(path)


@pytest.mark.parametrize("ending", [".json", ".yaml", ".yml"])
def test_paths_of_a_recipe_are_beside_it_or_in_the_working_directory(tmp_path, monkeypatch, ending):
    folder, here = tmp_path / "recipes", tmp_path / "here"
    for place in (folder, folder / "pictures", here, here / "only here"):
        place.mkdir()
    for place in (folder / "both", here / "both", folder / "a.parquet"):
        place.write_text("")
    monkeypatch.chdir(here)
    path = os.path.relpath(recipe(folder, ending, train_dataset="both"))
    (settings,) = parse_settings((Settings,), [path])
    assert settings.train_dataset == os.path.join("..", "recipes", "both")
    names = {
        "train_dataset": "*.parquet",
        "eval_dataset": "only here",
        "dataset_options": {"image_folder": "pictures"},
    }
    recipe(folder, ending, **names, config_overrides='{"a": 1}', learning_rates="someone/model")
    (settings,) = parse_settings((Settings,), [path])
    assert settings.train_dataset == "../recipes/*.parquet" and settings.eval_dataset == "only here"
    assert settings.dataset_options == {"image_folder": "../recipes/pictures"}
    assert settings.config_overrides == '{"a": 1}' and settings.learning_rates == "someone/model"
    # The command line is relative to the working directory.
    assert parse_settings((Settings,), ["--train_dataset", "both"])[0].train_dataset == "both"
    recipe(folder, ending, train_dataset="./gone")
    with pytest.raises(ValueError, match="`train_dataset` of .* nothing at '.*recipes/gone' nor at '.*here/gone'"):
        parse_settings((Settings,), [path])


def test_recipes_of_the_repository_find_what_lies_beside_them(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    script = importlib.import_module("run_unified")
    monkeypatch.chdir(tmp_path)
    types = (script.ModelArguments, script.DataArguments, script.DualTokenTrainingArguments)
    model, data, _ = parse_settings(types, [str(EXAMPLES / "digits/finetune.json")])
    assert Path(model.model_name_or_path) == EXAMPLES / "digits/checkpoint/dualtoken"
    assert data.train_dataset == "digits-new/mixture.json"


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({}, "lacks train_dataset"),
        ({"train_dataset": "a", "trian": 1}, "settings that do not exist: trian"),
        ({"train_dataset": None}, "`train_dataset` .* must be str, got None"),
        ({"train_dataset": ["a"]}, r"`train_dataset` .* must be str, got \['a'\]"),
        ({"train_dataset": "a", "steps": "many"}, "`steps` .* must be int, got 'many'"),
        ({"train_dataset": "a", "steps": 1.5}, "`steps` .* must be int, got 1.5"),
        ({"train_dataset": "a", "steps": True}, "`steps` .* must be int, got True"),
        ({"train_dataset": "a", "rate": 10**400}, "`rate` .* must be float, got 1000"),
        ({"train_dataset": "a", "rate": float("nan")}, "`rate` .* must be float, got nan"),
        ({"train_dataset": "a", "streaming": "false"}, "`streaming` .* must be bool, got 'false'"),
        ({"train_dataset": "a", "parts": "heads"}, "`parts` .* must be list.*, got 'heads'"),
        ({"train_dataset": "a", "parts": [1]}, "`parts` .* must be list"),
        ({"train_dataset": "a", "dataset_options": 3}, "`dataset_options` .* must be dict"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_named(tmp_path, settings, match):
    with pytest.raises(ValueError, match=match):
        parse_settings((Settings,), [recipe(tmp_path, **settings)])


@pytest.mark.parametrize(
    ("text", "match"),
    [("[1]", "must be an object of settings, got list"), ("{", "cannot be read"), ("[" * 100000, "")],
)
def test_recipes_that_are_none(tmp_path, text, match):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=f"The recipe .*a.json' .*{match}"):
        parse_settings((Settings,), [str(tmp_path / "a.json")])
    with pytest.raises(ValueError, match="The recipe 'gone.yaml' cannot be read .* working directory"):
        parse_settings((Settings,), ["gone.yaml"])


@pytest.mark.parametrize(
    ("ending", "text"), [(".json", '{"steps": 1, "steps": 2}'), (".yaml", "steps: 1\nsteps: 2\n")]
)
def test_a_setting_stands_once_in_a_recipe(tmp_path, ending, text):
    path = tmp_path / f"a{ending}"
    path.write_text(text)
    with pytest.raises(SettingsError, match="cannot be read .it has steps more than once"):
        parse_settings((Settings,), [str(path), "--train_dataset", "a"])


def test_merged_keys_of_yaml_may_be_replaced(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("train_dataset: a\ndataset_options:\n  x: &base {p: 1, q: 2}\n  y:\n    <<: *base\n    p: 3\n")
    (settings,) = parse_settings((Settings,), [str(path)])
    assert settings.dataset_options["y"] == {"p": 3, "q": 2}


def test_numbers_of_a_recipe_are_of_their_field(tmp_path):
    path = recipe(tmp_path, ".yaml", train_dataset="a", rate="1e-3", steps=1e3, limit="9007199254740993")
    (settings,) = parse_settings((Settings,), [path])
    assert (settings.rate, settings.steps, settings.limit) == (1e-3, 1000, 9007199254740993)
    assert type(settings.steps) is int


def test_options_after_a_recipe_count_before_its_own(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("")
    path = recipe(
        tmp_path, ".yaml", train_dataset="a", eval_dataset="a", rate=0.5, steps=3, streaming=True, parts=["x"]
    )
    monkeypatch.chdir(tmp_path)
    given = ["--rate", "2", "--train_dataset", "b", "--parts", "y", "z", "--streaming", "false"]
    (settings,) = parse_settings((Settings,), [path, *given])
    assert (settings.rate, settings.train_dataset, settings.parts, settings.streaming) == (2.0, "b", ["y", "z"], False)
    assert (settings.steps, settings.eval_dataset, settings.limit) == (3, str(tmp_path / "a"), None)
    # What the recipe lacks or has wrong may come from the options.
    (settings,) = parse_settings((Settings,), [recipe(tmp_path, rate="fast"), "--train_dataset", "b", "--rate", "1"])
    assert settings.train_dataset == "b" and settings.rate == 1
    with pytest.raises(SettingsError, match="lacks train_dataset"):
        parse_settings((Settings,), [recipe(tmp_path), "--rate", "1"])
    for before in ([], [path]):
        with pytest.raises(SettingsError, match="options that do not exist: --step 1"):
            parse_settings((Settings,), [*before, "--train_dataset", "a", "--step", "1"])
        with pytest.raises(SettingsError, match="options that do not exist: --trian 1"):
            parse_settings((Settings,), [*before, "--train_dataset", "b", "--trian", "1"])


def test_options_after_a_recipe_of_the_repository(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    script = importlib.import_module("run_unified")
    types = (script.ModelArguments, script.DataArguments, script.DualTokenTrainingArguments)
    path = EXAMPLES / "digits/finetune.json"
    kept = json.loads(path.read_text())
    argv = [str(path), "--output_dir", str(tmp_path), "--max_steps", "3", "--lr_scheduler_kwargs", '{"a": 0.5}']
    model, data, training = parse_settings(types, argv)
    assert training.output_dir == str(tmp_path) and training.max_steps == 3
    assert training.lr_scheduler_kwargs == {"a": 0.5}
    assert Path(model.model_name_or_path) == path.parent / kept["model_name_or_path"] and data.precompute_codes
    assert training.per_device_train_batch_size == kept["per_device_train_batch_size"]


def test_scripts_say_wrong_settings_in_a_sentence(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES / "miniature"))
    script = importlib.import_module("train_siglip")
    monkeypatch.setattr("sys.argv", ["train_siglip.py", "--data_dir", "data", "--max_step", "3", "--unknown"])
    with pytest.raises(
        SystemExit, match="^train_siglip.py: The command line has options that do not exist: --max_step 3 --unknown.$"
    ):
        run_script(script.main)
