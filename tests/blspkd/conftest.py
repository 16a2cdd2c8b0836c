"""Tiny random parts and a tiny corpus, made once a session: no network, a second or two.

`tiny_parts` are folders as `save_pretrained` leaves them: a whole Whisper model (with its decoder)
and a Llama with a ChatML template. `tiny_corpus` is a manifest of tones and noise. Nothing here
has learnt anything: tests compare ways of running a model, never what it says.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

torch.set_num_threads(1)

TINY_ADAPTER = {
    "hidden_size": 32,
    "num_pre_layers": 1,
    "num_post_layers": 1,
    "num_heads": 4,
    "frame_stacking": 4,
}
TEXTS = (
    "the old man went to the sea",
    "where is my red hat",
    "she sells shells by the shore",
    "ten small boats came home at night",
    "a bird sang in the tall tree",
    "we eat bread and cheese",
)
RESPONSES = (
    "he found a boat and sailed away",
    "it is on the chair",
    "the shells are white",
    "their lamps were lit",
    "it sang of spring",
    "and drink milk",
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class TinyParts:
    """Where the tiny pretrained parts lie.

    Attributes:
        encoder: WhisperForConditionalGeneration, feature extractor and tokenizer.
        language_model: LlamaForCausalLM (tied head) and a tokenizer with a ChatML template.
    """

    encoder: Path
    language_model: Path


@dataclass(frozen=True)
class TinyCorpus:
    """Six clips.

    Attributes:
        manifest: jsonl with audio, text, id, duration, response, response_finished, translation.
        texts: the transcripts.
        responses: the answers.
        audio: the wav files.
    """

    manifest: Path
    texts: tuple[str, ...]
    responses: tuple[str, ...]
    audio: tuple[Path, ...]


def _bpe(vocab_size: int, special_tokens: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TEXTS, *RESPONSES], trainer)
    return tokenizer


def _save_language_model(folder: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_bpe(400, ["<|pad|>", "<|im_start|>", "<|im_end|>"]),
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.3,  # so that answers differ from clip to clip
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def _save_encoder(folder: Path) -> None:
    trained = _bpe(300, [])
    state = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in state["merges"]]
    tokenizer = WhisperTokenizer(vocab=state["vocab"], merges=merges)
    names = ["<|startoftranscript|>", "<|en|>", "<|de|>", "<|transcribe|>", "<|translate|>"]
    tokenizer.add_special_tokens({"extra_special_tokens": [*names, "<|notimestamps|>"]})
    tokenizer.save_pretrained(folder)
    token = tokenizer.convert_tokens_to_ids
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    torch.manual_seed(1)
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=80,
        d_model=32,
        encoder_layers=1,
        encoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_layers=1,
        decoder_attention_heads=4,
        decoder_ffn_dim=64,
        max_target_positions=64,
        init_std=0.3,
        bos_token_id=token("<|endoftext|>"),
        eos_token_id=token("<|endoftext|>"),
        pad_token_id=token("<|endoftext|>"),
        decoder_start_token_id=token("<|startoftranscript|>"),
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = WhisperForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        is_multilingual=True,
        lang_to_id={"<|en|>": token("<|en|>"), "<|de|>": token("<|de|>")},
        task_to_id={
            "transcribe": token("<|transcribe|>"),
            "translate": token("<|translate|>"),
        },
        no_timestamps_token_id=token("<|notimestamps|>"),
        decoder_start_token_id=token("<|startoftranscript|>"),
        eos_token_id=token("<|endoftext|>"),
        pad_token_id=token("<|endoftext|>"),
        max_length=12,
        alignment_heads=[[0, 0], [0, 1]],
    )
    model.save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_parts(tmp_path_factory: pytest.TempPathFactory) -> TinyParts:
    root = tmp_path_factory.mktemp("parts")
    parts = TinyParts(root / "encoder", root / "language_model")
    _save_encoder(parts.encoder)
    _save_language_model(parts.language_model)
    return parts


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> TinyCorpus:
    root = tmp_path_factory.mktemp("corpus")
    random = np.random.default_rng(0)
    lines, audio = [], []
    for index, (text, response) in enumerate(zip(TEXTS, RESPONSES, strict=True)):
        seconds = 0.6 + 0.15 * index
        time = np.arange(int(16_000 * seconds)) / 16_000
        sound = 0.3 * np.sin(2 * np.pi * (200 + 110 * index) * time)
        sound += 0.05 * random.standard_normal(time.size)
        path = root / f"clip{index}.wav"
        soundfile.write(path, sound.astype(np.float32), 16_000)
        audio.append(path)
        row = {
            "audio": path.name,
            "text": text,
            "id": f"clip{index}",
            "duration": time.size / 16_000,
            "response": response,
            "response_finished": index % 2 == 0,
            "translation": " ".join(reversed(text.split())),
        }
        lines.append(json.dumps(row))
    manifest = root / "manifest.jsonl"
    manifest.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return TinyCorpus(manifest, TEXTS, RESPONSES, tuple(audio))


@pytest.fixture(scope="session")
def tiny_model(tiny_parts: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an untrained speech LLM over `tiny_parts`, with CFormer and PLoRA."""
    from blspkd.model.configuration import BlspKDConfig
    from blspkd.model.modeling import BlspKDForConditionalGeneration

    torch.manual_seed(2)
    config = BlspKDConfig(
        encoder=str(tiny_parts.encoder),
        language_model=str(tiny_parts.language_model),
        adapter=TINY_ADAPTER,
        plora={"r": 4, "lora_alpha": 4},
    )
    model = BlspKDForConditionalGeneration.from_parts(config)
    with torch.no_grad():  # PLoRA starts at zero; here it must be able to make a difference
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "language_model" in name:
                parameter.normal_(std=0.1)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def load_recipe():
    """Import a script of recipes/ as python starts it, with its folder on the path."""
    loaded = []

    def load(name: str) -> types.ModuleType:
        path = Path(__file__).parents[2] / "recipes" / name
        sys.path.insert(0, str(path.parent))
        spec = importlib.util.spec_from_file_location(f"{path.stem}_recipe", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        loaded.append((spec.name, str(path.parent)))
        spec.loader.exec_module(module)
        return module

    yield load
    for name, folder in loaded:
        del sys.modules[name]
        sys.path.remove(folder)


@pytest.fixture(scope="session")
def tiny_model_section(tiny_parts: TinyParts) -> dict[str, Any]:
    """The `model` section of a configuration file over `tiny_parts`."""
    return {
        "encoder": str(tiny_parts.encoder),
        "language_model": str(tiny_parts.language_model),
        "adapter": dict(TINY_ADAPTER),
        "plora": {"r": 4, "lora_alpha": 4},
        "prompt": "Say: {speech}",
    }


@pytest.fixture
def recipe(tiny_model_section, tiny_corpus, tmp_path):
    """A configuration file for a few steps over the tiny corpus, and its held-out set."""
    from blspkd.data.manifest import read_manifest, write_manifest

    records = read_manifest(tiny_corpus.manifest)
    write_manifest(tmp_path / "train.jsonl", records[:4])
    write_manifest(tmp_path / "test.jsonl", records[4:])
    values = {
        "output": str(tmp_path / "run"),
        "log_steps": 1,
        "answer_limit": 2,
        "model": tiny_model_section,
        "data": {
            "train": str(tmp_path / "train.jsonl"),
            "eval": {"unseen": str(tmp_path / "test.jsonl")},
        },
        "losses": {"token": 1.0},
        "optim": {
            "learning_rate": 3e-3,
            "schedule": "constant",
            "warmup_steps": 0,
            "max_steps": 6,
            "batch_size": 2,
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def model_and_batch(tiny_model, tiny_corpus):
    """The untrained speech LLM, and a batch of four clips with their prompt in common."""
    from blspkd.data.batches import ClipDataset, Collator
    from blspkd.data.manifest import read_manifest
    from blspkd.model.loading import load_model

    model, processor = load_model(tiny_model)
    dataset = ClipDataset(read_manifest(tiny_corpus.manifest), processor, prompt="Say: {speech}")
    return model, Collator(processor)([dataset[i] for i in range(4)])


@pytest.fixture
def hearing_the_text(model_and_batch, monkeypatch):
    """The same, where the language model reads speech as the text's own embeddings."""
    model, batch = model_and_batch
    counts = batch["speech_mask"].sum(dim=1)
    present = torch.arange(int(counts.max())) < counts[:, None]

    def text_embeddings(vectors):
        spoken = torch.zeros_like(vectors)
        spoken[present] = model.embedding_weight()[batch["input_ids"][batch["speech_mask"]]]
        return spoken

    monkeypatch.setattr(model, "readable", text_embeddings)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.zeros_(parameter)
    return model, batch
