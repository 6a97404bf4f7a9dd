"""Checkpoints on disk: headers, indexes, layouts, completeness, pins, and the writer of new ones.

Everything here is synchronous and blocking, knows files and bytes but no torch and no anyio.
What belongs elsewhere: what to do with tensors (plan), what a quantized tensor means (quant).
"""
