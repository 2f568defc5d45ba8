"""The vision tokenizer's calls: what they return, compute, accept and refuse."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from tiny_models import layout_of_2025, tiny_quantizer_fields, tiny_tokenizer_config
from transformers import AutoConfig, AutoModel, SiglipConfig, SiglipModel, SiglipVisionConfig

from transformers_dualtoken import (
    DualTokenEncoderOutput,
    DualTokenQuantizerConfig,
    DualTokenVisionTokenizer,
    DualTokenVisionTokenizerConfig,
)


KINDS = ("pixel", "semantic")
INPUT_IDS = torch.tensor([[5, 6, 2, 0, 0, 0, 0, 0], [7, 8, 9, 2, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0, 0, 0]])

# Every way a tokenizer's architecture can differ from the default.
LAYOUTS = {
    "default": {},
    "no shortcut": {"shortcut_layer": None},
    "codebook per depth": {
        f"{kind}_quantizer_config": tiny_quantizer_fields(shared_codebook=False) for kind in ("pixel", "semantic")
    },
    "semantic layer is the last": {"semantic_layer": 4},
    "pixel layer is the semantic": {"pixel_layer": 3},
    "all in the last layer": {"pixel_layer": 4, "semantic_layer": 4, "shortcut_layer": 4},
    "shortcut above the pixel layer": {"pixel_layer": 1, "shortcut_layer": 2},
    "latent of the grid's size": {"decoder_latent_size": 3},
    "decoder as wide as the encoder": {"decoder_in_channels": 32},
    "attention at no level": {"decoder_attention_levels": []},
    "quantisers that differ": {
        "pixel_quantizer_config": tiny_quantizer_fields(num_depths=2, codebook_size=12, code_dim=4),
        "semantic_quantizer_config": tiny_quantizer_fields(num_depths=1, code_dim=16),
    },
    "projections of residual blocks": {"projection_type": "resnet"},
    "layout of 2025": layout_of_2025(),
}


def all_equal(first, second) -> bool:
    """Two model outputs have the same fields, bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first.keys())


# --- outputs ---


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes_and_dtypes(make_tokenizer, pixel_values, layout):
    model = make_tokenizer(**LAYOUTS[layout])
    config = model.config
    output = model(pixel_values, INPUT_IDS)
    expected = {
        "semantic_features": (2, 9, 32),
        "last_hidden_state": (2, 9, 32),
        "pooler_output": (2, 32),
        "pixel_hidden_state": (2, 9, 32),
        "semantic_hidden_state": (2, 9, 32),
        "reconstruction": (2, 3, config.reconstruction_size, config.reconstruction_size),
        "image_embeds": (2, 32),
        "text_embeds": (3, 32),
        "logits_per_image": (2, 3),
        "logits_per_text": (3, 2),
    }
    for kind in KINDS:
        quantizer = model.quantizer(kind).config
        expected[f"{kind}_codes"] = (2, 3, 3, quantizer.num_depths)
        expected[f"{kind}_quantized"] = (2, 9, quantizer.code_dim)
        expected[f"{kind}_commitment_loss"] = ()
    assert {key: tuple(value.shape) for key, value in output.items()} == expected
    for key, value in output.items():
        assert value.dtype == (torch.int64 if key.endswith("_codes") else torch.float32), key
        assert value.dtype == torch.int64 or value.isfinite().all(), key
    for kind in KINDS:
        assert 0 <= output[f"{kind}_codes"].min() <= output[f"{kind}_codes"].max()
        assert output[f"{kind}_codes"].max() < model.quantizer(kind).config.codebook_size
        sums = model.quantizer(kind).embed_codes(output[f"{kind}_codes"]).flatten(1, 2)
        torch.testing.assert_close(output[f"{kind}_quantized"], sums)

    encoded = model.encode(pixel_values)
    assert all(torch.equal(encoded[key], output[key]) for key in encoded.keys())
    from_codes = model.decode(pixel_codes=encoded.pixel_codes).reconstruction
    from_sums = model.decode(pixel_quantized=encoded.pixel_quantized).reconstruction
    torch.testing.assert_close(from_codes, from_sums, rtol=1e-4, atol=1e-5)
    assert torch.equal(from_sums, output.reconstruction)


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pixel_codes_alone_run_nothing_deeper(make_tokenizer, pixel_values, layout):
    model = make_tokenizer(**LAYOUTS[layout])
    full = model.encode(pixel_values)
    ran = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    encoded = model.encode(pixel_values, codes=("pixel",))
    assert set(encoded.keys()) == {
        "pixel_codes",
        "pixel_quantized",
        "pixel_commitment_loss",
        "pixel_hidden_state",
    }
    assert all(torch.equal(encoded[key], full[key]) for key in encoded.keys())
    deepest = max(model.config.pixel_layer, model.config.shortcut_layer or 1)
    prefix = "siglip.vision_model.encoder.layers."
    layers = {int(name.removeprefix(prefix)) for name in ran if name.removeprefix(prefix).isdigit()}
    assert layers == set(range(deepest))
    deeper = ("semantic_", "pixel_up_proj", "decoder", "post_quantizer_block")
    towers = ("siglip.text_model", "siglip.vision_model.head", "siglip.vision_model.post_layernorm")
    assert not [name for name in ran if name.startswith(deeper + towers)]


