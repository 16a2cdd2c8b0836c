"""The losses of BLSP-KD, each computed only if it weighs something.

Shapes: B batch, S spliced length, L text length, N tokens, H width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from kd_losses import (
    cif_alignment_loss,
    cif_quantity_loss,
    linear_cross_entropy,
    linear_kl_div,
    response_mask,
)

from .passes import Depth, Reading

LayerDistance = Literal["cosine", "mse"]
LOSS_NAMES = (
    "token",
    "input_kl",
    "response_kl",
    "response_ce",
    "layer_hidden",
    "layer_kl",
    "quantity",
    "alignment",
)


@dataclass(frozen=True)
class LossWeights:
    """How much each loss weighs. The defaults are the paper's (arXiv 2405.19041, sec. 3.3).

    Attributes:
        token: cross entropy of each speech token against its text token, through the language
            model's own embeddings (not in the paper; it bootstraps the alignment).
        input_kl: KL between the distributions after the i-th text and the i-th speech token.
        response_kl: KL between the distributions over each token of the response.
        response_ce: cross entropy of the response; the baseline that KL replaces.
        layer_hidden: distance between the hidden states of the i-th text and the i-th speech token
            after one layer of the language model.
        layer_kl: KL as in ``input_kl``, but between what the head reads from that layer.
        quantity: |sum of CIF weights / number of text tokens - 1|.
        alignment: |CIF weight in a token's stretch of the clip - 1|, by an alignment made
            beforehand (not in the paper).
    """

    token: float = 0.0
    input_kl: float = 1.0
    response_kl: float = 1.0
    response_ce: float = 0.0
    layer_hidden: float = 0.0
    layer_kl: float = 0.0
    quantity: float = 1.0
    alignment: float = 0.0

    def __post_init__(self) -> None:
        """Refuse weights that are negative or no number."""
        for field in fields(self):
            if not getattr(self, field.name) >= 0:
                raise ValueError(
                    f"loss weight {field.name} must be >= 0, got {getattr(self, field.name)}"
                )

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the losses that weigh something."""
        return tuple(name for name in LOSS_NAMES if getattr(self, name) > 0)

    @property
    def reads_language_model(self) -> bool:
        """Whether any loss needs the language model's layers, not only its embeddings."""
        return self.reads_last_layer or self.reads_early_layer

    @property
    def reads_last_layer(self) -> bool:
        """Whether any loss needs all of the language model's layers."""
        return self.input_kl > 0 or self.reads_response

    @property
    def reads_early_layer(self) -> bool:
        """Whether any loss needs the output of the one layer that the objective names."""
        return self.layer_hidden > 0 or self.layer_kl > 0

    @property
    def reads_teacher(self) -> bool:
        """Whether any loss needs the pass over text."""
        return self.input_kl > 0 or self.response_kl > 0 or self.reads_early_layer

    @property
    def pairs_tokens(self) -> bool:
        """Whether any loss needs one speech embedding per text token."""
        return self.token > 0 or self.input_kl > 0 or self.reads_early_layer

    @property
    def reads_response(self) -> bool:
        """Whether any loss needs the response."""
        return self.response_kl > 0 or self.response_ce > 0


def paired(mask: Tensor, free_running: Tensor | None) -> Tensor:
    """A mask (B, S) without the rows, (B,) bool, whose speech is not cut at the text's length."""
    return mask if free_running is None else mask & ~free_running[:, None]


def loss_items(
    speech_mask: Tensor, labels: Tensor, free_running: Tensor | None = None
) -> dict[str, Tensor]:
    """How many items each loss averages over in a batch: scalars, int64.

    Args:
        speech_mask: (B, L) bool, True on transcript tokens.
        labels: (B, L) int64, -100 except on the response.
        free_running: (B,) bool, rows that the losses between pairs of tokens leave out, or None.
    """
    tokens = paired(speech_mask, free_running).sum()
    responses = response_mask(labels).sum()
    clips = torch.tensor(speech_mask.shape[0], device=speech_mask.device)
    return {
        "token": tokens,
        "input_kl": tokens,
        "response_kl": responses,
        "response_ce": responses,
        "layer_hidden": tokens,
        "layer_kl": tokens,
        "quantity": clips,
        "alignment": speech_mask.sum(),
    }


