"""`save_pretrained`: from a model to a folder that changes as a whole.

Belongs here: which tensors are written under which names, their division into files, what goes
beside them. Does not belong here: the Hub (`models.push`, `hub`) and single files (`checkpoint`).
"""
