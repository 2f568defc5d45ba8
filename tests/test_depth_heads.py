"""The stacked depth heads against one naive head per kind of codes: logits, losses, gradients, sampling."""

import pytest
import torch
import torch.nn.functional as F
from naive.depth_head import naive_head, stacked_sources
from tiny_models import depth_logits
from torch.utils._python_dispatch import TorchDispatchMode

from transformers_dualtoken import DualTokenDepthHeadConfig, depth_heads
from transformers_dualtoken.depth_heads import DualTokenDepthHeads


POSITIONS, LANGUAGE_WIDTH, DEPTHS, CODES, CODE_DIM = 5, 12, 3, 11, 6


def build_heads(bias=False, num_depths=DEPTHS, dtype=torch.float32, **overrides) -> DualTokenDepthHeads:
    torch.manual_seed(0)
    fields = {"hidden_size": 8, "num_hidden_layers": 2, "head_dim": 4, "intermediate_size": 10, "input_hidden_size": 9}
    config = DualTokenDepthHeadConfig(**{**fields, **overrides}, bias=bias)
    heads = DualTokenDepthHeads(config, LANGUAGE_WIDTH, num_depths, CODES, CODE_DIM)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.normal_(std=0.5)
    return heads.to(dtype)


def build_inputs(num_depths=DEPTHS, shared=True, positions=POSITIONS, dtype=torch.float32):
    """hidden (T, H), codes (2, T, D), their vectors (2, T, D, C), codebooks (2, books, K, C)."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(positions, LANGUAGE_WIDTH, generator=generator, dtype=dtype)
    codes = torch.randint(CODES, (2, positions, num_depths), generator=generator)
    books = torch.randn(2, 1 if shared else num_depths, CODES, CODE_DIM, generator=generator, dtype=dtype)
    return hidden, codes, look_up(books, codes), books


def look_up(books, codes):
    vectors = [
        [books[kind, depth if books.shape[1] > 1 else 0][codes[kind, :, depth]] for depth in range(codes.shape[-1])]
        for kind in range(2)
    ]
    return torch.stack([torch.stack(kind, dim=1) for kind in vectors])


def greedy(logits):
    return logits.argmax(-1)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per_depth"])
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("num_depths", [1, DEPTHS])
class TestAgainstNaive:
    def test_logits(self, bias, shared, num_depths):
        heads = build_heads(bias, num_depths)
        hidden, _, vectors, _ = build_inputs(num_depths, shared)
        logits = depth_logits(heads, hidden, vectors)
        assert logits.shape == (2, POSITIONS, num_depths, CODES)
        for kind in range(2):
            torch.testing.assert_close(logits[kind], naive_head(heads, kind)(hidden, vectors[kind]), atol=1e-5, rtol=0)

    def test_loss_and_gradients(self, bias, shared, num_depths):
        heads = build_heads(bias, num_depths)
        hidden, codes, vectors, _ = build_inputs(num_depths, shared)
        hidden.requires_grad_()
        output = heads(hidden, codes, vectors)
        # A weight of its own for every depth and head: a mix-up shows.
        weights = torch.arange(1.0, 2 * num_depths + 1).view(2, num_depths)
        (output.loss_sums * weights).sum().backward()

        naive_hidden = hidden.detach().clone().requires_grad_()
        for kind in range(2):
            head = naive_head(heads, kind)
            logits = head(naive_hidden, vectors[kind])
            losses = F.cross_entropy(logits.transpose(1, 2), codes[kind], reduction="none").sum(0)
            torch.testing.assert_close(output.loss_sums[kind], losses, atol=1e-5, rtol=1e-6)
            assert torch.equal(output.num_correct[kind], (logits.argmax(-1) == codes[kind]).sum(0))
            (losses * weights[kind]).sum().backward()
            for naive, stacked, index in stacked_sources(heads, head, kind):
                # With one depth no code is ever read.
                expected = torch.zeros_like(naive) if naive.grad is None else naive.grad
                torch.testing.assert_close(stacked.grad[index], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(hidden.grad, naive_hidden.grad, atol=1e-5, rtol=1e-5)

    def test_greedy_sampling_is_the_argmax_chain(self, bias, shared, num_depths):
        heads = build_heads(bias, num_depths)
        hidden, _, _, books = build_inputs(num_depths, shared)
        codes = heads.sample(hidden, books, greedy)
        assert codes.shape == (2, POSITIONS, num_depths) and codes.dtype == torch.int64
        assert torch.equal(depth_logits(heads, hidden, look_up(books, codes)).argmax(-1), codes)
        assert num_depths == 1 or len(codes.unique(dim=-1)[0, 0]) > 1  # not one code throughout

    @torch.no_grad()
    def test_guidance_before_the_classifier_is_guidance_after(self, bias, shared, num_depths):
        heads, scale = build_heads(bias, num_depths), 2.5
        cond, _, _, books = build_inputs(num_depths, shared)
        uncond = torch.randn(cond.shape, generator=torch.Generator().manual_seed(2))
        seen = []

        def record(logits):
            seen.append(logits)
            return greedy(logits)

        codes = heads.sample(torch.cat([cond, uncond]), books, record, scale)
        vectors = look_up(books, codes)
        for kind in range(2):
            head = naive_head(heads, kind)
            with_prompt, without = head(cond, vectors[kind]), head(uncond, vectors[kind])
            guided = without + scale * (with_prompt - without)
            torch.testing.assert_close(torch.stack([x[kind] for x in seen], dim=1), guided, atol=1e-4, rtol=1e-5)
            assert torch.equal(guided.argmax(-1), codes[kind])


def test_heads_do_not_mix():
    heads = build_heads()
    hidden, codes, vectors, _ = build_inputs()
    heads(hidden, codes, vectors).loss_sums[0].sum().backward()
    for name, parameter in heads.named_parameters():
        assert parameter.grad[1].abs().max() == 0, name
        assert parameter.grad[0].abs().max() > 0, name


def test_a_depth_sees_only_the_codes_before_it():
    heads = build_heads()
    hidden, _, vectors, _ = build_inputs()
    before = depth_logits(heads, hidden, vectors)
    for depth in range(DEPTHS):
        changed = vectors.clone()
        changed[:, :, depth] += 1
        same = torch.isclose(depth_logits(heads, hidden, changed), before).all(-1).all(1).all(0)
        assert same.tolist() == [other <= depth for other in range(DEPTHS)]


@pytest.mark.parametrize("num_depths", [1, DEPTHS])
def test_no_positions_give_a_connected_zero(num_depths):
    heads = build_heads(bias=True, num_depths=num_depths)
    hidden, codes, vectors, _ = build_inputs(num_depths, positions=0)
    hidden.requires_grad_()
    loss_sums = heads(hidden, codes, vectors).loss_sums
    assert torch.equal(loss_sums, torch.zeros(2, num_depths))
    loss_sums.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in heads.parameters())
    assert hidden.grad.shape == (0, LANGUAGE_WIDTH)


@pytest.mark.parametrize("num_depths", [1, DEPTHS])
def test_gradcheck(num_depths):
    heads = build_heads(bias=True, num_depths=num_depths, dtype=torch.float64)
    hidden, codes, vectors, _ = build_inputs(num_depths, positions=2, dtype=torch.float64)
    names = [name for name, _ in heads.named_parameters()]

    def loss_sums(hidden_states, *parameters):
        arguments = (hidden_states, codes, vectors)
        return torch.func.functional_call(heads, dict(zip(names, parameters)), arguments).loss_sums

    inputs = [tensor.detach().requires_grad_() for tensor in (hidden, *heads.parameters())]
    assert torch.autograd.gradcheck(loss_sums, inputs, fast_mode=True)


def test_gradient_checkpointing_changes_nothing():
    calls = []

    def checkpoint(function, *args):
        calls.append(function)
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)

    results = []
    for checkpointing in (False, True):
        heads = build_heads(bias=True).train()
        for layer in heads.layers:
            layer.gradient_checkpointing, layer._gradient_checkpointing_func = checkpointing, checkpoint
        hidden, codes, vectors, _ = build_inputs()
        hidden.requires_grad_()
        loss_sums = heads(hidden, codes, vectors).loss_sums
        loss_sums.sum().backward()
        assert len(calls) == (len(heads.layers) if checkpointing else 0)
        results.append([loss_sums, hidden.grad, *(parameter.grad for parameter in heads.parameters())])
    for plain, checkpointed in zip(*results):
        torch.testing.assert_close(plain, checkpointed)


def attention_errors(attention, exact, dtype):
    """The largest errors of an attention's value and gradients in `dtype`, beside torch's in float64."""
    results = []
    for function, of in ((causal_attention_of_torch, torch.float64), (attention, dtype)):
        *inputs, upstream = (x.to(dtype).to(of) for x in exact)
        inputs = [x.detach().requires_grad_() for x in inputs]
        output = function(*inputs)
        assert output.dtype == of
        results.append([output, *torch.autograd.grad(output, inputs, upstream)])
    return [(value.double() - expected).abs().max().item() for expected, value in zip(*results)]


def causal_attention_of_torch(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


@pytest.mark.parametrize("head_dim", [16, 48])
@pytest.mark.parametrize("num_depths", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_attention_is_as_exact_as_that_of_torch(dtype, num_depths, head_dim):
    """In value and gradient; scores that are rounded to bfloat16 are off by almost twice as much."""
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(400, num_depths, head_dim, generator=generator, dtype=torch.float64) for _ in range(4)]
    own = attention_errors(depth_heads._CausalAttention.apply, exact, dtype)
    of_torch = attention_errors(causal_attention_of_torch, exact, dtype)
    # In float32 and float64 either is rounding alone.
    rounding = {torch.float32: 2e-6, torch.float64: 1e-13}.get(dtype, 0)
    for error, other in zip(own, of_torch):
        assert error <= max(1.2 * other, rounding)


def test_scores_beyond_float16_are_finite():
    """Products of queries and keys, before they are scaled, and softmax's own sums."""
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(40, 8, 16, generator=generator, dtype=torch.float64) for _ in range(4)]
    exact[0], exact[1] = 200 * exact[0], 200 * exact[1]
    assert (exact[0] @ exact[1].transpose(1, 2)).abs().max() > torch.finfo(torch.float16).max
    inputs = [x.half().requires_grad_() for x in exact[:3]]
    output = depth_heads._CausalAttention.apply(*inputs)
    gradients = torch.autograd.grad(output, inputs, exact[3].half())
    assert all(x.isfinite().all() for x in (output, *gradients))


