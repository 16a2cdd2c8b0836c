"""What is adapted and how strongly: the one configuration of the package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class PLoRAConfig:
    """Rank, scale, dropout and targets of Partial LoRA, under PEFT's field names.

    The adapted layer computes, on the masked positions only, ``W x + b + (lora_alpha / r) B A
    dropout(x)`` (Partial LoRA, arXiv 2401.16420, section 3.2; LoRA, arXiv 2106.09685, eq. 3).

    Args:
        r: Rank of the update, at least 1.
        lora_alpha: Numerator of the scale ``lora_alpha / r``; positive.
        lora_dropout: Probability, in [0, 1), of dropping a feature of a masked position on its way
            into A, while training.
        target_modules: ``"all-linear"`` for every linear layer inside the decoder, or the names to
            adapt: a layer is taken when its path equals an entry or ends in ``"." + entry``.
        exclude_modules: Names, matched in the same way, that are left alone.

    Raises:
        ValueError: A number is out of its range, or a name is empty.
        TypeError: A field has the wrong type.
    """

    r: int = 16
    lora_alpha: float = 16
    lora_dropout: float = 0.05
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    exclude_modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.r, int) or isinstance(self.r, bool):
            raise TypeError(f"r: expected an int, got {self.r!r}")
        if self.r < 1:
            raise ValueError(f"r: expected a rank of at least 1, got {self.r}")
        for name in ("lora_alpha", "lora_dropout"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise TypeError(f"{name}: expected a number, got {value!r}")
        if not 0 < self.lora_alpha < float("inf"):
            raise ValueError(f"lora_alpha: expected a positive number, got {self.lora_alpha}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(
                f"lora_dropout: expected a probability in [0, 1), got {self.lora_dropout}"
            )
        if isinstance(self.target_modules, str):
            if self.target_modules != ALL_LINEAR:
                raise ValueError(
                    f"target_modules: the only string is {ALL_LINEAR!r}, got "
                    f"{self.target_modules!r}; give names as a list, such as "
                    f"[{self.target_modules!r}]"
                )
        else:
            object.__setattr__(
                self, "target_modules", _names("target_modules", self.target_modules)
            )
            if not self.target_modules:
                raise ValueError(
                    "target_modules: expected at least one name, got an empty list; "
                    f"use {ALL_LINEAR!r} for every linear layer"
                )
        object.__setattr__(self, "exclude_modules", _names("exclude_modules", self.exclude_modules))

    @property
    def scaling(self) -> float:
        """The factor on the low-rank update, ``lora_alpha / r``."""
        return self.lora_alpha / self.r

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values: numbers, strings and lists of strings."""
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


def matches(path: str, names: tuple[str, ...]) -> str | None:
    """The first of `names` that `path` equals or ends in after a dot, or None."""
    return next((name for name in names if path == name or path.endswith(f".{name}")), None)


def _names(field: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, (list, tuple, set, frozenset)):
        raise TypeError(f"{field}: expected a list of names, got {value!r}")
    ordered = sorted(value) if isinstance(value, (set, frozenset)) else value
    for name in ordered:
        if not isinstance(name, str):
            raise TypeError(f"{field}: expected names, got {name!r}")
        if not name.strip("."):
            raise ValueError(f"{field}: expected names, got the empty name {name!r}")
    return tuple(ordered)
