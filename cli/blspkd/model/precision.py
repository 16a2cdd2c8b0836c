"""Whether a processor multiplies in a 16-bit type, or torch must do without its help."""

from __future__ import annotations

import torch

# names of torch.cpu.get_capabilities() on x86-64, one of which oneDNN needs for products in a type
_INSTRUCTIONS = {
    torch.bfloat16: ("avx512_f", "amx_bf16", "avx_ne_convert"),
    torch.float16: ("avx512_fp16", "amx_fp16", "avx_ne_convert"),
}


def slow_type_warning(dtype: torch.dtype, device: torch.device, *, remedy: str) -> str | None:
    """A line for who is about to compute in a type that is several times slower than float32 there.

    Args:
        dtype: any.
        device: where the model runs.
        remedy: what to give for float32, such as ``--dtype float32``.

    Returns:
        None where the type is not slow, or where that cannot be known: on processors other than
        x86-64, and with a torch that does not tell their instructions.
    """
    get_capabilities = getattr(torch.cpu, "get_capabilities", None)
    if device.type != "cpu" or dtype not in _INSTRUCTIONS or get_capabilities is None:
        return None
    found = get_capabilities()
    if found.get("architecture") != "x86_64" or any(map(found.get, _INSTRUCTIONS[dtype])):
        return None
    name = str(dtype).removeprefix("torch.")
    return f"warning: this processor has no instructions for {name} and is slow in it: {remedy}"
