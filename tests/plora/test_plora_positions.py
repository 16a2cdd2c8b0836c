"""Masks from token ids, spans and embeddings."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plora import mask_from_embeddings, mask_from_ids, mask_from_spans


@pytest.mark.parametrize("ids", [3, [3], [3, 5], torch.tensor([5, 3])])
def test_tokens_are_found(ids):
    wanted = {3} if not hasattr(ids, "__len__") else {int(i) for i in ids}
    input_ids = torch.tensor([[1, 3, 3, 5], [5, 0, 3, 2]])
    mask = mask_from_ids(input_ids, ids)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[i in wanted for i in row] for row in input_ids.tolist()]


@settings(max_examples=40, deadline=None)
@given(
    spans=st.lists(
        st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)).map(sorted), max_size=3),
        min_size=1,
        max_size=3,
    )
)
def test_the_forms_of_spans_agree_with_a_loop(spans):
    expected = [
        [any(start <= position < end for start, end in row) for position in range(7)]
        for row in spans
    ]
    triples = [(row, start, end) for row, found in enumerate(spans) for start, end in found]
    tensor = torch.tensor(triples, dtype=torch.long).view(-1, 3)
    assert mask_from_spans(spans, length=7).tolist() == expected
    assert mask_from_spans(triples, length=7, batch=len(spans)).tolist() == expected
    assert mask_from_spans(tensor, length=7, batch=len(spans)).tolist() == expected


def test_embeddings_are_compared_in_all_features():
    table = torch.randn(9, 4)
    ids = torch.tensor([[1, 8, 8, 2], [8, 3, 4, 8]])
    embeds = table[ids]
    embeds[0, 0, :3] = table[8, :3]  # all but one feature
    assert torch.equal(mask_from_embeddings(embeds, table[8]), ids == 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mask_from_ids(torch.ones(3), 1), r"input_ids\[None\]"),
        (lambda: mask_from_spans([(0, 1, 2)], length=4), "batch: expected their number"),
        (lambda: mask_from_spans([], length=4), "batch: expected their number"),
        (lambda: mask_from_spans([[(0, 1)]], length=4, batch=2), "batch: expected 1"),
        (lambda: mask_from_spans([[(0, 5)]], length=4), r"got \(0, 5\) in sequence 0"),
        (lambda: mask_from_spans([(2, 0, 1)], length=4, batch=2), "in sequence 2"),
        (lambda: mask_from_spans([[(3, 2)]], length=4), r"got \(3, 2\)"),
        (lambda: mask_from_spans([[(1, 2, 3)]], length=4), r"\(start, end\) in the list"),
        (lambda: mask_from_spans([(0, 2), (1, 3)], length=4), r"\(start, end\) in the list"),
        (lambda: mask_from_embeddings(torch.ones(2, 3), torch.ones(3)), "placeholder of"),
        (lambda: mask_from_embeddings(torch.ones(2, 3, 4), torch.ones(3)), "placeholder of"),
    ],
)
def test_what_does_not_fit_raises(call, message):
    with pytest.raises(ValueError, match=message):
        call()
