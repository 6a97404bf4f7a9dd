"""The mathematics of the formulas, in torch: one file a formula, the same code on CPU and CUDA.

`decode.KERNELS` says which function computes which formula.
"""
