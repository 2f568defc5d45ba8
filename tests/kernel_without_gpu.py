"""
The search's Triton kernel on a machine without a GPU: run by Triton's interpreter, or compiled and not run.

    TRITON_INTERPRET=1 python kernel_without_gpu.py run CASES OUTPUT    # lists of arguments; the codes of each
    python kernel_without_gpu.py compile CAPABILITY WIDTH               # prints what a thread takes, and the matrix units it uses

Scripts of their own, since whether there is an interpreter is settled when Triton is imported.
"""

import os
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import torch

from transformers_dualtoken import code_search_kernel


PRECISION = "tf32x3"
POINTERS = dict.fromkeys(("vectors", "codebook", "bias", "best_scores"), "*fp32") | {"best_codes": "*i64"}
SIZES = dict.fromkeys(("num_vectors", "num_codes", "codes_per_split"), "i32")


def run(cases: str, output: str) -> None:
    """Cases: `(vectors, codebook, precision, splits)`, saved by torch; without splits as on a GPU of few processors."""
    torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(major=9, multi_processor_count=2)
    cases = torch.load(cases)
    torch.set_default_dtype(getattr(torch, os.environ.get("DEFAULT_DTYPE", "float32")))
    torch.save([code_search_kernel.fused_nearest_codes(*case) for case in cases], output)


def compile(capability: str, width: str) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = code_search_kernel.nearest_codes_kernel
    constants = code_search_kernel.kernel_constants(int(width), PRECISION)
    source = ASTSource(
        fn=kernel,
        signature={**POINTERS, **SIZES, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in POINTERS},
    )
    target = GPUTarget("cuda", int(capability), 32)
    binaries = triton.compile(source, target=target, options=code_search_kernel.LAUNCH_OPTIONS).asm
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binaries["cubin"])
        file.flush()
        # Triton's own: it reads what Triton's assembler has written.
        reader = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [reader, "--dump-resource-usage", file.name]
        print(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    units = re.findall(r"(?<!\w)(?:wgmma\.mma_async|mma\.sync)\S+", binaries["ptx"])
    print("Matrix units:", *(f"{units.count(unit)} x {unit}" for unit in sorted(set(units))))


if __name__ == "__main__":
    {"run": run, "compile": compile}[sys.argv[1]](*sys.argv[2:])
