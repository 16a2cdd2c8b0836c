"""The language-model head: hidden rows to logits, gradients of logits back to rows.

Letters: n rows, H width, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import is_available

from kd_losses.divergences import trim_vocabulary
from kd_losses.reduction import accumulation_dtype

# Twice as many go through a shared head at once. For 512 x 576 x 49,152 on one core of an EPYC,
# chunks of 128, 171 and 256 take 546, 580 and 596 ms in bfloat16, in float32 1,177, 1,203 and
# 1,175. In bfloat16 those of 128 stay below the 32 MiB too up to which malloc keeps what is freed.
_CHUNK_CPU = 128
_CHUNK_ACCELERATOR = 1024


@dataclass(frozen=True)
class LinearHead:
    """A linear head, in the dtype that its matrix products run in.

    Attributes:
        weight: (V, H).
        bias: (V,) or None.
        softcap: logits become softcap * tanh(logits / softcap), as in Gemma 2; None: they stay.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None = None

    def detach(self) -> LinearHead:
        """The same head, cut off from the graph."""
        bias = None if self.bias is None else self.bias.detach()
        return LinearHead(self.weight.detach(), bias, self.softcap)

    def logits(self, rows: Tensor, temperature: float) -> Tensor:
        """Logits (n, V) of ``rows`` (n, H), over the temperature, at least in float32."""
        logits = rows.to(self.weight.dtype) @ self.weight.t()
        logits = logits.to(accumulation_dtype(logits.dtype))
        if self.bias is not None:
            logits = logits + self.bias
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits if temperature == 1 else logits / temperature

    def finish(self, logits: Tensor, temperature: float) -> Tensor:
        """What ``logits`` does after the product, in place."""
        if self.bias is not None:
            logits.add_(self.bias)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits if temperature == 1 else logits.div_(temperature)


