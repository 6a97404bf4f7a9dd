"""Architectures that run here: one module each, with its configuration and its model classes.

Parameter names are those of the Hub's checkpoints, so nothing is renamed on the way in or out.
`models.registry` knows which module holds which class; nothing is imported before it is used.
The decoder family is described in `decoder_layers.Traits` and built in `decoder`.
"""
