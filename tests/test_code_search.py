"""The search for the nearest code against brute force, and which of the two searches runs."""

import logging
import sys
import threading
import time
import types

import pytest
import torch

from transformers_dualtoken import code_search
from transformers_dualtoken.code_search import blocked_nearest_codes, nearest_codes


def brute_force(vectors, codebook) -> torch.Tensor:
    """All squared distances `(T, K)` in float64, from the definition."""
    return (vectors.double()[:, None] - codebook.double()[None]).square().sum(-1)


@pytest.mark.parametrize("num_codes", [1, 2, 127, 128, 129, 300, 1000])
@pytest.mark.parametrize("num_vectors", [1, 77])
def test_nearest_codes_equals_brute_force(num_codes, num_vectors):
    vectors, codebook = torch.randn(num_vectors, 8), torch.randn(num_codes, 8)
    codes = nearest_codes(vectors, codebook)
    assert codes.shape == (num_vectors,) and codes.dtype == torch.long
    distances = brute_force(vectors, codebook)
    chosen = distances.gather(1, codes[:, None])[:, 0]
    assert torch.all(chosen <= distances.amin(1) * (1 + 1e-5))  # equal up to ties in float32


@pytest.mark.parametrize("num_codes", [5, 128, 300])
def test_of_equally_near_codes_the_lowest_index_wins(num_codes):
    # Small integers are exact in float32, and 3**2 different codes make every minimum a tie.
    vectors = torch.randint(-1, 2, (200, 2)).float()
    codebook = torch.randint(-1, 2, (num_codes, 2)).float()
    distances = brute_force(vectors, codebook)
    lowest = [int((row == row.min()).nonzero()[0]) for row in distances]
    assert nearest_codes(vectors, codebook).tolist() == lowest


def test_copies_of_a_code_in_other_blocks_never_win():
    codebook = torch.randn(150, 8).repeat(3, 1)
    assert nearest_codes(torch.randn(500, 8), codebook).max() < 150


def test_search_in_many_chunks_equals_one(monkeypatch):
    vectors, codebook = torch.randn(101, 8), torch.randn(300, 8)
    whole = nearest_codes(vectors, codebook)
    monkeypatch.setattr("transformers_dualtoken.code_search._MAX_SCORES_CPU", 10 * 384)  # ten vectors at a time
    assert torch.equal(nearest_codes(vectors, codebook), whole)


def tf32(values) -> torch.Tensor:
    """Float32 with a mantissa of 10 bits, rounded to the nearest, as a GPU's matrix units take it."""
    return ((values.view(torch.int32) + (1 << 12)) & -(1 << 13)).view(torch.float32)


def test_tf32_products_change_no_code_on_a_gpu(monkeypatch):
    addmm = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda bias, a, b, out: addmm(bias, tf32(a), tf32(b), out=out))
    vectors, codebook = 1 + torch.randn(1000, 32), 1 + torch.randn(1000, 32)
    distances = brute_force(vectors, codebook)

    def is_nearest(codes):
        return distances.gather(1, codes[:, None])[:, 0] <= distances.amin(1) * (1 + 1e-5)

    assert not is_nearest(nearest_codes(vectors, codebook)).all()  # what the setting would do
    monkeypatch.setattr(code_search, "_products_may_be_rounded", lambda device: True)
    assert is_nearest(nearest_codes(vectors, codebook)).all()


@pytest.mark.parametrize("num_codes", [24, 128])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_codes_of_numbers_that_are_not_finite_are_in_range(num_codes, value):
    # An index out of range would end the process on a GPU before the loss tells what is wrong.
    vectors, codebook = torch.randn(5, 8), torch.randn(num_codes, 8)
    vectors[2, 3] = value
    codes = nearest_codes(vectors, codebook)
    assert codes.min() >= 0 and codes.max() < num_codes
    others = [0, 1, 3, 4]
    assert torch.equal(codes[others], nearest_codes(vectors[others], codebook))


# --- which search runs on a GPU ---


@pytest.fixture
def gpu(monkeypatch):
    """What the choice asks about a GPU, answered as an H100 with Triton would; fields to be changed."""
    gpu = types.SimpleNamespace(
        capability=(9, 0), has_triton=True, capturing=False, splits=[], kernel=blocked_nearest_codes
    )

    def kernel(vectors, codebook, splits=None):
        gpu.splits.append(splits)
        return gpu.kernel(vectors, codebook)

    module = types.ModuleType("transformers_dualtoken.code_search_kernel")
    module.fused_nearest_codes, module.MAX_WIDTH = kernel, 32
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpu.capability)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: gpu.capturing)
    gpu.sync_modes = [2]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: gpu.sync_modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", gpu.sync_modes.append)
    monkeypatch.setattr(code_search, "is_triton_available", lambda: gpu.has_triton)
    monkeypatch.setattr(code_search, "_fused_searches", {})
    return gpu


def find(width=8):
    # On the CPU: only who asks looks at the kind of device.
    return code_search.find_fused_search(torch.device("cpu"), width)


def test_kernel_is_tried_once_and_kept(gpu):
    search = find()
    assert search is sys.modules["transformers_dualtoken.code_search_kernel"].fused_nearest_codes
    assert gpu.splits == [None, 1]  # tried as it will run, and as one program
    assert find() is search and gpu.splits == [None, 1]
    assert find(width=16) is search and gpu.splits == [None, 1, None, 1]


