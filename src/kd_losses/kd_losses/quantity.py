"""The CIF quantity loss: the adapter should fire as many tokens as the text has.

Letters: B batch.
"""

from typing import Literal, get_args

from torch import Tensor

from kd_losses.reduction import Reduction, accumulation_dtype, check_reduction, reduce_loss

QuantityMode = Literal["relative", "absolute"]


def cif_quantity_loss(
    alpha_sum: Tensor,
    target_length: Tensor,
    *,
    mode: QuantityMode = "relative",
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    """Distance of the summed, unscaled CIF weights from the number of text tokens.

    Source: arXiv 1905.11235, section 3.2 (absolute); arXiv 2405.19041 (BLSP-KD).
    Equals: ``((alpha_sum - n).abs() / n).mean()``, without the division in mode "absolute".

    Args:
        alpha_sum: (B,) floating point: sum over the frames of the weights before any scaling, in
            units of the threshold (tokens).
        target_length: (B,) integer or floating point: the number of text tokens.
        mode: "relative": |sum - n| / max(1, n). "absolute": |sum - n|, in tokens.
        reduction: "mean" over the sequences, "sum" or "none".
        num_items: with "mean", divides instead of B: the sequences of the whole global batch.

    Returns:
        A scalar, or (B,) for reduction "none"; float32 for half-precision input.

    Raises:
        TypeError: alpha_sum isn't floating point.
        ValueError: the shapes differ, or an option is unknown.
    """
    check_reduction(reduction, num_items)
    if mode not in get_args(QuantityMode):
        raise ValueError(f"mode: expected one of {', '.join(get_args(QuantityMode))}, got {mode!r}")
    if not alpha_sum.is_floating_point():
        raise TypeError(f"alpha_sum: expected a floating-point tensor, got {alpha_sum.dtype}")
    if alpha_sum.ndim != 1 or alpha_sum.shape != target_length.shape:
        raise ValueError(
            f"alpha_sum and target_length: expected the same shape (B,), got "
            f"{tuple(alpha_sum.shape)} and {tuple(target_length.shape)}; one number per sequence"
        )
    total = alpha_sum.to(accumulation_dtype(alpha_sum.dtype))
    length = target_length.to(total)
    losses = (total - length).abs()
    if mode == "relative":
        # an empty transcript wants a sum of zero; it must not divide by zero
        losses = losses / length.clamp(min=1)
    return reduce_loss(losses, reduction, num_items)
