"""Jobs: their states, how they are kept, and how a runner reports on them.

What belongs here: the pure states and transitions (`job`), the contract of a store (`store`) and the
one that keeps jobs in SQLite (`sqlite`, `schema.sql`), and the JSON lines that runner and worker
exchange (`progress`). What does not: deciding that there is work (watch, service), doing it
(runner), showing it (cli, web).
"""