def test_trial_may_wait_for_the_device_and_leaves_the_mode(gpu):
    find()
    assert gpu.sync_modes == [2, "default", 2]


def test_where_waits_are_allowed_the_mode_is_left_alone(gpu):
    gpu.sync_modes[:] = [0]
    find()
    assert gpu.sync_modes == [0]


def test_of_two_threads_one_tries(gpu):
    """The other waits for the outcome; interleaved they would leave the mode at what the trial needs."""
    starts, found = threading.Barrier(4), []

    def slow(vectors, codebook):
        time.sleep(0.02)
        return blocked_nearest_codes(vectors, codebook)

    gpu.kernel = slow

    def work():
        starts.wait()
        found.append(find())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert gpu.splits == [None, 1] and len(set(found)) == 1 and found[0] is not None
    assert gpu.sync_modes == [2, "default", 2]


class OnGPU:
    """As much of a tensor as the choice looks at."""

    device, shape = torch.device("cuda", 0), (5, 8)

    def float(self):
        return self


def test_gpus_search_by_an_operator_that_runs_the_kernel(monkeypatch):
    tensors, calls = (OnGPU(), OnGPU()), []
    with monkeypatch.context() as patch:
        patch.setattr(code_search, "_operator", lambda *given: calls.append(given))
        nearest_codes(*tensors)
    assert calls == [tensors]
    monkeypatch.setattr(code_search, "find_fused_search", lambda *given: lambda *tensors: (given, tensors))
    assert code_search._search(*tensors) == ((torch.device("cuda", 0), 8), tensors)
    monkeypatch.setattr(code_search, "find_fused_search", lambda *given: None)
    monkeypatch.setattr(code_search, "blocked_nearest_codes", lambda *tensors: ("blocks", tensors))
    assert code_search._search(*tensors) == ("blocks", tensors)


def test_operator_searches(monkeypatch):
    vectors, codebook = torch.randn(50, 8), torch.randn(30, 8)
    assert torch.equal(code_search._operator(vectors, codebook), nearest_codes(vectors, codebook))


@pytest.mark.parametrize("field, value", [("capability", (7, 5)), ("has_triton", False)])
def test_other_devices_search_in_blocks_without_a_warning(gpu, field, value, warnings_of_search):
    setattr(gpu, field, value)
    assert find() is None and gpu.splits == []
    assert not warnings_of_search


def test_amd_searches_in_blocks(gpu, monkeypatch, warnings_of_search):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert find() is None and gpu.splits == [] and not warnings_of_search


def test_wide_codes_are_searched_in_blocks(gpu, warnings_of_search):
    assert find(width=33) is None and gpu.splits == [] and not warnings_of_search


def rounds_to_tf32(vectors, codebook):
    return (tf32(vectors) @ tf32(codebook).t() - codebook.square().sum(1) / 2).argmax(1)


@pytest.mark.parametrize("width", [1, 2, 8, 32, 256])
def test_what_is_as_exact_as_float32_passes_and_tf32_does_not(width, monkeypatch):
    cpu = torch.device("cpu")
    code_search.check_search(blocked_nearest_codes, cpu, width)
    with pytest.raises(RuntimeError, match="not the nearest"):
        code_search.check_search(rounds_to_tf32, cpu, width)
    monkeypatch.setattr(code_search, "_products_may_be_rounded", lambda device: True)
    addmm = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda bias, a, b, out: addmm(bias, tf32(a), tf32(b), out=out))
    code_search.check_search(blocked_nearest_codes, cpu, width)


def no_compiler(vectors, codebook):
    raise RuntimeError("Failed to find C compiler.")


@pytest.mark.parametrize(
    "kernel, message",
    [
        (no_compiler, "RuntimeError: Failed to find C compiler."),
        (rounds_to_tf32, "codes that are not the nearest"),
        (lambda vectors, codebook: torch.full((len(vectors),), len(codebook)), "codes from 1001 to 1001 among 1001"),
    ],
)
def test_kernel_that_does_not_work_is_named_and_not_used(gpu, kernel, message, warnings_of_search):
    gpu.kernel = kernel
    assert find() is None and find() is None
    assert len(gpu.splits) == 1 and len(warnings_of_search) == 1
    assert "width 8 runs in blocks on cpu" in warnings_of_search[0] and message in warnings_of_search[0]


def test_memory_that_ends_is_no_reason_to_search_in_blocks(gpu):
    def no_memory(vectors, codebook):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    gpu.kernel = no_memory
    with pytest.raises(torch.OutOfMemoryError):
        find()
    gpu.kernel = blocked_nearest_codes
    assert find() is not None


def test_nothing_is_tried_while_a_graph_is_captured(gpu):
    gpu.capturing = True
    assert find() is None and gpu.splits == []
    gpu.capturing = False
    search = find()
    gpu.capturing = True
    assert search is not None and find() is search


@pytest.fixture
def warnings_of_search():
    """The messages of the search's logger."""
    messages = []

    class Handler(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    handler = Handler(logging.WARNING)
    code_search.logger.addHandler(handler)
    yield messages
    code_search.logger.removeHandler(handler)