def wants_gradient(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a head of these two has to be given a gradient, here."""
    wanted = weight.requires_grad or (bias is not None and bias.requires_grad)
    return wanted and torch.is_grad_enabled()


def make_head(
    name: str,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    vocab_size: int | None,
    softcap: float | None = None,
) -> LinearHead:
    """Check a head against the rows it's applied to, trim it, and cast it as autocast would.

    A sharded weight (DTensor) is gathered here, once.

    Args:
        name: what the caller calls ``weight``; its bias and rows are named after it.
        weight: (V, H).
        bias: (V,) or None.
        rows: (n, H).
        vocab_size: keep the first vocab_size entries; None: all.
        softcap: see ``LinearHead``.

    Raises:
        TypeError: the dtypes of rows and weight differ, outside of autocast.
        ValueError: the shapes don't fit, or the soft cap isn't positive.
    """
    rows_name = name.replace("linear_weight", "input")
    if weight.ndim != 2 or weight.shape[1] != rows.shape[1]:
        raise ValueError(
            f"{name}: expected shape (V, {rows.shape[1]}) to fit {rows_name}, got "
            f"{tuple(weight.shape)}; give the head's weight as nn.Linear stores it"
        )
    if bias is not None:
        check_bias(name.replace("weight", "bias"), bias, weight)
    check_softcap(name.replace("linear_weight", "softcap"), softcap)
    size = trim_vocabulary(name, weight.shape[0], vocab_size)
    dtype = compute_dtype(weight)
    if dtype != compute_dtype(rows):
        raise TypeError(
            f"{rows_name} and {name}: expected the same dtype, got {rows.dtype} and "
            f"{weight.dtype}; cast one of them, or run under torch.autocast"
        )
    weight = gathered(weight)[:size].to(dtype)
    return LinearHead(weight, None if bias is None else gathered(bias)[:size], softcap)


def check_bias(name: str, bias: Tensor, weight: Tensor) -> None:
    """Raise unless ``bias`` has one number for each entry of the vocabulary."""
    if bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{name}: expected shape ({weight.shape[0]},) to fit {name.replace('bias', 'weight')}, "
            f"got {tuple(bias.shape)}"
        )


def check_softcap(name: str, softcap: float | None) -> None:
    """Raise unless ``softcap`` is None or a positive finite number."""
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(
            f"{name}: expected a positive finite number, got {softcap}; None leaves the logits as "
            "they are"
        )


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor; any other tensor as it is.

    Its gradient is averaged over the processes, as FSDP does with those of all other parameters;
    where they share the data, as under tensor parallelism, it is the same in all of them anyway.
    """
    if is_available():
        from torch.distributed.tensor import DTensor, Partial

        if isinstance(tensor, DTensor):
            if not tensor.requires_grad:
                return tensor.full_tensor()
            whole = tensor.full_tensor(grad_placements=[Partial()] * tensor.device_mesh.ndim)
            processes = tensor.device_mesh.size()
            # gloo knows no averages
            whole.register_hook(lambda gradient: gradient / processes)
            return whole
    return tensor


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which a matrix product of ``tensor`` runs here, autocast considered."""
    kind = tensor.device.type
    if torch.is_autocast_enabled(kind) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return tensor.dtype


def check_chunk_size(chunk_size: int | None) -> None:
    """Raise unless ``chunk_size`` is None or a number of rows."""
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1 row, got {chunk_size}; None chooses")


def check_in_vocabulary(name: str, ids: Tensor, vocabulary: int, besides: str = "") -> None:
    """Raise, on a CPU, where it costs no synchronisation, if an id isn't in the vocabulary.

    Args:
        name: what the caller calls ``ids``.
        ids: int64, those that count.
        vocabulary: V.
        besides: what else the caller may give, for the message.
    """
    if torch.compiler.is_compiling() or ids.device.type != "cpu" or ids.numel() == 0:
        return
    smallest, largest = int(ids.min()), int(ids.max())
    if smallest < 0 or largest >= vocabulary:
        raise ValueError(
            f"{name}: expected 0 to {vocabulary - 1}{besides}, got {smallest} to {largest}; check "
            "vocab_size and the tokenizer"
        )


def check_below_infinity(losses: Tensor, *sides: tuple[str, Tensor, LinearHead]) -> None:
    """Name the logits of +inf, of which a softmax is NaN, on a CPU, where looking costs nothing.

    Args:
        losses: (n,).
        sides: for each model what the caller calls its rows, these rows (n, H), and its head.

    Raises:
        ValueError: a loss is NaN, and a logit of its row +inf.
    """
    if torch.compiler.is_compiling() or losses.device.type != "cpu":
        return
    for row in torch.nonzero(losses.isnan())[:8, 0].tolist():
        for name, rows, head in sides:
            if head.logits(rows[row : row + 1].detach(), 1.0).isposinf().any():
                raise ValueError(
                    f"{name}: expected logits that are finite or -inf, got +inf in selected row "
                    f"{row}; forbid words by -inf, and where float16 overflows use bfloat16"
                )


def chunk_rows(chunk_size: int | None, rows: int, device: torch.device) -> int:
    """How many of ``rows`` rows are worked on at a time: chunks that are about equally long."""
    if chunk_size is not None:
        return min(chunk_size, max(1, rows))
    most = _CHUNK_CPU if device.type == "cpu" else _CHUNK_ACCELERATOR
    chunks = max(1, math.ceil(rows / most))
    return max(1, math.ceil(rows / chunks))


def scale_row_gradients(gradient: Tensor, factors: Tensor) -> Tensor:
    """The backward of a fused loss: its rows' gradients (n, H) times the factors (n,).

    Raises:
        RuntimeError: under create_graph, where a second derivative would silently be missing.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph: expected False, for a loss fused with a frozen head can be "
            "differentiated once, got True; for second derivatives apply the head and use a loss "
            "on logits"
        )
    return (gradient * factors.unsqueeze(-1)).to(gradient.dtype)


def head_products(
    student: Tensor,
    teacher: Tensor | None,
    head: LinearHead,
    teacher_head: LinearHead | None,
    buffer: Tensor,
) -> Tensor:
    """Fill ``buffer`` by the head's products.

    Returns:
        (2, c, V): the teacher's logits, then the student's or, with a shared head, their
        difference; (1, c, V), the student's, without a teacher.
    """
    parts = 1 if teacher is None else 2
    logits = buffer[: parts * len(student)].view(parts, len(student), -1)
    if teacher is None:
        _product(student, head.weight, logits[0])
    elif teacher_head is None:
        # subtracting before the product is what saves the small differences
        dtype = head.weight.dtype
        both = torch.cat([teacher.to(dtype), (student - teacher).to(dtype)])
        _product(both, head.weight, logits.view(-1, logits.shape[-1]))
    else:
        _product(student, head.weight, logits[1])
        _product(teacher, teacher_head.weight, logits[0])
    return logits


def _product(rows: Tensor, weight: Tensor, logits: Tensor) -> None:
    if logits.dtype == weight.dtype:
        torch.mm(rows.to(weight.dtype), weight.t(), out=logits)
    else:
        logits.copy_(rows.to(weight.dtype) @ weight.t())


def pull_back(
    logits_gradient: Tensor, scales: Tensor | None, weight: Tensor, gradient: Tensor
) -> None:
    """Write the rows' gradient (c, H), from that of the logits (c, V)."""
    logits_gradient = logits_gradient.to(weight.dtype)
    if scales is None and gradient.dtype == weight.dtype:
        torch.mm(logits_gradient, weight, out=gradient)
        return
    product = logits_gradient @ weight
    gradient.copy_(product if scales is None else product.to(scales.dtype) * scales)
