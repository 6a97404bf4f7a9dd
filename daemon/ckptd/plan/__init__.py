"""From a checkpoint to a published one: expressions, drafts, plans, and their execution.

A draft says which tensors there will be, as expressions over source extents; a plan fixes every
output byte's place; the stream executes the plan. Everything but the stream is pure and reads no
tensor byte. What belongs elsewhere: which stages there are and what they decide (pipeline).
"""
