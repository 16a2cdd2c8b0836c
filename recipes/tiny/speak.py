"""Speaks sentences of the little world with flite and espeak-ng.

    python recipes/tiny/speak.py --out FOLDER [--clips 8000] [--seed 1]

writes the large set that only the encoder's pretraining uses: FOLDER/big.npy (all clips one after
another, int16, 16 kHz) and FOLDER/big.jsonl (a line a clip: start and length in samples, text,
voice). The clips that the package ships are made by pack_clips.py, with the functions of this
file. Needs the programs `flite` and `espeak-ng` (`apt-get install flite espeak-ng`).

The voice `awb` of flite (a Scottish man) is `UNSEEN`: nothing is trained on it.
"""

import argparse
import json
import random
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soundfile
import soxr
from world import free_sentence, questions, vocabulary, word_salad

SAMPLE_RATE = 16_000


@dataclass(frozen=True)
class Voice:
    """A voice as a synthesiser knows it.

    Attributes:
        engine: "flite" or "espeak".
        name: the synthesiser's own name of the voice.
        pitch: factor on the voice's pitch.
        speed: factor on the voice's speed.
        stretch: factor on pitch, speed and formants together, by resampling.
    """

    engine: str
    name: str
    pitch: float = 1.0
    speed: float = 1.0
    stretch: float = 1.0


VOICES = {
    "slt": Voice("flite", "slt"),
    "rms": Voice("flite", "rms"),
    "kal16": Voice("flite", "kal16"),
    "us": Voice("espeak", "en-us", speed=0.95),
    "rp-f2": Voice("espeak", "en-gb-x-rp+f2", speed=0.9),
    "us-f4": Voice("espeak", "en-us+f4", speed=0.95),
    "gb-m3": Voice("espeak", "en-gb+m3", speed=0.9),
    "us-klatt": Voice("espeak", "en-us+klatt2", speed=0.9),
}
UNSEEN = {"awb": Voice("flite", "awb")}
# further voices of the large set only: more throats and accents for the encoder
EXTRA = {
    "scotland": Voice("espeak", "en-gb-scotland+m7", speed=0.9),
    "lancaster": Voice("espeak", "en-gb-x-gbclan+m1", speed=0.9),
    "scotland-f": Voice("espeak", "en-gb-scotland+f5", speed=0.9),
    "us-m6": Voice("espeak", "en-us+m6", speed=0.9),
    "steph": Voice("espeak", "en-us+steph", speed=0.9),
    "michael": Voice("espeak", "en-gb+michael", speed=0.9),
}


def say(text: str, voice: Voice) -> np.ndarray:
    """Speaks `text`: (samples,) float32 in [-1, 1], 16 kHz, one channel."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        if voice.engine == "flite":
            command = ["flite", "-voice", voice.name]
            command += ["--setf", f"duration_stretch={1 / voice.speed:.3f}"]
            # the clustergen voices take a factor, the diphone voices a mean in Hz
            command += ["--setf", f"f0_shift={voice.pitch:.3f}"]
            if voice.name.startswith("kal"):
                command += ["--setf", f"int_f0_target_mean={95 * voice.pitch:.1f}"]
            command += ["-t", text, "-o", file.name]
        else:
            pitch = round(min(99, max(0, 50 + 100 * (voice.pitch - 1))))
            speed = round(165 * voice.speed)
            command = ["espeak-ng", "-v", voice.name, "-p", str(pitch), "-s", str(speed)]
            command += ["-w", file.name, text]
        subprocess.run(command, check=True, capture_output=True)
        samples, rate = soundfile.read(file.name, dtype="float32")
    samples = soxr.resample(samples, rate * voice.stretch, SAMPLE_RATE).astype(np.float32)
    return (0.6 * samples / max(1e-4, float(np.abs(samples).max()))).astype(np.float32)


def varied(voice: Voice, rng: random.Random) -> Voice:
    """The same voice with another pitch and speed, and half the time another throat."""
    return replace(
        voice,
        pitch=voice.pitch * rng.uniform(0.85, 1.2),
        speed=voice.speed * rng.uniform(0.85, 1.2),
        stretch=rng.uniform(0.88, 1.14) if rng.random() < 0.5 else 1.0,
    )


def big_set_texts(count: int, rng: random.Random) -> list[str]:
    """Draws training texts: free sentences, questions with their answers, word salads."""
    words = vocabulary()
    asked = [text for pair in questions() for text in pair]
    texts = []
    for _ in range(count):
        kind = rng.random()
        if kind < 0.55:
            texts.append(free_sentence(rng).text)
        elif kind < 0.8:
            texts.append(rng.choice(asked))
        else:
            texts.append(word_salad(rng, words))
    return texts


def main() -> None:
    """Speaks the large set."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(args.seed)
    # the natural flite voices twice as often as each espeak-ng voice
    names = ["slt", "rms", "kal16", *VOICES, *EXTRA]
    everyone = VOICES | EXTRA
    start, chunks, lines = 0, [], []
    for text in big_set_texts(args.clips, rng):
        name = rng.choice(names)
        samples = say(text, varied(everyone[name], rng))
        chunks.append((samples * 32767).astype(np.int16))
        line = {"start": start, "length": len(samples), "text": text, "voice": name}
        lines.append(json.dumps(line))
        start += len(samples)
    np.save(args.out / "big.npy", np.concatenate(chunks))
    (args.out / "big.jsonl").write_text("\n".join(lines) + "\n")
    print(f"{len(lines)} clips, {start / SAMPLE_RATE / 3600:.2f} h")


if __name__ == "__main__":
    main()
