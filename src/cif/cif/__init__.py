"""Continuous integrate-and-fire (CIF) for PyTorch: exact token counts, batch-invariant fires, closed-form backward."""
