"""The kernels go through Triton's compiler down to machine code; no GPU is needed for that."""

import pytest

pytest.importorskip("triton")

PROGRAM = """
import re
import struct
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from cif.backends import triton_kernels as kernels

POINTERS = {
    "starts": "i64", "ends": "i64", "limits": "i64", "readable": "i1", "mask": "i1",
    "targets": "i64", "counts": "i64", "lengths": "i64", "token_mask": "i1", "fire_times": "fp32",
    "totals": "i64", "slopes": "fp64",
}
KERNELS = (
    kernels.integrate_kernel, kernels.integrate_backward_kernel, kernels.align_kernel,
    kernels.align_backward_kernel,
)
INTEGERS = {
    "hidden_stride", "grad_stride", "row_stride", "column_stride", "mask_stride", "num_frames",
    "num_tokens", "all_frames",
}

def compile_for(kernel, capability, frames, work, constants):
    def kind(name):
        if name in constants:
            return "constexpr"
        if name in INTEGERS:
            return "i32"
        if name in ("uniform", "nan"):
            return {"uniform": "i64", "nan": "fp32"}[name]
        if name in POINTERS:
            return "*" + POINTERS[name]
        in_frames = ("hidden", "out", "grad", "d_hidden", "alphas", "d_alphas")
        return "*" + (frames if name in in_frames else work)

    source = ASTSource(
        fn=kernel,
        signature={name: kind(name) for name in kernel.arg_names},
        constexprs=constants,
        # what Triton finds out by itself when it launches: torch aligns what it allocates
        attrs={
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(kernel.arg_names) if name not in constants
        },
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert len(compiled.asm["cubin"]) > 1000
    return compiled

ONES = dict.fromkeys(("num_frames", "hidden_stride", "column_stride", "num_tokens"), 1)

def constants_of(kernel, constants):
    return {name: value for name, value in constants.items() if name in kernel.arg_names}

for capability in (80, 90):
    for frames, work in (("bf16", "fp32"), ("fp32", "fp32"), ("fp64", "fp64")):
        constants = {
            "WIDTH": 1280, "BLOCK_FRAMES": 8, "BLOCK_WIDTH": 256, "THRESHOLD": 0.9, "SCALED": True,
            "HAS_MASK": True, "HAS_TARGETS": True, "BLOCK": 1024, "SCALE": 2**40 / 0.9,
            "CEILING": 0.9 * 2**22, "TAIL_BIAS": 2**39,
        }
        for kernel in KERNELS:
            compiled = compile_for(
                kernel, capability, frames, work, constants_of(kernel, constants)
            )
            if kernel is kernels.align_kernel:
                # the factor of the prefix comes through in float64: 0d and 16 hexadecimal digits
                factor = struct.pack(">d", 2**40 / 0.9).hex().upper()
                assert "0d" + factor in compiled.asm["ptx"]
            elif kernel is not kernels.align_backward_kernel:
                # frames are read 16 bytes at a time
                assert re.search(r"ld\\.global\\.v(4\\.b32|2\\.b64)", compiled.asm["ptx"])

# sizes of 1 become constants, and what is None is one
bare = {**constants, **ONES, "HAS_MASK": False, "HAS_TARGETS": False, "SCALED": False}
bare |= {"mask": None, "readable": None, "targets": None}
for kernel in KERNELS:
    compile_for(kernel, 90, "bf16", "fp32", constants_of(kernel, bare))
print("compiled")
"""


def test_every_kernel_compiles_for_gpus_that_are_not_here(outside_interpreter):
    assert outside_interpreter(PROGRAM) == "compiled\n"
