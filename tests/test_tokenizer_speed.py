"""What makes the vision tokenizer fast changes nothing: compiled, channels-last, bfloat16 and sliced calls, attention."""

import os
import shutil

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_tokenizer_config
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from transformers_dualtoken import DualTokenVisionTokenizer, DualTokenVisionTokenizerConfig
from transformers_dualtoken.code_search import nearest_codes


ENCODE_CALLS = {
    "both kinds": {},
    "both kinds, codes alone": {"features": False},
    "pixel codes alone": {"codes": ("pixel",), "features": False},
}


@pytest.fixture
def compiler():
    """`torch.compile` of whole graphs; what it compiled is forgotten afterwards."""
    torch._dynamo.reset()
    yield lambda function, backend, **options: torch.compile(function, backend=backend, fullgraph=True, **options)
    torch._dynamo.reset()


def assert_same(actual, expected, **tolerance):
    """Codes equal, everything else close."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        if key.endswith("_codes"):
            assert torch.equal(actual[key], value), key
        else:
            torch.testing.assert_close(actual[key], value, **tolerance)


# --- compiled ---


@torch.no_grad()
@pytest.mark.parametrize("call", ENCODE_CALLS)
def test_encode_compiles_as_one_graph(tokenizer, pixel_values, compiler, call):
    arguments = ENCODE_CALLS[call]
    expected = tokenizer.encode(pixel_values, **arguments)
    assert_same(compiler(tokenizer.encode, "aot_eager")(pixel_values, **arguments), expected)


@torch.no_grad()
@pytest.mark.parametrize("slice_size", [None, 1])
def test_decode_compiles_as_one_graph(tokenizer, pixel_values, compiler, slice_size):
    encoded = tokenizer.encode(pixel_values, codes=("pixel",))
    decode = compiler(tokenizer.decode, "eager")
    expected = tokenizer.decode(encoded.pixel_codes)
    assert_same(decode(encoded.pixel_codes, slice_size=slice_size), expected, rtol=1e-4, atol=1e-4)
    from_sums = decode(pixel_quantized=encoded.pixel_quantized, slice_size=slice_size)
    assert_same(from_sums, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow  # C++ compilers take their time
@torch.no_grad()
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="Inductor needs a C++ compiler.")
def test_inductor_gives_the_same_codes_and_images(make_tokenizer, pixel_values, compiler):
    tokenizer = make_tokenizer(pixel_layer=1, shortcut_layer=None, decoder_num_res_blocks=0)
    call = {"codes": ("pixel",), "features": False}
    expected = tokenizer.encode(pixel_values, **call)
    assert_same(compiler(tokenizer.encode, "inductor")(pixel_values, **call), expected, rtol=1e-4, atol=1e-4)
    image = compiler(tokenizer.decode, "inductor")(expected.pixel_codes)
    assert_same(image, tokenizer.decode(expected.pixel_codes), rtol=1e-4, atol=1e-4)


def test_compiled_search_is_one_operator_for_every_number_of_vectors(compiler):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    codebook = torch.randn(300, 8)
    search = compiler(nearest_codes, backend, dynamic=True)
    for num_vectors in (9, 700, 5000):  # the last in two chunks
        vectors = torch.randn(num_vectors, 8)
        assert torch.equal(search(vectors, codebook), nearest_codes(vectors, codebook))
    calls = [node.target for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    searches = [call for call in calls if "nearest_codes" in str(call)]
    assert len(graphs) == len(searches) == 1
    assert not [call for call in calls if "mm" in str(call)]


# --- waiting for the device ---


@torch.no_grad()
def test_nothing_but_the_input_checks_waits_for_the_device(tokenizer, monkeypatch):
    # On the meta device whatever needs a value on the host raises: `item`, `tolist`, `nonzero`, masks, copies.
    tokenizer.to("meta")
    pixel_values = torch.empty(2, 3, 24, 24, device="meta")
    codes = torch.empty(2, 3, 3, 3, dtype=torch.int64, device="meta")
    with pytest.raises(NotImplementedError, match="no data"):
        tokenizer.encode(pixel_values)
    with pytest.raises(NotImplementedError, match="no data"):
        tokenizer.decode(codes)
    assert tokenizer.decode(pixel_quantized=torch.empty(2, 9, 8, device="meta")).reconstruction.shape == (2, 3, 24, 24)

    waits = []
    tolist = torch.Tensor.tolist

    def counted(tensor):
        # What `aminmax` gave, and nothing else, may be asked for.
        waits.append(tuple(tensor.shape))
        return tolist(torch.zeros(tensor.shape, dtype=tensor.dtype))

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    for arguments in ENCODE_CALLS.values():
        encoded = tokenizer.encode(pixel_values, **arguments)
        assert encoded.pixel_codes.shape == (2, 3, 3, 3)
    assert waits == [(2,)] * len(ENCODE_CALLS)
    assert tokenizer.decode(codes, slice_size=1).reconstruction.shape == (2, 3, 24, 24)
    assert waits == [(2,)] * (len(ENCODE_CALLS) + 1)


# --- layout, dtype, slices ---


@torch.no_grad()
def test_channels_last(tokenizer, pixel_values, tmp_path):
    encoded = tokenizer.encode(pixel_values)
    image = tokenizer.decode(encoded.pixel_codes).reconstruction
    tokenizer.to(memory_format=torch.channels_last)
    moved = [name for name, value in tokenizer.named_parameters() if value.ndim == 4 and not value.is_contiguous()]
    assert "decoder.conv_in.weight" in moved and "post_quantizer_block.conv2.weight" in moved
    assert_same(tokenizer.encode(pixel_values), encoded)

    maps = {}
    for name, module in tokenizer.named_modules():
        if isinstance(module, torch.nn.Conv2d) and not name.startswith("siglip"):
            module.register_forward_hook(lambda _, args, output, name=name: maps.update({name: (*args, output)}))
    actual = tokenizer.decode(encoded.pixel_codes).reconstruction
    torch.testing.assert_close(actual, image, rtol=1e-4, atol=1e-4)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    for name, (given, output) in maps.items():
        assert output.is_contiguous(memory_format=torch.channels_last), name
        # Some releases of diffusers bring what a shortcut is given into the usual order.
        assert given.is_contiguous(memory_format=torch.channels_last) or name.endswith("conv_shortcut"), name

    tokenizer.save_pretrained(tmp_path)
    loaded = DualTokenVisionTokenizer.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.decode(encoded.pixel_codes).reconstruction, image, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_decoding_in_bfloat16_stays_close(tokenizer, pixel_values):
    codes = tokenizer.encode(pixel_values, codes=("pixel",)).pixel_codes
    image = tokenizer.decode(codes).reconstruction
    tokenizer.to(dtype=torch.bfloat16, memory_format=torch.channels_last)
    half = tokenizer.decode(codes).reconstruction
    assert half.dtype == torch.bfloat16 and tokenizer.quantizer("pixel").codebook.embeddings.dtype == torch.float32
    # PSNR of images in [-1, 1].
    assert 10 * torch.log10(4 / F.mse_loss(half.float(), image)) > 35


@pytest.mark.parametrize("slice_size, expected", [(None, [5]), (1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (9, [5])])
def test_sliced_decoding(tokenizer, slice_size, expected):
    codes = torch.randint(24, (5, 3, 3, 3))
    sums = tokenizer.pixel_quantizer.embed_codes(codes).flatten(1, 2).requires_grad_()
    whole = tokenizer.decode(pixel_quantized=sums).reconstruction
    batches = []
    tokenizer.decoder.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    sliced = tokenizer.decode(pixel_quantized=sums, slice_size=slice_size).reconstruction
    assert batches == expected
    torch.testing.assert_close(sliced, whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tokenizer.decode(codes, slice_size=slice_size).reconstruction, sliced)
    gradients = [torch.autograd.grad(image.square().sum(), sums)[0] for image in (sliced, whole)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("slice_size", [0, -1])
def test_bad_slices(tokenizer, slice_size):
    with pytest.raises(ValueError, match=f"`slice_size` must be at least 1.*got {slice_size}"):
        tokenizer.decode(torch.zeros(1, 3, 3, 3, dtype=torch.int64), slice_size=slice_size)


# --- attention ---


class AttentionCalls(TorchFunctionMode):
    """Notes the mask and the causality of every call of PyTorch's attention."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            self.calls.append((mask is None, kwargs.get("is_causal", False)))
        return function(*args, **kwargs)


