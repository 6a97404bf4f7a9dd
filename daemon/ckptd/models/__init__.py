"""The model layer: what a config.json and the names in a checkpoint mean.

Belongs here: facts about architectures as data, and pure decisions made from names, dtypes, shapes
and configurations. Does not belong here: files, bytes, the plan, and anything that imports torch
or transformers when it is imported.
"""
