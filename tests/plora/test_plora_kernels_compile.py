"""The kernels go through Triton's compiler down to machine code; no GPU is needed for that."""

import pytest

pytest.importorskip("triton")

PROGRAM = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from plora.backends import triton_kernels as kernels

INTEGERS = {"matrix_stride", "rank_stride", "column_stride", "num_rows", "columns"}

def compile_for(kernel, capability, dtype, constants):
    def kind(name):
        if name in constants:
            return "constexpr"
        if name in INTEGERS:
            return "i32"
        return {"rows": "*i64", "parts": "*fp32", "scaling": "fp32"}.get(name, "*" + dtype)

    source = ASTSource(
        fn=kernel, signature={name: kind(name) for name in kernel.arg_names}, constexprs=constants
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert len(compiled.asm["cubin"]) > 1000
    return compiled.asm["ptx"]

for capability in (80, 90):
    for dtype in ("bf16", "fp16", "fp32"):
        for rank in (16, 64):
            tile = {
                "RANK": rank, "BLOCK_ROWS": 32, "BLOCK_COLUMNS": 64, "BLOCK_RANK": rank,
                "WIDEN": False,
            }
            shrink = {**tile, "COLUMNS_PER_PART": 512}
            outer = {**tile, "ROWS_PER_PART": 128}
            expand = {**tile, "BLOCK_COLUMNS": 128}
            for kernel, constants in (
                (kernels.shrink_kernel, shrink),
                (kernels.outer_kernel, outer),
                (kernels.expand_kernel, expand),
            ):
                ptx = compile_for(kernel, capability, dtype, constants)
                # 16-bit products go to the tensor cores
                assert ("mma" in ptx) == (dtype != "fp32"), (kernel, dtype)
                assert "atom." not in ptx
print("compiled")
"""


def test_every_kernel_compiles_for_gpus_that_are_not_here(outside_interpreter):
    assert outside_interpreter(PROGRAM) == "compiled\n"
