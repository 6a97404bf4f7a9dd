"""`generate`: from logits to tokens, and the settings that say how.

Belongs here: the loop, what is done to logits, when it stops, generation_config.json. Does not belong
here: how a model computes its logits (native).
"""
