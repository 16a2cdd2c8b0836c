"""Distillation losses fused with a frozen language-model head."""
