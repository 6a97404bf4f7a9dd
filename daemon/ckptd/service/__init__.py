"""The daemon: what is seen becomes jobs, jobs go to runner processes, everything ends in order.

`daemon` is the composition root. Nothing here imports torch or the Hub's client: the work is done
in runner processes (`ckptd.runner`).
"""
