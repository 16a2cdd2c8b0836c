"""CFormer: pre-CIF Transformer, CIF, post-CIF Transformer, projection (arXiv 2405.19041, sec. 3.2).

Shapes: B batch, T input frames, S stacked frames (T where nothing is stacked), N tokens, D input
width, H output width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from cif import CIF, CIFOutput

from .free_running import fire
from .inputs import checked_mask
from .output import AdapterOutput
from .transformer import Transformer


@dataclass(frozen=True)
class CFormerConfig:
    """Shape of a :class:`CFormer`; the defaults are the paper's.

    Attributes:
        input_size: D, the speech encoder's width.
        output_size: H, the language model's embedding width.
        hidden_size: width of the Transformers; the encoder's when None.
        num_pre_layers: Transformer layers before CIF.
        num_post_layers: Transformer layers after CIF.
        num_heads: attention heads of each layer.
        ffn_size: inner width of the feed-forward layers; four times ``hidden_size`` when None.
        dropout: in the Transformers.
        frame_stacking: how many successive frames become one before the first layer; 1 is the
            paper's, 4 brings Whisper's 50 Hz to 12.5 Hz.
        alpha_head: how CIF predicts its weights, see :class:`cif.CIF`.
        alpha_noise: standard deviation of the noise on their logits in training.
        threshold: CIF's firing threshold, beta.
        tail: what becomes of the residual when no length is given, see :func:`cif.cif`.
        output_rms: root mean square that the outputs have at initialisation; set it to that of the
            language model's embeddings. None leaves the projection's default initialisation.
    """

    input_size: int
    output_size: int
    hidden_size: int | None = None
    num_pre_layers: int = 4
    num_post_layers: int = 4
    num_heads: int = 8
    ffn_size: int | None = None
    dropout: float = 0.1
    frame_stacking: int = 1
    alpha_head: Literal["last_channel", "conv", "mlp"] = "last_channel"
    alpha_noise: float = 0.0
    threshold: float = 1.0
    tail: Literal["round", "threshold", "drop", "keep"] = "round"
    output_rms: float | None = None

    def __post_init__(self) -> None:
        """Refuse shapes that no CFormer can have."""
        for name in ("input_size", "output_size", "num_heads", "frame_stacking"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("hidden_size", "ffn_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 or None, got {value}")
        for name in ("num_pre_layers", "num_post_layers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        if self.output_rms is not None and self.output_rms <= 0:
            raise ValueError(f"output_rms must be positive or None, got {self.output_rms}")


class CFormer(nn.Module):
    """Speech-encoder frames in, one embedding per text token out.

    Example:
        >>> adapter = CFormer(CFormerConfig(input_size=512, output_size=576, num_pre_layers=1))
        >>> out = adapter(torch.randn(2, 100, 512), target_lengths=torch.tensor([7, 9]))
        >>> out.hidden_states.shape
        torch.Size([2, 9, 576])
    """

    def __init__(self, config: CFormerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size or config.input_size
        ffn_size = config.ffn_size or 4 * width
        self.input_projection: nn.Module = nn.Identity()
        if config.frame_stacking > 1 or width != config.input_size:
            self.input_projection = nn.Linear(config.frame_stacking * config.input_size, width)
        self.pre_cif = Transformer(
            config.num_pre_layers, width, config.num_heads, ffn_size, dropout=config.dropout
        )
        self.cif = CIF(
            width,
            alpha_head=config.alpha_head,
            alpha_noise=config.alpha_noise,
            threshold=config.threshold,
            tail=config.tail,
        )
        self.post_cif = Transformer(
            config.num_post_layers, width, config.num_heads, ffn_size, dropout=config.dropout
        )
        self.output_projection = nn.Linear(width, config.output_size)
        if config.output_rms is not None:
            # post_cif closes with a LayerNorm, so its rows have unit RMS
            nn.init.normal_(self.output_projection.weight, std=config.output_rms * width**-0.5)
            nn.init.zeros_(self.output_projection.bias)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        target_lengths: Tensor | None = None,
        max_tokens: int | None = None,
        free_running: Tensor | None = None,
    ) -> AdapterOutput:
        """Cut the frames into tokens.

        Args:
            hidden_states: (B, T, D), right-padded.
            attention_mask: (B, T) bool or int, True on real frames; None means all are real.
            target_lengths: (B,) int, how many tokens each row must fire (training); None lets the
                predicted weights decide (inference).
            max_tokens: N, when it is known: spares the device a synchronisation.
            free_running: (B,) bool, rows whose predicted weights decide the length although target
                lengths are given, so that some of the training meets inference's conditions.

        Returns:
            :class:`AdapterOutput` with every optional field set.

        Raises:
            ValueError: a shape does not fit the configuration.
        """
        frames, mask, last = self._read(hidden_states, attention_mask)
        fired = fire(
            self.cif,
            frames,
            mask,
            target_lengths=target_lengths,
            free_running=free_running,
            max_tokens=max_tokens,
        )
        return self._write(fired, last)

    def at_lengths(
        self, hidden_states: Tensor, attention_mask: Tensor | None, offsets: Iterable[int]
    ) -> list[AdapterOutput]:
        """The same clips at several numbers of tokens around the predicted ones.

        Args:
            hidden_states: (B, T, D), right-padded. They are read once.
            attention_mask: (B, T) bool or int, True on real frames; None means all are real.
            offsets: how many tokens more than predicted; negative for fewer, but never below one.

        Returns:
            One output for each offset, as :meth:`forward` gives it for such target lengths. A clip
            whose weights sum to 0 has no tokens in any of them. (For inference: in training mode
            each would draw dropout and ``alpha_noise`` of its own.)
        """
        frames, mask, last = self._read(hidden_states, attention_mask)
        predicted = self.cif(frames, mask).lengths
        outputs = []
        for offset in offsets:
            lengths = torch.where(predicted > 0, (predicted + offset).clamp(min=1), 0)
            fired = self.cif(frames, mask, target_lengths=lengths)
            outputs.append(self._write(fired, last))
        return outputs

    def _read(
        self, hidden_states: Tensor, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Frames as CIF gets them (B, S, W), their mask (B, S), where the clips end (B, 1)."""
        mask = checked_mask(hidden_states, attention_mask, self.config.input_size)
        last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1, keepdim=True)
        frames, mask = self._stack(hidden_states, mask)
        return self.pre_cif(self.input_projection(frames), mask), mask, last

    def _write(self, fired: CIFOutput, last: Tensor) -> AdapterOutput:
        """What CIF fired, as the language model gets it."""
        tokens = self.post_cif(fired.hidden_states, fired.attention_mask)
        embeddings = self.output_projection(tokens)
        return AdapterOutput(
            hidden_states=embeddings.masked_fill(~fired.attention_mask[..., None], 0.0),
            attention_mask=fired.attention_mask,
            alpha_sum=fired.alpha_sum / self.config.threshold,
            # The last stacked frame may be part padding; no token ends after the clip.
            fire_times=(fired.fire_times * self.config.frame_stacking).minimum(last),
            alphas=fired.alphas,
            frames_per_alpha=self.config.frame_stacking,
            threshold=self.config.threshold,
        )

    def _stack(self, frames: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Join ``frame_stacking`` neighbours; padding counts as zeros, so batch = single."""
        k = self.config.frame_stacking
        frames = frames.masked_fill(~mask[..., None], 0.0)
        if k == 1:
            return frames, mask
        missing = -frames.shape[1] % k
        frames = F.pad(frames, (0, 0, 0, missing))
        mask = F.pad(mask, (0, missing), value=False)
        return (
            rearrange(frames, "b (s k) d -> b s (k d)", k=k),
            rearrange(mask, "b (s k) -> b s k", k=k).any(dim=-1),
        )
