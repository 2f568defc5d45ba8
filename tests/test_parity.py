"""The authors' checkpoints: their numbers, golden numbers that agree with theirs, and other layouts of their format.

The authors' numbers stay outside the repository: a miniature of their 384 px layout (8 x 8 positions, a 7 x 7 latent,
four depths, layers 2 / 1 / 5 of 6) with random weights, and what their implementation makes of it in float32 on a CPU
(one evaluation forward; one training forward with its gradients and its moved codebooks). They are read from
`../shared/reference/tokenizer_small` beside the repository, or from the folder `DUALTOKEN_REFERENCE`.

`fixtures/golden_tokenizer.safetensors` is a smaller checkpoint in their format with the same numbers, made by this
project's implementation when it agreed with theirs (`python tests/fixtures/make_golden_tokenizer.py`).
"""

import json
import os
from pathlib import Path

import pytest
import torch
from official_format import (
    EVALUATION,
    INPUTS,
    KINDS,
    TRAINING,
    decoder_fields,
    evaluation_outputs,
    official_fields,
    official_state_dict,
    quantizer_fields,
    random_model,
    siglip_fields,
    training_outputs,
    write_folder,
    write_golden_folder,
)
from safetensors.torch import load_file
from transformers import AutoModel
from transformers.models.auto.image_processing_auto import (
    AutoImageProcessor,
)  # up to 5.17 the short path needs torchvision

from transformers_dualtoken import DualTokenVisionTokenizerConfig, load_official_tokenizer
from transformers_dualtoken.cli import main
from transformers_dualtoken.convert import convert_official_config


BESIDE_THE_REPOSITORY = Path(__file__).parents[2] / "shared" / "reference" / "tokenizer_small"


# --- the authors' numbers and the golden ones ---


@pytest.fixture(scope="module", params=["authors", "golden"])
def numbers(request, tmp_path_factory):
    """A folder in the authors' format, and the inputs and outputs that belong to it."""
    if request.param == "golden":
        folder = tmp_path_factory.mktemp("golden")
        return folder, write_golden_folder(folder)
    folder = Path(os.environ.get("DUALTOKEN_REFERENCE") or BESIDE_THE_REPOSITORY)
    if not folder.is_dir():
        pytest.skip(f"The authors' numbers are not at {folder}; DUALTOKEN_REFERENCE names the folder that holds them.")
    return folder, load_file(folder / "expected.safetensors")


@pytest.fixture(scope="module")
def evaluated(numbers):
    folder, expected = numbers
    return evaluation_outputs(load_official_tokenizer(folder), expected)


@pytest.fixture(scope="module")
def trained(numbers):
    folder, expected = numbers
    return training_outputs(load_official_tokenizer(folder), expected)


def assert_agrees(actual, wanted):
    """Codes identical, everything else within 1e-4 (relative Frobenius norm)."""
    actual = actual.detach()
    assert actual.shape == wanted.shape and actual.dtype == wanted.dtype
    if wanted.dtype == torch.int64:
        assert torch.equal(actual, wanted)
    else:
        assert (actual.double() - wanted.double()).norm() < 1e-4 * wanted.double().norm()


@pytest.mark.parametrize("name", EVALUATION)
def test_evaluation_agrees(evaluated, numbers, name):
    assert_agrees(evaluated[name], numbers[1][name])


@pytest.mark.parametrize("name", TRAINING)
def test_training_agrees(trained, numbers, name):
    assert_agrees(trained[name], numbers[1][name])


def test_every_expected_tensor_is_compared(numbers):
    assert {*INPUTS, *EVALUATION, *TRAINING} == numbers[1].keys()


# --- other checkpoints of their format ---


@pytest.fixture
def write_official(tmp_path):
    """A function of `official_fields` that writes a folder with random weights: returns it and the source model."""

    def write(num_layers=4, change=None, zero_k_bias=True, **overrides):
        fields, siglip = official_fields(**overrides), siglip_fields(num_layers)
        folder = write_folder(tmp_path / "official", fields, None, siglip)
        model = random_model(convert_official_config(folder))
        official = official_state_dict(model, zero_k_bias)
        if change is not None:
            official = change(official) or official
        write_folder(folder, fields, official, siglip)
        return folder, model

    return write