def test_attention_under_autocast_keeps_its_scores():
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(40, 8, 16, generator=generator).bfloat16().requires_grad_() for _ in range(3)]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = depth_heads._CausalAttention.apply(*inputs)
            results.append([output, *torch.autograd.grad(output, inputs, torch.ones_like(output))])
    assert all(torch.equal(plain, autocast) for plain, autocast in zip(*results))


class Watched(TorchDispatchMode):
    """The names of all operations and the bytes of what they return."""

    def __init__(self):
        super().__init__()
        self.sizes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.sizes[name] = max([self.sizes.get(name, 0), *(leaf.nbytes for leaf in leaves)])
        return result


def test_attention_of_eight_images_makes_24_megabytes_of_scores():
    """At the paper's size, in bfloat16, the scores in float32; nothing has a fixed limit of positions, and no mask is made for each."""
    positions, num_depths = 8 * 729, 8
    with torch.device("meta"):
        layer = depth_heads.DualTokenDepthLayer(DualTokenDepthHeadConfig(), num_depths).to(torch.bfloat16)
        hidden = torch.empty(2, num_depths, positions, 1024, dtype=torch.bfloat16, requires_grad=True)
    with Watched() as watched:
        layer(hidden).sum().backward()
    assert not any("attention" in name for name in watched.sizes)
    scores = 2 * positions * 8 * num_depths**2 * 4
    assert watched.sizes["_softmax"] == watched.sizes["_softmax_backward_data"] == scores < 24e6
    assert watched.sizes["triu"] == num_depths**2 * 4


