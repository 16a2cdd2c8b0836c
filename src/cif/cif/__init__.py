"""Continuous integrate-and-fire (CIF): frames to tokens, exactly and fast."""

from cif.alignment import Alignment, SparseWeights
from cif.functional import CIFOutput, align, cif
from cif.layer import CIF
from cif.packed import CIFPackedOutput, cif_packed

__all__ = [
    "CIF",
    "Alignment",
    "CIFOutput",
    "CIFPackedOutput",
    "SparseWeights",
    "align",
    "cif",
    "cif_packed",
]
