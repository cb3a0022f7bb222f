"""Continual learning with interference-free low-rank adaptation, in plain PyTorch."""
