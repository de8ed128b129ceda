"""What the fork server of the judges imports first: it ends with the process that started it.

By itself it would look for that only once it has imported the rest, which takes seconds.
"""

import ctypes
import signal
import sys
from contextlib import suppress
from typing import Final

PR_SET_PDEATHSIG: Final = 1

if sys.argv[:1] == ["-c"]:  # as multiprocessing starts a fork server
    with suppress(OSError, AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
