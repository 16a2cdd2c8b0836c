"""The kernels go through Triton's compiler down to machine code; no GPU is needed for that."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
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
        fn=kernel, signature={name: kind(name) for name in kernel.arg_names}, constexprs=constants
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert len(compiled.asm["cubin"]) > 1000
    return compiled

for capability in (80, 90):
    for frames, work in (("bf16", "fp32"), ("fp32", "fp32"), ("fp64", "fp64")):
        tile = {"WIDTH": 1280, "BLOCK_FRAMES": 8, "BLOCK_WIDTH": 256}
        compile_for(kernels.integrate_kernel, capability, frames, work, tile)
        compile_for(
            kernels.integrate_backward_kernel, capability, frames, work, {**tile, "HAS_MASK": True}
        )
        scan = {"THRESHOLD": 0.9, "SCALED": True, "HAS_MASK": True, "BLOCK": 1024}
        compile_for(kernels.align_backward_kernel, capability, frames, work, scan)
        scan |= {"SCALE": 2**40 / 0.9, "CEILING": 0.9 * 2**22, "TAIL_BIAS": 2**39}
        compiled = compile_for(
            kernels.align_kernel, capability, frames, work, {**scan, "HAS_TARGETS": True}
        )
        # the factor of the prefix must come through in float64: 0dX and its 16 hexadecimal digits
        factor = struct.pack(">d", 2**40 / 0.9).hex().upper()
        assert "0d" + factor in compiled.asm["ptx"]
print("compiled")
"""


def test_every_kernel_compiles_for_gpus_that_are_not_here(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.stdout == "compiled\n", done.stderr[-3000:]
