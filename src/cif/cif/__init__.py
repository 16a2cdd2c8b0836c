"""Continuous integrate-and-fire (CIF): frames to tokens, exactly and fast."""

from cif.alignment import Alignment, SparseWeights
from cif.functional import CIFOutput, align, cif
from cif.layer import CIF
from cif.packed import CIFPackedOutput, cif_packed
from cif.streaming import CIFState, cif_stream

__all__ = [
    "CIF",
    "Alignment",
    "CIFOutput",
    "CIFPackedOutput",
    "CIFState",
    "SparseWeights",
    "align",
    "cif",
    "cif_packed",
    "cif_stream",
]
