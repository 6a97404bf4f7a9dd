"""What names, times and sizes say about whether a save has ended.

What belongs here: signs that a write is going on, the age of last files, what the checkpoint before
had, side files that are not whole. Each module looks at one kind of sign and returns values. What
does not: the verdict (completeness), which layout it is (layouts), when a folder is quiet (watch).
"""
