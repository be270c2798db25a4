"""Quantize Hugging Face models to GPTQ checkpoints, one transformer block at a time."""

__version__ = "0.1.0"
