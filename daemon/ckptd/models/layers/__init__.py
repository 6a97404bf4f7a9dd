"""What native models are built of: attention, masks, positions, caches, activations, outputs.

Belongs here: pieces that more than one family of architectures uses. Does not belong here: what one
architecture does (native), and weights on disk.
"""
