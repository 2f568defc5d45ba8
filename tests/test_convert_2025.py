"""The authors' older layout, of the checkpoint that was made public in 2025: its recorded numbers, and what does not fit.

The numbers were made once by the public code (see `fixtures/make_tokenizer_of_2025.py`) from a small random checkpoint
that is built here again, and not by this project.
"""

import pytest
import torch
from format_of_2025 import NUMBERS, inputs_of_2025, tensor_of_name, write_folder_of_2025
from official_format import official_fields, quantizer_fields, write_folder
from safetensors.torch import load_file
from tiny_models import layout_of_2025, lively_unified_model, tiny_tokenizer_config
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from transformers_dualtoken import DualTokenVisionTokenizer, DualTokenVisionTokenizerConfig, convert
from transformers_dualtoken.cli import main
from transformers_dualtoken.convert import is_official_folder, load_official_tokenizer, load_vision_tokenizer
from transformers_dualtoken.data.codes import tokenizer_fingerprint
from transformers_dualtoken.image_processing_pil_dualtoken import DualTokenImageProcessorPil


KINDS = ("pixel", "semantic")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder_of_2025(tmp_path_factory.mktemp("of_2025"))


@pytest.fixture(scope="module")
def model(folder):
    assert is_official_folder(folder)
    return load_vision_tokenizer(folder)


@torch.no_grad()
def outputs(model) -> dict:
    inputs = inputs_of_2025()
    output = model(**inputs)
    return {
        **output,
        "decoded_from_pixel_codes": model.decode(pixel_codes=output.pixel_codes).reconstruction,
        "text_pooler_output": model.get_text_features(inputs["input_ids"]).pooler_output,
    }


# --- the recorded numbers ---


def test_recorded_numbers(model):
    """Codes identical, everything else within 1e-4 (relative Frobenius norm)."""
    ours, recorded = outputs(model), load_file(NUMBERS)
    assert len(recorded) == 13
    for name, wanted in recorded.items():
        actual = ours[name]
        assert actual.shape == wanted.shape and actual.dtype == wanted.dtype, name
        if wanted.dtype == torch.int64:
            assert torch.equal(actual, wanted), name
        else:
            assert (actual.double() - wanted.double()).norm() < 1e-4 * wanted.double().norm(), name


def test_configuration(model):
    config = model.config
    layers = (config.pixel_layer, config.shortcut_layer, config.semantic_layer)
    assert layers == (6, None, 26) and (config.projection_type, config.semantic_projection) == ("resnet", False)
    assert config.decoder_latent_size == 3 and config.decoder_attention_levels == []
    for kind in KINDS:
        quantizer = model.quantizer(kind).config
        assert (quantizer.codebook_size, quantizer.code_dim, quantizer.num_depths) == (24, 64, 8)
        assert (quantizer.shared_codebook, quantizer.restart_unused_codes) == (False, True)
        assert (quantizer.update_rule, quantizer.ema_vectors, quantizer.ema_decay) == ("rq", "own", 0.99)
    assert not any(name.startswith(("semantic_down_proj", "semantic_up_proj")) for name in model.state_dict())


def test_paper_scale_on_the_meta_device():
    quantizer = {"code_dim": 1152, "shared_codebook": False}
    config = DualTokenVisionTokenizerConfig(
        **{"projection_type": "resnet", "semantic_projection": False, "shortcut_layer": None},
        **{f"{kind}_quantizer_config": quantizer for kind in KINDS},
    )
    with torch.device("meta"):
        model = DualTokenVisionTokenizer(config)
    # A 1 x 1 and a 3 x 3 convolution and two norms; no 1 x 1 shortcut, since the width stays.
    for projection in (model.pixel_down_proj, model.pixel_up_proj):
        assert sum(parameter.numel() for parameter in projection.parameters()) == 10 * 1152**2 + 6 * 1152
    assert model.semantic_quantizer.codebook.embeddings.shape == (8, 16384, 1152)


# --- saved, converted, trained ---


