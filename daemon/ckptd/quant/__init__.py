"""Decoders of quantized checkpoints, one a file behind one protocol.

Empty so far: quantized checkpoints pass through bit for bit, and stages that would break them
(`cast`, `resize` of quantized rows) refuse them by name.
"""
