"""The authors' checkpoints: one of theirs with the numbers of their code, and others of their format.

`fixtures/official_tokenizer/` is a miniature of the authors' 384 px layout (8 x 8 positions, a 7 x 7 latent, four
depths, layers 2 / 1 / 5 of 6) with random weights, and what their implementation makes of it in float32 on a CPU: one
evaluation forward, and one training forward with its gradients and its moved codebooks. Numbers only.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModel, SiglipConfig

from transformers_dualtoken import DualTokenVisionTokenizer, DualTokenVisionTokenizerConfig, load_official_tokenizer
from transformers_dualtoken.cli import main
from transformers_dualtoken.convert import convert_official_config, official_key


OFFICIAL = Path(__file__).parent / "fixtures" / "official_tokenizer"
KINDS = ("pixel", "semantic")


# --- the authors' numbers ---


@pytest.fixture(scope="module")
def expected():
    return load_file(OFFICIAL / "expected.safetensors")


@pytest.fixture(scope="module")
def evaluated(expected):
    """Our evaluation forward under the names of the expected tensors."""
    model = load_official_tokenizer(OFFICIAL)
    with torch.no_grad():
        output = model(expected["pixel_values"], expected["input_ids"])
        return {
            **output,
            "decoded_from_pixel_codes": model.decode(pixel_codes=output.pixel_codes).reconstruction,
            "hidden_state_recon": output.pixel_hidden_state,
            "hidden_state_sem": output.semantic_hidden_state,
            "hidden_state_last": output.last_hidden_state,
            **{
                f"{kind}_code_embeds_with_depth": model.quantizer(kind).embed_codes_with_depth(output[f"{kind}_codes"])
                for kind in KINDS
            },
        }


@pytest.fixture(scope="module")
def trained(expected):
    """Our training forward and backward under the names of the expected tensors."""
    model = load_official_tokenizer(OFFICIAL).train()
    output = model(expected["pixel_values"])
    # The authors' probe: what each branch ends in, and the commitments.
    loss = output.reconstruction.square().mean() + output.pooler_output.square().mean()
    loss = loss + output.pixel_commitment_loss + output.semantic_commitment_loss
    loss.backward()
    named = {"train_probe_loss": loss, "train_reconstruction": output.reconstruction}
    for kind in KINDS:
        codebook = model.quantizer(kind).codebook
        named[f"train_{kind}_codes"] = output[f"{kind}_codes"]
        named[f"train_{kind}_commitment_loss"] = output[f"{kind}_commitment_loss"]
        named[f"train_{kind}_codebook_after"] = codebook.embeddings
        named[f"train_{kind}_cluster_size_after"] = codebook.cluster_size
    levels = len(model.config.decoder_block_out_channels)
    for name, parameter in model.named_parameters():
        named[f"grad/{official_key(name, levels)}"] = parameter.grad
    return named


EVALUATION = [
    "pixel_codes",
    "semantic_codes",
    "pixel_quantized",
    "pixel_code_embeds_with_depth",
    "semantic_code_embeds_with_depth",
    "semantic_features",
    "hidden_state_recon",
    "hidden_state_sem",
    "hidden_state_last",
    "pooler_output",
    "image_embeds",
    "text_embeds",
    "reconstruction",
    "pixel_commitment_loss",
    "semantic_commitment_loss",
]
TRAINING = [
    "train_pixel_codes",
    "train_semantic_codes",
    "train_reconstruction",
    "train_pixel_commitment_loss",
    "train_semantic_commitment_loss",
    "train_probe_loss",
    "train_pixel_codebook_after",
    "train_pixel_cluster_size_after",
    "train_semantic_codebook_after",
    "train_semantic_cluster_size_after",
    "grad/decoder.conv_out.weight",
    "grad/prequant_pix.proj.weight",
    "grad/prequant_sem.attn.qkv.weight",
    "grad/siglip_model.vision_model.embeddings.patch_embedding.weight",
    "grad/siglip_model.vision_model.encoder.layers.0.mlp.fc1.weight",
]


def assert_agrees(actual, wanted):
    """Codes identical, everything else within 1e-4 (relative Frobenius norm)."""
    actual = actual.detach()
    assert actual.shape == wanted.shape and actual.dtype == wanted.dtype
    if wanted.dtype == torch.int64:
        assert torch.equal(actual, wanted)
    else:
        assert (actual.double() - wanted.double()).norm() < 1e-4 * wanted.double().norm()


@pytest.mark.parametrize("name", EVALUATION)
def test_evaluation_equals_the_authors(evaluated, expected, name):
    assert_agrees(evaluated[name], expected[name])


def test_image_from_codes_alone_equals_the_authors(evaluated, expected):
    # Theirs equals their reconstruction to 2e-6 and is not stored a second time.
    assert_agrees(evaluated["decoded_from_pixel_codes"], expected["reconstruction"])


@pytest.mark.parametrize("name", TRAINING)
def test_training_equals_the_authors(trained, expected, name):
    assert_agrees(trained[name], expected[name])


def test_every_expected_tensor_is_compared(expected):
    assert set(EVALUATION) | set(TRAINING) | {"pixel_values", "input_ids"} == expected.keys()


# --- other checkpoints of their format ---


def quantizer_fields(**overrides):
    return {
        "bottleneck_type": "rq",
        "code_shape": [3, 3, 3],
        "latent_shape": [3, 3, 8],
        "decay": 0.9,
        "embed_dim": 8,
        "n_embed": 24,
        "restart_unused_codes": False,
        "shared_codebook": True,
        "ckpt_path": None,
        **overrides,
    }


def decoder_fields(**overrides):
    return {
        "attn_resolutions": [12],
        "ch": 32,
        "ch_mult": [1, 2],
        "decoder_in_channels": 64,
        "num_res_blocks": 1,
        "resolution": 24,
        "in_channels": 3,
        "out_ch": 3,
        "dropout": 0.0,
        "double_z": False,
        **overrides,
    }


def official_fields(**overrides):
    """`rqvaesiglip` of a 24 px tokenizer with 3 x 3 positions; fields given as `...` are left out."""
    fields = {
        "layer_recon": 2,
        "layer_sem": 3,
        "layer_shortcut": 1,
        "weight_shortcut": 0.6,
        "ddconfig": decoder_fields(),
        "decoder_latent_shape": [12, 12],
        "vq_pix": quantizer_fields(),
        "vq_sem": quantizer_fields(bottleneck_type="rq_ema"),
        "pretrained_model": "siglip",
        **overrides,
    }
    return {key: value for key, value in fields.items() if value is not ...}


def siglip_fields(num_layers=4):
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    text = {"num_hidden_layers": 1, "vocab_size": 64, "max_position_embeddings": 8, "projection_size": 32}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = {"num_hidden_layers": num_layers, "image_size": 24, "patch_size": 8}
    return SiglipConfig(vision_config={**tower, **vision}, text_config={**tower, **text, **ids}).to_dict()


def official_state_dict(model, zero_k_bias=True) -> dict[str, torch.Tensor]:
    """A model's weights as the authors' code would save them."""
    levels = len(model.config.decoder_block_out_channels)
    official = {}
    for name, tensor in model.state_dict().items():
        if ".codebook." in name:
            continue
        key = official_key(name, levels)
        # Their attention over pixels is made of 1 x 1 convolutions.
        is_pixel_attention = "attentions" in name and name.endswith("weight") and tensor.ndim == 2
        official[key] = (tensor[:, :, None, None] if is_pixel_attention else tensor).clone()
        if zero_k_bias and key.endswith("attn.q_bias"):
            official[key.replace("q_bias", "zero_k_bias")] = torch.zeros_like(tensor)
    for kind, short in (("pixel", "pix"), ("semantic", "sem")):
        codebook, depths = model.quantizer(kind).codebook, model.quantizer(kind).config.num_depths
        for depth in range(depths):
            book = depth if len(codebook.embeddings) > 1 else 0
            prefix = f"quantizer_{short}.codebooks.{depth}."
            official[prefix + "weight"] = F.pad(codebook.embeddings[book], (0, 0, 0, 1))
            official[prefix + "cluster_size_ema"] = codebook.cluster_size[book].clone()
            official[prefix + "embed_ema"] = codebook.embedding_sum[book].clone()
    return official


def write_folder(folder, fields, official, num_layers=4, name="epoch_3.pt"):
    (folder / "siglip").mkdir(parents=True, exist_ok=True)
    (folder / "siglip" / "config.json").write_text(json.dumps(siglip_fields(num_layers)))
    (folder / "config.json").write_text(json.dumps({"rqvaesiglip": fields}))
    if official is not None:
        torch.save({"epoch": 3, "name": "x", "state_dict": official}, folder / name)
    return folder


def random_model(config):
    torch.manual_seed(0)
    model = DualTokenVisionTokenizer(config)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.normal_(std=0.2)
        for kind in KINDS:
            codebook = model.quantizer(kind).codebook
            codebook.embeddings.normal_()
            codebook.cluster_size.uniform_(1, 3)
            codebook.embedding_sum.copy_(codebook.embeddings * codebook.cluster_size[..., None])
    return model.eval()


@pytest.fixture
def write_official(tmp_path):
    """A function of `official_fields` that writes a folder with random weights: returns it and the source model."""

    def write(num_layers=4, change=None, zero_k_bias=True, **overrides):
        folder = write_folder(tmp_path / "official", official_fields(**overrides), None, num_layers)
        model = random_model(convert_official_config(folder))
        official = official_state_dict(model, zero_k_bias)
        if change is not None:
            official = change(official) or official
        write_folder(folder, official_fields(**overrides), official, num_layers)
        return folder, model

    return write


PER_DEPTH = {"shared_codebook": False}
CASES = {
    "as in the fixture": ({}, {"pixel_layer": 2, "semantic_layer": 3, "shortcut_layer": 1, "decoder_latent_size": 12}),
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


def test_names_of_parts_the_fixture_lacks(write_official):
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
        ({"vq_pix": quantizer_fields(n_embed=[24, 24, 12])}, r"vq_pix: 'n_embed' must be the same at every depth"),
        ({"vq_pix": quantizer_fields(bottleneck_type="vq")}, "must be 'rq' or 'rq_ema', got 'vq'"),
        ({"decoder_latent_shape": [12, 10]}, r"'decoder_latent_shape' must be square, got \[12, 10\]"),
        ({"layer_sem": 5}, "`semantic_layer` must lie between 1 and 4.*got 5"),
    ],
)  # fmt: skip
def test_configurations_that_do_not_fit(tmp_path, overrides, message):
    folder = write_folder(tmp_path, official_fields(**overrides), None)
    with pytest.raises(ValueError, match=message):
        load_official_tokenizer(folder)


def test_files_that_are_missing_or_too_many(write_official, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no config.json"):
        load_official_tokenizer(tmp_path / "nowhere")
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


def test_convert_command(tmp_path, expected, evaluated, capsys):
    output_dir = tmp_path / "converted"
    assert main(["convert", str(OFFICIAL), str(output_dir)]) == 0
    assert "64 positions" in capsys.readouterr().out
    model = AutoModel.from_pretrained(output_dir)
    assert isinstance(model.config, DualTokenVisionTokenizerConfig)
    assert model.config.semantic_quantizer_config.ema_vectors == "final"
    with torch.no_grad():
        output = model(expected["pixel_values"], expected["input_ids"])
    assert all(torch.equal(output[key], evaluated[key]) for key in output.keys())
    processor = AutoImageProcessor.from_pretrained(output_dir, backend="pil")
    assert (processor.size["height"], processor.size["width"]) == (112, 112)

    assert main(["convert", str(OFFICIAL), str(output_dir)]) == 1
    assert "is not empty" in capsys.readouterr().err


def test_convert_command_reports_errors_in_one_line(tmp_path, write_official, capsys):
    folder, _ = write_official(change=without("decoder.conv_in.bias"))
    assert main(["convert", str(folder), str(tmp_path / "a")]) == 1
    assert "missing 'decoder.conv_in.bias'" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "nowhere"), str(tmp_path / "b")]) == 1
    assert "holds no config.json" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["convert", str(OFFICIAL), str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err.startswith("dualtoken: ")
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
