"""The residual quantiser against loops in float64."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_models import tiny_quantizer_fields, tiny_tokenizer_config
from torch import nn

from transformers_dualtoken import DualTokenVisionTokenizer
from transformers_dualtoken.configuration_dualtoken import DualTokenQuantizerConfig
from transformers_dualtoken.vector_quantization import DualTokenResidualQuantizer


RULES = (("rq", "own"), ("rq_ema", "own"), ("rq_ema", "final"))
BUFFERS = ("embeddings", "cluster_size", "embedding_sum")


def make_quantizer(**overrides) -> DualTokenResidualQuantizer:
    """K = 24 codes of width 8, D = 3, with statistics that a first batch does not erase."""
    quantizer = DualTokenResidualQuantizer(DualTokenQuantizerConfig(**tiny_quantizer_fields(**overrides)))
    codebook = quantizer.codebook
    codebook.embeddings.normal_()
    codebook.cluster_size.uniform_(0.5, 3)
    codebook.embedding_sum.copy_(codebook.embeddings * codebook.cluster_size[..., None])
    return quantizer


def exact_distances(first, second) -> torch.Tensor:
    """Between all vectors of both, zero between equal ones."""
    return torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")


def snapshot(quantizer) -> dict[str, torch.Tensor]:
    return {name: getattr(quantizer.codebook, name).clone() for name in BUFFERS}


def test_search_runs_in_float32_under_autocast_and_for_half_inputs():
    quantizer = make_quantizer(codebook_size=500).eval()
    vectors = torch.randn(64, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = quantizer(vectors)
    assert torch.equal(output.codes, quantizer(vectors).codes)
    assert output.quantized.dtype == output.commitment_loss.dtype == torch.float32
    half = quantizer(vectors.bfloat16())
    assert torch.equal(half.codes, quantizer(vectors.bfloat16().float()).codes)
    assert half.quantized.dtype == torch.bfloat16 and half.commitment_loss.dtype == torch.float32


# --- the quantiser as loops ---


class NaiveQuantizer:
    """The residual quantiser written from its definition: loops, one-hot products, float64."""

    def __init__(self, quantizer: DualTokenResidualQuantizer):
        self.config = quantizer.config
        self.e, self.n, self.m = ([x.double() for x in getattr(quantizer.codebook, name)] for name in BUFFERS)

    def move(self, book, codes, vectors):
        config, decay = self.config, self.config.ema_decay
        one_hot = torch.zeros(len(codes), config.codebook_size, dtype=torch.float64)
        for row, code in enumerate(codes):
            one_hot[row, code] = 1
        self.n[book] = decay * self.n[book] + (1 - decay) * one_hot.sum(0)
        self.m[book] = decay * self.m[book] + (1 - decay) * one_hot.T @ vectors
        total = self.n[book].sum()
        smoothed = total * (self.n[book] + config.ema_eps) / (total + config.codebook_size * config.ema_eps)
        self.e[book] = self.m[book] / smoothed[:, None]

    def __call__(self, z, training):
        """Vectors `(T, C)` -> codes `(T, D)`, sums `(T, C)`, commitment, and its gradient `(T, C)`."""
        config, z = self.config, z.double()
        residual, partial = z.clone(), torch.zeros_like(z)
        codes, looked_up, commitment, gradient = [], [], 0.0, torch.zeros_like(z)
        for depth in range(config.num_depths):
            book = 0 if config.shared_codebook else depth
            vectors = self.e[book]
            chosen = [int(((vectors - row) ** 2).sum(1).argmin()) for row in residual]
            if training and config.update_rule == "rq":
                self.move(book, chosen, residual)
            looked_up.append(residual)
            codes.append(chosen)
            partial = partial + vectors[chosen]
            residual = residual - vectors[chosen]
            commitment += ((z - partial) ** 2).mean() / config.num_depths
            gradient += 2 * (z - partial) / z.numel() / config.num_depths
        if training and config.update_rule == "rq_ema":
            if config.ema_vectors == "final":
                looked_up = [residual] * config.num_depths
            if config.shared_codebook:
                self.move(0, sum(codes, []), torch.cat(looked_up))
            else:
                for depth in range(config.num_depths):
                    self.move(depth, codes[depth], looked_up[depth])
        return torch.tensor(codes).T, partial, commitment, gradient


@pytest.mark.parametrize("update_rule, ema_vectors", RULES)
@pytest.mark.parametrize("shared_codebook", [True, False])
def test_training_steps_equal_the_naive_quantizer(update_rule, ema_vectors, shared_codebook):
    quantizer = make_quantizer(
        update_rule=update_rule,
        ema_vectors=ema_vectors,
        shared_codebook=shared_codebook,
        ema_decay=0.8,
        restart_unused_codes=False,
    )
    naive = NaiveQuantizer(quantizer)
    for step in range(4):
        z = torch.randn(2, 15, 8)
        output = quantizer.train()(z)
        codes, sums, commitment, _ = naive(z.flatten(0, 1), training=True)
        assert torch.equal(output.codes.flatten(0, 1), codes), step
        torch.testing.assert_close(output.quantized.flatten(0, 1).double(), sums, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(output.commitment_loss.double(), commitment, rtol=1e-5, atol=0)
        for name, expected in zip(BUFFERS, (naive.e, naive.n, naive.m)):
            actual = getattr(quantizer.codebook, name).double()
            torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shared_codebook", [True, False])
def test_eval_equals_the_naive_quantizer_and_never_moves_the_codebook(shared_codebook):
    for update_rule, ema_vectors in RULES:
        quantizer = make_quantizer(
            update_rule=update_rule, ema_vectors=ema_vectors, shared_codebook=shared_codebook
        ).eval()
        before = snapshot(quantizer)
        z = torch.randn(40, 8)
        output = quantizer(z)
        codes, sums, _, _ = NaiveQuantizer(quantizer)(z, training=False)
        assert torch.equal(output.codes, codes)
        torch.testing.assert_close(quantizer.embed_codes(codes).double(), sums, rtol=1e-5, atol=1e-5)
        assert all(torch.equal(getattr(quantizer.codebook, name), before[name]) for name in BUFFERS)


@pytest.mark.parametrize("update_rule, ema_vectors", RULES)
def test_frozen_training_equals_eval(update_rule, ema_vectors):
    quantizer = make_quantizer(update_rule=update_rule, ema_vectors=ema_vectors)
    assert not quantizer.frozen
    before, z = snapshot(quantizer), torch.randn(40, 8)
    expected = quantizer.eval()(z)
    quantizer.train().frozen = True
    random_state = torch.get_rng_state()
    output = quantizer(z)
    assert all(torch.equal(output[name], expected[name]) for name in expected)
    assert all(torch.equal(getattr(quantizer.codebook, name), before[name]) for name in BUFFERS)
    assert torch.equal(torch.get_rng_state(), random_state)  # nothing was drawn for restarts
    assert "frozen" not in quantizer.config.to_dict() and not any("frozen" in name for name in quantizer.state_dict())
    quantizer.frozen = False
    quantizer(z)
    assert not torch.equal(quantizer.codebook.embeddings, before["embeddings"])


@pytest.mark.parametrize("update_rule, ema_vectors", RULES)
def test_training_compiles_as_one_graph(update_rule, ema_vectors):
    eager = make_quantizer(update_rule=update_rule, ema_vectors=ema_vectors, restart_unused_codes=True).train()
    compiled = copy.deepcopy(eager)
    step = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    for seed in range(2):
        z = torch.randn(30, 8)
        outputs, gradients = [], []
        for quantizer in (eager, step):
            torch.manual_seed(seed)
            leaf = z.clone().requires_grad_()
            outputs.append(quantizer(leaf))
            (outputs[-1].commitment_loss + outputs[-1].quantized.square().sum()).backward()
            gradients.append(leaf.grad)
        assert torch.equal(outputs[0].codes, outputs[1].codes)
        torch.testing.assert_close(*gradients)
        for name, value in snapshot(eager).items():
            torch.testing.assert_close(getattr(compiled.codebook, name), value)
    torch._dynamo.reset()


@pytest.mark.parametrize("update_rule, ema_vectors", RULES)
def test_gradients(update_rule, ema_vectors):
    fields = {"update_rule": update_rule, "ema_vectors": ema_vectors, "restart_unused_codes": False}
    quantizer = make_quantizer(**fields).train()
    naive = NaiveQuantizer(quantizer)
    z = torch.randn(30, 8, requires_grad=True)
    weights = torch.randn(30, 8)
    output = quantizer(z)
    (straight_through,) = torch.autograd.grad((output.quantized * weights).sum(), z, retain_graph=True)
    assert torch.equal(straight_through, weights)
    (commitment,) = torch.autograd.grad(output.commitment_loss, z)
    torch.testing.assert_close(commitment.double(), naive(z.detach(), training=True)[3], rtol=1e-4, atol=1e-8)


def test_the_two_rules_are_one_with_a_codebook_per_depth():
    # A depth's codebook is searched before either rule moves it; only a shared one is searched again.
    snapshots = []
    for update_rule in ("rq", "rq_ema"):
        torch.manual_seed(0)
        quantizer = make_quantizer(update_rule=update_rule, shared_codebook=False).train()
        for _ in range(3):
            quantizer(torch.randn(30, 8))
        snapshots.append(snapshot(quantizer))
    assert all(torch.equal(snapshots[0][name], snapshots[1][name]) for name in BUFFERS)


def test_a_rule_that_is_named_and_not_written_is_an_error():
    quantizer = make_quantizer()
    object.__setattr__(quantizer.config, "update_rule", "new")
    with pytest.raises(KeyError, match="new"):
        quantizer(torch.randn(2, 8))


def test_codes_do_not_depend_on_the_batch_in_eval():
    quantizer = make_quantizer(codebook_size=300).eval()
    z = torch.randn(50, 8)
    together = quantizer(z).codes
    assert torch.equal(torch.cat([quantizer(row).codes for row in z.split(1)]), together)
    assert torch.equal(quantizer(z.view(5, 10, 8)).codes, together.view(5, 10, 3))
    assert quantizer(z[0]).codes.shape == (3,)


@pytest.mark.parametrize("shared_codebook", [True, False])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_embed_codes(shared_codebook, dtype):
    quantizer = make_quantizer(shared_codebook=shared_codebook)
    codes = torch.randint(24, (2, 4, 3))
    quantizer.check_codes(codes.to(dtype), "codes")
    embeds = quantizer.embed_codes_with_depth(codes.to(dtype))
    assert embeds.shape == (2, 4, 3, 8) and embeds.dtype == torch.float32
    for depth in range(3):
        assert torch.equal(embeds[..., depth, :], quantizer.codebook[depth][codes[..., depth]])
    assert torch.equal(quantizer.embed_codes(codes.to(dtype)), embeds.sum(-2))


# --- restarts ---


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("shared_codebook", [True, False])
@pytest.mark.parametrize(("update_rule", "ema_vectors"), RULES)
def test_a_vector_that_is_not_finite_moves_no_codebook(update_rule, ema_vectors, shared_codebook, value):
    """Nor does one whose sum overflows; the next batch moves it as if there had been none."""
    quantizer = make_quantizer(update_rule=update_rule, ema_vectors=ema_vectors, shared_codebook=shared_codebook)
    # Codes that do not follow from the statistics, as a converted checkpoint may have them.
    quantizer.codebook.embeddings.normal_()
    before = snapshot(quantizer)
    vectors = torch.randn(3, 50, 8)
    vectors[1, 7] = value
    vectors[1, 8] = value
    output = quantizer.train()(vectors)
    assert not output.commitment_loss.isfinite()  # which the trainers stop at
    assert 0 <= output.codes.min() <= output.codes.max() < 24
    for name, buffer in snapshot(quantizer).items():
        assert torch.equal(buffer, before[name]), name
    quantizer(vectors[:1])
    assert all(buffer.isfinite().all() for buffer in snapshot(quantizer).values())
    assert not torch.equal(quantizer.codebook.embeddings, before["embeddings"])


def test_unused_codes_restart_at_different_vectors_of_the_batch():
    quantizer = make_quantizer(num_depths=1, ema_decay=0.0).train()  # no memory: N is this batch's count
    z = torch.randn(40, 8)
    codes = quantizer(z).codes[:, 0]
    counts = torch.bincount(codes, minlength=24)
    unused = counts == 0
    assert unused.any() and not unused.all()
    codebook = quantizer.codebook
    assert torch.equal(codebook.cluster_size[0], counts.clamp(min=1).float())
    restarted = codebook.embedding_sum[0, unused]
    distances = exact_distances(restarted, z)
    assert torch.all(distances.amin(1) == 0)
    assert len(distances.argmin(1).unique()) == unused.sum()  # without replacement
    for code in (~unused).nonzero()[:, 0]:
        torch.testing.assert_close(codebook.embedding_sum[0, code], z[codes == code].sum(0))
    expected = codebook.embedding_sum[0] / codebook.cluster_size[0, :, None]
    torch.testing.assert_close(codebook.embeddings[0], expected, rtol=1e-4, atol=1e-5)


def test_first_batch_chooses_the_codes():
    # Empty statistics, as a new model has them: every code becomes a vector of the first batch.
    quantizer = make_quantizer(num_depths=1).train()
    quantizer.codebook.cluster_size.zero_()
    quantizer.codebook.embedding_sum.zero_()
    z = torch.randn(60, 8)
    quantizer(z)
    assert exact_distances(quantizer.codebook.embeddings[0], z).amin(1).max() < 1e-4
    assert torch.equal(quantizer.codebook.cluster_size, torch.ones(1, 24))


def test_restart_with_fewer_vectors_than_codes():
    quantizer = make_quantizer(num_depths=1, ema_decay=0.0).train()
    z = torch.randn(5, 8)
    unused = torch.bincount(quantizer.eval()(z).codes[:, 0], minlength=24) == 0
    quantizer.train()(z)
    restarted = quantizer.codebook.embedding_sum[0, unused]
    assert len(restarted) >= 19
    offsets = (restarted[:, None] - z).abs().amax(-1).amin(1)
    assert torch.all(offsets <= 0.01 / 8**0.5 + 1e-6)
    # The noise keeps copies of one vector from becoming copies of one code.
    assert len(restarted.unique(dim=0)) == len(restarted)


@pytest.mark.parametrize("update_rule, ema_vectors", RULES)
@pytest.mark.parametrize("shared_codebook", [True, False])
def test_restart_leaves_no_unused_code(update_rule, ema_vectors, shared_codebook):
    quantizer = make_quantizer(update_rule=update_rule, ema_vectors=ema_vectors, shared_codebook=shared_codebook)
    for _ in range(3):
        quantizer.train()(torch.randn(30, 8))
    assert torch.all(quantizer.codebook.cluster_size >= 1)
    assert all(getattr(quantizer.codebook, name).isfinite().all() for name in BUFFERS)


# --- buffers and their dtype ---


def test_codebooks_are_buffers_without_gradient():
    model = DualTokenVisionTokenizer(tiny_tokenizer_config())
    assert not [name for name, _ in model.named_parameters() if "codebook" in name]
    names = {f"{kind}_quantizer.codebook.{name}" for kind in ("pixel", "semantic") for name in BUFFERS}
    assert {name for name, _ in model.named_buffers() if "codebook" in name} == names
    assert names <= set(model.state_dict())
    assert not any(dict(model.named_buffers())[name].requires_grad for name in names)


CASTS = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "double": lambda module: module.double(),
    "to(dtype)": lambda module: module.to(torch.bfloat16),
    "to(device, dtype)": lambda module: module.to("cpu", torch.float16),
    "to(tensor)": lambda module: module.to(torch.zeros((), dtype=torch.bfloat16)),
    # DeepSpeed wraps the model and casts the wrapper.
    "a parent's half": lambda module: nn.ModuleDict({"module": module}).half()["module"],
}


@pytest.mark.parametrize("cast", CASTS)
def test_casts_leave_codebooks_in_float32_bit_for_bit(tokenizer, cast):
    before = [snapshot(tokenizer.quantizer(kind)) for kind in ("pixel", "semantic")]
    model = CASTS[cast](copy.deepcopy(tokenizer))
    assert model.pixel_down_proj.proj.weight.dtype != torch.float32
    for kind, expected in zip(("pixel", "semantic"), before):
        for name, value in expected.items():
            actual = getattr(model.quantizer(kind).codebook, name)
            assert actual.dtype == torch.float32 and torch.equal(actual, value)


def test_from_pretrained_in_bfloat16_keeps_codebooks_in_float32(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    model = DualTokenVisionTokenizer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.pixel_down_proj.proj.weight.dtype == torch.bfloat16
    for kind in ("pixel", "semantic"):
        for name, value in snapshot(tokenizer.quantizer(kind)).items():
            actual = getattr(model.quantizer(kind).codebook, name)
            assert actual.dtype == torch.float32 and torch.equal(actual, value)


def test_construction_under_another_default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = DualTokenVisionTokenizer(tiny_tokenizer_config())
    finally:
        torch.set_default_dtype(torch.float32)
    assert model.pixel_down_proj.proj.weight.dtype == torch.bfloat16
    for kind in ("pixel", "semantic"):
        assert all(value.dtype == torch.float32 for value in snapshot(model.quantizer(kind)).values())


def test_training_in_bfloat16_moves_the_codebook_in_float32(tokenizer, pixel_values):
    model = tokenizer.to(torch.bfloat16).train()
    before = snapshot(model.pixel_quantizer)
    output = model.encode(pixel_values)
    assert output.pixel_quantized.dtype == torch.bfloat16
    after = snapshot(model.pixel_quantizer)
    assert all(value.dtype == torch.float32 for value in after.values())
    assert not torch.equal(after["embeddings"], before["embeddings"])


# --- several ranks ---

WORLD_SIZE = 2
# Vectors of each rank, of the 20 of a step: a last batch may be uneven.
RANK_VECTORS = ((10, 10), (7, 13), (16, 4))


def rank_steps(quantizer, batches):
    for batch in batches:
        quantizer.train()(batch)
    return snapshot(quantizer)


def distributed_cases():
    """(name, quantiser, batches `(steps, T, C)`), the same in every process."""
    generator = torch.Generator().manual_seed(3)
    for restart in (False, True):
        for rule, vectors in RULES:
            for shared in (True, False):
                torch.manual_seed(7)
                fields = {"update_rule": rule, "ema_vectors": vectors, "shared_codebook": shared}
                quantizer = make_quantizer(**fields, restart_unused_codes=restart, ema_decay=0.8)
                # About 10 vectors a rank: fewer than the 24 codes without the shared codebook's three depths, mostly
                # more with it.
                yield (restart, rule, vectors, shared), quantizer, torch.randn(3, 20, 8, generator=generator)


def run_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD_SIZE, device_id=None
    )
    results = {}
    for name, quantizer, batches in distributed_cases():
        torch.manual_seed(100 + rank)  # each rank would restart codes at its own vectors
        results[name] = rank_steps(
            quantizer, [batch.split(sizes)[rank] for batch, sizes in zip(batches, RANK_VECTORS)]
        )
    # A vector that is not finite on one rank moves the codebook of neither.
    for rule, vectors in RULES:
        torch.manual_seed(8)
        quantizer = make_quantizer(update_rule=rule, ema_vectors=vectors)
        before = snapshot(quantizer)
        batch = torch.randn(10, 8)
        batch[3] = float("nan") if rank == 1 else 0.0
        quantizer.train()(batch)
        assert all(torch.equal(before[name], value) for name, value in snapshot(quantizer).items())
    torch.save(results, os.path.join(folder, f"rank{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.slow  # two processes that import everything: about ten seconds
def test_two_ranks_equal_one_process_with_the_joint_batch(tmp_path):
    mp.spawn(run_rank, args=(str(tmp_path),), nprocs=WORLD_SIZE)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(WORLD_SIZE))
    for name, quantizer, batches in distributed_cases():
        restart = name[0]
        joint = rank_steps(quantizer, batches)
        for buffer in BUFFERS:
            assert torch.equal(first[name][buffer], second[name][buffer]), (name, buffer)
            if not restart:  # with restarts, the pool is rank 0's batch
                torch.testing.assert_close(first[name][buffer], joint[buffer], rtol=1e-5, atol=1e-5)
        if restart:
            assert torch.all(first[name]["cluster_size"] >= 1)
