"""Training clips augmented: waveforms, and masks on features.

Every draw comes from a hash of what it is for and the clip's id, never from a shared state: so it
is the same with any number of workers, in any order, and in a resumed run.

Shapes: S samples at 16 kHz, M mel bins, F mel frames, T encoder frames, D encoder width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from blspkd.model.audio import MAX_DURATION, SAMPLING_RATE, load_audio

from .acoustics import (
    add_noise,
    change_speed,
    pink_noise,
    reverberate,
    room_impulse_response,
    telephone_band,
    white_noise,
)
from .augment_config import AugmentConfig
from .manifest import Record

AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".mp3"})
MEL_FRAMES_PER_SECOND = 100
ENCODER_FRAMES_PER_SECOND = 50


class WaveformAugmenter:
    """Speed, room, noise and telephone, as often and as strong as configured.

    Args:
        config: what to draw from.
        pool: the clips of which babble is made.

    Raises:
        ValueError: if a folder holds no audio, or the pool is too small for babble.
    """

    def __init__(self, config: AugmentConfig, pool: Sequence[Record]) -> None:
        self.config = config
        self.rooms = _audio_files(config.reverb.folder) if config.reverb.probability else []
        self.noises = _audio_files(config.noise.folder) if config.noise.probability else []
        self.kinds = [*config.noise.kinds, *(["folder"] if self.noises else [])]
        babble = config.noise.probability > 0 and "babble" in self.kinds
        if babble and len(pool) < 2:
            raise ValueError(
                f"babble is made of other clips, but the clips number {len(pool)}: take it out of "
                "data.augment.noise.kinds"
            )
        self.pool = [(record.id, record.audio) for record in pool] if babble else []

    def __call__(self, waveform: np.ndarray, *, clip_id: str, draw: str) -> np.ndarray:
        """One augmented version of a clip, (S,) float32.

        Args:
            waveform: (S,).
            clip_id: whose it is.
            draw: names the version; the same name gives the same version.
        """
        config = self.config
        result = change_speed(
            waveform, factor=self.speed_factor(clip_id, draw=draw, samples=len(waveform))
        )
        rng = _generator("room", draw, clip_id)
        if rng.random() < config.reverb.probability:
            result = reverberate(result, self._room(rng))
        rng = _generator("noise", draw, clip_id)
        if rng.random() < config.noise.probability:
            ratio = _uniform(rng, config.noise.snr_db)
            noise = self._noise(len(result), clip_id, rng)
            if np.any(noise):  # a recording may hold nothing but silence where it was cut
                result = add_noise(result, noise, snr_db=ratio)
        if _generator("telephone", draw, clip_id).random() < config.telephone:
            result = telephone_band(result)
        return result

    def speed_factor(self, clip_id: str, *, draw: str, samples: int) -> float:
        """How much faster a version is played: times in it are those of the clip over this.

        A factor that would stretch the clip beyond the encoder's 30 s is not used.
        """
        factor = float(_generator("speed", draw, clip_id).choice(self.config.speed))
        return factor if samples / factor <= MAX_DURATION * SAMPLING_RATE else 1.0

    def fingerprint(self) -> str:
        """Of everything that decides how a given version of a given clip sounds."""
        settings = dataclasses.asdict(self.config)
        for elsewhere in ("copies", "masks"):
            del settings[elsewhere]
        files = [f"{path.resolve()}|{path.stat().st_size}" for path in [*self.rooms, *self.noises]]
        clips = [f"{name}|{path.resolve()}" for name, path in self.pool]
        identity = json.dumps([settings, files, clips], sort_keys=True)
        return hashlib.sha256(identity.encode()).hexdigest()[:24]

    def _room(self, rng: np.random.Generator) -> np.ndarray:
        if self.rooms:
            path = self.rooms[rng.integers(len(self.rooms))]
            return load_audio(path, min_duration=0.0, max_duration=None)
        reverb = self.config.reverb
        return room_impulse_response(
            rt60=_uniform(rng, reverb.rt60),
            direct_to_reverberant_db=_uniform(rng, reverb.direct_to_reverberant_db),
            rng=rng,
        )

    def _noise(self, samples: int, clip_id: str, rng: np.random.Generator) -> np.ndarray:
        kind = self.kinds[rng.integers(len(self.kinds))]
        if kind == "white":
            return white_noise(samples, rng=rng)
        if kind == "pink":
            return pink_noise(samples, rng=rng)
        if kind == "folder":
            return _stretch(self.noises[rng.integers(len(self.noises))], samples, rng)
        babble = np.zeros(samples, dtype=np.float32)
        for _ in range(self.config.noise.babble_voices):
            place = int(rng.integers(len(self.pool)))
            if self.pool[place][0] == clip_id:
                place = (place + 1) % len(self.pool)
            voice = _stretch(self.pool[place][1], samples, rng)
            power = float(np.mean(voice**2))
            babble += voice / (power**0.5 or 1.0)
        return babble


class Augmentation:
    """What a training set does to its clips in each epoch.

    Args:
        config: what to draw from.
        pool: the training clips.
        seed: of the run.
    """

    def __init__(self, config: AugmentConfig, pool: Sequence[Record], *, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.augmenter = WaveformAugmenter(config, pool) if config.changes_waveforms else None

    def waveform(self, record: Record, epoch: int) -> np.ndarray:
        """(S,) float32: the clip as it is heard in an epoch."""
        waveform = load_audio(record.audio)
        if self.augmenter is None:
            return waveform
        return self.augmenter(waveform, clip_id=record.id, draw=f"{self.seed}/{epoch}")

    def copy(self, record: Record, epoch: int) -> int:
        """Which cached copy an epoch reads: all in turn, from one that seed and clip decide."""
        if self.augmenter is None:
            return 0
        count = self.config.copies + 1
        first = int(_generator("copy", str(self.seed), record.id).integers(count))
        return (first + epoch) % count

    def mask_mel(self, mel: np.ndarray, record: Record, epoch: int) -> np.ndarray:
        """Masks on (M, F) mel features, in time and in frequency; the argument stays as it is."""
        if not self.config.masks_anything:
            return mel
        masks, rng = self.config.masks, self._mask_generator(record, epoch)
        masked: np.ndarray = mel.copy()
        mean = mel.mean()
        for start, stop in self._time_masks(mel.shape[1], MEL_FRAMES_PER_SECOND, rng):
            masked[:, start:stop] = mean
        for _ in range(masks.frequency):
            width = int(rng.integers(min(masks.frequency_width, mel.shape[0]) + 1))
            start = int(rng.integers(mel.shape[0] - width + 1))
            masked[start : start + width] = mean
        return masked

    def mask_encoded(self, encoded: Tensor, record: Record, epoch: int) -> Tensor:
        """Masks in time on (T, D) encoder outputs; the argument stays as it is."""
        if not self.config.masks.time:
            return encoded
        masked, mean = encoded.clone(), encoded.float().mean(dim=0).to(encoded.dtype)
        rng = self._mask_generator(record, epoch)
        for start, stop in self._time_masks(len(encoded), ENCODER_FRAMES_PER_SECOND, rng):
            masked[start:stop] = mean
        return masked

    def _mask_generator(self, record: Record, epoch: int) -> np.random.Generator:
        return _generator("masks", f"{self.seed}/{epoch}", record.id)

    def _time_masks(
        self, frames: int, rate: int, rng: np.random.Generator
    ) -> list[tuple[int, int]]:
        masks = self.config.masks
        widest = min(int(masks.time_width * rate), int(masks.time_share * frames))
        spans = []
        for _ in range(masks.time):
            width = int(rng.integers(widest + 1))
            start = int(rng.integers(frames - width + 1))
            spans.append((start, start + width))
        return spans


def _generator(purpose: str, draw: str, clip_id: str) -> np.random.Generator:
    """Each effect draws by itself, so that switching one on leaves the others as they were."""
    digest = hashlib.sha256(f"{purpose}|{draw}|{clip_id}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def _uniform(rng: np.random.Generator, bounds: Sequence[float]) -> float:
    low, high = bounds
    return float(rng.uniform(low, high))


def _stretch(path: Path, samples: int, rng: np.random.Generator) -> np.ndarray:
    """So many samples of a recording, from a place drawn anew, going round at its end."""
    recording = load_audio(path, min_duration=0.0, max_duration=None)
    return np.resize(np.roll(recording, -int(rng.integers(len(recording)))), samples)


def _audio_files(folder: str | None) -> list[Path]:
    """The audio files below a folder, in an order that does not depend on the disk."""
    if folder is None:
        return []
    root = Path(folder).expanduser()
    found = sorted(path for path in root.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)
    if not found:
        raise ValueError(f"{root}: no audio file ({', '.join(sorted(AUDIO_SUFFIXES))}) in there")
    return found
