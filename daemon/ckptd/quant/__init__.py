"""Decoders of quantized checkpoints: from what lies on disk to plain weights.

Three rooms, so that planning needs no torch. `formats` has one file a family of writers: which
tensors belong together, what their names and metadata mean. It makes `formulas`, small frozen
values that say how one weight is computed from ranges of files, with shape and dtype known from
headers. `kernels` has the mathematics of each formula in torch, the only modules here that import
it. `registry` names all formats, `leftovers` proves that nothing quantized remains.
"""
