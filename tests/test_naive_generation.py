"""The naive peers of the benchmarks of image generation do the same as ours, and the counter counts what it says."""

import functools
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import lively_unified_model, tiny_quantizer_fields, tiny_tokenizer_config, tiny_unified_config

from transformers_dualtoken.code_sampling import DualTokenCodeSampler


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load_benchmark(name: str, path: Path):
    """A module or package of the benchmarks, whose names are those of others here."""
    folder = [str(path.parent)] if path.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=folder)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


load_benchmark("benchmarks_naive", BENCHMARKS / "naive" / "__init__.py")
depth_heads = importlib.import_module("benchmarks_naive.depth_heads")
generation = importlib.import_module("benchmarks_naive.generation")
operations = load_benchmark("benchmarks_operations", BENCHMARKS / "operations.py")

START = 50
GREEDY = DualTokenCodeSampler(do_sample=False)
SCALES = pytest.mark.parametrize("guidance_scale", [None, 2.5], ids=["alone", "guided"])
HEADS = pytest.mark.parametrize("head_class", [depth_heads.PrefixDepthHead, depth_heads.CachedDepthHead])
LOOPS = pytest.mark.parametrize("loop_class", [generation.VilaULoop, generation.JanusLoop])


@functools.cache
def make_model(shared: bool = True, bias: bool = False):
    quantizer = tiny_quantizer_fields(shared_codebook=shared)
    tokenizer = tiny_tokenizer_config(pixel_quantizer_config=quantizer, semantic_quantizer_config=quantizer)
    head = {**tiny_unified_config().depth_head_config.to_dict(), "bias": bias}
    model = lively_unified_model(vision_tokenizer_config=tokenizer.to_dict(), depth_head_config=head)
    for name, parameter in model.depth_heads.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    return model


def codebooks(model) -> torch.Tensor:
    return torch.stack([model.vision_tokenizer.quantizer(kind).codebook.embeddings for kind in ("pixel", "semantic")])


def hidden_states(model, guidance_scale, pairs: int = 4, dtype=torch.float32) -> torch.Tensor:
    rows = pairs if guidance_scale is None else 2 * pairs
    return torch.randn(rows, model.config.text_config.hidden_size, generator=torch.Generator().manual_seed(1)).to(
        dtype
    )


@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per_depth"])
@SCALES
@HEADS
class TestHeads:
    def test_same_codes(self, head_class, guidance_scale, shared, bias):
        model = make_model(shared, bias)
        states = hidden_states(model, guidance_scale)
        expected = model.depth_heads.sample(states, codebooks(model), GREEDY, guidance_scale)
        heads = depth_heads.separate_heads(model, head_class)
        codes = depth_heads.sample_separately(heads, states, depth_heads.most_probable, guidance_scale)
        assert codes.shape == (2, 4, model.config.num_depths) and torch.equal(codes, expected)
        assert len(codes.flatten(0, 1).unique(dim=0)) > 2

    def test_same_logits(self, head_class, guidance_scale, shared, bias):
        """Whatever is drawn: here always code d + 1 at depth d."""
        model = make_model(shared, bias)
        states = hidden_states(model, guidance_scale)
        seen = {"ours": [], "naive": []}

        def record(name, logits):
            seen[name].append(logits)
            return torch.full_like(logits[..., 0], len(seen[name]) % model.config.num_depths, dtype=torch.long)

        model.depth_heads.sample(states, codebooks(model), functools.partial(record, "ours"), guidance_scale)
        heads = depth_heads.separate_heads(model, head_class)
        depth_heads.sample_separately(heads, states, functools.partial(record, "naive"), guidance_scale)
        # One head after the other: all depths of the pixel codes first.
        naive = torch.stack(seen["naive"]).unflatten(0, (2, -1)).transpose(0, 1)
        torch.testing.assert_close(naive, torch.stack(seen["ours"]), atol=1e-3, rtol=1e-5)


@HEADS
def test_heads_in_float64(head_class):
    heads = make_model().depth_heads
    try:
        heads.double()
        model, scale = make_model(), 2.5
        states = hidden_states(model, scale, dtype=torch.float64)
        expected = heads.sample(states, codebooks(model), GREEDY, scale)
        separate = depth_heads.separate_heads(model, head_class)
        codes = depth_heads.sample_separately(separate, states, depth_heads.most_probable, scale)
        assert torch.equal(codes, expected)
    finally:
        heads.float()


def test_separate_heads_use_the_memory_of_the_stacked_ones():
    model = make_model(bias=True)
    head = depth_heads.separate_heads(model, depth_heads.PrefixDepthHead)[1]
    weight = model.depth_heads.layers[1].qkv_proj.weight
    assert head.layers[1].query.weight.data_ptr() == weight[1].data_ptr()
    assert head.classifiers[2].bias.data_ptr() == model.depth_heads.classifier.bias[1, 2].data_ptr()


@pytest.mark.parametrize("top_k, top_p", [(5, 1.0), (24, 0.6), (6, 0.8)])
def test_the_naive_draw_has_the_distribution_of_ours(top_k, top_p):
    draws = 20000
    logits = 2 * torch.randn(2, 24, generator=torch.Generator().manual_seed(3))
    sampler = DualTokenCodeSampler(top_k=(top_k, top_k), top_p=(top_p, top_p))
    ours = sampler(logits[:, None].repeat(1, draws, 1))
    for kind in range(2):
        naive = depth_heads.draw_by_full_sort(logits[kind].repeat(draws, 1), top_k=top_k, top_p=top_p)
        shares = torch.stack([x.bincount(minlength=24) / draws for x in (ours[kind], naive)])
        # Codes of which hardly any is drawn may be missing on one side.
        assert torch.equal(*(shares > 0)) or shares[:, (shares == 0).any(0)].max() < 1e-3
        assert (shares == 0).any(0).sum() >= 24 - top_k
        assert (shares[0] - shares[1]).abs().sum() < 0.05


