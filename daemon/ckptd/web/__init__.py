"""The status page and the HTTP API of the daemon.

Empty so far: `ckptd status` and `ckptd jobs` read the state folder.
"""
