"""`from_pretrained`: from a folder or a repo to a model whose every value is read.

Belongs here: which files, which names, which dtype, where each tensor goes, what is reported. Does
not belong here: reading the bytes (`plan.fill`) and configurations (`models.config`).
"""