@torch.no_grad()
def test_semantic_codes_alone(tokenizer, pixel_values):
    full = tokenizer.encode(pixel_values)
    encoded = tokenizer.encode(pixel_values, codes="semantic")
    assert not [key for key in encoded.keys() if key.startswith("pixel")]
    assert all(torch.equal(encoded[key], full[key]) for key in encoded.keys())
    codes_only = tokenizer.encode(pixel_values, codes=("semantic",), features=False)
    assert codes_only.pooler_output is None and codes_only.semantic_features is None
    assert torch.equal(codes_only.semantic_codes, full.semantic_codes)


@torch.no_grad()
def test_images_do_not_depend_on_their_batch(tokenizer, pixel_values):
    together = tokenizer.encode(pixel_values)
    for index in range(2):
        alone = tokenizer.encode(pixel_values[index : index + 1])
        for kind in KINDS:
            assert torch.equal(alone[f"{kind}_codes"][0], together[f"{kind}_codes"][index])
        torch.testing.assert_close(alone.pooler_output[0], together.pooler_output[index])


@torch.no_grad()
@pytest.mark.parametrize("weight", [0.0, 0.6, 2.0])
def test_latent_formula(make_tokenizer, pixel_values, weight):
    # z_pix = P_pix(h_2) + weight P_short(h_1), z_sem = P_sem(h_3), with h_i from SigLIP's own forward.
    model = make_tokenizer(shortcut_weight=weight)
    hidden = model.siglip.vision_model(pixel_values, output_hidden_states=True).hidden_states
    pixel = model.pixel_down_proj(hidden[2]) + weight * model.shortcut_down_proj(hidden[1])
    encoded = model.encode(pixel_values)
    assert torch.equal(model.pixel_quantizer(pixel).codes, encoded.pixel_codes.flatten(1, 2))
    semantic = model.semantic_quantizer(model.semantic_down_proj(hidden[3]))
    assert torch.equal(semantic.codes, encoded.semantic_codes.flatten(1, 2))
    assert torch.equal(hidden[2], encoded.pixel_hidden_state)
    assert torch.equal(hidden[3], encoded.semantic_hidden_state)
    # What follows is SigLIP with its hidden state replaced.
    with_features = model.siglip.vision_model.encoder.layers[3](encoded.semantic_features, attention_mask=None)
    assert torch.equal(with_features, encoded.last_hidden_state)


@torch.no_grad()
def test_forward_logits(tokenizer, pixel_values):
    tokenizer.siglip.logit_scale.fill_(1.5)
    tokenizer.siglip.logit_bias.fill_(-2.0)
    output = tokenizer(pixel_values, INPUT_IDS)
    image = F.normalize(tokenizer.encode(pixel_values).pooler_output, dim=-1)
    text = F.normalize(tokenizer.siglip.get_text_features(INPUT_IDS, return_dict=True).pooler_output, dim=-1)
    expected = image @ text.T * torch.tensor(1.5).exp() - 2.0
    torch.testing.assert_close(output.logits_per_image, expected)
    torch.testing.assert_close(output.logits_per_text, expected.T)
    assert tokenizer(pixel_values).get("logits_per_image") is None


