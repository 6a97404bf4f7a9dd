"""Configurations: `PreTrainedConfig`, and how config.json becomes one and comes from one.

Belongs here: fields, aliases, nested configurations, where the file is found, what is written of it.
Does not belong here: what an architecture's own configuration declares (native), and torch.
"""
