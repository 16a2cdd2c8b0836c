"""Pretrains the tiny Whisper-architecture encoder with CTC on the large synthetic set.

    python recipes/tiny/pretrain_encoder.py --big FOLDER --llm cli/blspkd/tiny/llm \
        --out cli/blspkd/tiny/encoder [--epochs 8] [--seed 1]

Two CTC heads, both thrown away afterwards: characters after the second layer, which aligns early,
and the LLM's own tokens after the last, so that the features tell the units the adapter must find.
Clips are encoded without the 30 s padding, by the product's own SpeechEncoder.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import jiwer
import numpy as np
import torch
from augment import augment, frame_mask, pad
from flat_start import alignment_loss, spoken_part, spread
from safetensors.torch import load_file, save_file
from speak import SAMPLE_RATE, UNSEEN, VOICES, say
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from world import free_sentence, questions

from blspkd.model.encoder import SpeechEncoder

# steps that new heads train alone, so that they don't spoil an encoder that is gone on from
HEADS_FIRST = 60
QUICK, NATURAL = (0.55, 0.8), (0.7, 1.1)
LETTERS = " abcdefghijklmnopqrstuvwxyz"


class CTCPretrainer(nn.Module):
    """The encoder with its two throw-away heads; unit 0 of each is the blank."""

    def __init__(self, config: WhisperConfig, tokens: int) -> None:
        super().__init__()
        self.speech = SpeechEncoder(WhisperEncoder(config))
        # so that the sound is not drowned by the positions, whose sinusoids have fixed size
        nn.init.normal_(self.speech.encoder.conv1.weight, std=0.15)
        nn.init.normal_(self.speech.encoder.conv2.weight, std=0.12)
        # in bfloat16 on a CPU the plain attention trains at twice the speed of the fused one
        self.speech.encoder.set_attn_implementation("eager")
        self.middle: Tensor | None = None
        self.letter_head = nn.Linear(config.d_model, len(LETTERS) + 1)
        self.token_head = nn.Linear(config.d_model, tokens + 1)
        self.norm = nn.LayerNorm(config.d_model)
        self.speech.encoder.layers[config.encoder_layers // 2 - 1].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        self.middle = output[0] if isinstance(output, tuple) else output

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of letters and tokens (B, T, units) and the frames (B,)."""
        mask = frame_mask(lengths, features.shape[-1])
        hidden, out_mask = self.speech(features, mask)
        letters = self.letter_head(self.norm(self.middle))
        return letters, self.token_head(hidden), out_mask.sum(dim=1)


def extract(extractor: WhisperFeatureExtractor, samples: np.ndarray) -> np.ndarray:
    """(M, F) float16 features of one clip, as the product computes them."""
    out = extractor(
        samples, sampling_rate=SAMPLE_RATE, padding="longest", truncation=False,
        return_attention_mask=True, return_tensors="np",
    )  # fmt: skip
    frames = int(out["attention_mask"][0].sum())
    return out["input_features"][0, :, :frames].astype(np.float16)


def load_big(
    folder: Path, extractor: WhisperFeatureExtractor
) -> tuple[list[np.ndarray], list[str]]:
    """Features and texts of the large set."""
    audio = np.load(folder / "big.npy", mmap_mode="r")
    rows = [json.loads(line) for line in (folder / "big.jsonl").read_text().splitlines()]
    cache = folder / "features.npz"
    if not cache.exists():
        clips = (audio[row["start"] : row["start"] + row["length"]] for row in rows)
        features = [extract(extractor, clip.astype(np.float32) / 32768) for clip in clips]
        ends = np.cumsum([f.shape[1] for f in features])
        np.savez(cache, frames=np.concatenate(features, axis=1), ends=ends)
    stored = np.load(cache)
    features = np.split(stored["frames"], stored["ends"][:-1], axis=1)
    return features, [row["text"] for row in rows]


def test_sets(extractor: WhisperFeatureExtractor) -> dict[str, tuple[list[np.ndarray], list[str]]]:
    """Held-out sentences and questions in known voices, held-out sentences in the unseen voice."""
    rng = random.Random(4242)
    known = list(VOICES.values())
    asked = rng.sample([q for q, _ in questions(held_out=True)], 60)
    texts = [free_sentence(rng, held_out=True).text for _ in range(120)]
    spoken = {
        "unseen-sentences": [(t, known[i % len(known)]) for i, t in enumerate(texts[:60])],
        "questions": [(t, known[i % len(known)]) for i, t in enumerate(asked)],
        "unseen-voice": [(t, UNSEEN["awb"]) for t in texts[60:]],
    }
    return {
        split: ([extract(extractor, say(t, v)) for t, v in rows], [t for t, _ in rows])
        for split, rows in spoken.items()
    }


