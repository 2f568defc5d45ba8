"""
The search's Triton kernel on a machine without a GPU: run by Triton's interpreter, or compiled and not run.

    TRITON_INTERPRET=1 python kernel_without_gpu.py run CASES OUTPUT    # lists of arguments; the codes of each
    python kernel_without_gpu.py compile CAPABILITY WIDTH               # prints what a thread takes, and the matrix units it uses

Scripts of their own, since whether there is an interpreter is settled when Triton is imported.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from transformers_dualtoken import code_search_kernel


PRECISION = "tf32x3"
POINTERS = dict.fromkeys(("vectors", "codebook", "bias", "best_scores"), "*fp32") | {"best_codes": "*i64"}
SIZES = dict.fromkeys(("num_vectors", "num_codes", "codes_per_split"), "i32")


def run(cases: str, output: str) -> None:
    """Cases: `(vectors, codebook, precision, splits)`, saved by torch."""
    torch.save([code_search_kernel.fused_nearest_codes(*case) for case in torch.load(cases)], output)


def compile(capability: str, width: str) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = code_search_kernel.nearest_codes_kernel
    constants = code_search_kernel.kernel_constants(int(width), PRECISION)
    aligned = [name for name in (*POINTERS, *SIZES) if name != "num_vectors"]
    source = ASTSource(
        fn=kernel,
        signature={**POINTERS, **SIZES, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
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
    print("Matrix units:", ", ".join(sorted(set(re.findall(r"(?:wgmma\.mma_async|mma\.sync)\S+", binaries["ptx"])))))


if __name__ == "__main__":
    {"run": run, "compile": compile}[sys.argv[1]](*sys.argv[2:])
