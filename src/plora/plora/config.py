"""What is adapted and how strongly: the one configuration of the package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from plora.names import check_names, check_pattern, check_regex, match_pattern

ALL_LINEAR = "all-linear"
# Of the one modality of a model whose modalities have no names; also PEFT's name for its adapter
DEFAULT = "default"


@dataclass(frozen=True)
class PLoRAConfig:
    """Rank, scale, dropout and targets of Partial LoRA, under PEFT's field names.

    The adapted layer computes, on the masked positions only, ``W x + b + scaling B A dropout(x)``
    (Partial LoRA, arXiv 2401.16420, section 3.2; LoRA, arXiv 2106.09685, eq. 3).

    Args:
        r: Rank of the update, at least 1.
        lora_alpha: Numerator of the scale ``lora_alpha / r``; positive.
        lora_dropout: Probability, in [0, 1), of dropping a feature of a masked position on its way
            into A, while training.
        target_modules: ``"all-linear"`` for every linear layer inside the decoder; or names: a
            layer is taken when its path equals an entry or ends in ``"." + entry``; or a regular
            expression that has to match the whole path, such as ``r".*\\.[qv]_proj"``.
        exclude_modules: Names, or a regular expression, of layers that are left alone.
        use_rslora: Scale by ``lora_alpha / sqrt(r)`` (rsLoRA, arXiv 2312.03732).
        use_dora: Weight-decomposed update with a trained magnitude for each output feature (DoRA,
            arXiv 2402.09353, eq. 5), on the masked positions. Not on quantised layers.
        rank_pattern: Name or regular expression at the end of a path -> its rank, in place of `r`;
            the first entry that fits counts.
        alpha_pattern: The same for `lora_alpha`.
        layers_to_transform: Index or indices of the layers to adapt, for `target_modules` given by
            names: the first number in a path, as in ``model.layers.3.mlp``.
        layers_pattern: Name or names of the module list that these indices count in.

    Raises:
        ValueError: A number is out of its range, a name is empty, a regular expression is wrong, or
            two fields exclude each other.
        TypeError: A field has the wrong type.
    """

    r: int = 16
    lora_alpha: float = 16
    lora_dropout: float = 0.05
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    exclude_modules: str | tuple[str, ...] = ()
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: int | tuple[int, ...] | None = None
    layers_pattern: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _check_rank("r", self.r)
        _check_alpha("lora_alpha", self.lora_alpha)
        _check_number("lora_dropout", self.lora_dropout)
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(
                f"lora_dropout: expected a probability in [0, 1), got {self.lora_dropout}"
            )
        for name in ("use_rslora", "use_dora"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected a bool, got {getattr(self, name)!r}")
        self._check_targets()
        for name, check in (("rank_pattern", _check_rank), ("alpha_pattern", _check_alpha)):
            # a dict of its own: what the caller does with his changes nothing here
            pattern = dict(check_pattern(name, getattr(self, name)))
            for key, value in pattern.items():
                check(f"{name}[{key!r}]", value)
            object.__setattr__(self, name, pattern)
        self._check_layers()

    def __hash__(self) -> int:
        """Of what the dicts hold, too."""
        return hash(repr(self.to_dict()))

    @property
    def scaling(self) -> float:
        """The factor on the low-rank update: ``lora_alpha / r``, with rsLoRA / sqrt(r)."""
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)

    def at(self, path: str) -> PLoRAConfig:
        """The configuration of the layer at `path`, with its own rank and alpha and no patterns."""
        rank_key = match_pattern(path, self.rank_pattern)
        alpha_key = match_pattern(path, self.alpha_pattern)
        return replace(
            self,
            r=self.r if rank_key is None else self.rank_pattern[rank_key],
            lora_alpha=self.lora_alpha if alpha_key is None else self.alpha_pattern[alpha_key],
            rank_pattern={},
            alpha_pattern={},
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values: numbers, strings, lists and dicts of them."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PLoRAConfig:
        """Inverse of `to_dict`; fields that are absent take their defaults.

        Raises:
            ValueError: A key is no field of the configuration.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"PLoRAConfig: unknown field {unknown[0]!r}; the fields are {known}")
        return cls(**values)

    def _check_targets(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if not isinstance(value, str):
                object.__setattr__(self, name, check_names(name, value))
            elif value != ALL_LINEAR or name == "exclude_modules":
                check_regex(name, value)
        if not self.target_modules:
            raise ValueError(
                "target_modules: expected at least one name, got an empty list; "
                f"use {ALL_LINEAR!r} for every linear layer"
            )

    def _check_layers(self) -> None:
        chosen, pattern = self.layers_to_transform, self.layers_pattern
        if chosen is None:
            if pattern is not None:
                raise ValueError("layers_pattern: expected layers_to_transform beside it, got none")
            return
        if isinstance(self.target_modules, str):
            raise ValueError(
                "layers_to_transform: expected target_modules to be a list of names, got "
                f"{self.target_modules!r}; write the indices into the expression, or give names"
            )
        indices = (chosen,) if isinstance(chosen, int) else tuple(chosen)
        if not indices or not all(isinstance(index, int) and index >= 0 for index in indices):
            raise ValueError(
                f"layers_to_transform: expected indices of layers, from 0 on, got {chosen!r}"
            )
        object.__setattr__(
            self, "layers_to_transform", chosen if isinstance(chosen, int) else indices
        )
        if pattern is not None and not isinstance(pattern, str):
            object.__setattr__(self, "layers_pattern", check_names("layers_pattern", pattern))


def _check_number(name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {value!r}")


def _check_alpha(name: str, value: float) -> None:
    _check_number(name, value)
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected a positive number, got {value}")


def _check_rank(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected a rank of at least 1, got {value}")
