"""What ckptd tells about itself: logs for the journal, status values for people and programs.

Lower than everything that reports: nothing here knows jobs, the Hub or files.
"""
