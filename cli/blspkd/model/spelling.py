"""Tokens by their letters: what is spelled alike mostly sounds alike, and gets near vectors.

An adapter that scores tokens by the language model's embeddings alone has to learn each word's
sound by itself, because those embeddings say what a word means. With the spelling beside them, a
word that training seldom spoke is found by letters that other words taught.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

WORD_STARTS = ("\u0120", "\u2581")
"""How byte-level and SentencePiece vocabularies write the space before a word."""
FROM_START, FROM_END = 12, 4
"""How many letters count by their place, from either end."""
LESS = 0.7
"""Weight of what repeats the letters from the start: letters from the end, and pairs of letters."""
RARE, MOST = 8, 2000
"""Features of fewer tokens are left out, and so are all but so many of the commonest."""


def spelling_codes(tokens: Sequence[str], width: int) -> Tensor:
    """One unit vector for each token, near those of tokens that are spelled alike.

    The features of a spelling are: which letter stands where from the start and from the end, each
    pair of neighbours, the length, capitals, and whether a word begins. The vectors are the first
    principal components of all tokens' features.

    Args:
        tokens: the vocabulary as the tokenizer keeps it (``convert_ids_to_tokens``), in order.
        width: W, how many components.

    Returns:
        (V, W) float32. Signs and the order of components that explain equally much are the linear
        algebra library's choice: keep the codes that a model was trained with.

    Raises:
        ValueError: if the vocabulary has fewer features than ``width``.
    """
    spelled = [dict(_features(token)) for token in tokens]
    counts = Counter(feature for features in spelled for feature in features)
    common = [feature for feature, count in counts.most_common(MOST) if count >= RARE]
    if len(common) < width:
        raise ValueError(
            f"the spellings of {len(tokens)} tokens have {len(common)} common features: "
            f"token_spelling must be at most that, got {width}"
        )
    column = {feature: number for number, feature in enumerate(common)}
    found = [
        (row, column[feature], weight)
        for row, features in enumerate(spelled)
        for feature, weight in features.items()
        if feature in column
    ]
    rows, columns, weights = zip(*found, strict=True)
    table = torch.sparse_coo_tensor(
        torch.tensor([rows, columns]),
        torch.tensor(weights),
        (len(tokens), len(common)),
        check_invariants=True,
    ).coalesce()
    mean = torch.sparse.sum(table, dim=0).to_dense() / len(tokens)
    products = torch.zeros(len(common), len(common))
    for part in torch.arange(len(tokens)).split(8192):
        dense = table.index_select(0, part).to_dense()
        products += dense.T @ dense / len(tokens)
    components = torch.linalg.eigh(products - mean.outer(mean)).eigenvectors[:, -width:]
    return F.normalize(torch.sparse.mm(table, components) - mean @ components, dim=-1)


def _features(token: str) -> Iterator[tuple[str, float]]:
    begins = token.startswith(WORD_STARTS)
    written = token[1:] if begins else token
    letters = written.lower()
    yield f"begins {begins}", 1.0
    yield f"capitals {letters != written}", 1.0
    yield f"length {min(len(letters), FROM_START)}", 1.0
    for place, letter in enumerate(letters[:FROM_START]):
        yield f"start {place} {letter}", 1.0
    for place, letter in enumerate(reversed(letters[-FROM_END:])):
        yield f"end {place} {letter}", LESS
    for first, second in pairwise(letters):
        yield f"pair {first}{second}", LESS
