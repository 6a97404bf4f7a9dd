"""How fast this machine is and how close a job comes to that: what `ckptd bench` measures.

Belongs here: measuring limits (disk, memory, hash, GPU), running jobs in processes of their own and
drawing their timeline. Does not: printing, and comparing with other tools (tests/benchmarks).
"""