def test_attention_keeps_no_wide_copies():
    """For the backward: queries, keys and values as they are, and the probabilities in float32."""
    inputs = [torch.randn(40, 8, 16).bfloat16().requires_grad_() for _ in range(3)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        depth_heads._CausalAttention.apply(*inputs)
    assert sum(x.nbytes for x in kept) == 3 * inputs[0].nbytes + 40 * 8 * 8 * 4


def test_bfloat16_stays_near_float32():
    heads = build_heads()
    hidden, codes, vectors, books = build_inputs()
    exact = heads(hidden, codes, vectors).loss_sums
    rough = heads.to(torch.bfloat16)(hidden.to(torch.bfloat16), codes, vectors).loss_sums
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.5)
    # Code vectors stay in float32 and are cast where they enter.
    assert heads.sample(hidden.to(torch.bfloat16), books, greedy).shape == (2, POSITIONS, DEPTHS)


def test_parameters_at_the_papers_size():
    with torch.device("meta"):
        heads = DualTokenDepthHeads(DualTokenDepthHeadConfig(), 2048, num_depths=8, codebook_size=16384, code_dim=32)
    assert all(parameter.shape[0] == 2 for parameter in heads.parameters())
    per_head = sum(parameter[0].numel() for parameter in heads.parameters())
    assert 2 * per_head == sum(parameter.numel() for parameter in heads.parameters())
    assert 257e6 <= per_head <= 259e6
