"""What a room, a street or a telephone line does to a recording; on plain numpy arrays.

Used to augment training clips and to measure robustness. Waveforms are mono, (S,) floating, S
samples at 16 kHz unless said otherwise; results are float32, are not clipped to [-1, 1], and have
the waveform's length except after :func:`change_speed`. Nothing here draws a random number but from
the generator it is given.
"""

from __future__ import annotations

import numpy as np
import soxr

from blspkd.model.audio import SAMPLING_RATE

__all__ = [
    "add_noise",
    "change_speed",
    "pink_noise",
    "reverberate",
    "room_impulse_response",
    "telephone_band",
    "white_noise",
]


def add_noise(waveform: np.ndarray, noise: np.ndarray, *, snr_db: float) -> np.ndarray:
    """Add noise at a signal-to-noise ratio.

    Equals: ``waveform + noise * sqrt(P_waveform / P_noise / 10 ** (snr_db / 10))``, with P the mean
    power over the whole clip, pauses included. Silence stays silence.

    Args:
        waveform: (S,).
        noise: any length; repeated or cut to S from its start.
        snr_db: 10 log10 of the ratio of mean powers.

    Raises:
        ValueError: if the noise, over those S samples, is silent.
    """
    signal, other = _mono("waveform", waveform), _mono("noise", noise)
    if len(signal) == 0:
        return signal.astype(np.float32)
    if len(other) == 0:
        raise ValueError("noise is empty: expected at least one sample")
    other = np.resize(other, len(signal))
    power = float(np.mean(other**2))
    if power == 0.0:
        raise ValueError("noise is silent: no gain gives it a signal-to-noise ratio")
    gain = (float(np.mean(signal**2)) / power) ** 0.5 * 10.0 ** (-snr_db / 20.0)
    noisy: np.ndarray = signal + gain * other
    return noisy.astype(np.float32)


def white_noise(samples: int, *, rng: np.random.Generator) -> np.ndarray:
    """(samples,) float32 Gaussian noise of unit power: the same power at every frequency."""
    return rng.standard_normal(samples, dtype=np.float32)


def pink_noise(samples: int, *, rng: np.random.Generator) -> np.ndarray:
    """(samples,) float32 noise of unit power that loses 3 dB an octave."""
    size = _fft_size(samples)
    spectrum = np.fft.rfft(rng.standard_normal(size))
    index = np.arange(len(spectrum), dtype=np.float64)
    index[0] = np.inf  # no constant part
    pink = np.fft.irfft(spectrum / np.sqrt(index), size)[:samples]
    power = float(np.mean(pink**2)) if samples else 1.0
    scaled: np.ndarray = pink / power**0.5
    return scaled.astype(np.float32)


def telephone_band(
    waveform: np.ndarray,
    *,
    low: float = 300.0,
    high: float = 3400.0,
    sampling_rate: int = SAMPLING_RATE,
) -> np.ndarray:
    """Keep what an analogue telephone line carries, with no delay.

    The gain is 1/2 at both edges and falls from 1 to 0 within 100 Hz around each (a raised cosine).

    Args:
        waveform: (S,).
        low: lower edge, Hz.
        high: upper edge, Hz.
        sampling_rate: of the waveform, Hz.
    """
    signal = _mono("waveform", waveform)
    if not 50.0 <= low < high <= sampling_rate / 2:
        raise ValueError(
            f"expected 50 <= low < high <= {sampling_rate / 2:g} Hz, got {low:g} and {high:g}"
        )
    # the filter rings for some 20 ms on both sides: what wraps around meets zeros
    size = _fft_size(len(signal) + sampling_rate // 10)
    frequency = np.fft.rfftfreq(size, 1.0 / sampling_rate)
    distance = np.minimum(frequency - low, high - frequency)  # Hz inside the band
    gain = 0.5 + 0.5 * np.sin(np.clip(distance / 100.0, -0.5, 0.5) * np.pi)
    filtered = np.fft.irfft(np.fft.rfft(signal, size) * gain, size)[: len(signal)]
    return filtered.astype(np.float32)


def room_impulse_response(
    *,
    rt60: float,
    direct_to_reverberant_db: float = 3.0,
    rng: np.random.Generator,
    sampling_rate: int = SAMPLING_RATE,
) -> np.ndarray:
    """A synthetic room: the direct sound, and 2 ms later Gaussian noise that decays exponentially.

    Args:
        rt60: seconds in which the reverberation loses 60 dB.
        direct_to_reverberant_db: energy of the direct sound over that of all the rest.
        rng: draws the noise.
        sampling_rate: Hz.

    Returns:
        (R,) float32, 1.25 times rt60 long, with the direct sound as a 1 at index 0.
    """
    if not 0.0 < rt60 < 20.0:
        raise ValueError(f"rt60 must be seconds between 0 and 20, got {rt60}")
    gap = sampling_rate // 500
    length = max(int(1.25 * rt60 * sampling_rate), 2)
    tail = rng.standard_normal(length) * 10.0 ** (-3.0 * np.arange(length) / sampling_rate / rt60)
    tail *= 10.0 ** (-direct_to_reverberant_db / 20.0) / np.sqrt(np.sum(tail**2))
    return np.concatenate([[1.0], np.zeros(gap), tail]).astype(np.float32)


def reverberate(waveform: np.ndarray, impulse_response: np.ndarray) -> np.ndarray:
    """Put a recording into a room.

    The direct sound (the response's largest sample) keeps its place in time, what rings on after
    the clip's end is cut off, and the clip keeps its mean power.

    Args:
        waveform: (S,).
        impulse_response: (R,), of a room, at the waveform's sampling rate.
    """
    signal = _mono("waveform", waveform)
    response = _mono("impulse_response", impulse_response)
    if len(response) == 0 or not np.any(response):
        raise ValueError("impulse_response is empty or silent: expected a room's response")
    size = _fft_size(len(signal) + len(response) - 1)
    wet = np.fft.irfft(np.fft.rfft(signal, size) * np.fft.rfft(response, size), size)
    direct = int(np.argmax(np.abs(response)))
    wet = wet[direct : direct + len(signal)]
    power = float(np.sum(wet**2))
    if power > 0.0:
        wet *= np.sqrt(np.sum(signal**2) / power)
    return wet.astype(np.float32)


def change_speed(waveform: np.ndarray, *, factor: float) -> np.ndarray:
    """Play a recording faster or slower; its pitch goes along, as with Kaldi's and sox's ``speed``.

    Args:
        waveform: (S,).
        factor: 1.1 is 10 % faster.

    Returns:
        About S / factor samples, float32.
    """
    if not 0.25 <= factor <= 4.0:
        raise ValueError(f"factor must lie between 0.25 and 4, got {factor}")
    signal = _mono("waveform", waveform).astype(np.float32)
    if factor == 1.0:
        return signal
    resampled: np.ndarray = soxr.resample(signal, factor, 1.0)
    return resampled


def _mono(name: str, samples: np.ndarray) -> np.ndarray:
    """As float64, checked to be one channel of floating-point samples."""
    if samples.ndim != 1 or not np.issubdtype(samples.dtype, np.floating):
        raise ValueError(
            f"{name}: expected mono floating-point samples, shape (S,); got shape "
            f"{samples.shape}, {samples.dtype}"
        )
    return samples.astype(np.float64)


def _fft_size(least: int) -> int:
    """The next size for which FFTs are quick: a power of two, or 3/4 or 5/8 of it."""
    power = 1 << max(least - 1, 1).bit_length()
    return min(size for size in (power * 5 // 8, power * 3 // 4, power) if size >= least)
