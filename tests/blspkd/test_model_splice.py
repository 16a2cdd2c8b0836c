"""Speech goes exactly where the text keeps its place, and nothing else moves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blspkd.model.splice import IGNORE_INDEX, splice


def _case(speech_lengths, *, text_length=6, span=(2, 4)):
    batch = len(speech_lengths)
    text = torch.arange(batch * text_length).reshape(batch, text_length, 1).float() + 1
    speech_mask = torch.zeros(batch, text_length, dtype=torch.bool)
    speech_mask[:, span[0] : span[1]] = True
    longest = max(max(speech_lengths), 1)
    speech = -(torch.arange(batch * longest).reshape(batch, longest, 1).float() + 1)
    present = torch.arange(longest) < torch.tensor(speech_lengths)[:, None]
    attention = torch.ones(batch, text_length, dtype=torch.bool)
    return text, attention, speech_mask, speech, present


@pytest.mark.parametrize("side", ["left", "right"])
def test_two_rows_by_hand(side):
    text, attention, mask, speech, present = _case([1, 3])
    attention[0, 5] = False  # the first row's text is one shorter
    labels = torch.full((2, 6), IGNORE_INDEX)
    labels[:, 4] = torch.tensor([50, 51])

    out = splice(text, attention, mask, speech, present, labels=labels, padding_side=side)

    first, second = [1, 2, -1, 5], [7, 8, -4, -5, -6, 11, 12]
    pad = [0] * 3
    rows = [pad + first if side == "left" else first + pad, second]
    assert out.inputs_embeds[..., 0].tolist() == rows
    assert out.attention_mask.tolist() == [[value != 0 for value in row] for row in rows]
    assert out.speech_mask.tolist() == [[value < 0 for value in row] for row in rows]
    expected = [[50 if v == 5 else 51 if v == 11 else IGNORE_INDEX for v in row] for row in rows]
    assert out.labels.tolist() == expected


def test_as_many_speech_tokens_as_text_tokens_keeps_every_position():
    text, attention, mask, speech, present = _case([2, 2])
    out = splice(text, attention, mask, speech, present, length=6)
    assert torch.equal(out.speech_mask, mask)
    assert torch.equal(out.inputs_embeds[~mask], text[~mask])
    assert torch.equal(out.inputs_embeds[mask], speech[present])


def test_no_speech_at_all_leaves_the_prompt():
    text, attention, mask, speech, present = _case([0])
    out = splice(text, attention, mask, speech, present)
    assert out.inputs_embeds[0, :, 0].tolist() == [1, 2, 5, 6]
    assert not out.speech_mask.any()


@pytest.mark.parametrize("places", [[], [1, 3], [0, 1, 5]])
def test_a_row_with_no_place_for_speech_or_several_is_refused(places):
    text, attention, mask, speech, present = _case([1, 2])
    mask[1] = False
    mask[1, places] = True
    runs = min(len(places), 2)
    with pytest.raises(ValueError, match=f"speech_mask: expected one run .* rows with {runs};"):
        splice(text, attention, mask, speech, present)


def test_gradients_reach_the_speech_and_only_what_is_present():
    text, attention, mask, speech, present = _case([1, 3])
    speech.requires_grad_()
    splice(text, attention, mask, speech, present).inputs_embeds.sum().backward()
    assert torch.equal(speech.grad[..., 0] != 0, present)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_a_row_does_not_depend_on_its_batch(lengths, pad):
    text, attention, mask, speech, present = _case(lengths)
    attention[0, 6 - pad + (pad > 2) :] = False
    whole = splice(text, attention, mask, speech, present)
    for row in range(len(lengths)):
        one = slice(row, row + 1)
        alone = splice(text[one], attention[one], mask[one], speech[one], present[one])
        real = whole.attention_mask[row]
        assert torch.equal(whole.inputs_embeds[row][real], alone.inputs_embeds[0])
        assert torch.equal(whole.speech_mask[row][real], alone.speech_mask[0])
