"""One job in one process: plan, stream, publish.

`job` does the work of one job and knows nothing of the daemon; `__main__` is the process that the
daemon starts ahead and hands jobs to, over JSON lines. torch and the Hub's client are imported
when a job needs them: work that only moves bytes pays for neither.
"""
