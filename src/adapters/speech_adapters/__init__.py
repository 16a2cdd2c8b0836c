"""Speech-to-LLM adapters: speech-encoder frames in, language-model embeddings out."""

from .cformer import CFormer, CFormerConfig
from .conv_subsampler import ConvSubsampler, ConvSubsamplerConfig
from .output import AdapterOutput
from .transformer import Transformer

__all__ = [
    "AdapterOutput",
    "CFormer",
    "CFormerConfig",
    "ConvSubsampler",
    "ConvSubsamplerConfig",
    "Transformer",
]
