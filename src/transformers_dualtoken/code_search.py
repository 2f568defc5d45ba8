"""The nearest code of every vector, in float32: blocked products anywhere, one kernel on a GPU that takes it."""

import functools
import threading
from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers.utils import is_triton_available, logging


logger = logging.get_logger(__name__)


# Scores held at once by the blocked search: on a CPU 4 MiB stay in the cache between product and reduction, a GPU needs
# more to be busy.
_MAX_SCORES_CPU = 1 << 20
_MAX_SCORES_GPU = 1 << 26
_SEARCH_BLOCK = 128


@torch.no_grad()
def nearest_codes(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """
    Index of the nearest code of every vector, in float32, without a distance matrix in memory.

    argmin_k |r - e_k|^2 = argmax_k (r . e_k - |e_k|^2 / 2). Of equally near codes the lowest index wins; TF32, where it
    is switched on, changes no code. GPUs of NVIDIA run one Triton kernel (codes up to 32 wide); elsewhere the scores are
    made for a few vectors at a time. The two may differ where codes are equally near to float32. Under `torch.compile`
    it is one operator of the graph.

    Args:
        vectors (`torch.Tensor` of shape `(T, C)`).
        codebook (`torch.Tensor` of shape `(K, C)`).

    Returns:
        `torch.Tensor` of shape `(T,)`, int64.
    """
    # On a GPU always an operator: tracing would not see a kernel that is launched beside torch.
    if torch.compiler.is_compiling() or vectors.device.type == "cuda":
        return _operator(vectors, codebook)
    return _search(vectors, codebook)


def _search(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """`(T, C)` and `(K, C)` -> `(T,)`, by the way that the device takes."""
    search = find_fused_search(vectors.device, vectors.shape[1]) if vectors.device.type == "cuda" else None
    return (search or blocked_nearest_codes)(vectors.float(), codebook.float())


# Traced, the loop over chunks would be unrolled: a minute to compile, for this batch only. The name is this module's,
# since remote code may be loaded beside it.
_operator = torch.library.custom_op(f"{__name__.replace('.', '_')}::nearest_codes", _search, mutates_args=())


@_operator.register_fake
def _(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    return vectors.new_empty(vectors.shape[0], dtype=torch.long)


def blocked_nearest_codes(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """
    [`nearest_codes`], `(T, C)` and `(K, C)` -> `(T,)`, by products of a few vectors at a time with all codes, on any
    device. The maximum is taken over blocks of codes first, and its index looked for in the winning block only.
    """
    num_vectors, num_codes = len(vectors), len(codebook)
    num_blocks = -(-num_codes // _SEARCH_BLOCK)
    padding = num_blocks * _SEARCH_BLOCK - num_codes
    # A padding code has score -inf and never wins.
    bias = F.pad(codebook.square().sum(1).mul_(-0.5), (0, padding), value=float("-inf"))
    if _products_may_be_rounded(vectors.device):
        vectors, codebook = _split_for_tf32(vectors, codebook)
    keys = F.pad(codebook, (0, 0, 0, padding)).t()

    max_scores = _MAX_SCORES_CPU if vectors.device.type == "cpu" else _MAX_SCORES_GPU
    chunk = max(1, min(num_vectors, max_scores // keys.shape[1]))
    scores = vectors.new_empty(chunk, keys.shape[1])
    rows = torch.arange(chunk, device=vectors.device)
    codes = torch.empty(num_vectors, dtype=torch.long, device=vectors.device)
    for start in range(0, num_vectors, chunk):
        part = vectors[start : start + chunk]
        size = len(part)
        blocks = torch.addmm(bias, part, keys, out=scores[:size]).view(size, num_blocks, _SEARCH_BLOCK)
        best_block = blocks.amax(-1).argmax(-1)
        within = blocks[rows[:size], best_block].argmax(-1)
        torch.add(within, best_block, alpha=_SEARCH_BLOCK, out=codes[start : start + size])
    # An infinite vector makes NaN of a padding code's score, whose index would end a process that uses a GPU.
    return codes.clamp_(max=num_codes - 1)


def _products_may_be_rounded(device: torch.device) -> bool:
    """Whether float32 matrix products on `device` may be in TF32."""
    return device.type != "cpu"


def _split_for_tf32(vectors: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    `(T, 3 C)` and `(K, 3 C)` whose products are those of `(T, C)` and `(K, C)`, in TF32 as well as in float32.

    TF32 keeps 10 bits of a mantissa. Every number becomes high + low, high with just those bits; of the four products
    only low * low, 2^-20 of the whole, is left out. The setting, which is the whole process's, is left alone.
    """

    def split(values):
        high = (values.view(torch.int32) & -(1 << 13)).view(torch.float32)
        return high, values - high

    (vector_high, vector_low), (code_high, code_low) = split(vectors), split(codebook)
    return (
        torch.cat([vector_high, vector_low, vector_high], dim=1),
        torch.cat([code_high, code_high, code_low], dim=1),
    )


# By device and width of a code: the kernel, or `None` where it does not work.
_fused_searches: dict[tuple[torch.device, int], Callable | None] = {}
_trial_lock = threading.Lock()


def find_fused_search(device: torch.device, width: int) -> Callable | None:
    """
    `fused_nearest_codes`, compiled and tried once in a process for a CUDA device and a width of codes; `None` where the
    kernel is not for it, and, with a warning, where it cannot be compiled or finds other codes than the nearest.
    """
    key = (device, width)
    if key not in _fused_searches:
        if torch.cuda.is_current_stream_capturing():
            return None  # nothing can be tried now: call once before the capture
        # One thread tries: the trial changes a setting of the whole process, and puts it back.
        with _trial_lock:
            if key not in _fused_searches:
                _fused_searches[key] = _try_fused_search(device, width)
    return _fused_searches[key]


def _try_fused_search(device: torch.device, width: int) -> Callable | None:
    # Three products of TF32 stand for one of float32, which earlier matrix units do not have, nor do AMD's.
    has_tf32 = torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
    if not has_tf32 or not is_triton_available():
        return None
    # The trial waits for the device, also where nothing else may.
    mode = torch.cuda.get_sync_debug_mode()
    if mode:
        torch.cuda.set_sync_debug_mode("default")
    try:
        from .code_search_kernel import MAX_WIDTH, fused_nearest_codes

        if width > MAX_WIDTH:
            return None
        # As the codes are divided on this device, and all of them in one program after the other.
        for splits in (None, 1):
            check_search(functools.partial(fused_nearest_codes, splits=splits), device, width)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # Triton needs a C compiler, for one: codes can be found without it.
        logger.warning(
            f"The search for codes of width {width} runs in blocks on {device}, since its kernel does not work there: "
            f"{type(error).__name__}: {error}"
        )
        return None
    finally:
        if mode:
            torch.cuda.set_sync_debug_mode(mode)
    return fused_nearest_codes


def check_search(search: Callable, device: torch.device, width: int) -> None:
    """Raise a `RuntimeError` unless `search` finds the nearest codes, as far as float32 can tell them apart."""
    generator = torch.Generator().manual_seed(0)
    # No multiples of any tile, and enough of them that products in TF32 show, by 2e-5 at least; in float32 by 1e-6 at most.
    vectors, codebook = (
        1 + torch.randn(count, width, generator=generator, dtype=torch.float32, device="cpu") for count in (2001, 1001)
    )
    codes = search(vectors.to(device), codebook.to(device)).cpu()
    if not 0 <= codes.min() <= codes.max() < len(codebook):
        raise RuntimeError(f"it found codes from {codes.min()} to {codes.max()} among {len(codebook)}.")
    vectors, codebook = vectors.double(), codebook.double()
    distances = torch.cdist(vectors, codebook).square()
    excess = distances.gather(1, codes[:, None])[:, 0] - distances.amin(1)
    # Of the products that a search adds up.
    excess = (excess / vectors.norm(dim=1)).max().item() / codebook.norm(dim=1).max().item()
    if not excess < 1e-5:
        raise RuntimeError(f"it found codes that are not the nearest, by {excess:.1e} where 1e-5 is float32's.")
