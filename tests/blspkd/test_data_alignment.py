"""Where tokens end: the cut itself, its transfer between tokenizers, and its use in a run."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blspkd.data.alignment import CrossAttentionAligner, monotonic_ends
from blspkd.model.bases import load_tokenizer
from blspkd.model.losses import BlspKDOutput, loss_sums
from blspkd.model.objective import LossWeights, Objective
from blspkd.training.config_file import load_config
from blspkd.training.run import train
from speech_adapters import AdapterOutput


def _gain(scores, ends):
    bounds = [0, *ends]
    return sum(
        row[a:b].sum() for row, (a, b) in zip(scores, itertools.pairwise(bounds), strict=True)
    )


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 10_000))
def test_no_other_cut_gains_more(tokens, frames, seed):
    scores = np.random.default_rng(seed).normal(size=(tokens, frames))
    ends = monotonic_ends(scores)
    assert ends[-1] == frames
    assert (np.diff([0, *ends]) >= 0).all()
    every = itertools.combinations_with_replacement(range(frames + 1), tokens - 1)
    best = max(_gain(scores, [*cut, frames]) for cut in every)
    assert _gain(scores, ends) == pytest.approx(best)


class _Planted(CrossAttentionAligner):
    """Looks at ten frames for each character of each of the decoder's tokens."""

    def _attention(self, encoded, ids, *, rows):
        texts = [self.tokenizer.decode([i]) for i in ids[-(rows - 1) :]]
        scores = np.full((rows, len(encoded)), -1.0)
        start = 0
        for row, text in enumerate(texts):
            end = start + 10 * len(text.strip())
            scores[row, start:end] = 1.0
            start = end
        scores[rows - 1, start:] = 1.0
        return scores


def _aligner(kind, tiny_parts):
    loaded = CrossAttentionAligner.load(
        str(tiny_parts.encoder), dtype=torch.float32, device=torch.device("cpu")
    )
    return kind(loaded.model, loaded.tokenizer)


@pytest.mark.parametrize("text", ["we eat bread", "  ten small boats ", "a"])
def test_times_go_from_one_tokenizer_to_another_by_character(tiny_parts, text):
    aligner = _aligner(_Planted, tiny_parts)
    clean = text.strip()
    letters = list(range(1, len(clean) + 1))  # a tokenizer of single characters
    ends = aligner.token_ends(torch.zeros(400, 8), text, letters)
    # within a decoder token, time is shared out evenly: its ends are where it is exact
    spans = aligner.tokenizer(" " + clean, add_special_tokens=False, return_offsets_mapping=True)
    for _, end in spans["offset_mapping"]:
        spoken = len(clean[: end - 1].replace(" ", ""))
        assert ends[end - 2].item() == 10 * spoken
    assert (ends.diff() >= 0).all()


def test_a_real_decoder_gives_one_end_per_token_in_the_clip(tiny_parts):
    aligner = _aligner(CrossAttentionAligner, tiny_parts)
    tokenizer = load_tokenizer(str(tiny_parts.language_model))
    text = "she sells shells by the shore"
    coded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    width = aligner.model.config.d_model
    ends = aligner.token_ends(
        torch.randn(57, width), text, [end for _, end in coded["offset_mapping"]], language="de"
    )
    assert ends.shape == (len(coded["input_ids"]),)
    assert (ends.diff() >= 0).all()
    assert 0 <= ends[0] <= ends[-1] <= 57
    aligner.token_ends(torch.randn(57, width), text, [1], language="de-AT")
    with pytest.raises(ValueError, match="language 'xx'"):
        aligner.token_ends(torch.randn(57, width), text, [1], language="xx")


def test_a_run_with_alignment_trains_with_it_and_keeps_it(recipe, tmp_path):
    changes = [
        "losses.alignment=1",
        "data.cache_features=true",
        f"data.cache_dir={tmp_path / 'features'}",
        "answer_limit=0",
        "optim.max_steps=25",
        "optim.learning_rate=1e-2",
    ]
    lines = []
    result = train(load_config(recipe, changes), say=lines.append)
    assert "aligned 4/4 clips" in lines
    rows = [json.loads(line) for line in (result.folder / "log.jsonl").read_text().splitlines()]
    losses = [row["loss/alignment"] for row in rows if "loss" in row]
    assert sum(losses[-3:]) < sum(losses[:3])
    lines.clear()
    shutil.rmtree(result.folder)
    train(load_config(recipe, [*changes, "optim.max_steps=1"]), say=lines.append)
    assert not any("aligned" in line for line in lines)


def test_what_alignment_needs_is_said(recipe, tiny_parts, tmp_path):
    with pytest.raises(ValueError, match=r"data\.cache_features=true"):
        train(load_config(recipe, ["losses.alignment=1"]), say=lambda text: None)
    encoder = tmp_path / "encoder"
    shutil.copytree(tiny_parts.encoder, encoder)
    path = encoder / "generation_config.json"
    settings_ = json.loads(path.read_text())
    del settings_["alignment_heads"]
    path.write_text(json.dumps(settings_))
    changes = ["losses.alignment=1", "data.cache_features=true", f"model.encoder={encoder}"]
    with pytest.raises(ValueError, match="alignment_heads"):
        train(load_config(recipe, [*changes, f"output={tmp_path / 'o'}"]), say=lambda text: None)


def test_token_ends_count_in_encoder_frames_whatever_the_adapter_stacks():
    """CIF weights that fit the alignment cost nothing; each weight stands for four frames."""
    alphas = torch.tensor([[0.5, 0.5, 0.25, 0.75, 0.0]])
    adapter = AdapterOutput(
        hidden_states=torch.zeros(1, 2, 3),
        attention_mask=torch.ones(1, 2, dtype=torch.bool),
        alpha_sum=alphas.sum(dim=1),
        alphas=alphas,
        frames_per_alpha=4,
        threshold=1.0,
    )
    nothing = dict.fromkeys(LossWeights.__dataclass_fields__, 0.0)
    found = [
        loss_sums(
            BlspKDOutput(None, {}, adapter, adapter.hidden_states, None, None),
            Objective(LossWeights(**{**nothing, "alignment": 1.0})),
            token_ids=torch.zeros(1, 2, dtype=torch.long),
            speech_mask=torch.ones(1, 2, dtype=torch.bool),
            free_running=None,
            token_ends=torch.tensor([ends]),
            token_keys=None,
            head_weight=torch.zeros(0, 3),
            token_scale=30.0,
        )["alignment"].item()
        for ends in ([8.0, 20.0], [4.0, 20.0], [2.0, 20.0])
    ]
    # the tokens weigh 1 and 1, 0.5 and 1.5, 0.25 and 1.75
    assert found == pytest.approx([0.0, 1.0, 1.5])
