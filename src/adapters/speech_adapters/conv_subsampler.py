"""The convolutional baseline of BLSP-KD's ablation (arXiv 2405.19041, sec. 4; arXiv 2309.00916).

Shapes: B batch, T input frames, N output positions, D input width, H output width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from .inputs import checked_mask
from .output import AdapterOutput


@dataclass(frozen=True)
class ConvSubsamplerConfig:
    """Shape of a :class:`ConvSubsampler`; the defaults are the paper's (8 times shorter).

    Attributes:
        input_size: D, the speech encoder's width.
        output_size: H, the language model's embedding width.
        num_layers: convolutions; each halves the length.
        kernel_size: of every convolution; odd.
        bottleneck_size: inner width of the closing residual bottleneck.
        output_rms: root mean square of the outputs at initialisation, or None for 1, which is
            what the closing LayerNorm gives.
    """

    input_size: int
    output_size: int
    num_layers: int = 3
    kernel_size: int = 5
    bottleneck_size: int = 512
    output_rms: float | None = None

    def __post_init__(self) -> None:
        """Refuse shapes that no subsampler can have."""
        for name in ("input_size", "output_size", "num_layers", "bottleneck_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, got {self.kernel_size}")
        if self.output_rms is not None and self.output_rms <= 0:
            raise ValueError(f"output_rms must be positive or None, got {self.output_rms}")


class ConvSubsampler(nn.Module):
    """Strided convolutions with GLU, then a residual bottleneck and LayerNorm.

    Its length follows from the audio, not from the text: N = ceil(T / 2**num_layers), so it has no
    use for the number of text tokens, no ``alpha_sum`` and no ``fire_times``.

    Example:
        >>> adapter = ConvSubsampler(ConvSubsamplerConfig(input_size=512, output_size=576))
        >>> adapter(torch.randn(2, 100, 512)).hidden_states.shape
        torch.Size([2, 13, 576])
    """

    def __init__(self, config: ConvSubsamplerConfig) -> None:
        super().__init__()
        self.config = config
        width, target = config.input_size, config.output_size
        self.convolutions = nn.ModuleList(
            nn.Conv1d(
                width,
                2 * (width if i + 1 < config.num_layers else target),
                config.kernel_size,
                stride=2,
                padding=config.kernel_size // 2,
            )
            for i in range(config.num_layers)
        )
        self.bottleneck = nn.Sequential(
            nn.Linear(target, config.bottleneck_size),
            nn.GELU(),
            nn.Linear(config.bottleneck_size, target),
        )
        self.norm = nn.LayerNorm(target)
        if config.output_rms is not None:
            nn.init.constant_(self.norm.weight, config.output_rms)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        target_lengths: Tensor | None = None,
        max_tokens: int | None = None,
    ) -> AdapterOutput:
        """Shorten the frames.

        Args:
            hidden_states: (B, T, D), right-padded.
            attention_mask: (B, T) bool or int, True on real frames; None means all are real.
            target_lengths: ignored; accepted so that adapters are interchangeable.
            max_tokens: ignored likewise.

        Returns:
            :class:`AdapterOutput` whose ``alpha_sum``, ``fire_times`` and ``alphas`` are None.

        Raises:
            ValueError: a shape does not fit the configuration.
        """
        mask = checked_mask(hidden_states, attention_mask, self.config.input_size)
        x = hidden_states.transpose(1, 2)
        for convolution in self.convolutions:
            # what lies in the padding must look to the kernel like the end of the clip
            x = x.masked_fill(~mask[:, None, :], 0.0)
            x = F.glu(convolution(x), dim=1)
            mask = mask[:, ::2]
        x = x.transpose(1, 2)
        x = self.norm(x + self.bottleneck(x))
        return AdapterOutput(x.masked_fill(~mask[..., None], 0.0), mask)