@dataclass(frozen=True)
class Objective:
    """What a pass is judged by.

    Attributes:
        weights: of the losses.
        temperature: of both distributions in the KL losses (2 in the authors' code).
        scale_by_temperature_squared: multiply the KL losses by the temperature squared.
        layer: of the language model, from 1, after which the layer losses compare.
        layer_distance: "cosine" (one minus it) or "mse", of ``layer_hidden``.
    """

    weights: LossWeights
    temperature: float = 1.0
    scale_by_temperature_squared: bool = False
    layer: int = 1
    layer_distance: LayerDistance = "cosine"

    def __post_init__(self) -> None:
        """Refuse temperatures that are no temperature, and layers that are no layer."""
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if self.layer < 1:
            raise ValueError(f"layer: expected 1 for the first layer or more, got {self.layer}")
        if self.layer_distance not in get_args(LayerDistance):
            raise ValueError(
                f"layer_distance: expected one of {', '.join(get_args(LayerDistance))}, got "
                f"{self.layer_distance!r}"
            )

    @property
    def depth(self) -> Depth:
        """How far into the language model the losses look."""
        if not self.weights.reads_early_layer:
            return Depth()
        return Depth(self.layer, stop=not self.weights.reads_last_layer)


@dataclass(frozen=True)
class Pass:
    """One pass through the language model.

    Attributes:
        hidden_states: (B, S, H), what its head would read after the last layer that was run.
        speech_mask: (B, S) bool, True on the tokens that stand for the utterance, where each has
            its counterpart in the other pass.
        labels: (B, S) int64, -100 except on the response.
        layer_output: (B, S, H), the output of the objective's layer, if a loss needs it.
        layer_readout: (B, S, H), what the head would read from it.
    """

    hidden_states: Tensor
    speech_mask: Tensor
    labels: Tensor
    layer_output: Tensor | None = None
    layer_readout: Tensor | None = None

    @classmethod
    def of(cls, reading: Reading, speech_mask: Tensor, labels: Tensor) -> Pass:
        """The pass whose hidden states these are."""
        return cls(reading.last, speech_mask, labels, reading.layer_output, reading.layer_readout)


def token_loss(speech_vectors: Tensor, token_ids: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Summed cross entropy of each speech vector against its token, by scaled cosine.

    Args:
        speech_vectors: (n, W).
        token_ids: (n,) int64.
        keys: (V, W) unit rows, frozen; the products are computed in their dtype.
        scale: factor on the cosine.
    """
    queries = F.normalize(speech_vectors.float(), dim=-1) * scale
    return linear_cross_entropy(
        queries.to(keys.dtype),
        keys,
        token_ids,
        reduction="sum",
    )


def kl_loss(
    student: Pass,
    teacher: Pass,
    head: Tensor,
    objective: Objective,
    *,
    on: Literal["input", "response"],
) -> Tensor:
    """Summed KL(teacher || student) over the utterance or over the response."""

    def selected(one: Pass) -> Tensor:
        return one.speech_mask if on == "input" else response_mask(one.labels)

    return linear_kl_div(
        student.hidden_states,
        head,
        teacher.hidden_states,
        mask=selected(student),
        teacher_mask=selected(teacher),
        temperature=objective.temperature,
        scale_by_temperature_squared=objective.scale_by_temperature_squared,
        reduction="sum",
    )


def response_ce_loss(student: Pass, head: Tensor) -> Tensor:
    """Summed cross entropy of the response under the student."""
    mask = response_mask(student.labels)
    targets = student.labels[:, 1:][mask[:, :-1]]
    return linear_cross_entropy(student.hidden_states[mask], head, targets, reduction="sum")


def quantity_loss(alpha_sum: Tensor, token_counts: Tensor) -> Tensor:
    """Summed |sum(alpha) / N - 1| over the clips (arXiv 1905.11235, eq. 6, made relative)."""
    return cif_quantity_loss(alpha_sum, token_counts, reduction="sum")


def alignment_loss(
    alphas: Tensor, token_ends: Tensor, token_counts: Tensor, threshold: float
) -> Tensor:
    """Summed |CIF weight in a token's stretch of the clip / threshold - 1| over the tokens."""
    return cif_alignment_loss(
        alphas, token_ends, token_counts, threshold=threshold, reduction="sum"
    )