@torch.no_grad()
def test_image_and_text_features(tokenizer, pixel_values):
    text = tokenizer.get_text_features(INPUT_IDS)
    own = tokenizer.siglip.get_text_features(INPUT_IDS)
    assert torch.equal(text.pooler_output, own.pooler_output)
    assert torch.equal(text.last_hidden_state, own.last_hidden_state)
    image = tokenizer.get_image_features(pixel_values)
    encoded = tokenizer.encode(pixel_values)
    assert torch.equal(image.pooler_output, encoded.pooler_output)
    normed = tokenizer.siglip.vision_model.post_layernorm(encoded.last_hidden_state)
    assert torch.equal(image.last_hidden_state, normed)
    as_tuple = tokenizer.get_image_features(pixel_values, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[1], image.pooler_output)


@torch.no_grad()
def test_a_mask_says_where_texts_end_and_the_text_tower_sees_them_padded_as_in_training(tokenizer, pixel_values):
    """SigLIP attends its padding: what a tokenizer returns by default must not give other features."""
    expected = tokenizer.get_text_features(INPUT_IDS).pooler_output
    rows = [[5, 6, 2], [7, 8, 9, 2], [3, 2]]
    length = max(map(len, rows))
    for left in (False, True):
        for pad in (0, 61):  # whatever the padding is written with
            ids = [[pad] * (length - len(row)) + row if left else row + [pad] * (length - len(row)) for row in rows]
            mask = [
                [0] * (length - len(row)) + [1] * len(row) if left else [1] * len(row) + [0] * (length - len(row))
                for row in rows
            ]
            ids, mask = torch.tensor(ids), torch.tensor(mask)
            assert torch.equal(tokenizer.get_text_features(ids, attention_mask=mask).pooler_output, expected)
            logits = tokenizer(pixel_values, ids, attention_mask=mask).logits_per_image
            assert torch.equal(logits, tokenizer(pixel_values, INPUT_IDS).logits_per_image)


def test_hidden_states_and_attentions_are_recorded_where_asked(pixel_values):
    model = DualTokenVisionTokenizer._from_config(tiny_tokenizer_config(), attn_implementation="eager").eval()
    rows = len(pixel_values)
    plain = model(pixel_values)
    assert plain.hidden_states is None and plain.attentions is None
    wanted = {"output_hidden_states": True, "output_attentions": True}
    for output in (model.encode(pixel_values, **wanted), model(pixel_values, INPUT_IDS, **wanted)):
        assert [state.shape for state in output.hidden_states] == [(rows, 9, 32)] * 5
        assert [weights.shape for weights in output.attentions] == [(rows, 4, 9, 9)] * 4
        assert torch.equal(output.hidden_states[2], output.pixel_hidden_state)
        assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
        assert torch.equal(output.pixel_codes, plain.pixel_codes)
    shallow = model.encode(pixel_values, codes="pixel", output_hidden_states=True)
    assert len(shallow.hidden_states) == 3 and shallow.attentions is None
    model.config.output_hidden_states = True
    assert len(model.encode(pixel_values).hidden_states) == len(model(pixel_values).hidden_states) == 5
    assert model(pixel_values, output_hidden_states=False).hidden_states is None
    assert len(model.get_image_features(pixel_values).hidden_states) == 5
    # A config that asks for tuples means what is returned, not what is used inside.
    model.config.return_dict = False
    assert isinstance(model(pixel_values), tuple)
    assert isinstance(model.encode(pixel_values), DualTokenEncoderOutput)


def test_padding_of_siglip_2_where_its_folder_says_nothing():
    assert DualTokenVisionTokenizerConfig().text_config.pad_token_id == 0
    fields = tiny_tokenizer_config().to_dict()
    fields["text_config"] |= {"vocab_size": 256000, "pad_token_id": 1}
    assert DualTokenVisionTokenizerConfig(**fields).text_config.pad_token_id == 0
    fields["text_config"] |= {"vocab_size": 32000}
    assert DualTokenVisionTokenizerConfig(**fields).text_config.pad_token_id == 1


