"""The losses as modules that hold their options. They have no parameters; heads are arguments.

Letters: B batch, L positions, n rows, H width, V vocabulary.
"""

from torch import Tensor, nn

from kd_losses.backends import Backend
from kd_losses.fused_cross_entropy import linear_cross_entropy
from kd_losses.fused_kl import linear_kl_div
from kd_losses.quantity import QuantityMode, cif_quantity_loss
from kd_losses.reduction import Reduction


class LinearKLDivLoss(nn.Module):
    """Module form of ``linear_kl_div``; see there for every argument."""

    def __init__(
        self,
        *,
        softcap: float | None = None,
        teacher_softcap: float | None = None,
        temperature: float = 1.0,
        scale_by_temperature_squared: bool = False,
        reduction: Reduction = "mean",
        vocab_size: int | None = None,
        chunk_size: int | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.softcap = softcap
        self.teacher_softcap = teacher_softcap
        self.temperature = temperature
        self.scale_by_temperature_squared = scale_by_temperature_squared
        self.reduction: Reduction = reduction
        self.vocab_size = vocab_size
        self.chunk_size = chunk_size
        self.backend: Backend = backend

    def forward(
        self,
        input: Tensor,
        linear_weight: Tensor,
        teacher_input: Tensor,
        teacher_linear_weight: Tensor | None = None,
        *,
        linear_bias: Tensor | None = None,
        teacher_linear_bias: Tensor | None = None,
        mask: Tensor | None = None,
        teacher_mask: Tensor | None = None,
        num_items: float | Tensor | None = None,
    ) -> Tensor:
        """Forward KL of input (B, L, H) or (n, H) from teacher_input, through their heads."""
        return linear_kl_div(
            input,
            linear_weight,
            teacher_input,
            teacher_linear_weight,
            linear_bias=linear_bias,
            teacher_linear_bias=teacher_linear_bias,
            softcap=self.softcap,
            teacher_softcap=self.teacher_softcap,
            mask=mask,
            teacher_mask=teacher_mask,
            temperature=self.temperature,
            scale_by_temperature_squared=self.scale_by_temperature_squared,
            reduction=self.reduction,
            num_items=num_items,
            vocab_size=self.vocab_size,
            chunk_size=self.chunk_size,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """The options, for ``repr``."""
        return (
            f"temperature={self.temperature}, "
            f"scale_by_temperature_squared={self.scale_by_temperature_squared}, "
            f"reduction={self.reduction!r}, vocab_size={self.vocab_size}, "
            f"softcap={self.softcap}, teacher_softcap={self.teacher_softcap}"
        )


class LinearCrossEntropyLoss(nn.Module):
    """Module form of ``linear_cross_entropy``; see there for every argument."""

    def __init__(
        self,
        *,
        softcap: float | None = None,
        ignore_index: int = -100,
        temperature: float = 1.0,
        reduction: Reduction = "mean",
        vocab_size: int | None = None,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        self.softcap = softcap
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.reduction: Reduction = reduction
        self.vocab_size = vocab_size
        self.chunk_size = chunk_size

    def forward(
        self,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        *,
        linear_bias: Tensor | None = None,
        num_items: float | Tensor | None = None,
    ) -> Tensor:
        """Cross entropy of input (B, L, H) or (n, H) and target (B, L) or (n,)."""
        return linear_cross_entropy(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            softcap=self.softcap,
            ignore_index=self.ignore_index,
            temperature=self.temperature,
            reduction=self.reduction,
            num_items=num_items,
            vocab_size=self.vocab_size,
            chunk_size=self.chunk_size,
        )

    def extra_repr(self) -> str:
        """The options, for ``repr``."""
        return (
            f"ignore_index={self.ignore_index}, temperature={self.temperature}, "
            f"reduction={self.reduction!r}, vocab_size={self.vocab_size}, softcap={self.softcap}"
        )


class CIFQuantityLoss(nn.Module):
    """Module form of ``cif_quantity_loss``; see there for every argument."""

    def __init__(self, *, mode: QuantityMode = "relative", reduction: Reduction = "mean") -> None:
        super().__init__()
        self.mode: QuantityMode = mode
        self.reduction: Reduction = reduction

    def forward(
        self, alpha_sum: Tensor, target_length: Tensor, *, num_items: float | Tensor | None = None
    ) -> Tensor:
        """Distance of alpha_sum (B,) from target_length (B,)."""
        return cif_quantity_loss(
            alpha_sum, target_length, mode=self.mode, reduction=self.reduction, num_items=num_items
        )

    def extra_repr(self) -> str:
        """The options, for ``repr``."""
        return f"mode={self.mode!r}, reduction={self.reduction!r}"
