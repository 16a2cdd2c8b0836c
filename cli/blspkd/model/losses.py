"""From a pass over speech and a pass over text to the losses between them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from speech_adapters import AdapterOutput

from .layer_losses import layer_hidden_loss, layer_kl_loss
from .objective import (
    Objective,
    Pass,
    alignment_loss,
    kl_loss,
    paired,
    quantity_loss,
    response_ce_loss,
    token_loss,
)


@dataclass
class BlspKDOutput:
    """What a training or evaluation pass yields.

    Attributes:
        loss: scalar, the weighted sum of ``losses``; None without loss weights.
        losses: each active loss, averaged over its items, detached.
        adapter: what the adapter made of the speech.
        speech_vectors: (B, N, W), the adapter's outputs before any soft embedding.
        student: the pass that read speech; None if no active loss needs it.
        teacher: the pass that read text, without gradients; None likewise.
    """

    loss: Tensor | None
    losses: dict[str, Tensor]
    adapter: AdapterOutput
    speech_vectors: Tensor
    student: Pass | None
    teacher: Pass | None


def loss_sums(
    output: BlspKDOutput,
    objective: Objective,
    *,
    token_ids: Tensor,
    speech_mask: Tensor,
    free_running: Tensor | None,
    token_ends: Tensor | None,
    token_keys: Tensor | None,
    head_weight: Tensor,
    token_scale: float,
) -> dict[str, Tensor]:
    """Each active loss, summed over its items.

    Args:
        output: of the two passes.
        objective: which losses.
        token_ids: (B, L) int64, the text.
        speech_mask: (B, L) bool, True on the transcript.
        free_running: (B,) bool, rows whose speech is not cut at the text's length, or None.
        token_ends: (B, N), where each text token ends, in encoder frames, or None.
        token_keys: (V, W), what the token loss compares (n, W) speech vectors with; None where
            that loss does not count.
        head_weight: (V, H), its head.
        token_scale: factor on cosines in the token loss.

    Raises:
        ValueError: if a loss needs one speech embedding per text token and there is none.
    """
    weights = objective.weights
    adapter, student, teacher = output.adapter, output.student, output.teacher
    sums: dict[str, Tensor] = {}
    if weights.pairs_tokens and adapter.alpha_sum is None:
        raise ValueError(
            "the token, input_kl and layer losses need one speech embedding per text token, which "
            "this adapter does not give: set their weights to 0, or adapter_type to cformer"
        )
    if weights.token > 0:
        assert token_keys is not None
        sums["token"] = token_loss(
            output.speech_vectors[paired(adapter.attention_mask, free_running)],
            token_ids[paired(speech_mask, free_running)],
            token_keys,
            token_scale,
        )
    if weights.input_kl > 0:
        assert student is not None
        assert teacher is not None
        sums["input_kl"] = kl_loss(student, teacher, head_weight, objective, on="input")
    if weights.response_kl > 0:
        assert student is not None
        assert teacher is not None
        sums["response_kl"] = kl_loss(student, teacher, head_weight, objective, on="response")
    if weights.response_ce > 0:
        assert student is not None
        sums["response_ce"] = response_ce_loss(student, head_weight)
    if weights.reads_early_layer:
        assert student is not None
        assert teacher is not None
        if weights.layer_hidden > 0:
            sums["layer_hidden"] = layer_hidden_loss(student, teacher, objective)
        if weights.layer_kl > 0:
            sums["layer_kl"] = layer_kl_loss(student, teacher, head_weight, objective)
    if weights.quantity > 0 and adapter.alpha_sum is not None:
        sums["quantity"] = quantity_loss(adapter.alpha_sum, speech_mask.sum(dim=1))
    if weights.alignment > 0:
        sums["alignment"] = _alignment_sum(adapter, token_ends, speech_mask.sum(dim=1))
    return sums


def _alignment_sum(
    adapter: AdapterOutput, token_ends: Tensor | None, token_counts: Tensor
) -> Tensor:
    if adapter.alphas is None:
        raise ValueError(
            "the alignment loss needs the weights of a CIF, which this adapter has none of: set "
            "losses.alignment to 0, or adapter_type to cformer"
        )
    if token_ends is None:
        raise ValueError("the alignment loss needs token_ends, where each text token ends")
    ends = token_ends / adapter.frames_per_alpha
    return alignment_loss(adapter.alphas, ends, token_counts, adapter.threshold)
