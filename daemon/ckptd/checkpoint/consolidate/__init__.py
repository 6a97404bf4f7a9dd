"""Consolidation: what trainers on many devices write, read as one checkpoint.

One file a family. Each says which folders are its own, and gathers their tensors from names,
metadata and headers alone: every tensor becomes an extent or boxes of extents, so that any stage
can follow and nothing is in memory at once. Pickles are read inertly. What belongs here: the
layout on disk of one framework. What does not: whether a save has ended (completeness), what
becomes of the tensors (plan).
"""
