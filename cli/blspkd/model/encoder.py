"""Whisper's encoder on clips of any length up to its window.

Shapes: B batch, M mel bins, F mel frames (100 Hz), T encoder frames (50 Hz), D encoder width.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.whisper.modeling_whisper import WhisperEncoder


class SpeechEncoder(nn.Module):
    """Runs a stock :class:`WhisperEncoder` on the real frames of each clip alone.

    The stock module insists on 30 s of input and attends to its padding. Here padding is zeroed
    before each convolution and masked in each attention, so that a clip's output is the same in
    any batch. With ``full_window`` the clips must come padded to the whole window and are encoded
    as the stock module does it, padding included.

    Args:
        encoder: the pretrained encoder; its modules are used as they are.
        full_window: encode the padding too, as Whisper was trained.
    """

    def __init__(self, encoder: WhisperEncoder, *, full_window: bool = False) -> None:
        super().__init__()
        self.encoder = encoder
        self.full_window = full_window

    @property
    def window(self) -> int:
        """The most mel frames that the encoder's positions reach (3,000, or 30 s)."""
        return 2 * int(self.encoder.embed_positions.num_embeddings)

    def forward(self, input_features: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Encode.

        Args:
            input_features: (B, M, F) log-mel features, right-padded.
            attention_mask: (B, F) bool or int, True on real mel frames.

        Returns:
            (B, T, D) in the encoder's dtype and its (B, T) bool mask; T = ceil(F / 2), or with
            ``full_window`` the longest real length. Values on padding are unspecified.
        """
        frames = input_features.shape[-1]
        if frames > self.window:
            raise ValueError(
                f"input_features has {frames} mel frames, the encoder's window is {self.window} "
                f"({self.window / 100:.0f} s): split the audio into shorter clips"
            )
        mask = attention_mask.bool()
        if self.full_window:
            if frames != self.window:
                raise ValueError(
                    f"full_window expects {self.window} mel frames, got {frames}: pad to the window"
                )
            hidden = self.encoder(input_features.to(self.encoder.dtype)).last_hidden_state
            mask = mask[:, ::2]
            longest = int(mask.sum(dim=1).max())
            return hidden[:, :longest], mask[:, :longest]
        return self._encode(input_features.to(self.encoder.dtype), mask)

    def _encode(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        encoder = self.encoder
        x = F.gelu(encoder.conv1(features.masked_fill(~mask[:, None, :], 0.0)))
        x = F.gelu(encoder.conv2(x.masked_fill(~mask[:, None, :], 0.0)))
        mask = mask[:, ::2]
        x = x.transpose(1, 2) + encoder.embed_positions.weight[: x.shape[-1]]
        x = F.dropout(x, p=encoder.dropout, training=encoder.training)
        attention = create_bidirectional_mask(
            config=encoder.config, inputs_embeds=x, attention_mask=mask.long()
        )
        for layer in encoder.layers:
            output = layer(x, attention_mask=attention)
            x = output[0] if isinstance(output, tuple) else output
        return encoder.layer_norm(x), mask
