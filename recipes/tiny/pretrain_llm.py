"""Pretrains the tiny chat LLM and its tokenizer on dialogs over the little world.

    python recipes/tiny/pretrain_llm.py --out cli/blspkd/tiny/llm [--steps 3000] [--seed 1]

A Llama of about a million parameters, one CPU thread. Every dialog is drawn afresh, so no epoch
repeats; the loss is taken on the response and, with a smaller weight, on the transcript, so that
the model also knows which word may follow which.
"""

import argparse
import math
import random
import time
from pathlib import Path

import torch
from dialogs import CHAT_TEMPLATE, PROMPTS, Dialog, DialogSource, dialog_ids, prompt_pieces
from facts import facts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from world import free_sentence, questions, vocabulary

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TRANSCRIPT_WEIGHT = 0.3
MERGES = 600


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text has ids; nearly every word of the world is one token."""
    rng = random.Random(seed)
    texts = []
    for _ in range(8000):
        sentence = free_sentence(rng)
        texts += [" " + sentence.text, sentence.text, " " + sentence.continuation]
    for fact in facts() * 6:
        texts += [fact.statement, *(" " + t for t in (fact.statement, *fact.questions))]
    texts += [text for pair in questions() for text in pair]
    texts += ["user", "assistant", "system", "Repeat:", "Continue:", "you said"] * 300
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(SPECIAL) + 256 + MERGES,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A fresh Llama of the tiny shape, special tokens set."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    # in bfloat16 on a CPU the plain attention trains at twice the speed of the fused one
    model.set_attn_implementation("eager")
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=64,
    )
    return model


def batch_of(
    tokenizer: PreTrainedTokenizerFast, dialogs: list[Dialog]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids (B, T) and the weight of each position's prediction (B, T - 1)."""
    rows = [dialog_ids(tokenizer, dialog) for dialog in dialogs]
    width = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    weights = torch.zeros(len(rows), width)
    for i, (row, prompt_length) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        weights[i, :prompt_length] = TRANSCRIPT_WEIGHT
        weights[i, prompt_length : len(row)] = 1.0
    return ids, weights[:, 1:]


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    steps: int,
    batch_size: int,
    peak_lr: float,
    seed: int,
) -> None:
    """Trains in place: AdamW, warm-up, cosine to a fiftieth."""
    source = DialogSource(seed)
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak_lr, betas=(0.9, 0.98))
    model.train()
    began = time.monotonic()
    for step in range(steps):
        warm = min(1.0, (step + 1) / 100)
        decayed = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * warm * decayed
        ids, weights = batch_of(tokenizer, [source() for _ in range(batch_size)])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
        losses = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (losses * weights.flatten()).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(
                f"step {step + 1} loss {loss.item():.3f} {time.monotonic() - began:.0f} s",
                flush=True,
            )
        if (step + 1) % 1000 == 0:
            print(evaluate(model, tokenizer, count=100), flush=True)
            model.train()
    model.eval()


@torch.no_grad()
def answers(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    turns: list[tuple[str, str]],
) -> list[tuple[str, bool]]:
    """Greedy answers to (prompt, text) turns, and whether each ended with the end token."""
    out = []
    for start in range(0, len(turns), 50):
        rows = []
        for prompt, text in turns[start : start + 50]:
            pieces = prompt_pieces(tokenizer, prompt, text)
            rows.append([token for piece in pieces for token in piece])
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), tokenizer.pad_token_id)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :] = torch.tensor(row)
        mask = ids != tokenizer.pad_token_id
        new = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=64
        )[:, width:]
        for row in new.tolist():
            finished = tokenizer.eos_token_id in row
            out.append((tokenizer.decode(row, skip_special_tokens=True).strip(), finished))
    return out


def evaluate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, count: int
) -> dict[str, float]:
    """Share of exact greedy answers on held-out sentences and held-out questions."""
    model.eval()
    rng = random.Random(999)
    tests: dict[str, list[Dialog]] = {"repeat": [], "continue": []}
    for _ in range(count):
        sentence = free_sentence(rng, held_out=True)
        tests["repeat"].append(Dialog(PROMPTS["repeat"], sentence.text, sentence.text))
        tests["continue"].append(Dialog(PROMPTS["continue"], sentence.text, sentence.continuation))
    asked = questions(held_out=True)
    asked = rng.sample(asked, min(count, len(asked)))
    tests["question"] = [Dialog(PROMPTS["question"], q, a) for q, a in asked]
    shares = {}
    for name, rows in tests.items():
        got = answers(model, tokenizer, [(d.prompt, d.text) for d in rows])
        right = sum(g == (d.response, True) for g, d in zip(got, rows, strict=True))
        shares[name] = right / len(rows)
    return shares


def main() -> None:
    """Pretrains and writes the LLM and its tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = train_tokenizer(args.seed)
    pieces = {w: len(tokenizer(" " + w)["input_ids"]) for w in vocabulary()}
    print(len(tokenizer), "tokens;", sum(pieces.values()) / len(pieces), "a word;")
    print("words of several tokens:", {w: n for w, n in pieces.items() if n > 1})
    model = build_model(tokenizer, args.seed)
    print(sum(p.numel() for p in model.parameters()), "parameters", flush=True)
    train(
        model,
        tokenizer,
        steps=args.steps,
        batch_size=args.batch_size,
        peak_lr=args.lr,
        seed=args.seed,
    )
    model.half().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    stored = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    print("stored in half precision:", evaluate(stored, tokenizer, count=400))


if __name__ == "__main__":
    main()
