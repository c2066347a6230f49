"""Exit statuses of the scripts, so that a job scheduler can tell what to do next.

STOPPED, UNWRITABLE, STUCK and PEER_LOST leave a work directory from which the same command continues.
"""

DONE = 0
ERROR = 1  # one sentence on stderr says what to change
USAGE = 2  # of the command line, from argparse
UNWRITABLE = 74  # several checkpoints in a row could not be written
STUCK = 75  # the watchdog: a phase took longer than its budget
PEER_LOST = 76  # another process of the run ended, or was never reached
STOPPED = 130  # on request, after saving
