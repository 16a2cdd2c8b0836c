"""Noise, telephone, rooms and speed, measured on what comes out."""

import numpy as np
import pytest

from blspkd.data.acoustics import (
    add_noise,
    change_speed,
    pink_noise,
    reverberate,
    room_impulse_response,
    telephone_band,
    white_noise,
)

RATE = 16_000


def tone(frequency, seconds=1.0):
    return np.sin(2 * np.pi * frequency * np.arange(int(seconds * RATE)) / RATE).astype(np.float32)


def amplitude(waveform, frequency):
    """By projection on sine and cosine, away from the ends."""
    middle = np.asarray(waveform, dtype=np.float64)[len(waveform) // 4 : -len(waveform) // 4]
    turns = 2 * np.pi * frequency * np.arange(len(middle)) / RATE
    return 2 * np.hypot(np.mean(middle * np.sin(turns)), np.mean(middle * np.cos(turns)))


def band_power_db(waveform, low, high):
    """Mean of windowed periodograms, summed over a band."""
    frames = np.lib.stride_tricks.sliding_window_view(waveform, 1024)[::512] * np.hanning(1024)
    power = np.mean(np.abs(np.fft.rfft(frames)) ** 2, axis=0)
    frequency = np.fft.rfftfreq(1024, 1 / RATE)
    return 10 * np.log10(np.sum(power[(frequency >= low) & (frequency <= high)]))


def reverberation_time(response):
    """T30: Schroeder's backward integral of the tail, fitted from -5 to -35 dB (ISO 3382)."""
    tail = np.asarray(response, dtype=np.float64)[RATE // 500 + 1 :]
    decay = np.cumsum(tail[::-1] ** 2)[::-1]
    level = 10 * np.log10(decay / decay[0])
    used = (level < -5) & (level > -35)
    slope = np.polyfit(np.flatnonzero(used) / RATE, level[used], 1)[0]
    return -60 / slope


@pytest.mark.parametrize("snr_db", [20.0, 10.0, 5.0, 0.0, -5.0])
def test_the_noise_has_the_ratio_asked_for(snr_db):
    speech = 0.3 * tone(440)
    for noise in (white_noise(RATE, rng=np.random.default_rng(0)), 7 * tone(3000, 0.3)):
        noisy = add_noise(speech, noise, snr_db=snr_db)
        assert noisy.dtype == np.float32
        added = noisy.astype(np.float64) - speech
        measured = 10 * np.log10(np.mean(speech.astype(np.float64) ** 2) / np.mean(added**2))
        assert measured == pytest.approx(snr_db, abs=0.01)


def test_short_noise_repeats_and_silence_stays_silent():
    noise = np.array([1.0, -1.0, 1.0, 0.0], dtype=np.float32)
    added = add_noise(np.ones(10, dtype=np.float32), noise, snr_db=0.0) - 1
    np.testing.assert_allclose(added[4:8], added[:4], rtol=1e-6)
    assert not add_noise(np.zeros(10, dtype=np.float32), noise, snr_db=0.0).any()


def test_wrong_arrays_are_refused():
    speech = tone(440, 0.1)
    with pytest.raises(ValueError, match="noise is silent"):
        add_noise(speech, np.zeros(5, dtype=np.float32), snr_db=0.0)
    with pytest.raises(ValueError, match=r"expected mono floating-point.*\(2, 800\)"):
        telephone_band(speech.reshape(2, -1))
    with pytest.raises(ValueError, match="int16"):
        reverberate((speech * 1000).astype(np.int16), np.ones(1, dtype=np.float32))
    with pytest.raises(ValueError, match="factor"):
        change_speed(speech, factor=0.0)


def test_pink_noise_loses_three_decibels_an_octave():
    pink = pink_noise(30 * RATE, rng=np.random.default_rng(1))
    assert np.mean(pink.astype(np.float64) ** 2) == pytest.approx(1.0, rel=1e-4)
    # octave bands of pink noise have equal power; of white noise, 3 dB more with each octave
    octaves = [band_power_db(pink, f, 2 * f) for f in (250, 500, 1000, 2000, 4000)]
    assert np.ptp(octaves) < 1.0
    white = white_noise(30 * RATE, rng=np.random.default_rng(1))
    steps = np.diff([band_power_db(white, f, 2 * f) for f in (250, 500, 1000, 2000, 4000)])
    np.testing.assert_allclose(steps, 3.01, atol=0.5)


def test_the_telephone_keeps_its_band_alone():
    for frequency, gain in [(400, 1.0), (1000, 1.0), (3300, 1.0), (300, 0.5), (3400, 0.5)]:
        assert amplitude(telephone_band(tone(frequency)), frequency) == pytest.approx(
            gain, abs=0.02
        )
    white = white_noise(10 * RATE, rng=np.random.default_rng(2))
    line = telephone_band(white)
    assert len(line) == len(white)
    assert band_power_db(line, 0, 200) < band_power_db(white, 0, 200) - 40
    assert band_power_db(line, 3500, 8000) < band_power_db(white, 3500, 8000) - 40
    inside = band_power_db(line, 400, 3300) - band_power_db(white, 400, 3300)
    assert inside == pytest.approx(0.0, abs=0.1)


def test_the_telephone_has_no_delay_and_does_not_wrap_around():
    click = np.zeros(RATE, dtype=np.float32)
    click[5] = 1.0
    heard = telephone_band(click)
    assert np.argmax(np.abs(heard)) == 5
    assert np.abs(heard[RATE // 10 :]).max() < 1e-3 * np.abs(heard).max()


@pytest.mark.parametrize("rt60", [0.2, 0.5, 1.0])
def test_a_room_rings_as_long_as_asked(rt60):
    response = room_impulse_response(
        rt60=rt60, direct_to_reverberant_db=6.0, rng=np.random.default_rng(3)
    )
    assert reverberation_time(response) == pytest.approx(rt60, rel=0.1)
    energy = response.astype(np.float64) ** 2
    assert 10 * np.log10(energy[0] / energy[1:].sum()) == pytest.approx(6.0, abs=0.01)


def test_reverberation_is_a_convolution_in_place_and_of_equal_power():
    rng = np.random.default_rng(4)
    speech = white_noise(3000, rng=rng)
    response = room_impulse_response(rt60=0.1, rng=rng)
    late = np.concatenate([np.zeros(50, dtype=np.float32), response])  # recorded with a delay
    plain = np.convolve(speech.astype(np.float64), response)[:3000]
    for room in (response, late):
        wet = reverberate(speech, room)
        np.testing.assert_allclose(
            wet, plain * np.sqrt(np.sum(speech**2) / np.sum(plain**2)), atol=1e-5
        )
    np.testing.assert_allclose(reverberate(speech, np.ones(1, dtype=np.float32)), speech, atol=1e-6)


@pytest.mark.parametrize("factor", [0.9, 1.1, 1.037])
def test_speed_changes_length_and_pitch(factor):
    fast = change_speed(tone(500, 2.0), factor=factor)
    assert len(fast) == pytest.approx(2 * RATE / factor, abs=1)
    assert amplitude(fast, 500 * factor) == pytest.approx(1.0, abs=0.02)
    assert amplitude(fast, 500) < 0.05
