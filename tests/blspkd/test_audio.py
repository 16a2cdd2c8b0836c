"""Reading audio: what comes out, and one clear error for each fault."""

import struct

import numpy as np
import pytest
import soundfile

from blspkd.model.audio import (
    AudioError,
    check_waveform,
    is_silent,
    load_audio,
    probe_audio,
)

RATE = 16_000


def tone(seconds, *, rate=RATE, hertz=440.0, level=0.5):
    time = np.arange(round(seconds * rate)) / rate
    return (level * np.sin(2 * np.pi * hertz * time)).astype(np.float32)


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_any_rate_and_channels_become_one_channel_at_16_khz(tmp_path, rate, channels):
    path = tmp_path / "clip.wav"
    sound = np.stack([tone(1.0, rate=rate)] * channels, axis=1)
    soundfile.write(path, sound, rate, subtype="FLOAT")
    loaded = load_audio(path)
    assert loaded.dtype == np.float32
    assert loaded.shape == (RATE,)
    middle = slice(RATE // 4, 3 * RATE // 4)  # the filter rings at the ends
    np.testing.assert_allclose(loaded[middle], tone(1.0)[middle], atol=1e-3)
    info = probe_audio(path)
    assert (info.sampling_rate, info.channels, info.duration) == (rate, channels, 1.0)


def test_channels_are_averaged(tmp_path):
    left, right = tone(0.5, hertz=300), tone(0.5, hertz=700)
    soundfile.write(tmp_path / "s.wav", np.stack([left, right], 1), RATE, subtype="FLOAT")
    np.testing.assert_allclose(load_audio(tmp_path / "s.wav"), (left + right) / 2, atol=1e-6)


@pytest.mark.parametrize("name", ["a.flac", "a.mp3", "a.ogg"])
def test_compressed_formats(tmp_path, name):
    soundfile.write(tmp_path / name, tone(1.0), RATE)
    assert load_audio(tmp_path / name).shape == (RATE,)


def write_half(path):
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, RATE), RATE)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def write_nan(path):
    sound = tone(1.0)
    sound[7] = np.nan
    soundfile.write(path, sound, RATE, subtype="FLOAT")


FAULTS = {
    "missing": ("none.wav", lambda path: None, "no such audio file"),
    "folder": ("folder.wav", lambda path: path.mkdir(), "got a folder"),
    "no bytes": ("empty.wav", lambda path: path.write_bytes(b""), "0 bytes"),
    "no samples": ("zero.wav", lambda p: soundfile.write(p, tone(0.0), RATE), "no samples"),
    "text": ("text.wav", lambda path: path.write_text("not audio " * 50), "cannot be decoded"),
    "raw": ("clip.raw", lambda path: path.write_bytes(bytes(999)), "sampling rate"),
    "half a wav": ("half.wav", write_half, "it ends after"),
    "half a flac": ("half.flac", write_half, "cannot be decoded"),
    "not a number": ("nan.wav", write_nan, "NaN"),
    "50 ms": ("short.wav", lambda p: soundfile.write(p, tone(0.05), RATE), "0.050 s is too short"),
    "60 s": ("long.wav", lambda p: soundfile.write(p, tone(60), RATE), "60.0 s is too long.*split"),
}
REASONS = {
    "missing": "missing",
    "folder": "missing",
    "no bytes": "empty",
    "no samples": "empty",
    "not a number": "not finite",
    "50 ms": "too short",
    "60 s": "too long",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_gives_one_error_that_names_the_file(tmp_path, fault):
    name, write, message = FAULTS[fault]
    write(tmp_path / name)
    with pytest.raises(AudioError, match=message) as caught:
        load_audio(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.reason == REASONS.get(fault, "corrupt")


def test_a_wav_written_to_a_pipe_is_no_cut_off_file(tmp_path):
    path = tmp_path / "piped.wav"
    soundfile.write(path, tone(1.0), RATE)
    data = bytearray(path.read_bytes())
    data[4:8] = b"\xff\xff\xff\xff"  # the RIFF size, unknown to a program that cannot seek
    data[40:44] = b"\xff\xff\xff\xff"  # the same of the data chunk
    path.write_bytes(data)
    assert load_audio(path).shape == (RATE,)


def test_a_wav_with_a_wrong_file_size_is_as_long_as_its_samples(tmp_path):
    path = tmp_path / "odd.wav"
    soundfile.write(path, tone(1.0), RATE)
    data = bytearray(path.read_bytes())
    data[4:8] = struct.pack("<I", len(data))  # some programs count these eight bytes, too
    path.write_bytes(data)
    assert load_audio(path).shape == (RATE,)
    path.write_bytes(data[:-100])
    with pytest.raises(AudioError, match="it ends after 31900 of 32000 bytes of samples"):
        load_audio(path)


def test_a_flac_written_to_a_pipe_says_what_it_lacks(tmp_path):
    path = tmp_path / "piped.flac"
    soundfile.write(path, tone(1.0), RATE)
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0  # the last 36 bits before the checksum: how many samples
    data[22:26] = bytes(4)
    path.write_bytes(data)
    for read in (probe_audio, load_audio):
        with pytest.raises(AudioError, match=r"does not say how long it is\); convert it"):
            read(path)


def test_long_audio_is_loaded_whole_when_asked(tmp_path):
    soundfile.write(tmp_path / "long.wav", tone(31.0), RATE)
    assert load_audio(tmp_path / "long.wav", max_duration=None).shape == (31 * RATE,)


def test_silence_is_told_from_quiet_speech(tmp_path):
    soundfile.write(tmp_path / "silent.wav", np.zeros(RATE), RATE)
    assert is_silent(load_audio(tmp_path / "silent.wav"))
    assert is_silent(tone(1.0, level=10 ** (-71 / 20)))
    assert not is_silent(tone(1.0, level=10 ** (-69 / 20)))
    assert not is_silent(-np.abs(tone(1.0)))


def test_waveforms_in_memory_are_checked_alike():
    assert check_waveform(tone(1.0).astype(np.float64)).dtype == np.float32
    with pytest.raises(TypeError, match="32768"):
        check_waveform(np.zeros(RATE, dtype=np.int16))
    with pytest.raises(ValueError, match="one channel"):
        check_waveform(np.zeros((2, RATE), dtype=np.float32))
    with pytest.raises(AudioError, match="too short"):
        check_waveform(tone(0.05))
    with pytest.raises(AudioError, match="no samples"):
        check_waveform(tone(0.0))