@torch.no_grad()
@pytest.mark.parametrize("arguments", [{}, {"input_ids": INPUT_IDS}])
def test_fields_and_tuples_come_in_the_declared_order(tokenizer, pixel_values, arguments):
    def declared(output):
        names = [field.name for field in dataclasses.fields(output)]
        return [name for name in names if getattr(output, name) is not None]

    output = tokenizer(pixel_values, **arguments)
    assert list(output.keys()) == declared(output) and list(output.keys())[0] == "last_hidden_state"
    as_tuple = tokenizer(pixel_values, **arguments, return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == len(output) == (16 if arguments else 13)
    assert all(torch.equal(value, output[name]) for name, value in zip(declared(output), as_tuple))
    for codes in (KINDS, ("semantic", "pixel"), ("semantic",), ("pixel",)):
        encoded = tokenizer.encode(pixel_values, codes=codes)
        assert list(encoded.keys()) == declared(encoded)


# --- the up-projection is causal ---


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_up_projection_is_causal_and_the_down_projection_is_not(tokenizer, kind):
    up, down = getattr(tokenizer, f"{kind}_up_proj"), getattr(tokenizer, f"{kind}_down_proj")
    for projection, width, causal in ((up, 8, True), (down, 32, False)):
        x = torch.randn(2, 9, width)
        changed = x.clone()
        changed[:, 5:] += torch.randn(2, 4, width)
        same = torch.isclose(projection(x), projection(changed), rtol=1e-5, atol=1e-6).all(-1)
        assert same[:, :5].all() == causal
        assert not same[:, 5:].any()


@torch.no_grad()
def test_projection_formula(tokenizer):
    """The attention projection against loops over heads and positions, with the paper's symbols."""
    for projection, width, causal in ((tokenizer.pixel_down_proj, 32, False), (tokenizer.pixel_up_proj, 8, True)):
        for parameter in projection.parameters():
            parameter.normal_(std=0.3)
        x = torch.randn(5, width)
        attention, n = projection.attn, projection.norm1(x)
        queries, keys, values = (n @ attention.qkv.weight.T).chunk(3, dim=-1)
        queries, values = queries + attention.q_bias, values + attention.v_bias
        heads = []
        for head in range(4):
            part = slice(head * 8, head * 8 + 8)
            rows = []
            for position in range(5):
                seen = position + 1 if causal else 5
                weights = (keys[:seen, part] @ queries[position, part] / 8**0.5).softmax(0)
                rows.append(weights @ values[:seen, part])
            heads.append(torch.stack(rows))
        context = torch.cat(heads, dim=-1) if causal else sum(heads) / 4
        y = projection.proj(projection.norm3(x)) + attention.out_proj(context)
        mlp = projection.mlp
        m = mlp.norm(projection.norm2(y))
        y = y + mlp.down_proj(F.gelu(mlp.gate_proj(m), approximate="tanh") * mlp.up_proj(m))
        torch.testing.assert_close(projection(x[None])[0], y, rtol=1e-4, atol=1e-5)
        assert [projection.norm1.eps, projection.norm2.eps, projection.norm3.eps, mlp.norm.eps] == [1e-5] * 3 + [1e-6]
        assert attention.qkv.bias is None and mlp.gate_proj.out_features == 2 * projection.proj.out_features


# --- gradients ---


def test_gradient_of_the_reconstruction_reaches_the_encoder(tokenizer, pixel_values):
    encoded = tokenizer.encode(pixel_values)
    tokenizer.decode(pixel_quantized=encoded.pixel_quantized).reconstruction.square().mean().backward()
    touched = {name for name, parameter in tokenizer.named_parameters() if parameter.grad is not None}
    for name in (
        "siglip.vision_model.embeddings.patch_embedding.weight",
        "siglip.vision_model.encoder.layers.1.mlp.fc1.weight",
        "pixel_down_proj.attn.qkv.weight",
        "shortcut_down_proj.attn.qkv.weight",
        "pixel_up_proj.proj.weight",
        "post_quantizer_block.conv1.weight",
        "decoder.conv_out.weight",
    ):
        assert name in touched and tokenizer.get_parameter(name).grad.abs().max() > 0
    assert not [name for name in touched if name.startswith(("semantic", "siglip.vision_model.encoder.layers.2"))]


def training_gradients(model, pixel_values):
    model.train().zero_grad()
    torch.manual_seed(0)  # codes that restart are drawn
    output = model(pixel_values, INPUT_IDS)
    loss = output.reconstruction.square().mean() + output.logits_per_image.square().mean()
    (loss + output.pixel_commitment_loss + output.semantic_commitment_loss).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")  # renamed in a later transformers than our floor
def test_gradient_checkpointing_gives_equal_gradients_and_codebooks(make_tokenizer, pixel_values):
    plain, checkpointed = make_tokenizer(), make_tokenizer()
    checkpointed.gradient_checkpointing_enable()
    assert checkpointed.is_gradient_checkpointing
    expected, actual = training_gradients(plain, pixel_values), training_gradients(checkpointed, pixel_values)
    assert expected.keys() == actual.keys() and len(expected) > 100
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-7, msg=name)
    for name, buffer in plain.named_buffers():  # a recomputed forward must not move the EMA twice
        assert torch.equal(checkpointed.get_buffer(name), buffer), name


