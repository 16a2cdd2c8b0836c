"""Distillation losses fused with a frozen language-model head."""

from kd_losses.alignment import cif_alignment_loss
from kd_losses.backends import Backend
from kd_losses.counts import global_num_items
from kd_losses.divergences import Divergence, divergence_with_logits, kl_div_with_logits
from kd_losses.fused_both import KLAndCrossEntropy, linear_kl_div_cross_entropy
from kd_losses.fused_cross_entropy import linear_cross_entropy
from kd_losses.fused_divergence import linear_divergence
from kd_losses.fused_kl import linear_kl_div
from kd_losses.fused_topk import linear_topk_kl_div
from kd_losses.hidden import hidden_cosine_loss, hidden_mse_loss
from kd_losses.modules import CIFQuantityLoss, LinearCrossEntropyLoss, LinearKLDivLoss
from kd_losses.quantity import cif_quantity_loss
from kd_losses.reduction import Reduction
from kd_losses.selection import response_mask

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "CIFQuantityLoss",
    "Divergence",
    "KLAndCrossEntropy",
    "LinearCrossEntropyLoss",
    "LinearKLDivLoss",
    "Reduction",
    "cif_alignment_loss",
    "cif_quantity_loss",
    "divergence_with_logits",
    "global_num_items",
    "hidden_cosine_loss",
    "hidden_mse_loss",
    "kl_div_with_logits",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_kl_div",
    "linear_kl_div_cross_entropy",
    "linear_topk_kl_div",
    "response_mask",
]
