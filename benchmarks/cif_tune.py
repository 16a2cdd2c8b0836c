"""The sizes of tiles of CIF's Triton kernels: which are the fastest on this GPU.

    python -m benchmarks.cif_tune [--out RESULTS_DIR] [--quick]

Times every tile on batches of 32 x 1500 frames, N from 60 to 400, for each width and dtype, by the
time for which the GPU is busy, and prints the best beside the one of cif/backends/triton_tiles.py.
results/cif_tune-cuda.jsonl holds every tile. Does nothing without a GPU.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence

import torch

from benchmarks import measure
from cif import cif
from cif.backends import triton_tiles
from cif.backends.triton_tiles import Tile

TILES = [
    Tile(frames, columns, warps)
    for frames, columns, warps in itertools.product((4, 8, 16), (128, 256, 512, 1024), (2, 4, 8))
    if 1024 <= frames * columns <= 8192
]
WIDTHS = (512, 1280, 4096)
DTYPES = (torch.bfloat16, torch.float32)


def calls(width: int, dtype: torch.dtype, frames: int) -> dict[str, Callable[[], object]]:
    """The forward pass, and the backward pass over a graph that is kept."""
    torch.manual_seed(0)
    hidden = torch.randn(32, frames, width, device="cuda", dtype=dtype, requires_grad=True)
    alphas = torch.rand(32, frames, device="cuda", requires_grad=True)
    targets = torch.randint(frames // 25, frames * 4 // 15, (32,), device="cuda")
    most = frames * 4 // 15

    def forward() -> torch.Tensor:
        out = cif(hidden, alphas, target_lengths=targets, max_tokens=most, backend="triton")
        return out.hidden_states

    tokens = forward()
    upstream = torch.randn_like(tokens)

    def backward() -> object:
        return torch.autograd.grad(tokens, (hidden, alphas), upstream, retain_graph=True)

    return {"forward": forward, "backward": backward}


def main(arguments: Sequence[str] | None = None) -> int:
    options = measure.options("python -m benchmarks.cif_tune", arguments)
    if options.device != "cuda":
        print("cif_tune: skipped, there is no GPU to choose tiles for")
        return 0
    where = measure.machine(options.device)
    widths, tiles, frames = (WIDTHS, TILES, 1500)
    if options.quick:
        widths, tiles, frames = WIDTHS[:1], TILES[:2], 60
    rows = []
    for width, dtype in itertools.product(widths, DTYPES):
        tables = {"forward": triton_tiles.FORWARD, "backward": triton_tiles.BACKWARD}
        for name, call in calls(width, dtype, frames).items():
            table, standing = tables[name], tables[name][dtype.itemsize]
            times = {}
            for tile in dict.fromkeys([standing, *tiles]):
                table[dtype.itemsize] = tile
                times[tile] = measure.kernel_ms(call)
                setting = {"case": f"D{width}", "dtype": str(dtype)[6:], "pass": name}
                rows.append({**setting, "tile": list(tile), "kernel_ms": times[tile], **where})
            table[dtype.itemsize] = standing
            best = min(times, key=times.__getitem__)
            print(
                f"D {width:5} {str(dtype)[6:]:9} {name:9} {times[standing]:7.4f} ms with "
                f"{tuple(standing)}, at best {times[best]:7.4f} ms with {tuple(best)}",
                flush=True,
            )
    measure.write(rows, options.out / "cif_tune-cuda.jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(main())
