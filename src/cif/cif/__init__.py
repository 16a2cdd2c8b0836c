"""Continuous integrate-and-fire (CIF): frames to tokens, exactly and fast."""

from cif.functional import CIFOutput, cif
from cif.layer import CIF

__all__ = ["CIF", "CIFOutput", "cif"]
