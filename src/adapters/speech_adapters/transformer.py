"""A pre-norm bidirectional Transformer that honours padding masks.

Shapes: B batch, T positions, D width, A heads, head_size = D / A.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


def rotary_angles(length: int, head_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary position embedding (arXiv 2104.09864, eq. 15).

    Returns:
        Two (T, head_size) float32 tensors. Only differences of positions matter, so a row's
        output does not depend on how much padding stands beside it.
    """
    frequencies = 10000.0 ** (-torch.arange(0, head_size, 2, device=device).float() / head_size)
    angles = torch.outer(torch.arange(length, device=device).float(), frequencies)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the two halves of each head's channels by the angles of their position.

    Args:
        x: (B, A, T, head_size).
        cos: (T, head_size) float32, from :func:`rotary_angles`; sin likewise.

    Returns:
        x's shape and dtype; computed in float32 at least.
    """
    first, second = x.chunk(2, dim=-1)
    turned = x * cos + torch.cat([-second, first], dim=-1) * sin
    return turned.to(x.dtype)


class SelfAttention(nn.Module):
    """Multi-head self-attention with rotary positions.

    Args:
        hidden_size: D, a multiple of ``2 * num_heads``.
        num_heads: A.
        dropout: probability of dropping an attention weight in training.
    """

    def __init__(self, hidden_size: int, num_heads: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        if hidden_size % (2 * num_heads):
            raise ValueError(
                f"hidden_size={hidden_size} must be a multiple of 2 * num_heads="
                f"{2 * num_heads}, so that each head has an even width; change one of them"
            )
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, key_mask: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Attend.

        Args:
            x: (B, T, D).
            key_mask: (B, 1, 1, T) bool, True where a key may be seen.
            rotary: what :func:`rotary_angles` gave for T positions.

        Returns:
            (B, T, D).
        """
        q, k, v = rearrange(
            self.qkv(x), "b t (three a d) -> three b a t d", three=3, a=self.num_heads
        )
        attended = F.scaled_dot_product_attention(
            rotate(q, *rotary),
            rotate(k, *rotary),
            v,
            attn_mask=key_mask,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out(rearrange(attended, "b a t d -> b t (a d)"))  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped


class TransformerLayer(nn.Module):
    """Pre-norm attention and a GELU feed-forward of ``ffn_size``, each with a residual."""

    def __init__(
        self, hidden_size: int, num_heads: int, ffn_size: int, *, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.attention = SelfAttention(hidden_size, num_heads, dropout=dropout)
        self.ffn_norm = nn.LayerNorm(hidden_size)
        self.ffn = nn.Sequential(
            nn.Linear(hidden_size, ffn_size),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(ffn_size, hidden_size),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, key_mask: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Transform x (B, T, D); the arguments are those of :meth:`SelfAttention.forward`."""
        x = x + self.dropout(self.attention(self.attention_norm(x), key_mask, rotary))
        x = x + self.dropout(self.ffn(self.ffn_norm(x)))
        return x


class Transformer(nn.Module):
    """A stack of :class:`TransformerLayer`, closed by a LayerNorm.

    Args:
        num_layers: how many; 0 leaves only the closing LayerNorm.
        hidden_size: D.
        num_heads: A.
        ffn_size: inner width of the feed-forward layers.
        dropout: on attention weights, inside the feed-forward, and on each residual branch.
    """

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        num_heads: int,
        ffn_size: int,
        *,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.head_size = hidden_size // num_heads
        self.layers = nn.ModuleList(
            TransformerLayer(hidden_size, num_heads, ffn_size, dropout=dropout)
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        """Transform.

        Args:
            x: (B, T, D).
            attention_mask: (B, T) bool or int, True on real positions; padding is never attended
                to.

        Returns:
            (B, T, D), zero on padding.
        """
        attention_mask = attention_mask.bool()
        # Not every attention backend survives a row that may see nothing: its softmax is 0/0.
        visible = attention_mask | ~attention_mask.any(dim=1, keepdim=True)
        key_mask = visible[:, None, None, :]
        x = x.masked_fill(~attention_mask[..., None], 0.0)
        rotary = rotary_angles(x.shape[1], self.head_size, x.device)
        for layer in self.layers:
            x = layer(x, key_mask, rotary)
        normed: Tensor = self.norm(x)
        return normed.masked_fill(~attention_mask[..., None], 0.0)
