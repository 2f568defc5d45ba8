"""Benchmarks that check one way of doing things against another still run, at their smallest."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize(
    "script",
    [
        "bench_head_loss.py",
        "bench_image_position.py",
        "bench_packing.py",
        "bench_precomputed_codes.py",
        "gpu_generation.py",
        "gpu_unified_training.py",
    ],
)
def test_small_run(script):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCHMARKS / script), "--small"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "failed" not in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("script", ["bench_tokenizer.py", "gpu_tokenizer.py"])
def test_small_run_of_the_tokenizer(script):
    test_small_run(script)