def test_save_and_load(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert not is_official_folder(tmp_path)
    before = outputs(model)
    for loaded in (AutoModel.from_pretrained(tmp_path), load_vision_tokenizer(tmp_path)):
        assert type(loaded) is DualTokenVisionTokenizer and loaded.config.projection_type == "resnet"
        assert AutoConfig.from_pretrained(tmp_path).semantic_projection is False
        after = outputs(loaded)
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_convert_command(folder, model, tmp_path, capsys):
    assert main(["convert", str(folder), str(tmp_path / "converted")]) == 0
    assert "32 px, 16 positions" in capsys.readouterr().out
    loaded = AutoModel.from_pretrained(tmp_path / "converted").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


def test_half_precision(folder):
    model = load_vision_tokenizer(folder, dtype=torch.bfloat16)
    output = model(inputs_of_2025()["pixel_values"].bfloat16())
    assert output.reconstruction.dtype == output.semantic_features.dtype == torch.bfloat16


@pytest.mark.parametrize("has_statistics", [False, True])
def test_training_goes_on(folder, tmp_path, has_statistics):
    """Codebooks move little, and no unused code restarts at once, whether the checkpoint has EMA statistics or not."""

    def change(weights):
        for name in [name for name in weights if ".codebooks." in name and has_statistics]:
            sizes = 50 + tensor_of_name(name, (24,)).float().abs()
            weights[name.replace("weight", "cluster_size_ema")] = sizes
            weights[name.replace("weight", "embed_ema")] = weights[name][:-1] * sizes[:, None]
        return weights

    model = load_official_tokenizer(write_folder_of_2025(tmp_path, change))
    sizes = model.pixel_quantizer.codebook.cluster_size
    low, high = (50, 52) if has_statistics else (99.99, 100.01)
    assert low <= sizes.min() and sizes.max() <= high
    before = {kind: model.quantizer(kind).codebook.embeddings.clone() for kind in KINDS}
    output = model.train()(inputs_of_2025()["pixel_values"])
    (output.reconstruction.square().mean() + output.pooler_output.square().mean()).backward()
    for kind in KINDS:
        moved = model.quantizer(kind).codebook.embeddings - before[kind]
        assert 0 < moved.norm() < 0.1 * before[kind].norm()
    for name in ("pixel_down_proj.conv1", "pixel_up_proj.norm2", "siglip.vision_model.encoder.layers.26.mlp.fc1"):
        assert model.get_parameter(f"{name}.weight").grad.abs().max() > 0


def test_shared_codebook(tmp_path):
    model = load_official_tokenizer(write_folder_of_2025(tmp_path, shared_codebook=True))
    assert model.pixel_quantizer.codebook.embeddings.shape == (1, 24, 64)


def test_values_its_code_has_defaults_for(tmp_path):
    left_out = {"shared_codebook": None, "restart_unused_codes": ..., "decay": ...}
    quantizer = load_official_tokenizer(write_folder_of_2025(tmp_path, **left_out)).config.pixel_quantizer_config
    assert (quantizer.shared_codebook, quantizer.restart_unused_codes, quantizer.ema_decay) == (False, False, 0.99)


def test_layers_are_counted_from_the_end(tmp_path):
    config = load_official_tokenizer(write_folder_of_2025(tmp_path, num_layers=24)).config
    assert (config.pixel_layer, config.semantic_layer) == (3, 23)


@torch.no_grad()
def test_compiles_as_one_graph():
    model = DualTokenVisionTokenizer(tiny_tokenizer_config(**layout_of_2025())).eval()
    pixel_values = torch.rand(2, 3, 24, 24) * 2 - 1
    encoded = torch.compile(model.encode, fullgraph=True, backend="eager")(pixel_values)
    expected = model.encode(pixel_values)
    assert all(torch.equal(encoded[name], expected[name]) for name in expected)


def test_in_a_unified_model(tmp_path):
    tokenizer = tiny_tokenizer_config(**layout_of_2025())
    model = lively_unified_model(vision_tokenizer_config=tokenizer.to_dict()).eval()
    # FSDP wraps the modules of these names, and refuses names that none has.
    names = {type(module).__name__ for module in model.modules()}
    assert {"DualTokenResnetProjection", "DualTokenResidualQuantizer"} <= set(model._no_split_modules) & names
    assert "DualTokenAttentionProjection" not in model._no_split_modules
    prompt = {"input_ids": torch.tensor([[5, 50]]), "generation_mode": "image", "image_do_sample": False}
    drawn = model.generate(**prompt)
    images = model.decode_images(drawn)
    assert images.shape == (1, 3, 24, 24) and images.isfinite().all()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).generate(**prompt)
    assert torch.equal(drawn.pixel_codes, again.pixel_codes)
    assert load_vision_tokenizer(tmp_path).config.projection_type == "resnet"


