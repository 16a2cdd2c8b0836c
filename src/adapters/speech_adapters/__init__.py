"""Speech-to-LLM adapters: speech-encoder frames in, language-model embeddings out."""

from .cformer import CFormer, CFormerConfig
from .conv_subsampler import ConvSubsampler, ConvSubsamplerConfig
from .length_search import search_length
from .output import AdapterOutput
from .transformer import Transformer

__all__ = [
    "AdapterOutput",
    "CFormer",
    "CFormerConfig",
    "ConvSubsampler",
    "ConvSubsamplerConfig",
    "Transformer",
    "search_length",
]
