"""The calling conventions of other CIF implementations, computed by `cif.cif`.

Each function takes and returns what its peer does, so that one line of a model changes. Where a
peer's result is wrong, ours differs, and the function says so.

Shapes: B batch, T frames, N tokens, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cif.functional import cif
from cif.prefix import FRACTION_BITS, ONE, Tail, fixed_point_prefix, row_totals, scale_prefix


def torch_cif(
    inputs: Tensor,
    alpha: Tensor,
    beta: float = 1.0,
    tail_thres: float = 0.5,
    padding_mask: Tensor | None = None,
    target_lengths: Tensor | None = None,
    eps: float = 1e-4,
    unbound_alpha: bool = False,
) -> dict[str, list[Tensor]]:
    """Integrate with the arguments and the outputs of torch-cif 0.2.0's `cif_function`.

    It differs where target lengths are given: torch-cif scales alpha to a sum of
    beta * N + eps, this to beta * N; it leaves a rest of weight eps in the rows after the last
    token of the shorter rows, here those are zero; a row without any weight makes it fail, here the
    row is zeros. Without target lengths, torch-cif multiplies the rest that it fires by a constant,
    through which no gradient flows, and leaves the delay of that token unscaled; here the gradient
    is that of the output, and the delay is the mean position of the token's weights.

    Args:
        inputs: (B, T, D) float.
        alpha: (B, T) float, at least 0.
        beta: the threshold.
        tail_thres: the smallest rest that fires without target lengths, as a sum of alpha, above 0.
        padding_mask: (B, T) bool or integer, nonzero at padding, which may stand on either side.
        target_lengths: (B,) integer, the tokens each row fires.
        eps: accepted, not used: nothing needs it.
        unbound_alpha: accepted, not used: values are not checked, alpha above 1 is allowed, and
            negative alpha counts as 0.

    Returns:
        Lists of one tensor each, as torch-cif returns them. "cif_out": (B, N, D) in the dtype of
        inputs. "cif_lengths": (B,) int64. "alpha_sum": (B,), unscaled, differentiable, for the
        quantity loss. "delays": (B, N), the mean 1-based position of the frames of each token,
        differentiable, for latency losses. "tail_weights": (B,), the rest after the last whole
        token, differentiable; an empty list with target lengths. "scaled_alpha": (B, T), summing to
        beta * N where target lengths are given, differentiable. Not differentiable, in float32:
        "cumsum_alpha": (B, T), its running sum; "right_indices", "left_indices": (B, T), the token
        open when the frame ends and begins; "right_weights", "left_weights": (B, T), the parts of
        the frame that go there, the right one 0 where nothing fires.

    Raises:
        TypeError: a tensor has a dtype of the wrong kind.
        ValueError: shapes or devices do not fit, or an option is out of range.
    """
    if tail_thres <= 0:
        raise ValueError(
            f"tail_thres: expected above 0, got {tail_thres}; to fire every rest as it is, call "
            'cif.cif with tail="keep"'
        )
    mask = None if padding_mask is None else ~padding_mask.bool()
    part = tail_thres / beta if beta > 0 else 1.0  # cif refuses such a threshold
    # A rest is below one token, so a higher bar is never met.
    tail: Tail = "threshold" if part <= 1 else "drop"
    tail_threshold = min(part, 1.0)

    def integrate(frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = cif(
            frames,
            alpha,
            attention_mask=mask,
            target_lengths=target_lengths,
            threshold=beta,
            tail=tail,
            tail_threshold=tail_threshold,
        )
        return out.hidden_states, out.lengths, out.alpha_sum

    tokens, lengths, alpha_sum = integrate(inputs)
    positions = torch.arange(1, alpha.shape[1] + 1, device=alpha.device, dtype=torch.float32)
    delays = integrate(positions.expand_as(alpha)[..., None])[0].squeeze(-1) / beta

    weights = _masked(alpha, mask, alpha_sum)
    prefix = fixed_point_prefix(weights.detach(), beta)
    if target_lengths is None:
        totals = row_totals(prefix)
        rest = (totals % ONE).double() / ONE * beta
        tails = [(rest + (alpha_sum - alpha_sum.detach())).to(inputs.dtype)]
        counts = totals >> FRACTION_BITS
    else:
        counts = target_lengths.to(prefix.device, torch.int64)
        prefix, tails = scale_prefix(prefix, counts), []
        scale = beta * counts / alpha_sum.where(alpha_sum > 0, 1.0)
        weights = weights * scale[:, None]
    right = (prefix >> FRACTION_BITS).clamp(max=_largest(counts))
    left = _before(right)
    level = prefix.double() / ONE * beta
    right_weights = torch.where(right > left, level - right * beta, 0.0)
    middle = (right - left - 1).clamp(min=0) * beta
    left_weights = level - _before(level) - right_weights - middle
    return {
        "cif_out": [tokens],
        "cif_lengths": [lengths],
        "alpha_sum": [alpha_sum.to(alpha.dtype)],
        "delays": [delays.to(inputs.dtype)],
        "tail_weights": tails,
        "scaled_alpha": [weights],
        "cumsum_alpha": [level.float()],
        "right_indices": [right],
        "right_weights": [right_weights.float()],
        "left_indices": [left],
        "left_weights": [left_weights.float()],
    }


def funasr_cif(
    hidden: Tensor, alphas: Tensor, threshold: float = 1.0, *, target_length: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Integrate as FunASR's `cif` and `cif_v1` (Paraformer, arXiv 2206.08317).

    In a subclass of its predictor, `cif_v1(hidden, alphas, self.threshold)` becomes
    `funasr_cif(hidden, alphas, self.threshold, target_length=target_length)`. Without the target
    length the float sum of the scaled alphas decides, which often ends just below N: then the last
    token is missing, as it is there.

    It differs where a frame completes several tokens (FunASR fires once per frame), and where the
    threshold is not 1: `cif` then still subtracts 1 and `cif_v1` ignores it; here a token takes
    `threshold`, as in FunASR's own `forward_chunk`.

    Args:
        hidden: (B, T, D) float.
        alphas: (B, T) float, at least 0, and 0 at padding.
        threshold: the sum of alphas that makes one token.
        target_length: (B,) integer or whole floats, the tokens each row fires in training.

    Returns:
        acoustic_embeds: (B, N, D), the whole tokens, zeros after them; N is the largest target
            length, or without them the largest sum of alphas, in tokens, rounded.
        fires: (B, T) float32, not differentiable: how full the open token is once the frame is
            added, before what has fired is taken off, so that `fires >= threshold` marks the frames
            in which a token is completed (FunASR's `cif_peak`, from which it takes timestamps).
    """
    if target_length is not None:
        counts = target_length.to(torch.int64)
        out = cif(hidden, alphas, target_lengths=counts, threshold=threshold, tail="drop")
        prefix = fixed_point_prefix(_masked(alphas, None, out.alpha_sum), threshold)
        return out.hidden_states, _fires(scale_prefix(prefix, counts), threshold)
    sums = (_sum(alphas) / threshold).round()
    out = cif(hidden, alphas, threshold=threshold, tail="drop", max_tokens=_largest(sums))
    prefix = fixed_point_prefix(_masked(alphas, None, out.alpha_sum), threshold)
    return out.hidden_states, _fires(prefix, threshold)