@torch.no_grad()
def test_eager_equals_sdpa(make_tokenizer, pixel_values):
    model = make_tokenizer()
    assert model.config._attn_implementation == "sdpa"
    sdpa = model(pixel_values, INPUT_IDS)
    model.set_attn_implementation("eager")
    assert model.siglip.vision_model.config._attn_implementation == "eager"
    eager = model(pixel_values, INPUT_IDS)
    for key in sdpa.keys():
        torch.testing.assert_close(eager[key], sdpa[key], rtol=1e-4, atol=1e-5)


def test_training_mode_moves_the_codebooks_and_eval_mode_never(tokenizer, pixel_values):
    before = {name: buffer.clone() for name, buffer in tokenizer.named_buffers() if "codebook" in name}
    tokenizer.eval()(pixel_values)
    assert all(torch.equal(tokenizer.get_buffer(name), value) for name, value in before.items())
    tokenizer.train().encode(pixel_values, codes=("pixel",))
    moved = {name for name, value in before.items() if not torch.equal(tokenizer.get_buffer(name), value)}
    assert moved and all(name.startswith("pixel_quantizer") for name in moved)


# --- saving and loading ---


def without_dtype(config) -> dict:
    """A config's fields; transformers notes the weights' dtype and origin in them on loading and saving."""

    def clean(fields):
        noted = ("dtype", "_name_or_path", "architectures", "transformers_version")
        return {k: clean(v) if isinstance(v, dict) else v for k, v in fields.items() if k not in noted}

    return clean(config.to_dict())


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
def test_save_and_load_bit_for_bit(make_tokenizer, pixel_values, tmp_path, layout):
    model = make_tokenizer(**LAYOUTS[layout])
    expected = model(pixel_values, INPUT_IDS)
    model.save_pretrained(tmp_path)
    loaded, info = DualTokenVisionTokenizer.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(AutoModel.from_pretrained(tmp_path)) is DualTokenVisionTokenizer
    assert without_dtype(AutoConfig.from_pretrained(tmp_path)) == without_dtype(loaded.config)
    assert without_dtype(loaded.config) == without_dtype(model.config)
    state = model.state_dict()
    assert state.keys() == loaded.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    assert not loaded.training and all_equal(loaded(pixel_values, INPUT_IDS), expected)


@torch.no_grad()
def test_load_from_the_meta_device_by_hand(tokenizer, pixel_values):
    with torch.device("meta"):
        model = DualTokenVisionTokenizer(tiny_tokenizer_config())
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    model.load_state_dict(tokenizer.state_dict(), assign=True)
    # The position ids are the only buffers outside a checkpoint.
    for tower in ("text_model", "vision_model"):
        embeddings, own = (getattr(x.siglip, tower).embeddings for x in (model, tokenizer))
        embeddings.position_ids = own.position_ids.clone()
    assert all_equal(model.eval()(pixel_values), tokenizer(pixel_values))


