"""Small asynchronous building blocks on anyio, each one usable without the daemon.

Here belongs what several rooms need to wait, retry or limit work. Nothing here knows a checkpoint,
a job or a Hub; the lowest layer but for errors and units.
"""
