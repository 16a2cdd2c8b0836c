"""BLSP-KD (arXiv 2405.19041): a text LLM that answers speech."""

__version__ = "0.1.0"
