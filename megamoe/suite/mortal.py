"""What the fork server of the judges imports first: it ends with the process that started it.

By itself it would look for that only once it has imported the rest, which takes seconds; and the
folder of its socket would stay where that process was killed and could not remove it.
"""

import ctypes
import gc
import os
import select
import shutil
import signal
import socket
import stat
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Final

PR_SET_PDEATHSIG: Final = 1
SERVER: Final = os.getpid()
PARENT: Final = os.getppid()
DESCRIPTORS: Final = range(3, 256)
"""Among them are the socket that the server listens on, and a pipe from the process that started
the server."""


def end(number: int, frame: FrameType | None) -> None:
    """Remove the folder of the socket, and end; a judge, which inherits this, only ends."""
    # A parent that is alive removes its folder itself, and fails if somebody else did it before.
    if os.getpid() == SERVER and (os.getppid() != PARENT or is_orphan()):
        for descriptor in DESCRIPTORS:
            with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as listener:
                name = listener.getsockname()
                folder = Path(name if isinstance(name, str) else "").parent
                if folder.name.startswith("pymp-"):
                    shutil.rmtree(folder, ignore_errors=True)
    os._exit(128 + number)


def is_orphan() -> bool:
    """Whether the process that started this one has ended: then a pipe has lost its writer."""
    for descriptor in DESCRIPTORS:
        with suppress(OSError):
            if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
                pipe = select.poll()
                pipe.register(descriptor, 0)
                if any(event & select.POLLHUP for _, event in pipe.poll(0)):
                    return True
    return False


if sys.argv[:1] == ["-c"]:  # as multiprocessing starts a fork server
    gc.disable()  # what it imports from here on is no garbage; its judges collect
    signal.signal(signal.SIGTERM, end)
    with suppress(OSError, AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if is_orphan():  # before the line above took effect
        end(signal.SIGTERM, None)