PER_DEPTH = {"shared_codebook": False}
CASES = {
    "default": ({}, {"pixel_layer": 2, "semantic_layer": 3, "shortcut_layer": 1, "decoder_latent_size": 12}),
    "codebook per depth": (
        {"vq_pix": quantizer_fields(**PER_DEPTH), "vq_sem": quantizer_fields(bottleneck_type="rq_ema", **PER_DEPTH)},
        {"pixel": {"shared_codebook": False}, "semantic": {"shared_codebook": False, "ema_vectors": "final"}},
    ),
    "one of each": ({"vq_pix": quantizer_fields(**PER_DEPTH)}, {"semantic": {"shared_codebook": True}}),
    "shortcut key absent": ({"layer_shortcut": ..., "weight_shortcut": ...}, {"shortcut_layer": None}),
    "shortcut null": ({"layer_shortcut": None, "weight_shortcut": None}, {"shortcut_layer": None}),
    "another weight": ({"weight_shortcut": 0.25}, {"shortcut_weight": 0.25}),
    "latent shape absent": ({"decoder_latent_shape": ...}, {"decoder_latent_size": 3, "reconstruction_size": 6}),
    "latent shape null": ({"decoder_latent_shape": None}, {"decoder_latent_size": 3, "reconstruction_size": 6}),
    "other layers": (
        {"num_layers": 6, "layer_recon": 1, "layer_shortcut": 3, "layer_sem": 6},
        {"pixel_layer": 1, "shortcut_layer": 3, "semantic_layer": 6},
    ),
    "other depths": (
        {
            "vq_pix": quantizer_fields(code_shape=[3, 3, 1]),
            "vq_sem": quantizer_fields(bottleneck_type="rq_ema", code_shape=[3, 3, 5], n_embed=16, embed_dim=16),
        },
        {"pixel": {"num_depths": 1}, "semantic": {"num_depths": 5, "codebook_size": 16, "code_dim": 16}},
    ),
    "rq for both": (
        {"vq_sem": quantizer_fields()},
        {kind: {"update_rule": "rq", "ema_vectors": "own"} for kind in KINDS},
    ),
    "rq_ema for both": (
        {"vq_pix": quantizer_fields(bottleneck_type="rq_ema")},
        {kind: {"update_rule": "rq_ema", "ema_vectors": "final"} for kind in KINDS},
    ),
    "restarts and decay": (
        {"vq_pix": quantizer_fields(restart_unused_codes=True, decay=0.99)},
        {"pixel": {"restart_unused_codes": True, "ema_decay": 0.99}, "semantic": {"ema_decay": 0.9}},
    ),
    "values listed per depth": (
        {"vq_pix": quantizer_fields(n_embed=[24, 24, 24], decay=[0.9, 0.9, 0.9])},
        {"pixel": {"codebook_size": 24, "ema_decay": 0.9}},
    ),
    "no block shortcut": ({"ddconfig": decoder_fields(decoder_in_channels=32)}, {"decoder_in_channels": 32}),
    "attention nowhere": ({"ddconfig": decoder_fields(attn_resolutions=[16])}, {"decoder_attention_levels": []}),
    "attention at every level": (
        {"ddconfig": decoder_fields(attn_resolutions=[24, 12])},
        {"decoder_attention_levels": [0, 1]},
    ),
    "another decoder": (
        {"ddconfig": decoder_fields(ch_mult=[1, 2, 3], num_res_blocks=2, attn_resolutions=[12])},
        {"decoder_block_out_channels": [32, 64, 96], "decoder_attention_levels": [1], "reconstruction_size": 48},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_other_checkpoints(write_official, case):
    overrides, config_fields = CASES[case]
    folder, source = write_official(**overrides)
    model = load_official_tokenizer(folder)
    for name, value in config_fields.items():
        if name in KINDS:
            quantizer = model.quantizer(name).config
            assert {key: getattr(quantizer, key) for key in value} == value
        else:
            assert getattr(model.config, name) == value
    state = source.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())

    pixel_values = torch.rand(2, 3, 24, 24) * 2 - 1
    input_ids = torch.randint(3, 64, (3, 8))
    with torch.no_grad():
        output, own = model(pixel_values, input_ids), source(pixel_values, input_ids)
        for key in own.keys():
            assert torch.equal(output[key], own[key]) and torch.all(output[key] == output[key])
        decoded = model.decode(pixel_codes=output.pixel_codes).reconstruction
        # The straight-through sum is rounded, and group norms of these nearly constant maps amplify that.
        assert (decoded - output.reconstruction).norm() < 1e-3 * decoded.norm()
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if "embeddings" in name}
    output = model.train()(pixel_values)
    (output.reconstruction.square().mean() + output.pooler_output.square().mean()).backward()
    for kind in KINDS:
        name = f"{kind}_quantizer.codebook.embeddings"
        assert model.get_buffer(name).isfinite().all() and not torch.equal(model.get_buffer(name), before[name])


