"""Audio files in, 16 kHz mono waveforms out, with one clear error for whatever is wrong.

Nothing here truncates, pads or repairs: a clip that cannot be used as it is raises `AudioError`,
whose `reason` is short enough to be counted and whose message names the file and the remedy.
Shape letters: S samples, C channels.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

SAMPLING_RATE = 16_000
"""Hz; what Whisper's feature extractor expects."""
MIN_DURATION = 0.1
"""Seconds; the feature extractor raises below about 200 samples, and no word is this short."""
MAX_DURATION = 30.0
"""Seconds; a Whisper encoder hears no more, and the rest would be cut off without a word."""
SILENCE_DBFS = -70.0
"""Peak level in dB relative to full scale below which a clip counts as silent."""

AudioFault = Literal["missing", "empty", "corrupt", "not finite", "too short", "too long"]

_BLOCK = 1 << 18  # frames read at a time: a header that promises too much costs no memory
_STREAMED_SIZE = 0x7F000000  # writers to a pipe put sizes from here up into the header
_UNKNOWN_FRAMES = (1 << 63) - 1  # what libsndfile says where the header does not
# formats whose headers hold the exact length, so that fewer frames mean a cut-off file
_EXACT_FORMATS = frozenset({"FLAC", "AIFF", "AU", "CAF", "W64", "RF64", "WAVEX"})


class AudioError(ValueError):
    """An audio clip that cannot be used.

    Attributes:
        reason: The kind of fault in one or two words.
    """

    def __init__(self, message: str, *, reason: AudioFault) -> None:
        super().__init__(message)
        self.reason: AudioFault = reason


@dataclass(frozen=True)
class AudioInfo:
    """What an audio file's header says.

    Attributes:
        sampling_rate: Hz.
        channels: 1 mono, 2 stereo.
        frames: Samples per channel.
    """

    sampling_rate: int
    channels: int
    frames: int

    @property
    def duration(self) -> float:
        """Length in seconds."""
        return self.frames / self.sampling_rate


def probe_audio(path: str | os.PathLike[str]) -> AudioInfo:
    """Read an audio file's header without decoding the sound.

    Args:
        path: Any file that libsndfile reads (wav, flac, ogg, mp3, ...).

    Raises:
        AudioError: The file is missing, empty or not audio.
    """
    with _open(Path(path)) as file:
        return AudioInfo(file.samplerate, file.channels, file.frames)


def load_audio(
    path: str | os.PathLike[str],
    *,
    sampling_rate: int = SAMPLING_RATE,
    min_duration: float = MIN_DURATION,
    max_duration: float | None = MAX_DURATION,
) -> npt.NDArray[np.float32]:
    """Read an audio file as one channel at one rate.

    Channels are averaged; another rate is resampled (soxr, high quality).

    Args:
        path: Any file that libsndfile reads, at any rate, with any number of channels.
        sampling_rate: Hz of the result.
        min_duration: Seconds; a shorter clip is an error.
        max_duration: Seconds; a longer clip is an error, never truncated. None: no limit.

    Returns:
        The waveform (S,) float32, nominally within [-1, 1].

    Raises:
        AudioError: The file is missing, empty, not audio, cut off, too short or too long, or
            holds NaN or infinity.
    """
    path = Path(path)
    with _open(path) as file:
        info = AudioInfo(file.samplerate, file.channels, file.frames)
        # before decoding, so that an hour of audio fails at once
        _check_duration(info.duration, str(path), min_duration=0.0, max_duration=max_duration)
        blocks: list[npt.NDArray[np.float32]] = []
        try:
            while len(block := file.read(_BLOCK, dtype="float32", always_2d=True)):
                blocks.append(block)
        except soundfile.LibsndfileError as error:
            raise _corrupt(path, error.error_string) from error
        container = file.format
    decoded = sum(map(len, blocks))
    if container in _EXACT_FORMATS and decoded < info.frames:
        raise _corrupt(path, f"it ends after {decoded} of {info.frames} samples")
    if container == "WAV":
        _check_wav_size(path)
    if decoded == 0:
        raise AudioError(f"{path}: holds no samples; leave it out", reason="empty")
    mono = np.concatenate(blocks).mean(axis=1, dtype=np.float32)
    if info.sampling_rate != sampling_rate and np.isfinite(mono).all():
        mono = soxr.resample(mono, info.sampling_rate, sampling_rate)
    return check_waveform(
        mono,
        sampling_rate=sampling_rate,
        min_duration=min_duration,
        max_duration=max_duration,
        name=str(path),
    )


