"""Watching: which checkpoints are there, and which of them have gone quiet.

What belongs here: expanding watched globs (`scan`), the pure settle machine (`settle`), file system
events as hints (`events`, `mounts`), and the task that brings them together (`watcher`). What does
not: judging whether a checkpoint is whole, pinning it, making jobs of it. Nothing here opens a file
of a trainer, and nothing is ever written into a watched folder.
"""
