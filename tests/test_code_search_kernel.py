"""The search as one Triton kernel, without a GPU: interpreted, and compiled; `make test-extras` runs this."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from transformers_dualtoken.code_search import blocked_nearest_codes


pytestmark = pytest.mark.extras
pytest.importorskip("triton", reason="needs the extra kernels: make test-extras", exc_type=ImportError)

SCRIPT = Path(__file__).with_name("kernel_without_gpu.py")
# Vectors, codes, width, splits: parts of tiles, whole ones, one of each, more splits than there are tiles.
SIZES = [
    (301, 1001, 32, 1),
    (301, 1001, 32, 3),
    (128, 256, 32, 2),
    (64, 64, 16, 1),
    (1, 1, 8, 4),
    (77, 129, 20, 2),
    (301, 1001, 32, None),
    (1000, 129, 32, None),
    (5, 300, 1, 9),
    (65, 2000, 64, 7),
    (0, 10, 8, 1),
]


def run(*arguments, **environment) -> str:
    # This environment may have a torchvision that only the shim makes importable.
    command = [sys.executable, "-m", "torchvision_shim", str(SCRIPT), *map(str, arguments)]
    paths = [str(SCRIPT.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), **environment}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    """Runs cases `(vectors, codebook, precision, splits)` in the interpreter."""

    def search(cases, **environment) -> list[torch.Tensor]:
        folder = tmp_path_factory.mktemp("cases")
        torch.save(cases, folder / "cases.pt")
        run("run", folder / "cases.pt", folder / "codes.pt", TRITON_INTERPRET="1", **environment)
        return torch.load(folder / "codes.pt")

    return search


def test_kernel_finds_what_the_blocked_search_finds(search):
    cases = [
        (torch.randn(num_vectors, width), torch.randn(num_codes, width), precision, splits)
        for num_vectors, num_codes, width, splits in SIZES
        for precision in ("tf32x3", "ieee")
    ]
    # A view, as the residuals of one depth may be.
    cases.append((torch.randn(32, 50).t(), torch.randn(16, 100).t()[:, :16].repeat(1, 2), "tf32x3", 2))
    for case, codes in zip(cases, search(cases), strict=True):
        vectors, codebook = case[:2]
        assert codes.shape == (len(vectors),) and codes.dtype == torch.long
        if len(vectors):
            distances = torch.cdist(vectors.double(), codebook.double())
            excess = distances.gather(1, codes[:, None])[:, 0] - distances.amin(1)
            assert excess.max() <= 1e-6 * distances.max(), case[2:]
            agreeing = (codes == blocked_nearest_codes(vectors, codebook)).float().mean()
            assert agreeing > 0.99, case[2:]  # the others are ties in float32


@pytest.mark.parametrize("splits", [1, 3])
def test_of_equally_near_codes_the_lowest_index_wins(search, splits):
    # Small integers are exact, so that every minimum is a tie; copies of all codes lie in other tiles and parts.
    vectors = torch.randint(-1, 2, (200, 2)).float()
    codebook = torch.randint(-1, 2, (150, 2)).float().repeat(3, 1)
    distances = torch.cdist(vectors, codebook, compute_mode="donot_use_mm_for_euclid_dist")
    lowest = [int((row == row.min()).nonzero()[0]) for row in distances]
    (codes,) = search([(vectors, codebook, "tf32x3", splits)])
    assert codes.tolist() == lowest


def test_codes_of_numbers_that_are_not_finite_are_in_range(search):
    cases = []
    for value in (float("inf"), -float("inf"), float("nan")):
        vectors = torch.randn(5, 8)
        vectors[2, 3] = value
        cases += [(vectors, torch.randn(200, 8), "tf32x3", splits) for splits in (1, 2)]
    for (vectors, codebook, *_), codes in zip(cases, search(cases), strict=True):
        assert codes.min() >= 0 and codes.max() < len(codebook)
        others = [0, 1, 3, 4]
        assert torch.equal(codes[others], blocked_nearest_codes(vectors[others], codebook))
        assert codes[2] == 0 or not vectors[2].isnan().any()


def test_half_as_the_default_dtype_rounds_nothing(search):
    vectors, codebook = torch.randn(300, 32), torch.randn(640, 32)
    expected = blocked_nearest_codes(vectors, codebook)
    (codes,) = search([(vectors, codebook, "tf32x3", 4)], DEFAULT_DTYPE="bfloat16")
    assert torch.equal(codes, expected)


def test_other_widths_are_refused(search):
    with pytest.raises(AssertionError, match="must be of one width and on one device, got widths 8 and 16 on cpu"):
        search([(torch.randn(3, 8), torch.randn(5, 16), "ieee", 1)])


# Of a tile, in steps of 8 along the width: three products of TF32 for one of float32. The interpreter rounds nothing.
@pytest.mark.parametrize("width", [8, 32])
@pytest.mark.parametrize(
    "capability, unit, products_of_a_step", [(80, "mma.sync", 8), (90, "wgmma.mma_async", 1)], ids=["8.0", "9.0"]
)
def test_kernel_compiles_to_the_matrix_units_without_spilling(capability, unit, products_of_a_step, width, tmp_path):
    report = run("compile", capability, width, TRITON_CACHE_DIR=str(tmp_path))
    steps = max(width, 16) // 8
    assert f"{3 * steps * products_of_a_step} x {unit}." in report and ".tf32.tf32" in report, report
    # Registers that do not suffice are spilled to the stack.
    assert re.search(r"REG:\d+ STACK:0 ", report), report