def test_names_of_parts_a_layout_may_lack(write_official):
    names = set()
    write_official(change=lambda official: names.update(official), ddconfig=decoder_fields(attn_resolutions=[24, 12]))
    assert {
        "post_quant_conv.nin_shortcut.weight",
        "decoder.up.0.attn.1.proj_out.bias",
        "decoder.up.0.block.0.nin_shortcut.weight",
        "decoder.up.1.upsample.conv.weight",
        "decoder.mid.attn_1.q.weight",
        "prequant_shortcut.attn.zero_k_bias",
    } <= names


def test_wrapped_and_bias_free_checkpoints(write_official):
    def wrap(official):
        return {f"module.{key}": tensor for key, tensor in official.items()}

    folder, source = write_official(change=wrap, zero_k_bias=False)
    state = source.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in load_official_tokenizer(folder).state_dict().items())


def test_siglip_configuration_beside_a_path_of_another_machine(write_official):
    folder, _ = write_official(pretrained_model="/data/models/siglip2-so400m-patch14-384")
    load_official_tokenizer(folder)


def test_checkpoint_in_half_precision_gives_float32(write_official):
    folder, _ = write_official(change=lambda official: {key: tensor.half() for key, tensor in official.items()})
    assert {tensor.dtype for tensor in load_official_tokenizer(folder).state_dict().values()} == {torch.float32}


# --- checkpoints that do not fit ---


def without(key):
    return lambda official: {name: tensor for name, tensor in official.items() if name != key}


def with_tensor(key, tensor):
    return lambda official: {**official, key: tensor}


@pytest.mark.parametrize(
    "change, message",
    [
        (without("prequant_pix.attn.qkv.weight"), "missing 'prequant_pix.attn.qkv.weight'"),
        (without("quantizer_sem.codebooks.2.embed_ema"), "missing 'quantizer_sem.codebooks.2.embed_ema'"),
        (with_tensor("loss.discriminator.weight", torch.ones(2)), "unexpected 'loss.discriminator.weight'"),
        (with_tensor("quantizer_pix.codebooks.3.weight", torch.ones(25, 8)), r"unexpected 'quantizer_pix.codebooks.3"),
        (with_tensor("decoder.conv_out.bias", torch.ones(4)), r"'decoder.conv_out.bias' has shape \(4,\) .* \(3,\)"),
        (
            with_tensor("quantizer_pix.codebooks.0.weight", torch.ones(24, 8)),
            r"'quantizer_pix.codebooks.0.weight' has shape \(24, 8\) instead of \(25, 8\)",
        ),
        (
            with_tensor("quantizer_sem.codebooks.1.weight", torch.ones(25, 8)),
            "'quantizer_sem.codebooks.1.weight' differs from 'quantizer_sem.codebooks.0.weight'",
        ),
        (
            with_tensor("quantizer_pix.codebooks.2.cluster_size_ema", torch.ones(24)),
            "'quantizer_pix.codebooks.2.cluster_size_ema' differs",
        ),
        (
            with_tensor("postquant_sem.attn.zero_k_bias", torch.ones(32)),
            "'postquant_sem.attn.zero_k_bias' is not zero",
        ),
    ],
)
def test_checkpoints_that_do_not_fit(write_official, change, message):
    folder, _ = write_official(change=change)
    with pytest.raises(ValueError, match=message):
        load_official_tokenizer(folder)


def test_all_problems_are_named_at_once(write_official):
    def change(official):
        del official["decoder.conv_in.bias"]
        official["decoder.conv_out.bias"] = torch.ones(1, 1)
        official["lpips.weight"] = torch.ones(1)

    folder, _ = write_official(change=change)
    with pytest.raises(ValueError) as error:
        load_official_tokenizer(folder)
    for name in ("decoder.conv_in.bias", "decoder.conv_out.bias", "lpips.weight"):
        assert name in str(error.value)


