"""Pipelines: definitions as people write them, stages, and drafts composed of them.

What belongs here: reading definitions strictly (`definition`, `locate`, `placeholders`, `names`,
`complaints`, `overrides`, `schema`), the stages one a file (`stages/`, `stage`, `registry`), and
putting them together for one checkpoint. What does not: reading tensors, running a plan, watching,
pushing.
"""
