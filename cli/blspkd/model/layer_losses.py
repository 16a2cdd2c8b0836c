"""Losses at one of the language model's early layers: as cheap as the layers up to it.

Shapes: B batch, S spliced length, H width, V vocabulary.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from kd_losses import hidden_cosine_loss, hidden_mse_loss

from .objective import Objective, Pass, kl_loss


def layer_hidden_loss(student: Pass, teacher: Pass, objective: Objective) -> Tensor:
    """Summed distance over the utterance between the outputs of the objective's layer.

    Args:
        student: with its ``layer_output``.
        teacher: likewise; the student's i-th speech position is held against its i-th.
        objective: names the distance.
    """
    assert student.layer_output is not None
    assert teacher.layer_output is not None
    distance = hidden_cosine_loss if objective.layer_distance == "cosine" else hidden_mse_loss
    return distance(
        student.layer_output,
        teacher.layer_output,
        mask=student.speech_mask,
        teacher_mask=teacher.speech_mask,
        reduction="sum",
    )


def layer_kl_loss(student: Pass, teacher: Pass, head: Tensor, objective: Objective) -> Tensor:
    """Summed KL(teacher || student) over the utterance, of what the head reads from that layer.

    Args:
        student: with its ``layer_readout``.
        teacher: likewise.
        head: (V, H), the language model's.
        objective: its temperature counts here too.
    """
    return kl_loss(_at_layer(student), _at_layer(teacher), head, objective, on="input")


def _at_layer(one: Pass) -> Pass:
    assert one.layer_readout is not None
    return dataclasses.replace(one, hidden_states=one.layer_readout)