def batches(lengths: list[int], frames: int, rng: random.Random) -> list[list[int]]:
    """Index batches of clips of like length, about `frames` mel frames each, in random order."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i] * rng.uniform(0.9, 1.1))
    out: list[list[int]] = [[]]
    for i in order:
        longest = max([lengths[i], *(lengths[j] for j in out[-1])])
        if out[-1] and longest * (len(out[-1]) + 1) > frames:
            out.append([])
        out[-1].append(i)
    rng.shuffle(out)
    return out


def ctc(logits: Tensor, frames: Tensor, targets: list[list[int]]) -> Tensor:
    """CTC loss per target unit, averaged over the batch; unit 0 is the blank."""
    return F.ctc_loss(
        logits.float().log_softmax(-1).transpose(0, 1),
        torch.tensor([unit for target in targets for unit in target]),
        frames,
        torch.tensor([len(t) for t in targets]),
        zero_infinity=True,
    )


@torch.no_grad()
def word_error(
    model: CTCPretrainer,
    tokenizer: PreTrainedTokenizerFast,
    features: list[np.ndarray],
    texts: list[str],
) -> float:
    """Word error rate of the token head's greedy path."""
    model.eval()
    heard = []
    for start in range(0, len(features), 20):
        _, logits, frames = model(*pad(features[start : start + 20]))
        for path, length in zip(logits.argmax(-1).tolist(), frames.tolist(), strict=True):
            path = path[:length]
            units = [u for u, before in zip(path, [0, *path], strict=False) if u and u != before]
            heard.append(" ".join(tokenizer.decode([u - 1 for u in units]).split()))
    model.train()
    return float(jiwer.wer(texts, heard))


def save(model: CTCPretrainer, extractor: WhisperFeatureExtractor, folder: Path) -> None:
    """Writes config, features' settings and the encoder's weights in half precision."""
    folder.mkdir(parents=True, exist_ok=True)
    encoder = model.speech.encoder
    state = {
        f"model.encoder.{name}": value.detach().half().contiguous()
        for name, value in encoder.state_dict().items()
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    encoder.config.save_pretrained(folder)
    extractor.save_pretrained(folder)


def main() -> None:
    """Pretrains and writes the encoder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--big", type=Path, required=True)
    parser.add_argument("--llm", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="go on from this encoder, with new heads")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--flat-steps", type=int, default=200)
    parser.add_argument("--frames", type=int, default=4000)
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng, generator = random.Random(args.seed), torch.Generator().manual_seed(args.seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.llm)
    extractor = WhisperFeatureExtractor(feature_size=80)
    config = WhisperConfig(
        d_model=144, encoder_layers=4, encoder_attention_heads=4, encoder_ffn_dim=576,
        decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=576, num_mel_bins=80,
        max_source_positions=1500, dropout=0.0, attention_dropout=0.0, init_std=0.05,
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.bos_token_id, architectures=["WhisperModel"],
    )  # fmt: skip
    model = CTCPretrainer(config, len(tokenizer))
    if args.start:
        stored = load_file(args.start / "model.safetensors")
        encoder = {k.removeprefix("model.encoder."): v for k, v in stored.items()}
        model.speech.encoder.load_state_dict(encoder)
    print(sum(p.numel() for p in model.speech.parameters()), "parameters", flush=True)
    features, texts = load_big(args.big, extractor)
    tests = test_sets(extractor)
    letters = [[LETTERS.index(c) + 1 for c in text] for text in texts]
    tokens = [[u + 1 for u in tokenizer(" " + text)["input_ids"]] for text in texts]
    sizes = [[len(tokenizer.decode([u - 1])) for u in row] for row in tokens]
    parts = [spoken_part(f) for f in features]
    lengths = [f.shape[1] for f in features]
    total = args.epochs * len(batches(lengths, args.frames, random.Random(0)))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    began, step = time.monotonic(), 0
    for epoch in range(args.epochs):
        for batch in batches(lengths, args.frames, rng):
            warm = min(1.0, (step + 1) / 150)
            decayed = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))
            optimizer.param_groups[0]["lr"] = args.lr * warm * decayed
            flat = step < args.flat_steps
            x, n = pad([features[i] for i in batch])
            if not flat:
                # quick speech has fewer frames, so most of the training runs on it
                pace = QUICK if step < 0.65 * total else NATURAL
                x, n = augment(x, n, generator, pace=pace)
            with torch.autocast("cpu", torch.bfloat16):
                by_letter, by_token, frames = model(x, n)
            if flat:
                rows = list(zip(batch, frames.tolist(), strict=True))
                ones = {i: [1] * len(letters[i]) for i in batch}
                letter_loss = alignment_loss(
                    by_letter, [spread(letters[i], ones[i], parts[i], t) for i, t in rows]
                )
                token_loss = alignment_loss(
                    by_token, [spread(tokens[i], sizes[i], parts[i], t) for i, t in rows]
                )
            else:
                letter_loss = ctc(by_letter, frames, [letters[i] for i in batch])
                token_loss = ctc(by_token, frames, [tokens[i] for i in batch])
            optimizer.zero_grad()
            (0.5 * letter_loss + 0.5 * token_loss).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            if args.start and step < HEADS_FIRST:
                for parameter in model.speech.parameters():
                    parameter.grad = None
            optimizer.step()
            step += 1
            if step % 25 == 0:
                print(
                    f"step {step}/{total} letters {letter_loss.item():.3f} "
                    f"tokens {token_loss.item():.3f} {time.monotonic() - began:.0f} s",
                    flush=True,
                )
        errors = {k: word_error(model, tokenizer, *t) for k, t in tests.items()}
        print(f"epoch {epoch + 1} word error", errors, flush=True)
        save(model, extractor, args.out)


if __name__ == "__main__":
    main()
