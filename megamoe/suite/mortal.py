"""What the fork server of the judges imports first: it ends with the process that started it.

By itself it would look for that only once it has imported the rest, which takes seconds; and the
folder of its socket would stay where that process was killed and could not remove it.
"""

import ctypes
import gc
import os
import shutil
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Final

PR_SET_PDEATHSIG: Final = 1
SERVER: Final = os.getpid()
DESCRIPTORS: Final = range(3, 16)
"""Among them is the socket that the server listens on."""


def end(number: int, frame: FrameType | None) -> None:
    """Remove the folder of the socket, and end; a judge, which inherits this, only ends."""
    if os.getpid() == SERVER:
        for descriptor in DESCRIPTORS:
            with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as found:
                name = found.getsockname()
                folder = Path(name if isinstance(name, str) else "").parent
                if folder.name.startswith("pymp-"):
                    shutil.rmtree(folder, ignore_errors=True)
    os._exit(128 + number)


if sys.argv[:1] == ["-c"]:  # as multiprocessing starts a fork server
    gc.disable()  # what it imports from here on is no garbage; its judges collect
    signal.signal(signal.SIGTERM, end)
    with suppress(OSError, AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
