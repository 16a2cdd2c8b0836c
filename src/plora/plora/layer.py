"""A linear layer with a low-rank update on the active positions."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from plora.activation import Activation, current_activation, current_taken
from plora.backends import Backend, triton_operators
from plora.bases import check_present, dense_weight, device_of, is_untouched, linear_features
from plora.config import ALL_LINEAR, DEFAULT, PLoRAConfig
from plora.dora import add_dora, weight_norm
from plora.gather import add_low_rank
from plora.mask import ambient_masks, is_disabled
from plora.taken import compute_dtype
from plora.update import Begun, shrink


@dataclass(frozen=True)
class Update:
    """The constants of one modality's update: its rank, scale and dropout, and whether by DoRA."""

    r: int
    scaling: float
    dropout: float
    use_dora: bool


class PLoRALinear(nn.Module):
    """A linear layer, untouched, plus ``scaling * B A dropout(x)`` on active positions.

    The layer is wrapped, not replaced: its own forward pass computes the base part, whatever it is
    made of. Where no position is active its result is returned as it is. It works inside of a
    decoder that `apply_plora` was given; called alone, it raises.

    A is (r, K), drawn as in PEFT (uniform, Kaiming with a = sqrt(5)); B is (N, r) and starts at
    zero; with DoRA there is a magnitude (N,), at first the lengths of the weight's rows. They are
    the parameters ``lora_A``, ``lora_B`` and ``lora_magnitude_vector``; of several modalities,
    `torch.nn.ParameterDict` of these names. All are float32 unless told otherwise, on the base
    layer's device.

    Args:
        base_layer: `torch.nn.Linear`, GPT-2's ``Conv1D``, or another layer with ``in_features`` and
            ``out_features``, such as a quantised one.
        config: Rank, scale and dropout; or one configuration for each modality that adapts this
            layer, by name.
        dtype: Of A, B and the magnitude.
        backend: As for `apply_plora`.

    Raises:
        TypeError: `base_layer` is not a linear layer, or DoRA is asked for and its weight is no
            plain floating matrix.
        ValueError: Its values are elsewhere until it is called (offloading).
    """

    def __init__(
        self,
        base_layer: nn.Module,
        config: PLoRAConfig | Mapping[str, PLoRAConfig],
        *,
        dtype: torch.dtype = torch.float32,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        shape = linear_features(base_layer)
        if shape is None:
            raise TypeError(
                "base_layer: expected torch.nn.Linear, Conv1D or a layer with in_features and "
                f"out_features, got {type(base_layer).__name__}; leave it out of target_modules"
            )
        self.in_features, self.out_features = shape
        self.base_layer = base_layer
        configs = {DEFAULT: config} if isinstance(config, PLoRAConfig) else dict(config)
        self.updates = {
            name: Update(one.r, one.scaling, one.lora_dropout, one.use_dora)
            for name, one in configs.items()
        }
        # A layer that was named has to fit; one of "all-linear" may turn out not to
        self.may_be_left_out = all(one.target_modules == ALL_LINEAR for one in configs.values())
        self.left_out: str | None = None
        self.stays_plain = False  # left out by all calls in the first masked pass
        self.backend = backend
        self.settled = False  # whether what the first pass found has been told
        self._create(dtype, named=configs.keys() != {DEFAULT})
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

    def trained(self, modality: str = DEFAULT) -> dict[str, nn.Parameter]:
        """The parameters of one modality by their PEFT name: ``lora_A``, ``lora_B`` and so on."""
        names = ["lora_A", "lora_B"]
        if self.updates[modality].use_dora:
            names.append("lora_magnitude_vector")
        found = {name: getattr(self, name) for name in names}
        return {
            name: value[modality] if isinstance(value, nn.ParameterDict) else value
            for name, value in found.items()
        }

    def forward(self, input: Tensor) -> Tensor:
        """The base layer's output, updated on the positions active in this decoder pass.

        Args:
            input: (batch, T, K) or (batch * T, K), floating; called as in `torch.nn.Linear`.

        Returns:
            (batch, T, N) or (batch * T, N), the base layer's dtype.

        Raises:
            ValueError: The layer runs where its update could be lost unnoticed: outside of a pass
                of its decoder, inside `plora_mask`, in training mode or with gradients on; or it
                was named in ``target_modules`` and its input does not have the positions of the
                pass.
        """
        hidden_states, activation = input, current_activation()
        if activation is None:
            self._check_bare_call()
        elif activation.watched is not None:
            activation.watched.setdefault(id(self), []).append(None)
        if activation is None:
            output: Tensor = self.base_layer(hidden_states)
            return output
        seen, chosen = activation.find(hidden_states)
        if seen and not chosen:
            output = self.base_layer(hidden_states)
            return output
        # Other kinds of tensors, such as those of tensor parallelism, take plain operations only
        cut = seen and type(hidden_states) is Tensor and not torch.compiler.is_compiling()
        begun: dict[str, Begun] = {}
        before = hidden_states
        if cut:
            before = self._shrink(hidden_states, chosen, activation, begun)
        output = self.base_layer(before)
        if not seen or not self._is_linear(hidden_states, output):
            self._leave_out(hidden_states, activation)
            return output
        if self.stays_plain:  # asked only here: a checkpoint has to repeat what the first pass did
            return output
        for name, rows in chosen.items():
            if name in begun:
                output = begun[name].finish(output)
            elif name in self.updates:
                # the rows are elsewhere if the decoder is spread out
                output = self._add(name, output, hidden_states, rows.to(hidden_states.device))
        return output

    def extra_repr(self) -> str:
        """Shapes and scale, for printing."""
        return "; ".join(
            ("" if name == DEFAULT else f"{name}: ")
            + f"r={one.r}, scaling={one.scaling:g}, dropout={one.dropout:g}"
            + (", DoRA" if one.use_dora else "")
            for name, one in self.updates.items()
        )

    def _create(self, dtype: torch.dtype, *, named: bool) -> None:
        """Make A and B, and the magnitudes."""
        check_present(self.base_layer)
        device = device_of(self.base_layer)
        made: dict[str, dict[str, nn.Parameter]] = {"lora_A": {}, "lora_B": {}}
        for name, one in self.updates.items():
            # Plain parameters: initialisers that go by module type would overwrite B's zeros
            a = nn.Parameter(torch.empty(one.r, self.in_features, device=device, dtype=dtype))
            b = nn.Parameter(torch.zeros(self.out_features, one.r, device=device, dtype=dtype))
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            made["lora_A"][name], made["lora_B"][name] = a, b
            if one.use_dora:
                with torch.no_grad():
                    norm = weight_norm(self._dense_weight(), a, b, scaling=one.scaling)
                magnitude = nn.Parameter(norm.to(dtype))
                made.setdefault("lora_magnitude_vector", {})[name] = magnitude
        for name, values in made.items():
            setattr(self, name, nn.ParameterDict(values) if named else values[DEFAULT])

    def _shrink(
        self,
        hidden_states: Tensor,
        chosen: Mapping[str, Tensor],
        activation: Activation,
        begun: dict[str, Begun],
    ) -> Tensor:
        """What the base layer is to be called with; fills `begun`, unless a modality has DoRA."""
        before, dtype = hidden_states, compute_dtype(hidden_states)
        taken, alone = current_taken(), is_untouched(self.base_layer)
        for name, found in chosen.items():
            update = self.updates.get(name)
            if update is None or update.use_dora:
                continue
            rows, parameters = activation.ready(found, hidden_states.device), self.trained(name)
            before, low = shrink(
                before,
                rows,
                parameters["lora_A"],
                dtype=dtype,
                taken=taken,
                source=hidden_states,
                dropout=update.dropout if self.training else 0.0,
                in_place=alone,
                backend=self.backend,
            )
            begun[name] = Begun.of(
                rows,
                low,
                parameters["lora_B"],
                scaling=update.scaling,
                in_place=alone,
                backend=self.backend,
            )
        return before

    def _add(self, modality: str, output: Tensor, hidden_states: Tensor, rows: Tensor) -> Tensor:
        """`output` with the update of one modality on `rows`."""
        if rows.dtype == torch.bool:  # torch.compile traces: all rows, then a choice among them
            every = torch.arange(rows.numel(), device=rows.device)
            updated = self._add(modality, output, hidden_states, every)
            return torch.where(rows.view(*output.shape[:-1], 1), updated, output)
        update, parameters = self.updates[modality], self.trained(modality)
        a, b, dropout = parameters["lora_A"], parameters["lora_B"], update.dropout
        dropout = dropout if self.training else 0.0
        if update.use_dora:
            return add_dora(
                output,
                hidden_states,
                rows,
                a,
                b,
                parameters["lora_magnitude_vector"],
                self._dense_weight(),
                self.bias,
                scaling=update.scaling,
                dropout=dropout,
            )
        add = triton_operators.add_low_rank if self.backend == "triton" else add_low_rank
        return add(output, hidden_states, rows, a, b, scaling=update.scaling, dropout=dropout)

    def _dense_weight(self) -> Tensor:
        weight = dense_weight(self.base_layer)
        if weight is None:
            raise TypeError(
                "use_dora: expected base layers with a plain floating weight, whose lengths DoRA "
                f"trains, got a {type(self.base_layer).__name__}, quantised or without a weight; "
                "use plain LoRA there (use_dora=False)"
            )
        return weight

    def _check_bare_call(self) -> None:
        learning = torch.is_grad_enabled() and any(p.requires_grad for p in self._parts())
        masked = ambient_masks() is not None
        if (self.training or learning or masked) and not is_disabled(self):
            raise ValueError(
                "PLoRALinear: expected to run inside a forward pass of the decoder it belongs to, "
                "got a call outside of one, so the mask of the pass is unknown. If this is a "
                "backward pass, a checkpoint of your own recomputes the layer: use the model's "
                "own gradient checkpointing (transformers) instead. A layer alone needs a module "
                "around it that apply_plora was given. For the plain base layer, use "
                "plora_disabled(model)"
            )

    def _parts(self) -> list[nn.Parameter]:
        return [part for name in self.updates for part in self.trained(name).values()]

    def _is_linear(self, hidden_states: Tensor, output: object) -> bool:
        """Whether the base layer did what its kind promises; routers derived from it do not."""
        return isinstance(output, Tensor) and output.shape == (
            *hidden_states.shape[:-1],
            self.out_features,
        )

    def _leave_out(self, hidden_states: Tensor, activation: Activation) -> None:
        batch, length = activation.batch, activation.length
        reason = (
            f"hidden_states: expected ({batch}, {length}, features) or ({batch * length}, "
            f"features), the positions of the decoder pass, and an output of {self.out_features} "
            f"features, got {tuple(hidden_states.shape)} in a {type(self.base_layer).__name__}; "
            "this layer does not see the sequence: put it in exclude_modules"
        )
        if not self.may_be_left_out:
            raise ValueError(reason)
        if activation.watched is not None:
            activation.watched[id(self)][-1] = reason
            return
        if self.settled and self.left_out is None:
            warnings.warn(f"plora: a layer is not adapted; {reason}", stacklevel=2)
        self.left_out = reason
