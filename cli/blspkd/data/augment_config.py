"""How clips are augmented: the settings, all off by default."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

NOISE_KINDS = ("white", "pink", "babble")


@dataclass(frozen=True)
class NoiseConfig:
    """Noise added to the waveform.

    Attributes:
        probability: of a clip getting noise; 0 is off.
        snr_db: lowest and highest signal-to-noise ratio, drawn evenly in dB.
        kinds: any of white, pink and babble (other clips of the training set, several at once).
        babble_voices: how many clips make babble.
        folder: recordings of noise; drawn as often as each of the kinds.
    """

    probability: float = 0.0
    snr_db: list[float] = field(default_factory=lambda: [5.0, 20.0])
    kinds: list[str] = field(default_factory=lambda: list(NOISE_KINDS))
    babble_voices: int = 4
    folder: str | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn from."""
        _check_probability("probability", self.probability)
        _check_range("snr_db", self.snr_db)
        unknown = [kind for kind in self.kinds if kind not in NOISE_KINDS]
        if unknown:
            raise ValueError(
                f"kinds: expected some of {', '.join(NOISE_KINDS)}; got {unknown[0]!r}"
            )
        if not self.kinds and self.folder is None:
            raise ValueError("kinds is empty and folder is null: name at least one source of noise")
        if self.babble_voices < 1:
            raise ValueError(f"babble_voices must be >= 1, got {self.babble_voices}")


@dataclass(frozen=True)
class ReverbConfig:
    """Rooms that the waveform is put into.

    Attributes:
        probability: of a clip getting a room; 0 is off.
        rt60: shortest and longest reverberation time of synthetic rooms, s.
        direct_to_reverberant_db: lowest and highest ratio of synthetic rooms.
        folder: recorded room impulse responses, in place of the synthetic ones.
    """

    probability: float = 0.0
    rt60: list[float] = field(default_factory=lambda: [0.1, 0.6])
    direct_to_reverberant_db: list[float] = field(default_factory=lambda: [0.0, 10.0])
    folder: str | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn from."""
        _check_probability("probability", self.probability)
        _check_range("rt60", self.rt60, above=0.0)
        _check_range("direct_to_reverberant_db", self.direct_to_reverberant_db)


@dataclass(frozen=True)
class MaskConfig:
    """SpecAugment's masks (arXiv 1904.08779): stretches overwritten by the clip's mean.

    Masks in time go over mel features or, where these are cached, over the encoder's outputs;
    masks in frequency go over mel features alone. Their widths are drawn evenly from 0 up.

    Attributes:
        time: how many masks in time; 0 is off.
        time_width: of the widest, s.
        time_share: of the widest, as a share of the clip.
        frequency: how many masks in frequency; 0 is off.
        frequency_width: of the widest, mel bins.
    """

    time: int = 0
    time_width: float = 0.4
    time_share: float = 0.15
    frequency: int = 0
    frequency_width: int = 20

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn from."""
        for name in ("time", "frequency", "frequency_width"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if self.time_width <= 0:
            raise ValueError(f"time_width must be > 0 s, got {self.time_width}")
        if not 0.0 < self.time_share <= 1.0:
            raise ValueError(f"time_share must be above 0 and at most 1, got {self.time_share}")


@dataclass(frozen=True)
class AugmentConfig:
    """What is done to training clips; nothing by default, and never to held-out ones.

    On the waveform, in this order: speed, reverb, noise, telephone. Without cached features each
    epoch draws anew; with them, each clip is encoded clean (copy 0) and in `copies` augmented
    copies, and each epoch reads another of these. Masks are drawn anew in each epoch either way.

    Attributes:
        copies: augmented copies of each clip that are encoded and kept with data.cache_features.
        speed: factors to draw from; Kaldi's are 0.9, 1.0 and 1.1. Pitch goes along.
        telephone: probability of being cut to the telephone band, 300 to 3400 Hz.
        noise: added noise.
        reverb: rooms.
        masks: SpecAugment.
    """

    copies: int = 1
    speed: list[float] = field(default_factory=lambda: [1.0])
    telephone: float = 0.0
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    reverb: ReverbConfig = field(default_factory=ReverbConfig)
    masks: MaskConfig = field(default_factory=MaskConfig)

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn from."""
        if self.copies < 1:
            raise ValueError(
                f"copies must be >= 1, got {self.copies}; for clean clips, leave the effects off"
            )
        _check_numbers("speed", self.speed)
        if not self.speed or not all(0.25 <= factor <= 4.0 for factor in self.speed):
            raise ValueError(f"speed: expected factors between 0.25 and 4, got {self.speed}")
        _check_probability("telephone", self.telephone)

    @property
    def changes_waveforms(self) -> bool:
        """Whether anything but masks is on."""
        return (
            any(factor != 1.0 for factor in self.speed)
            or self.telephone > 0
            or self.noise.probability > 0
            or self.reverb.probability > 0
        )

    @property
    def masks_anything(self) -> bool:
        """Whether a mask is on."""
        return self.masks.time > 0 or self.masks.frequency > 0


def _check_probability(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must lie between 0 and 1, got {value}")


def _check_numbers(name: str, values: list[float]) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{name}: expected numbers, got {value!r}")
        if not math.isfinite(value):
            raise ValueError(f"{name}: expected finite numbers, got {value}")


def _check_range(name: str, values: list[float], *, above: float | None = None) -> None:
    _check_numbers(name, values)
    if len(values) != 2 or values[0] > values[1]:
        raise ValueError(f"{name}: expected [lowest, highest], got {values}")
    if above is not None and values[0] <= above:
        raise ValueError(f"{name}: expected numbers above {above:g}, got {values}")
