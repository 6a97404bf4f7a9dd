"""ckptd, the checkpoint daemon: watched checkpoint folders become published models.

The rooms of this package and the layers they form are drawn in daemon/README.md.
"""

__version__ = "0.1.0"
