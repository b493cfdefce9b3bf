"""Run a command that dies with the process that started it: `python -P die_with_parent.py PARENT COMMAND ...`.

A comparison that is killed cannot stop its runs, and a run that lives on would race the comparison that resumes it.
Linux can be asked to kill a child when its parent ends; elsewhere the lock that the run holds open keeps the next
comparison out. A program of its own, because code between fork and exec is not safe beside threads.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # survives the exec
        if os.getppid() != parent:  # it ended before we could ask
            sys.exit("the process that started this run is gone")
    os.execv(command[0], command)