@torch.no_grad()
def test_every_attention_is_fused_and_without_a_mask(tokenizer, pixel_values):
    assert tokenizer.config._attn_implementation == "sdpa"
    bidirectional, causal = (True, False), (True, True)
    with AttentionCalls() as encoding:
        codes = tokenizer.encode(pixel_values).pixel_codes
    # Layers 1 to 3, three down-projections, the semantic up-projection, layer 4.
    assert encoding.calls[:8] == [bidirectional] * 6 + [causal, bidirectional]
    # Some versions of torch have an attention of their own in SigLIP's pooling head, one query an image.
    assert encoding.calls[8:] in ([], [bidirectional])
    with AttentionCalls() as decoding:
        tokenizer.decode(codes)
    num_attentions = sum("to_q" in name.split(".") for name, _ in tokenizer.decoder.named_modules())
    assert num_attentions > 0 and decoding.calls == [causal] + [bidirectional] * num_attentions


@torch.no_grad()
def test_attention_implementation_reaches_both_towers(pixel_values):
    # As "flash_attention_2" does where it is installed.
    seen = []

    def attention(module, query, key, value, attention_mask, **kwargs):
        seen.append((query.shape[2], attention_mask))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("noted", attention)
    config = DualTokenVisionTokenizerConfig(**tiny_tokenizer_config().to_dict())
    model = DualTokenVisionTokenizer._from_config(config, attn_implementation="noted").eval()
    model.encode(pixel_values)
    assert seen == [(9, None)] * 4
    model.get_text_features(torch.zeros(1, 8, dtype=torch.int64))
    assert [length for length, _ in seen[4:]] == [8]
