"""A linear layer with a low-rank update on the active positions."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn

from plora.config import ALL_LINEAR, PLoRAConfig
from plora.gather import add_low_rank
from plora.mask import current_activation, is_disabled


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """(input, output) features of a module that `PLoRALinear` can wrap, or None for any other.

    Those are `torch.nn.Linear` with its subclasses, and the transposed ``Conv1D`` of GPT-2, which
    is known by its name and its ``(nx, nf)`` weight because this package does not import
    transformers.
    """
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = getattr(module, "weight", None)
    if is_conv1d(module) and isinstance(weight, Tensor) and weight.ndim == 2:
        return weight.shape[0], weight.shape[1]
    return None


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is GPT-2's transposed linear layer."""
    return hasattr(module, "nf") and any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)


class PLoRALinear(nn.Module):
    """A linear layer, untouched, plus ``(lora_alpha / r) B A dropout(x)`` on active positions.

    The layer is wrapped, not replaced: its own forward pass computes the base part, whatever it is
    made of. Where no position is active its result is returned as it is.

    A is (r, K), drawn as in PEFT (uniform, Kaiming with a = sqrt(5)); B is (N, r) and starts at
    zero. Both are float32 unless told otherwise, on the base layer's device.

    Args:
        base_layer: `torch.nn.Linear` or GPT-2's ``Conv1D``.
        config: Rank, scale and dropout.
        dtype: Of A and B.

    Raises:
        TypeError: `base_layer` is not a linear layer.
    """

    def __init__(
        self, base_layer: nn.Module, config: PLoRAConfig, *, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        shape = linear_features(base_layer)
        if shape is None:
            raise TypeError(
                "base_layer: expected torch.nn.Linear or Conv1D, got "
                f"{type(base_layer).__name__}; leave it out of target_modules"
            )
        self.in_features, self.out_features = shape
        self.scaling = config.scaling
        self.dropout = config.lora_dropout
        self.base_layer = base_layer
        # A layer that was named has to fit; one of "all-linear" may turn out not to
        self.may_be_left_out = config.target_modules == ALL_LINEAR
        self.left_out: str | None = None
        self.settled = False  # whether what the first pass found has been told
        device = next(base_layer.parameters()).device
        # Plain parameters: initialisers that go by module type would overwrite B's zeros
        self.lora_A = nn.Parameter(
            torch.empty(config.r, self.in_features, device=device, dtype=dtype)
        )
        self.lora_B = nn.Parameter(
            torch.zeros(self.out_features, config.r, device=device, dtype=dtype)
        )
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.train(base_layer.training)

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, for code that asks a linear layer for it."""
        weight: Tensor = self.base_layer.weight  # type: ignore[assignment]  # Module | Tensor
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        bias: Tensor | None = self.base_layer.bias  # type: ignore[assignment]  # Module | Tensor
        return bias

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The base layer's output, updated on the positions active in this decoder pass.

        Args:
            hidden_states: (batch, T, K) or (batch * T, K), floating.

        Returns:
            (batch, T, N) or (batch * T, N), the base layer's dtype.

        Raises:
            ValueError: The layer runs where its update could be lost unnoticed: outside of a pass
                of its decoder, in training mode or with gradients on; or it was named in
                ``target_modules`` and its input does not have the positions of the pass.
        """
        output: Tensor = self.base_layer(hidden_states)
        activation = current_activation()
        if activation is None:
            self._check_bare_call()
            return output
        seen, rows = activation.find(hidden_states)
        if not seen or (rows is not None and not self._is_linear(hidden_states, output)):
            self._leave_out(hidden_states, activation.batch, activation.length)
            return output
        if rows is None:
            return output
        return add_low_rank(
            output,
            hidden_states,
            rows.to(hidden_states.device),  # elsewhere if the decoder is spread out
            self.lora_A,
            self.lora_B,
            scaling=self.scaling,
            dropout=self.dropout if self.training else 0.0,
        )

    def extra_repr(self) -> str:
        """Shapes and scale, for printing."""
        return f"r={self.lora_A.shape[0]}, scaling={self.scaling:g}, dropout={self.dropout:g}"

    def _check_bare_call(self) -> None:
        learning = torch.is_grad_enabled() and self.lora_A.requires_grad
        if (self.training or learning) and not is_disabled(self):
            raise ValueError(
                "PLoRALinear: expected to run inside a forward pass of the decoder it belongs to, "
                "got a call outside of one, so the mask of the pass is unknown. If this is a "
                "backward pass, a checkpoint of your own recomputes the layer: use the model's "
                "own gradient checkpointing (transformers) instead. For the plain base layer, use "
                "plora_disabled(model)"
            )

    def _is_linear(self, hidden_states: Tensor, output: object) -> bool:
        """Whether the base layer did what its kind promises; routers derived from it do not."""
        return isinstance(output, Tensor) and output.shape == (
            *hidden_states.shape[:-1],
            self.out_features,
        )

    def _leave_out(self, hidden_states: Tensor, batch: int, length: int) -> None:
        reason = (
            f"hidden_states: expected ({batch}, {length}, features) or ({batch * length}, "
            f"features), the positions of the decoder pass, and an output of {self.out_features} "
            f"features, got {tuple(hidden_states.shape)} in a {type(self.base_layer).__name__}; "
            "this layer does not see the sequence: put it in exclude_modules"
        )
        if not self.may_be_left_out:
            raise ValueError(reason)
        if self.settled and self.left_out is None:
            warnings.warn(f"plora: a layer is not adapted; {reason}", stacklevel=2)
        self.left_out = reason