def test_the_naive_draw_refuses_nan():
    with pytest.raises(ValueError, match="NaN"):
        depth_heads.draw_by_full_sort(torch.full((1, 8), float("nan")))


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@LOOPS
class TestLoops:
    PROMPTS = {
        "input_ids": torch.tensor([[5, 6, 7, START], [0, 0, 8, START]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]),
    }

    def ours(self, model, guidance_scale):
        settings = {"generation_mode": "image", "image_do_sample": False, "guidance_scale": guidance_scale}
        out = model.generate(**self.PROMPTS, **settings)
        return torch.stack([out.pixel_codes, out.semantic_codes]).flatten(2, 3)

    @pytest.mark.parametrize("shared", [True, False], ids=["shared", "per_depth"])
    def test_same_image(self, loop_class, guidance_scale, shared):
        model = make_model(shared)
        expected = self.ours(model, guidance_scale)
        codes = loop_class(model, guidance_scale, do_sample=False).generate(**self.PROMPTS)
        assert torch.equal(codes, expected)
        assert len(codes[0].flatten(0, 1).unique(dim=0)) > 5

    def test_fewer_positions(self, loop_class, guidance_scale):
        model = make_model()
        codes = loop_class(model, guidance_scale, do_sample=False).generate(**self.PROMPTS, num_positions=4)
        assert torch.equal(codes, self.ours(model, guidance_scale)[:, :, :4])

    def test_draws(self, loop_class, guidance_scale):
        loop = loop_class(make_model(), guidance_scale)
        codes = loop.generate(**self.PROMPTS)
        assert codes.shape == (2, 2, 9, 3) and 0 <= codes.min() and codes.max() < 24
        assert not torch.equal(codes, loop.generate(**self.PROMPTS))


class TestOperationCounter:
    def count(self, function):
        with torch.no_grad(), operations.OperationCounter() as counter:
            function()
        return counter

    def test_counts_work_and_no_views(self):
        a, b = torch.randn(4, 6), torch.randn(6, 8)

        def function():
            x = a @ b  # 1
            x = x.view(2, 2, 8).transpose(0, 1)[:, 1:].unsqueeze(0).expand(3, -1, -1, -1).detach()
            x = x.squeeze(2).reshape(6, 8)  # 1: it has to copy
            first, second = x.float().chunk(2)
            torch.empty(5), torch.empty_like(first), x.new_empty(3)
            x[:, 1] = 0.0  # 1
            x[:2] = second[:2]  # 1
            second.add_(1)  # 1
            torch.promote_types(x.dtype, torch.float16)
            return x.to(torch.float64).reshape(8, 6), torch.zeros(3)  # 2

        counter = self.count(function)
        names = {"mm": 1, "clone": 1, "fill_": 1, "copy_": 1, "add_": 1, "_to_copy": 1, "zeros": 1}
        assert counter.operations == names and counter.count == 7
        assert counter.num_synchronisations == 0

    def test_what_a_gpu_does_in_one_kernel_is_one(self):
        x, weight = torch.randn(2, 4, 3, 8), torch.ones(8)
        counter = self.count(lambda: F.scaled_dot_product_attention(F.rms_norm(x, (8,), weight), x, x) + x)
        assert counter.operations == {"rms_norm": 1, "scaled_dot_product_attention": 1, "add": 1}

    @pytest.mark.parametrize(
        "read",
        [
            lambda x: x[0].item(),
            lambda x: bool(x[0]),
            lambda x: 1 if x[0] else 0,
            lambda x: int(x[0]),
            lambda x: float(x[0]),
            lambda x: x.tolist(),
            lambda x: x.numpy(),
            lambda x: x.cpu(),
            lambda x: x.nonzero(),
            lambda x: x[torch.tensor([True, False, True])],
        ],
        ids=["item", "bool", "if", "int", "float", "tolist", "numpy", "cpu", "nonzero", "mask"],
    )
    def test_finds_reads_of_the_host(self, read):
        assert self.count(lambda: read(torch.arange(3))).num_synchronisations == 1

    def test_indices_are_no_reads(self):
        counter = self.count(lambda: torch.arange(3)[torch.tensor([2, 0])])
        assert counter.num_synchronisations == 0 and counter.operations == {"arange": 1, "index": 1}

    def test_nothing_is_counted_outside(self):
        counter = self.count(lambda: torch.ones(2))
        torch.ones(2).tolist()
        assert counter.count == 1 and counter.num_synchronisations == 0


def test_waits_and_operations_of_a_position():
    model, scale = make_model(), 2.5
    states, books, depths = hidden_states(model, scale), codebooks(model), model.config.num_depths

    def naive(head_class, draw):
        heads = depth_heads.separate_heads(model, head_class)
        return operations.count_operations(lambda: depth_heads.sample_separately(heads, states, draw, scale))

    sampler = DualTokenCodeSampler()
    ours = operations.count_operations(lambda: model.depth_heads.sample(states, books, sampler, scale))
    vila_u = naive(depth_heads.PrefixDepthHead, depth_heads.draw_by_full_sort)
    janus = naive(depth_heads.CachedDepthHead, depth_heads.draw_from_all)
    assert ours.num_synchronisations == janus.num_synchronisations == 0
    assert vila_u.num_synchronisations == vila_u.operations["sort"] == 2 * depths
    assert ours.operations["sort"] == 0 and ours.count < janus.count < vila_u.count
    # The codes of a position are embedded anew at every depth but the first.
    assert vila_u.operations["embedding"] == 2 * (depths - 1) * depths
    assert janus.operations["embedding"] == 2 * (depths - 1)
