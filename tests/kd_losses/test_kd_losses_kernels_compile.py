"""The kernel goes through Triton's compiler down to machine code; no GPU is needed for that."""

import pytest

pytest.importorskip("triton")

PROGRAM = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kd_losses.triton_kernels import forward_kl_kernel as kernel

for capability in (80, 90):
    for dtype in ("bf16", "fp32"):
        for shared in (False, True):
            constants = {
                "VOCABULARY": 152064, "SHARED": shared, "HAS_BIAS": not shared,
                "HAS_TEACHER_BIAS": True, "WITH_GRADIENT": True, "LARGEST": 50.0, "BLOCK": 4096,
            }
            kinds = {"losses": "*fp32", "row_stride": "i64", "scale": "fp32"}
            signature = {
                name: "constexpr" if name in constants else kinds.get(name, "*" + dtype)
                for name in kernel.arg_names
            }
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
            compiled = triton.compile(
                source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 16}
            )
            assert len(compiled.asm["cubin"]) > 1000
print("compiled")
"""


def test_the_kernel_compiles_for_gpus_that_are_not_here(outside_interpreter):
    assert outside_interpreter(PROGRAM) == "compiled\n"