def test_groups_decide_the_codes():
    """So that codes which were made with others are refused in training."""
    first, second = (
        DualTokenVisionTokenizer(tiny_tokenizer_config(**layout_of_2025(), decoder_norm_num_groups=groups))
        for groups in (8, 4)
    )
    second.load_state_dict(first.state_dict())
    processor = DualTokenImageProcessorPil()
    assert tokenizer_fingerprint(first, processor) != tokenizer_fingerprint(second, processor)


# --- what does not fit ---


def without(name):
    return lambda weights: {key: tensor for key, tensor in weights.items() if key != name}


@pytest.mark.parametrize(
    "change, message",
    [
        (without("prequant_visual.conv2.weight"), "missing 'prequant_visual.conv2.weight'"),
        (without("quantizer_semantic.codebooks.3.weight"), "missing 'quantizer_semantic.codebooks.3.weight'"),
        (
            lambda weights: {**weights, "quantizer.codebooks.0.embed_ema": torch.ones(24, 64)},
            "missing 'quantizer.codebooks.0.cluster_size_ema'",
        ),
        (
            lambda weights: {**weights, "prequant_semantic.conv1.weight": torch.ones(64, 64, 1, 1)},
            "unexpected 'prequant_semantic.conv1.weight'",
        ),
        (
            lambda weights: {**weights, "prequant_visual.nin_shortcut.weight": torch.ones(64, 64, 1, 1)},
            "unexpected 'prequant_visual.nin_shortcut.weight'",
        ),
        (
            lambda weights: {**weights, "quantizer.codebooks.0.weight": torch.ones(24, 64)},
            r"'quantizer.codebooks.0.weight' has shape \(24, 64\) instead of \(25, 64\)",
        ),
    ],
)
def test_weights_that_do_not_fit(tmp_path, change, message):
    folder = write_folder_of_2025(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        load_official_tokenizer(folder)


def test_foreign_parts_are_left_out(tmp_path, model, monkeypatch):
    """As in that code, which loads what it knows."""
    warnings = []
    monkeypatch.setattr(convert.logger, "warning", warnings.append)
    folder = write_folder_of_2025(tmp_path, lambda weights: {**weights, "discriminator.weight": torch.ones(2)})
    state = load_official_tokenizer(folder).state_dict()
    assert warnings == ["Left out, since the vision tokenizer has no such parts: ['discriminator.weight']."]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"code_shape": ...}, "'rqvaesiglip' lacks code_shape"),
        ({"hidden_size": ..., "ddconfig": ...}, "'rqvaesiglip' lacks hidden_size, ddconfig"),
        ({"embed_dim": 32}, "`rqvaesiglip.embed_dim` must be 64 by .* a checkpoint of 2025, got 32"),
        ({"hidden_size": 1152}, "`rqvaesiglip.hidden_size` must be 64 .* got 1152"),
        ({"latent_shape": [8, 8, 64]}, r"`rqvaesiglip.latent_shape` must be \[4, 4, 64\] .* got \[8, 8, 64\]"),
        ({"n_embed": [24] * 7 + [12]}, "`rqvaesiglip.n_embed` must be the same at every depth"),
        ({"num_layers": 12}, "from layer 22 from the end, but its SigLIP has 12 layers"),
        ({"vq_pix": quantizer_fields()}, "'rqvaesiglip' lacks layer_recon, layer_sem, vq_sem"),
    ],
)
def test_configurations_that_do_not_fit(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        write_folder_of_2025(tmp_path, **overrides)
    with pytest.raises(ValueError, match=message):
        load_official_tokenizer(tmp_path)


def test_weights_of_the_other_layout(folder, tmp_path):
    """A configuration of one layout beside weights of the other."""
    weights = torch.load(next(folder.glob("*.pt")), weights_only=True)["state_dict"]
    write_folder(tmp_path, official_fields(), weights)
    with pytest.raises(ValueError, match="does not fit its configuration"):
        load_official_tokenizer(tmp_path)


# --- the config ---


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"projection_type": "conv"}, "`projection_type` must be 'attention' or 'resnet', got 'conv'"),
        ({"semantic_projection": None}, "`semantic_projection` must be True or False, got None"),
        ({"semantic_projection": False}, "Without `semantic_projection`, .*code_dim must be 32, got 8"),
        ({"projection_type": "resnet", "pixel_quantizer_config": {"code_dim": 12}}, r"\(8\) must divide .* \(12\)"),
    ],
)
def test_fields_that_do_not_go_together(fields, message):
    with pytest.raises((TypeError, ValueError), match=message):
        tiny_tokenizer_config(**fields)
