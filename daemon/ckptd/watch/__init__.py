"""Watching: which checkpoints are there, and which of them have gone quiet.

What belongs here: what a watched glob means (`scan`), which candidates are there (`tree`), who of
them is listed when (`roster`), the pure settle machine (`settle`), file system events as hints
(`events`, `inotify`, `mounts`), and the task that brings them together (`watcher`). What does not:
judging whether a checkpoint is whole, pinning it, making jobs of it. Nothing here opens a file of a
trainer, and nothing is ever written into a watched folder.
"""
