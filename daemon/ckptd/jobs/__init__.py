"""Jobs: their states, how they are kept, and how a runner reports on them.

What belongs here: the pure states and transitions (`job`), failures and when they are tried again
(`failing`), the contract of a store (`store`) and the one that keeps jobs in SQLite (`sqlite`,
`schema.sql`; `damage` where the file is not sound), and the JSON lines that runner and worker
exchange (`progress`). What does not: deciding that there is work (watch, service), doing it
(runner), showing it (cli, web).
"""