def funasr_predictor(
    hidden: Tensor,
    alphas: Tensor,
    mask: Tensor | None = None,
    target_length: Tensor | None = None,
    *,
    threshold: float = 1.0,
    tail_threshold: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Do what FunASR's `CifPredictorV2.forward` does once it has its alphas.

    In a subclass, everything from `token_num = alphas.sum(-1)` on becomes `return
    funasr_predictor(hidden, alphas, mask, target_length, threshold=self.threshold,
    tail_threshold=self.tail_threshold)`.

    Without target lengths, a frame of zeros with weight `tail_threshold` follows the last real one,
    so that a rest of at least `threshold - tail_threshold` fires, unscaled. FunASR puts the weight
    on the first frame of padding, whatever stands there, so that its last token depends on the
    padding; here it is zeros in every row. For the rest see `funasr_cif`.

    Args:
        hidden: (B, T, D) float.
        alphas: (B, T) float, at least 0.
        mask: (B, T) bool, integer or float, nonzero at real frames.
        target_length: (B,) integer or whole floats, the tokens each row fires in training.
        threshold: the sum of alphas that makes one token.
        tail_threshold: the weight that the end is given without target lengths; 0 gives none.

    Returns:
        acoustic_embeds: (B, N, D), the tokens, zeros after them.
        token_num: (B,), float32 at least, the sum of alphas, unscaled and differentiable, for the
            quantity loss; or the number of tokens, if the end was given weight.
        alphas: (B, T), scaled to the target lengths if there are any; or (B, T + 1) with the weight
            of the end.
        cif_peak: like alphas, `fires` of `funasr_cif`.
    """
    if mask is not None:
        alphas = torch.where(mask.bool(), alphas, 0.0)
    token_num = _sum(alphas)
    if target_length is not None:
        embeds, fires = funasr_cif(hidden, alphas, threshold, target_length=target_length)
        scale = threshold * target_length / token_num.where(token_num > 0, 1.0)
        return embeds, token_num, alphas * scale[:, None], fires
    if tail_threshold <= 0:
        embeds, fires = funasr_cif(hidden, alphas, threshold)
        return embeds, token_num, alphas, fires
    hidden, alphas = F.pad(hidden, (0, 0, 0, 1)), F.pad(alphas, (0, 1))
    position = torch.arange(alphas.shape[1], device=alphas.device)
    end = position[None, -1:].expand(len(alphas), 1)
    if mask is not None:
        real = F.pad(mask.bool(), (0, 1))
        hidden = torch.where(real[..., None], hidden, 0.0)
        end = ((position + 1) * real).amax(dim=1, keepdim=True)
    alphas = torch.where(position == end, tail_threshold, alphas)
    out = cif(hidden, alphas, threshold=threshold, tail="drop")
    prefix = fixed_point_prefix(_masked(alphas, None, out.alpha_sum), threshold)
    lengths = out.lengths.to(token_num.dtype)
    return out.hidden_states, lengths, alphas, _fires(prefix, threshold)


def blsp_cif(
    hidden_states: Tensor, alphas: Tensor, num_tokens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Integrate as BLSP-Emo's `CFormer.forward_cif` (arXiv 2406.03872), with threshold 1.

    It differs where rows of a batch fire several times in a frame, and where the float sum of the
    alphas ends below N; rows without any weight are zeros, not NaN.

    Args:
        hidden_states: (B, T, D) float.
        alphas: (B, T) float, at least 0, and 0 at padding; scaled or not, they are scaled here.
        num_tokens: (B,) integer, the tokens each row fires; None for the rounded sum of alphas. At
            least one token fires in either case.

    Returns:
        (B, N, D), the tokens, and (B, N) int64, 1 at tokens.
    """
    wanted = _sum(alphas).round() if num_tokens is None else num_tokens
    out = cif(hidden_states, alphas, target_lengths=wanted.to(torch.int64).clamp(min=1))
    return out.hidden_states, out.attention_mask.long()


def _masked(alpha: Tensor, mask: Tensor | None, alpha_sum: Tensor) -> Tensor:
    """Return the weights that `cif.cif` integrates, (B, T); 0 in rows that it made NaN."""
    alpha = alpha.to(alpha_sum.dtype).clamp(min=0.0)
    if mask is not None:
        alpha = torch.where(mask, alpha, 0.0)
    return torch.where(alpha_sum.isfinite()[:, None], alpha, 0.0)


def _sum(alphas: Tensor) -> Tensor:
    """Sum the alphas of each row, (B,), float32 at least: 8 bits do not count to 300."""
    return alphas.sum(dim=-1, dtype=torch.promote_types(alphas.dtype, torch.float32))


def _largest(counts: Tensor) -> int:
    """Return the largest count, 0 for a batch without rows."""
    return int(counts.max()) if counts.numel() else 0


def _fires(prefix: Tensor, threshold: float) -> Tensor:
    """Return how full the open token is after each frame, (B, T) float32, before it fires."""
    fired = _before(prefix) >> FRACTION_BITS << FRACTION_BITS
    return ((prefix - fired).double() / ONE * threshold).float()


def _before(values: Tensor) -> Tensor:
    """Return what stands one frame earlier, (B, T); 0 before the first."""
    return F.pad(values, (1, 0))[:, :-1]
