"""The command line: one module for each group of commands, one sink, one table of failures.

`main` assembles the commands and is the only place that turns an error into text and an exit code
(`failures`). What commands print goes through `output`. Everything heavier than the argument parser
is imported inside the function that needs it, so that `ckptd --help` answers at once.
"""
