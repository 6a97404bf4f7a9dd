"""A PEFT adapter as the merge stage sees it: its settings, its tensors, their places in the base.

Everything here is pure and works on names, shapes and JSON; no tensor byte is read.
"""