def lacking(fields, key):
    return {name: value for name, value in fields.items() if name != key}


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"layer_recon": ...}, "'rqvaesiglip' lacks layer_recon"),
        ({"layer_sem": None}, "'rqvaesiglip' lacks layer_sem"),
        ({"vq_pix": ..., "ddconfig": ...}, "'rqvaesiglip' lacks ddconfig, vq_pix"),
        *(({"vq_pix": lacking(quantizer_fields(), key)}, f"'vq_pix' lacks {key}")
          for key in ("bottleneck_type", "n_embed", "embed_dim", "code_shape", "decay", "shared_codebook")),
        ({"vq_sem": lacking(quantizer_fields(), "restart_unused_codes")}, "'vq_sem' lacks restart_unused_codes"),
        *(({"ddconfig": lacking(decoder_fields(), key)}, f"'ddconfig' lacks {key}")
          for key in ("ch", "ch_mult", "resolution", "attn_resolutions", "num_res_blocks", "decoder_in_channels")),
        ({"vq_pix": quantizer_fields(n_embed=[24, 24, 12])}, r"`vq_pix.n_embed` must be the same at every depth"),
        ({"vq_pix": quantizer_fields(bottleneck_type="vq")}, "must be 'rq' or 'rq_ema', got 'vq'"),
        ({"decoder_latent_shape": [12, 10]}, r"'decoder_latent_shape' must be square, got \[12, 10\]"),
        ({"layer_sem": 5}, "`layer_sem` must lie between 1 and 4.*got 5"),
    ],
)  # fmt: skip
def test_configurations_that_do_not_fit(tmp_path, overrides, message):
    folder = write_folder(tmp_path, official_fields(**overrides), None)
    with pytest.raises(ValueError, match=message):
        load_official_tokenizer(folder)


def test_files_that_are_missing_or_too_many(write_official, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder '.*nowhere' .working directory"):
        load_official_tokenizer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no config.json"):
        load_official_tokenizer(tmp_path)
    folder, model = write_official()
    write_folder(folder, official_fields(), official_state_dict(model), name="epoch_4.pt")
    with pytest.raises(FileNotFoundError, match="exactly one checkpoint .*found epoch_3.pt, epoch_4.pt"):
        load_official_tokenizer(folder)
    for path in folder.glob("*.pt"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="exactly one checkpoint .*found none"):
        load_official_tokenizer(folder)
    torch.save({"model": {}}, folder / "x.pt")
    with pytest.raises(ValueError, match="has no 'state_dict'"):
        load_official_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    with pytest.raises(ValueError, match="not in the authors' format: it has no key 'rqvaesiglip'"):
        load_official_tokenizer(folder)


def test_no_siglip_configuration(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"rqvaesiglip": official_fields(pretrained_model=...)}))
    with pytest.raises(ValueError, match="has no 'pretrained_model', and .*siglip does not exist"):
        load_official_tokenizer(tmp_path)


# --- the command ---


def test_convert_command(tmp_path, write_official, pixel_values, capsys):
    folder, source = write_official()
    output_dir = tmp_path / "converted"
    assert main(["convert", str(folder), str(output_dir)]) == 0
    assert "9 positions" in capsys.readouterr().out
    model = AutoModel.from_pretrained(output_dir)
    assert isinstance(model.config, DualTokenVisionTokenizerConfig)
    assert model.config.semantic_quantizer_config.ema_vectors == "final"
    input_ids = torch.randint(3, 64, (3, 8))
    with torch.no_grad():
        output, own = model(pixel_values, input_ids), source(pixel_values, input_ids)
    assert output.keys() == own.keys() and all(torch.equal(output[key], own[key]) for key in own.keys())
    processor = AutoImageProcessor.from_pretrained(output_dir, backend="pil")
    assert (processor.size["height"], processor.size["width"]) == (24, 24)

    assert main(["convert", str(folder), str(output_dir)]) == 1
    assert "is not empty" in capsys.readouterr().err


def test_convert_command_reports_errors_in_one_line(tmp_path, write_official, capsys):
    folder, _ = write_official(change=without("decoder.conv_in.bias"))
    assert main(["convert", str(folder), str(tmp_path / "a")]) == 1
    assert "missing 'decoder.conv_in.bias'" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "nowhere"), str(tmp_path / "b")]) == 1
    assert "There is no folder" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    folder, _ = write_official()
    assert main(["convert", str(folder), str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err.startswith("dualtoken: ")
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