def test_new_codebooks_start_with_empty_statistics_or_as_they_are():
    for restart in (True, False):
        fields = tiny_quantizer_fields(restart_unused_codes=restart)
        model = DualTokenVisionTokenizer(tiny_tokenizer_config(pixel_quantizer_config=fields))
        codebook = model.pixel_quantizer.codebook
        assert 0.01 < codebook.embeddings.std() < 0.03
        if restart:
            assert not codebook.cluster_size.any() and not codebook.embedding_sum.any()
        else:
            assert torch.all(codebook.cluster_size == 1)
            assert torch.equal(codebook.embedding_sum, codebook.embeddings)


# --- the start of training ---


@pytest.fixture
def siglip_checkpoint(tmp_path):
    config = tiny_tokenizer_config()
    siglip = SiglipModel(SiglipConfig(vision_config=config.vision_config, text_config=config.text_config))
    siglip.save_pretrained(tmp_path / "siglip")
    return tmp_path / "siglip", siglip


SMALL_DECODER = {"decoder_block_out_channels": [8, 16], "decoder_in_channels": 16, "decoder_norm_num_groups": 8}


def test_from_siglip_pretrained(siglip_checkpoint):
    path, siglip = siglip_checkpoint
    overrides = {
        "pixel_quantizer_config": {"codebook_size": 24, "code_dim": 8},
        "semantic_quantizer_config": DualTokenQuantizerConfig(codebook_size=30, code_dim=4, num_depths=2),
        "semantic_layer": 4,
        **SMALL_DECODER,
    }
    model = DualTokenVisionTokenizer.from_siglip_pretrained(path, **overrides)
    own = siglip.state_dict()
    assert own.keys() == model.siglip.state_dict().keys()
    assert all(torch.equal(value, own[key]) for key, value in model.siglip.state_dict().items())
    config = model.config
    assert (config.pixel_layer, config.shortcut_layer, config.semantic_layer) == (1, 1, 4)
    assert config.pixel_quantizer_config.num_depths == 4  # 256 px and below
    assert config.semantic_quantizer_config.num_depths == 2
    assert config.pixel_quantizer_config.codebook_size == 24
    assert all(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    low = DualTokenVisionTokenizer.from_siglip_pretrained(
        path, dtype=torch.bfloat16, attn_implementation="eager", **overrides
    )
    assert low.siglip.vision_model.encoder.layers[0].self_attn.config._attn_implementation == "eager"
    assert {parameter.dtype for parameter in low.parameters()} == {torch.bfloat16}
    assert low.pixel_quantizer.codebook.embeddings.dtype == torch.float32


def test_from_siglip_pretrained_refuses(siglip_checkpoint, tmp_path):
    path, siglip = siglip_checkpoint
    with pytest.raises(ValueError, match="No such fields of DualTokenVisionTokenizerConfig: depths, pixle_layer"):
        DualTokenVisionTokenizer.from_siglip_pretrained(path, pixle_layer=2, depths=3)
    config = json.loads((path / "config.json").read_text())
    (tmp_path / "naflex").mkdir()
    (tmp_path / "naflex" / "config.json").write_text(json.dumps({**config, "model_type": "siglip2"}))
    with pytest.raises(ValueError, match="fixed resolution.*is of model type 'siglip2'"):
        DualTokenVisionTokenizer.from_siglip_pretrained(tmp_path / "naflex")
    with pytest.raises(ValueError, match="`semantic_layer` must lie between 1 and 4.*got 9"):
        DualTokenVisionTokenizer.from_siglip_pretrained(path, semantic_layer=9, **SMALL_DECODER)
    with pytest.raises(OSError):
        DualTokenVisionTokenizer.from_siglip_pretrained(tmp_path / "nowhere")


# --- the sizes of the paper ---


def count(module) -> float:
    """Millions of parameters."""
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


def test_paper_layout_builds_on_the_meta_device():
    config = DualTokenVisionTokenizerConfig()
    assert (config.image_size, config.grid_size, config.num_positions) == (384, 27, 729)
    assert (config.decoder_latent_size, config.reconstruction_size) == (24, 384)
    assert (config.pixel_layer, config.shortcut_layer, config.semantic_layer) == (6, 4, 26)
    with torch.device("meta"):
        model = DualTokenVisionTokenizer(config)
    for kind in KINDS:
        assert model.quantizer(kind).codebook.embeddings.shape == (1, 16384, 32)
    for projection in (model.pixel_down_proj, model.semantic_down_proj, model.pixel_up_proj, model.semantic_up_proj):
        assert (projection.attn.num_heads, projection.attn.head_dim) == (36, 32)
    # The towers are google/siglip2-so400m-patch14-384's: 428 M and 708 M (a vocabulary of 256000).
    assert count(model.siglip.vision_model) == pytest.approx(428, abs=1)
    assert count(model.siglip.text_model) == pytest.approx(708, abs=1)
    # Mostly qkv, 1152 x 3456, on the way down; the gated perceptron, 3 x 1152 x 2304, on the way up.
    assert count(model.pixel_down_proj) == pytest.approx(4.03, abs=0.01)
    assert count(model.pixel_up_proj) == pytest.approx(9.45, abs=0.01)
    assert count(model.post_quantizer_block) == pytest.approx(11.80, abs=0.01)
    attentions = [block for block in model.decoder.up_blocks if getattr(block, "attentions", None)]
    assert len(attentions) == 1 and attentions[0] is model.decoder.up_blocks[0]
    assert [len(block.resnets) for block in model.decoder.up_blocks] == [3] * 5
    assert count(model.decoder) == pytest.approx(168.4, abs=0.1)
    # Nothing is shared, and nothing lies outside the named parts.
    assert count(model) == pytest.approx(sum(count(module) for module in model.children()), abs=1e-6)


@pytest.mark.parametrize(
    "layers, expected", [(27, (6, 4, 26)), (24, (6, 4, 23)), (12, (3, 2, 11)), (1, (1, 1, 1)), (2, (1, 1, 1))]
)
def test_layers_for_other_encoders(layers, expected):
    fields = DualTokenVisionTokenizerConfig.layers_for(layers)
    assert (fields["pixel_layer"], fields["shortcut_layer"], fields["semantic_layer"]) == expected


def test_the_256_px_layout():
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision = SiglipVisionConfig(**sizes, image_size=256, patch_size=16).to_dict()
    config = DualTokenVisionTokenizerConfig(vision_config=vision, semantic_layer=23)
    assert (config.grid_size, config.decoder_latent_size, config.reconstruction_size) == (16, 16, 256)


# --- what is refused ---


@pytest.mark.parametrize(
    "bad, message",
    [
        (torch.zeros(2, 3, 32, 32), r"shape \(B, 3, 24, 24\).*got shape \(2, 3, 32, 32\)"),
        (torch.zeros(2, 1, 24, 24), r"got shape \(2, 1, 24, 24\)"),
        (torch.zeros(2, 24, 24, 3), r"got shape \(2, 24, 24, 3\)"),
        (torch.zeros(3, 24, 24), r"got shape \(3, 24, 24\)"),
        (torch.zeros(2, 3, 24, 24, dtype=torch.uint8), "must be a float tensor.*got torch.uint8.*image processor"),
        (torch.zeros(2, 3, 24, 24, dtype=torch.int64), "got torch.int64"),
        (torch.linspace(0, 255, 3 * 24 * 24).view(1, 3, 24, 24), r"in \[-1, 1\], got values from 0 to 255"),
        (torch.full((1, 3, 24, 24), float("nan")), "got values from nan"),
        (torch.full((1, 3, 24, 24), -2.0), "got values from -2 to -2"),
    ],
)
def test_bad_images(tokenizer, bad, message):
    for call in (tokenizer.encode, tokenizer, tokenizer.get_image_features):
        with pytest.raises(ValueError, match=message):
            call(bad)


def test_images_must_be_tensors(tokenizer):
    with pytest.raises(TypeError, match="must be a float tensor of shape.*got list"):
        tokenizer.encode([[0.0]])


@torch.no_grad()
def test_a_little_overshoot_of_resampling_is_accepted(tokenizer, pixel_values):
    tokenizer.encode(pixel_values.clamp(-1, 1) * 1.05)


@pytest.mark.parametrize("codes", [("pixel", "sematic"), "text", (), ("Pixel",)])
def test_unknown_kinds_of_codes(tokenizer, pixel_values, codes):
    with pytest.raises(ValueError, match="`codes` must name 'pixel', 'semantic' or both, got"):
        tokenizer.encode(pixel_values, codes=codes)


@pytest.mark.parametrize(
    "bad, message",
    [
        (torch.full((1, 3, 3, 3), 24), "`pixel_codes` must lie between 0 and 23, got values from 24 to 24"),
        (torch.full((1, 3, 3, 3), -1), "between 0 and 23, got values from -1"),
        (torch.zeros(1, 3, 3, 4, dtype=torch.long), r"3 residual codes on the last axis, got shape \(1, 3, 3, 4\)"),
        (torch.zeros(1, 3, 4, 3, dtype=torch.long), r"shape \(B, 3, 3, 3\), got \(1, 3, 4, 3\)"),
        (torch.zeros(1, 9, 3, dtype=torch.long), r"shape \(B, 3, 3, 3\), got \(1, 9, 3\)"),
        (torch.tensor(3), "residual codes on the last axis"),
        (torch.zeros(1, 3, 3, 3), "`pixel_codes` must be integers, got torch.float32"),
        (torch.zeros(1, 3, 3, 3, dtype=torch.bool), "must be integers, got torch.bool"),
    ],
)
def test_bad_codes(tokenizer, bad, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.decode(pixel_codes=bad)


def test_decode_takes_exactly_one_argument(tokenizer):
    codes, sums = torch.zeros(1, 3, 3, 3, dtype=torch.long), torch.zeros(1, 9, 8)
    for arguments in ({}, {"pixel_codes": codes, "pixel_quantized": sums}):
        with pytest.raises(ValueError, match="exactly one of `pixel_codes` and `pixel_quantized`"):
            tokenizer.decode(**arguments)
    with pytest.raises(ValueError, match=r"`pixel_quantized` must have shape \(B, 9, 8\), got \(1, 8, 8\)"):
        tokenizer.decode(pixel_quantized=sums[:, :8])


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"pixel_layer": 5}, "`pixel_layer` must lie between 1 and 4.*got 5"),
        ({"semantic_layer": 5}, "`semantic_layer` must lie between 1 and 4.*got 5"),
        ({"shortcut_layer": 0}, "`shortcut_layer` must be an integer from 1 .*got 0"),
        ({"pixel_layer": 4}, "must not lie above the semantic layer.*pixel_layer=4"),
        ({"shortcut_layer": 4}, "must not lie above the semantic layer.*shortcut_layer=4"),
        (
            {"pixel_quantizer_config": tiny_quantizer_fields(code_dim=5)},
            r"multiple of pixel_quantizer_config.code_dim",
        ),
        ({"decoder_norm_num_groups": 5}, r"`decoder_norm_num_groups` \(5\) must divide"),
        ({"decoder_attention_levels": [2]}, r"between 0 and 1, got \[2\]"),
        ({"decoder_latent_size": 0}, "`decoder_latent_size` must be an integer from 1"),
        ({"vision_config": {"image_size": 24, "patch_size": 32}}, "patch_size=32 is larger than image_size=24"),
        ({"vision_config": DualTokenQuantizerConfig()}, "`vision_config` must be a SiglipVisionConfig or a dict"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises((ValueError, TypeError), match=message):
        tiny_tokenizer_config(**fields)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"update_rule": "ema"}, "`update_rule` must be 'rq' or 'rq_ema', got 'ema'"),
        ({"ema_vectors": "last"}, "`ema_vectors` must be 'own' or 'final'"),
        ({"update_rule": "rq", "ema_vectors": "final"}, "`ema_vectors='final'` needs `update_rule='rq_ema'`"),
        ({"ema_decay": 1.0}, "`ema_decay` must be a number of at least 0 and below 1, got 1.0"),
        ({"num_depths": 0}, "`num_depths` must be an integer from 1 to 1024, got 0"),
        ({"codebook_size": 0}, "`codebook_size` must be an integer from 1"),
    ],
)
def test_bad_quantizer_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        DualTokenQuantizerConfig(**fields)
