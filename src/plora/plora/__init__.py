"""Partial LoRA for PyTorch: low-rank capacity on chosen positions only, the base model bit-identical elsewhere."""
