"""Continuous integrate-and-fire as a layer.

Shapes: B batch, T frames, N tokens, D width.
"""

from __future__ import annotations

import math
from typing import cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cif.backends import Backend
from cif.context import with_neighbours
from cif.functional import CIFOutput, cif
from cif.heads import (
    AlphaHead,
    alphas_from_logits,
    conv_logits,
    last_channel_logits,
    mlp_logits,
)
from cif.prefix import Tail
from cif.streaming import CIFState, cif_stream
from cif.validation import check_alphas, check_options


class CIF(nn.Module):
    """Predict how much of a token each frame carries, integrate, and project.

    With `alpha_head="last_channel"`, alpha is the sigmoid of the last channel and the other D - 1
    channels are integrated and projected, the layout of arXiv 2405.19041 and of CIF's own paper
    (arXiv 1905.11235, where a window of frames predicts alpha; here the layers below see to that).
    With "conv", a convolution over a few frames, a ReLU and one linear unit predict alpha, and with
    "mlp" a linear layer, a GELU and one linear unit, frame by frame; then all D channels are
    integrated.

    Args:
        hidden_size: D, at least 2 for "last_channel".
        alpha_head: "last_channel", "conv" or "mlp".
        threshold: as for `cif.cif`.
        tail: as for `cif.cif`.
        tail_threshold: as for `cif.cif`.
        output_size: width of the output; None for `hidden_size`.
        kernel_size: frames that the convolution of "conv" sees, odd.
        alpha_noise: standard deviation of the Gaussian noise added to the logits of alpha, in
            training mode only, see `cif.heads.alphas_from_logits`; drawn from torch's global
            generator. 0 adds none.
        backend: as for `cif.cif`.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        alpha_head: AlphaHead = "last_channel",
        threshold: float = 1.0,
        tail: Tail = "round",
        tail_threshold: float = 0.5,
        output_size: int | None = None,
        kernel_size: int = 3,
        alpha_noise: float = 0.0,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if alpha_head not in get_args(AlphaHead):
            raise ValueError(
                f"alpha_head: expected one of {', '.join(get_args(AlphaHead))}, got {alpha_head!r}"
            )
        least = 2 if alpha_head == "last_channel" else 1
        if hidden_size < least:
            raise ValueError(
                f"hidden_size: expected at least {least} for {alpha_head}, got {hidden_size}"
            )
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(
                f"kernel_size: expected an odd number of frames, so that the output keeps its "
                f"length, got {kernel_size}"
            )
        if output_size is not None and output_size < 1:
            raise ValueError(f"output_size: expected at least 1 or None, got {output_size}")
        if not 0 <= alpha_noise < math.inf:
            raise ValueError(
                f"alpha_noise: expected a standard deviation of at least 0, got {alpha_noise}"
            )
        check_options(threshold, tail, tail_threshold, None, backend)
        self.hidden_size = hidden_size
        self.alpha_head = alpha_head
        self.threshold = threshold
        self.tail = tail
        self.tail_threshold = tail_threshold
        self.output_size = hidden_size if output_size is None else output_size
        self.alpha_noise = alpha_noise
        self.backend = backend
        integrated = hidden_size - 1 if alpha_head == "last_channel" else hidden_size
        self.projection = nn.Linear(integrated, self.output_size)
        if alpha_head == "conv":
            self.alpha_conv = nn.Conv1d(
                hidden_size, hidden_size, kernel_size, padding=kernel_size // 2
            )
            self.alpha_linear = nn.Linear(hidden_size, 1)
        elif alpha_head == "mlp":
            self.alpha_hidden = nn.Linear(hidden_size, hidden_size)
            self.alpha_linear = nn.Linear(hidden_size, 1)

    @property
    def alpha_context(self) -> int:
        """Frames on either side that the weight of a frame depends on."""
        return self.alpha_conv.kernel_size[0] // 2 if self.alpha_head == "conv" else 0

    def extra_repr(self) -> str:
        """Return the options that are not visible in the submodules."""
        return (
            f"{self.hidden_size}, output_size={self.output_size}, alpha_head={self.alpha_head!r}, "
            f"threshold={self.threshold}, tail={self.tail!r}"
        )

    def predict_alphas(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Predict the firing weights.

        Args:
            hidden_states: (B, T, D) float.
            attention_mask: (B, T) bool or integer, nonzero at real frames.

        Returns:
            (B, T) float32 in [0, 1] (float64 for float64 input), 0 at masked frames.
        """
        frame_mask = None if attention_mask is None else attention_mask.bool()
        if frame_mask is not None and self.alpha_head != "last_channel":
            # What stands in padding reaches neither a real frame nor a parameter's gradient.
            hidden_states = torch.where(frame_mask[..., None], hidden_states, 0.0)
        context = self.alpha_context
        if context:
            hidden_states = F.pad(hidden_states, (0, 0, context, context))
        logits = self.alpha_logits(hidden_states)
        noise = self.alpha_noise if self.training else 0.0
        return alphas_from_logits(logits, frame_mask, noise=noise)

    def alpha_logits(self, padded: Tensor) -> Tensor:
        """Apply the head to frames that bring their neighbours along, without mask or noise.

        Args:
            padded: (B, C + T + C, D) float, C = `alpha_context`: the frames with their neighbours,
                zeros where there are none (beyond the ends of the row, and in padding).

        Returns:
            (B, T), what alpha is the sigmoid of.
        """
        if padded.shape[1] <= 2 * self.alpha_context:
            # No frame at all, which a convolution refuses.
            return padded[:, :0, 0]
        if self.alpha_head == "last_channel":
            return last_channel_logits(padded)
        if self.alpha_head == "conv":
            return conv_logits(padded, self.alpha_conv, self.alpha_linear)
        return mlp_logits(padded, self.alpha_hidden, self.alpha_linear)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        target_lengths: Tensor | None = None,
        max_tokens: int | None = None,
    ) -> CIFOutput:
        """Turn frames into tokens.

        Args:
            hidden_states: (B, T, D) float.
            attention_mask: (B, T) bool or integer, nonzero at real frames.
            target_lengths: (B,) integer, the tokens to fire in training; None at inference.
            max_tokens: N, see `cif.cif`.

        Returns:
            The output of `cif.cif` with `hidden_states` (B, N, output_size), zeros past the row's
            length, and with `alphas`.
        """
        self._check(hidden_states, attention_mask)
        alphas = self.predict_alphas(hidden_states, attention_mask)
        out = cif(
            hidden_states,
            alphas,
            attention_mask=attention_mask,
            target_lengths=target_lengths,
            threshold=self.threshold,
            tail=self.tail,
            tail_threshold=self.tail_threshold,
            max_tokens=max_tokens,
            backend=self.backend,
        )
        return self._projected(out)._replace(alphas=alphas)

    @torch.no_grad()
    def stream(
        self,
        hidden_states: Tensor,
        state: CIFState | None = None,
        *,
        attention_mask: Tensor | None = None,
        tail: Tail | None = None,
        final: bool = False,
        max_tokens: int | None = None,
    ) -> tuple[CIFOutput, CIFState]:
        """Turn the next frames of a batch of streams into tokens; for inference, without gradients.

        However a row is cut into chunks, together they give what `forward` gives for the whole row
        under the same tail rule, up to the rounding of the alpha head. The convolution of "conv"
        waits for the frames on the right of a frame: with it, tokens come `alpha_context` frames
        later. No noise is added to alpha.

        Args:
            hidden_states: (B, T, D) float, the next T frames; T may be 0.
            state: what the last call returned; None at the start.
            attention_mask: (B, T) bool or integer, nonzero at real frames. A row that has ended,
                while others have not, goes on with masked frames.
            tail: "threshold", "drop" or "keep"; None for the layer's own. A stream cannot do
                "round", and a layer made with that needs one of the others here.
            final: these are the last frames of all rows; a chunk of 0 frames will do.
            max_tokens: N, see `cif.cif_stream`.

        Returns:
            What `cif.cif_stream` returns, the tokens projected, with the `alphas` of the frames
            that were integrated.
        """
        self._check(hidden_states, attention_mask)
        ready = with_neighbours(
            hidden_states,
            attention_mask,
            None if state is None else state.context,
            None if state is None else state.context_mask,
            reach=self.alpha_context,
            final=final,
        )
        frames = ready.hidden_states
        alphas = alphas_from_logits(self.alpha_logits(ready.padded), ready.frame_mask)
        out, state = cif_stream(
            frames,
            alphas,
            state,
            attention_mask=ready.frame_mask,
            threshold=self.threshold,
            tail=self.tail if tail is None else tail,
            tail_threshold=self.tail_threshold,
            final=final,
            max_tokens=max_tokens,
            backend=self.backend,
        )
        if not final:
            state = state._replace(context=ready.context, context_mask=ready.context_mask)
        return self._projected(out)._replace(alphas=alphas), state

    def _projected(self, out: CIFOutput) -> CIFOutput:
        # Cutting the channel off the N tokens instead of the T frames saves a copy of the frames.
        integrated = out.hidden_states[..., : self.projection.in_features]
        hidden = cast(Tensor, self.projection(integrated))
        hidden = hidden.masked_fill(~out.attention_mask[..., None], 0.0)
        return out._replace(hidden_states=hidden)

    def _check(self, hidden_states: Tensor, attention_mask: Tensor | None) -> None:
        if hidden_states.dim() != 3 or hidden_states.shape[-1] != self.hidden_size:
            raise ValueError(
                f"hidden_states: expected shape (B, T, {self.hidden_size}), "
                f"got {tuple(hidden_states.shape)}"
            )
        check_alphas(hidden_states[..., 0], attention_mask, None)
