"""The language-model head: hidden rows to logits, gradients of logits back to rows.

Letters: n rows, H width, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kd_losses.divergences import trim_vocabulary
from kd_losses.reduction import accumulation_dtype

_CHUNK_CPU = 64
_CHUNK_ACCELERATOR = 1024


@dataclass(frozen=True)
class LinearHead:
    """A linear head, in the dtype that its matrix products run in.

    Attributes:
        weight: (V, H).
        bias: (V,) or None.
    """

    weight: Tensor
    bias: Tensor | None

    @property
    def frozen(self) -> bool:
        """True if neither weight nor bias wants a gradient."""
        return not self.weight.requires_grad and (self.bias is None or not self.bias.requires_grad)

    def detach(self) -> "LinearHead":
        """The same head, cut off from the graph."""
        return LinearHead(self.weight.detach(), None if self.bias is None else self.bias.detach())

    def logits(self, rows: Tensor, temperature: float, *, with_bias: bool = True) -> Tensor:
        """Logits (n, V) of ``rows`` (n, H), over the temperature, at least in float32."""
        logits = rows.to(self.weight.dtype) @ self.weight.t()
        logits = logits.to(accumulation_dtype(logits.dtype))
        if with_bias and self.bias is not None:
            logits = logits + self.bias
        return logits if temperature == 1 else logits / temperature

    def pull_back(self, logits_gradient: Tensor) -> Tensor:
        """Gradient (n, H) with respect to the rows, from that of the logits (n, V)."""
        if self.weight.dtype != torch.float16:
            return logits_gradient.to(self.weight.dtype) @ self.weight
        # most of a row's entries would underflow in float16 if it kept its scale
        largest = logits_gradient.abs().amax(-1, keepdim=True).clamp(min=1e-30)
        rows = (logits_gradient / largest).to(self.weight.dtype) @ self.weight
        return rows.to(logits_gradient.dtype) * largest


def make_head(
    name: str, weight: Tensor, bias: Tensor | None, rows: Tensor, vocab_size: int | None
) -> LinearHead:
    """Check a head against the rows it's applied to, trim it, and cast it as autocast would.

    Args:
        name: what the caller calls ``weight``; its bias and rows are named after it.
        weight: (V, H).
        bias: (V,) or None.
        rows: (n, H).
        vocab_size: keep the first vocab_size entries; None: all.

    Raises:
        TypeError: the dtypes of rows and weight differ, outside of autocast.
        ValueError: the shapes don't fit.
    """
    bias_name = name.replace("weight", "bias")
    rows_name = name.replace("linear_weight", "input")
    if weight.ndim != 2 or weight.shape[1] != rows.shape[1]:
        raise ValueError(
            f"{name}: expected shape (V, {rows.shape[1]}) to fit {rows_name}, got "
            f"{tuple(weight.shape)}; give the head's weight as nn.Linear stores it"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{bias_name}: expected shape ({weight.shape[0]},) to fit {name}, got "
            f"{tuple(bias.shape)}"
        )
    size = trim_vocabulary(name, weight.shape[0], vocab_size)
    dtype = compute_dtype(weight)
    if dtype != compute_dtype(rows):
        raise TypeError(
            f"{rows_name} and {name}: expected the same dtype, got {rows.dtype} and "
            f"{weight.dtype}; cast one of them, or run under torch.autocast"
        )
    weight = weight[:size].to(dtype)
    return LinearHead(weight, None if bias is None else bias[:size])


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which a matrix product of ``tensor`` runs here, autocast considered."""
    kind = tensor.device.type
    if torch.is_autocast_enabled(kind) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return tensor.dtype


def chunk_rows(chunk_size: int | None, device: torch.device) -> int:
    """The number of rows that are worked on at a time."""
    if chunk_size is None:
        return _CHUNK_CPU if device.type == "cpu" else _CHUNK_ACCELERATOR
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1 row, got {chunk_size}; None chooses")
    return chunk_size


def scale_row_gradients(gradient: Tensor, factors: Tensor, name: str) -> Tensor:
    """The backward of a fused loss: its rows' gradients (n, H) times the factors (n,).

    Raises:
        RuntimeError: under create_graph, where a second derivative would silently be missing.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name}: with a frozen head it can be differentiated once, got create_graph=True; for "
            "second derivatives apply the head and use a loss on logits"
        )
    return (gradient * factors.unsqueeze(-1)).to(gradient.dtype)