def check_waveform(
    waveform: npt.NDArray[np.floating[Any]],
    *,
    sampling_rate: int = SAMPLING_RATE,
    min_duration: float = MIN_DURATION,
    max_duration: float | None = MAX_DURATION,
    name: str = "audio",
) -> npt.NDArray[np.float32]:
    """Check a waveform that is already in memory by the rules of `load_audio`.

    Args:
        waveform: (S,) of any float type.
        sampling_rate: Hz at which it was taken.
        min_duration: Seconds.
        max_duration: Seconds, or None for no limit.
        name: What messages call it.

    Returns:
        The waveform (S,) as float32.

    Raises:
        AudioError: It is empty, too short or too long, or holds NaN or infinity.
        TypeError: It is not floating point (integer samples have another scale).
        ValueError: It is not one-dimensional.
    """
    waveform = np.asarray(waveform)
    if not np.issubdtype(waveform.dtype, np.floating):
        raise TypeError(
            f"{name}: expected float samples within [-1, 1], got {waveform.dtype}; divide "
            "16-bit integers by 32768"
        )
    if waveform.ndim != 1:
        raise ValueError(
            f"{name}: expected one channel of shape (S,), got {waveform.shape}; average the "
            "channels"
        )
    if waveform.size == 0:
        raise AudioError(f"{name}: holds no samples; leave it out", reason="empty")
    if not np.isfinite(waveform).all():
        raise AudioError(
            f"{name}: holds NaN or infinite samples; decode or record it again",
            reason="not finite",
        )
    _check_duration(
        waveform.size / sampling_rate, name, min_duration=min_duration, max_duration=max_duration
    )
    return np.ascontiguousarray(waveform, dtype=np.float32)


def is_silent(
    waveform: npt.NDArray[np.floating[Any]], *, threshold_dbfs: float = SILENCE_DBFS
) -> bool:
    """Tell whether a waveform (S,) stays below a peak level (dB relative to full scale)."""
    peak = float(np.abs(waveform).max(initial=0.0))
    return bool(peak < 10.0 ** (threshold_dbfs / 20.0))


def _open(path: Path) -> soundfile.SoundFile:
    if not path.exists():
        raise AudioError(f"{path}: no such audio file; check the path", reason="missing")
    if not path.is_file():
        raise AudioError(f"{path}: expected an audio file, got a folder", reason="missing")
    if path.stat().st_size == 0:
        raise AudioError(f"{path}: the file is empty (0 bytes); leave it out", reason="empty")
    try:
        file = soundfile.SoundFile(path)
    except soundfile.LibsndfileError as error:
        raise _corrupt(path, error.error_string) from error
    except TypeError as error:  # soundfile asks for a raw file's rate and channels
        raise _corrupt(path, "raw samples carry no sampling rate") from error
    if file.frames == _UNKNOWN_FRAMES:  # a FLAC from a pipe, which libsndfile cannot play
        file.close()
        raise _corrupt(path, "its header does not say how long it is")
    return file


def _check_wav_size(path: Path) -> None:
    # libsndfile plays a half-copied wav without a word, but its transcript is for all of it. The
    # size of the chunk that holds the samples tells; that of the whole file is wrong in many.
    present = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) != b"RIFF":
            return
        file.seek(12)
        while len(header := file.read(8)) == 8:
            name, size = struct.unpack("<4sI", header)
            if name == b"data":
                here = present - file.tell()
                if here < size < _STREAMED_SIZE:
                    raise _corrupt(path, f"it ends after {here} of {size} bytes of samples")
                return
            file.seek(size + size % 2, os.SEEK_CUR)


def _corrupt(path: Path, detail: str) -> AudioError:
    return AudioError(
        f"{path}: cannot be decoded as audio ({detail.rstrip('. ')}); convert it to wav or flac, "
        "or leave it out",
        reason="corrupt",
    )


def _check_duration(
    duration: float, name: str, *, min_duration: float, max_duration: float | None
) -> None:
    if duration < min_duration:
        raise AudioError(
            f"{name}: {duration:.3f} s is too short, expected at least {min_duration:g} s; leave "
            "it out",
            reason="too short",
        )
    if max_duration is not None and duration > max_duration:
        raise AudioError(
            f"{name}: {duration:.1f} s is too long, expected at most {max_duration:g} s; nothing "
            "is cut off silently: split it into shorter clips",
            reason="too long",
        )
