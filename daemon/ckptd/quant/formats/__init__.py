"""Families of quantized checkpoints, one a file: which tensors belong together and what they mean."""
