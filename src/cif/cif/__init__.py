"""Continuous integrate-and-fire (CIF): frames to tokens, exactly and fast."""

from cif.alignment import Alignment, SparseWeights
from cif.functional import CIFOutput, align, cif
from cif.layer import CIF

__all__ = ["CIF", "Alignment", "CIFOutput", "SparseWeights", "align", "cif"]
