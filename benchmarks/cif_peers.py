"""CIF as others do it, for benchmarks.cif, and in float64.

Shapes: B batch, T frames, N tokens, D width. Every implementation is called as
`run(hidden_states, alphas, lengths, num_tokens)`, scales alpha so that row b fires lengths[b]
tokens of weight 1, and returns (B, N, D).
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cif import cif

Run = Callable[[Tensor, Tensor, Tensor, int], Tensor]


# Largest error allowed, relative to the norm: of the output and dh, and of dalpha.
TOLERANCES = {
    # Exact fires and float32 sums: what is left is the rounding of the result to its dtype.
    "exact": {
        torch.float32: (1e-6, 1e-5),
        torch.bfloat16: (3e-3, 1e-4),
        torch.float16: (5e-4, 1e-4),
    },
    # A prefix in float32 has lost 1e-7 of N when it reaches N; a fire near a frame's edge falls
    # into the neighbouring frame, and with it a whole term of dalpha.
    "float32": {
        torch.float32: (1e-3, 1e-1),
        torch.bfloat16: (5e-3, 1e-1),
        torch.float16: (1e-3, 1e-1),
    },
}


class Implementation(NamedTuple):
    """One way to compute CIF.

    Attributes:
        run: the function, see the module.
        arithmetic: which of TOLERANCES it is held to.
        note: what to know about its result.
        foreign: not ours to correct: it is timed even where its result is wrong, and its row says
            so.
    """

    run: Run
    arithmetic: str = "exact"
    note: str = ""
    foreign: bool = False


def ours(
    hidden_states: Tensor, alphas: Tensor, lengths: Tensor, num_tokens: int, *, backend: str
) -> Tensor:
    """`cif.cif` with one backend."""
    out = cif(hidden_states, alphas, target_lengths=lengths, max_tokens=num_tokens, backend=backend)
    return out.hidden_states


def torch_cif(hidden_states: Tensor, alphas: Tensor, lengths: Tensor, num_tokens: int) -> Tensor:
    """torch-cif from its package."""
    from torch_cif import cif_function

    out = cif_function(hidden_states, alphas, target_lengths=lengths)
    return out["cif_out"][0]


def scaled_prefix(alphas: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The accumulated weight after and before each frame, (B, T) each, ending at `lengths`."""
    c = alphas.cumsum(dim=1)
    c = c / c[:, -1:] * lengths[:, None]
    return c, torch.cat([torch.zeros_like(c[:, :1]), c[:, :-1]], dim=1)


def dense_bmm(hidden_states: Tensor, alphas: Tensor, lengths: Tensor, num_tokens: int) -> Tensor:
    """All N x T weights, and a matrix product."""
    c, before = scaled_prefix(alphas, lengths)
    token = torch.arange(num_tokens, device=alphas.device)[:, None]
    weights = (c[:, None] - token).clamp(0, 1) - (before[:, None] - token).clamp(0, 1)
    return weights.to(hidden_states.dtype) @ hidden_states


def _split(alphas: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(prefix, prefix before, token before, token after), the last two integers, (B, T) each."""
    c, before = scaled_prefix(alphas.double(), lengths)
    return c, before, before.floor().long(), c.floor().long()


def index_add(hidden_states: Tensor, alphas: Tensor, lengths: Tensor, num_tokens: int) -> Tensor:
    """Add every weighted frame to its first token, then to its second one, and so on."""
    batch, _, width = hidden_states.shape
    c, before, first, last = _split(alphas, lengths)
    row = torch.arange(batch, device=alphas.device)[:, None] * (num_tokens + 1)
    out = torch.zeros(batch * (num_tokens + 1), width, device=alphas.device)
    for step in range(int((last - first).max()) + 1):
        token = torch.minimum(first + step, last)
        weight = (c - token).clamp(0, 1) - (before - token).clamp(0, 1)
        # a frame of fewer tokens than others has added its last one already
        weight = torch.where(first + step <= last, weight, 0.0).float()
        pieces = (weight[..., None] * hidden_states).flatten(0, 1)
        out.index_add_(0, (row + token).flatten(), pieces)
    return out.view(batch, num_tokens + 1, width)[:, :-1].to(hidden_states.dtype)


def loop(hidden_states: Tensor, alphas: Tensor, lengths: Tensor, num_tokens: int) -> Tensor:
    """Frame by frame, as CIF is usually told: integrate; at a fire, emit and begin anew.

    A frame fires at most one token. The fires are decided by a scaled sum in float64: with alpha
    scaled and summed in float32, as usual, rows often lose their last token.
    """
    c, before, first, last = _split(alphas, lengths)
    fires = last > first
    # up to the end of the token in progress, and what goes over into the next one
    within = torch.where(fires, last - before, c - before).float()
    over = torch.where(fires, c - last, 0.0).float()
    state = torch.zeros_like(hidden_states[:, 0], dtype=torch.float32)
    states = []
    for t, frame in enumerate(hidden_states.unbind(1)):
        state = state + within[:, t, None] * frame
        states.append(state)
        state = torch.where(fires[:, t, None], over[:, t, None] * frame, state)
    emitted = torch.stack(states, dim=1)
    token = torch.arange(num_tokens, device=alphas.device)
    # the first frame whose prefix has reached the end of the token
    frame = torch.searchsorted(last, (token + 1).expand(len(last), -1).contiguous())
    frame = frame.clamp(max=last.shape[1] - 1)
    out = emitted.gather(1, frame[..., None].expand(-1, -1, emitted.shape[-1]))
    out = out.masked_fill((token >= lengths[:, None])[..., None], 0.0)
    return out.to(hidden_states.dtype)


IMPLEMENTATIONS: dict[str, Implementation] = {
    "cif (triton)": Implementation(partial(ours, backend="triton")),
    "cif (torch)": Implementation(partial(ours, backend="torch")),
    "cif (dense)": Implementation(partial(ours, backend="dense")),
    "torch-cif 0.2.0": Implementation(
        torch_cif,
        "float32",
        "adds eps = 1e-4 to the sum of every row; computes N and the weights in the input's dtype",
        foreign=True,
    ),
    "dense + bmm": Implementation(dense_bmm, "float32"),
    "index_add": Implementation(index_add),
    "loop over frames": Implementation(loop, note="at most one fire per frame"),
}


def why_not(name: str, most_fires: int) -> str | None:
    """Why an implementation cannot be measured, as far as is known without trying."""
    if name == "loop over frames" and most_fires > 1:
        return f"a frame fires {most_fires} tokens, this loop at most one per frame"
    if name == "cif (triton)" and os.environ.get("TRITON_INTERPRET") == "1":
        return "Triton's interpreter (TRITON_INTERPRET=1) says nothing about speed"
    if name.startswith("torch-cif"):
        try:
            found = importlib.metadata.version("torch-cif")
        except importlib.metadata.PackageNotFoundError:
            return "torch-cif is not installed"
        return None if found == "0.2.0" else f"torch-cif {found} is installed"
    return None


def truth(
    hidden_states: Tensor, alphas: Tensor, lengths: Tensor, num_tokens: int, upstream: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The output and both gradients in float64, row by row through the dense weights."""
    rows = []
    for h, a, n, up in zip(hidden_states, alphas, lengths, upstream, strict=True):
        leaves = [x.detach().double()[None].requires_grad_() for x in (h, a)]
        out = dense_bmm(*leaves, n[None], num_tokens)
        rows.append((out.detach(), *torch.autograd.grad(out, leaves, up.double()[None])))
    out, d_hidden, d_alphas = (torch.cat(parts) for parts in zip(*rows, strict=True))
    return out, d_hidden, d_alphas
