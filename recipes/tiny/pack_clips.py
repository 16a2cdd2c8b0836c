"""Makes clips.tar, the spoken clips that the package ships, with their manifests inside.

    python recipes/tiny/pack_clips.py --llm cli/blspkd/tiny/llm --out cli/blspkd/tiny \
        [--train 960] [--seed 7] [--jobs 1]

The training sentences come from the training pool of the world, the test sentences and questions
from its held-out pool. The clips are OGG/Opus at 16 kHz. The manifests' `response` is the tiny
LLM's own greedy answer to the transcript, not the recipe's.
"""

import argparse
import io
import json
import random
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import soundfile
import torch
from dialogs import PROMPTS
from facts import facts
from pretrain_llm import answers
from speak import SAMPLE_RATE, UNSEEN, VOICES, Voice, say
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from world import free_sentence, questions, vocabulary

# libsndfile's scale from 0 (best) to 1 (smallest): about 20 kbit/s for these voices
COMPRESSION = 0.95
VOICE_NAMES = ("slt", "rms", "kal16", "slt", "rms", *VOICES)


def plan_train(count: int, rng: random.Random) -> list[tuple[str, str]]:
    """(task, text) of the training clips, all different until questions and facts run out.

    Of twelve: four free sentences and one fact to repeat, one row of the least-heard words to
    repeat, two free sentences and one fact's beginning to continue, three questions. Of several
    drawn texts the one with the rarest words is taken, so that every word is heard many times.
    """
    words, taken = vocabulary(), set()
    heard = dict.fromkeys(words, 0)
    asked = [question for question, _ in questions()]
    rows = []

    def free() -> str:
        return free_sentence(rng).text

    for i in range(count):
        kind = i % 12
        if kind in (2, 5, 10):
            task, options = "question", rng.sample(asked, 12)
        elif kind == 7:
            task, options = "repeat", [fact.statement for fact in rng.sample(facts(), 12)]
        elif kind == 4:
            task, options = "continue", [fact.beginning for fact in rng.sample(facts(), 12)]
        elif kind == 9:
            rare = sorted(words, key=lambda w: (heard[w], rng.random()))[:12]
            task, options = "repeat", [" ".join(rng.sample(rare, rng.randint(4, 6)))]
        else:
            task = "continue" if kind in (1, 8) else "repeat"
            options = [free() for _ in range(8)]
        # some hundred questions and facts: a larger set says them again, in other voices
        options = [o for o in options if o not in taken] or options
        text = max(options, key=lambda t: sum(1 / (1 + heard[w]) for w in t.split()))
        for word in text.split():
            heard[word] += 1
        taken.add(text)
        rows.append((task, text))
    return rows


def plan_test(rng: random.Random) -> list[tuple[str, str, str, str]]:
    """(split, task, text, voice) of the held-out clips."""
    texts: list[str] = []
    while len(texts) < 100:
        text = free_sentence(rng, held_out=True).text
        if text not in texts:
            texts.append(text)
    asked = [q for q, _ in rng.sample(questions(held_out=True), 60)]
    names = list(VOICES)
    rows = [
        ("unseen-sentences", "repeat", t, names[i % len(names)]) for i, t in enumerate(texts[:60])
    ]
    rows += [("questions", "question", t, names[i % len(names)]) for i, t in enumerate(asked)]
    return rows + [("unseen-voice", "repeat", t, "awb") for t in texts[60:]]


def natural(voice: Voice, rng: random.Random) -> Voice:
    """The voice as it would speak on another day."""
    return replace(
        voice,
        pitch=voice.pitch * rng.uniform(0.93, 1.08),
        speed=voice.speed * rng.uniform(0.93, 1.08),
    )


def encode(samples: np.ndarray) -> bytes:
    """The clip as OGG/Opus."""
    file = io.BytesIO()
    soundfile.write(
        file, samples, SAMPLE_RATE, format="OGG", subtype="OPUS", compression_level=COMPRESSION
    )
    return file.getvalue()


def spoken(text: str, voice: Voice) -> tuple[bytes, float]:
    """The clip as OGG/Opus, and its seconds."""
    samples = say(text, voice)
    return encode(samples), len(samples) / SAMPLE_RATE


def main() -> None:
    """Speaks, answers and packs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--llm", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=int, default=960)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--jobs", type=int, default=1, help="clips spoken at once")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.llm)
    model = LlamaForCausalLM.from_pretrained(args.llm, dtype=torch.float32).eval()
    rng = random.Random(args.seed)
    voices = VOICES | UNSEEN
    plan = [
        ("train", task, text, rng.choice(VOICE_NAMES)) for task, text in plan_train(args.train, rng)
    ]
    plan += plan_test(rng)
    replies = answers(model, tokenizer, [(PROMPTS[task], text) for _, task, text, _ in plan])
    said = [(text, natural(voices[voice], rng)) for _, _, text, voice in plan]
    lines: dict[str, list[str]] = {}
    with (
        tarfile.open(args.out / "clips.tar", "w", format=tarfile.USTAR_FORMAT) as tar,
        ThreadPoolExecutor(args.jobs) as pool,
    ):
        clips = pool.map(lambda clip: spoken(*clip), said)
        for number, ((split, task, text, voice), (data, seconds)) in enumerate(
            zip(plan, clips, strict=True)
        ):
            name = f"{'train' if split == 'train' else 'test'}-{number:04d}"
            info = tarfile.TarInfo(f"clips/{name}.ogg")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            response, finished = replies[number]
            row = {
                "audio": info.name,
                "text": text,
                "id": name,
                "duration": round(seconds, 3),
                "voice": voice,
                "task": task,
                "messages": [{"role": "user", "content": PROMPTS[task]}],
                "response": response,
                "response_finished": finished,
            }
            if split != "train":
                row["split"] = split
            manifest = "train" if split == "train" else f"test-{split}"
            lines.setdefault(manifest, []).append(json.dumps(row))
        for name, rows in lines.items():
            data = ("\n".join(rows) + "\n").encode()
            info = tarfile.TarInfo(f"{name}.jsonl")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            print(name, len(rows), "clips")


if __name__ == "__main__":
    main()
