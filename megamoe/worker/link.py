"""The judge's connection to a keeper: orders, reports, and the end of a worker."""

from __future__ import annotations

import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from megamoe.printable import all_printable, printable
from megamoe.worker.session import Reply, WorkerError

KEEPER: Final = Path(__file__).resolve().parent / "keeper.py"
SHARED: Final = Path("/dev/shm")
ROOM: Final = 4 << 30
"""Bytes that must be free in shared memory; with less, files are exchanged on the disk."""
PROMPT: Final = 20.0
"""Seconds in which a keeper obeys an order."""
KEEPER_END: Final = "the backend ended its keeper, a process of megamoe"


class ProcessEnd(Exception):
    """The worker's process, or its keeper's, has ended; the message says how."""


class Link:
    """The connection to one keeper, which creates the folder. So no folder lacks a process that
    removes it."""

    def __init__(self) -> None:
        """Raises :class:`WorkerError` where there is no folder to be had."""
        roomy = SHARED.is_dir() and shutil.disk_usage(SHARED).free >= ROOM
        where = [str(SHARED)] if roomy else []
        self._buffer = b""
        self._keeper = subprocess.Popen(
            [sys.executable, "-I", "-S", str(KEEPER), str(os.getpid()), *where],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            self.folder = Path(self.event(time.monotonic() + 60)["folder"])
        except (ProcessEnd, TimeoutError):
            raise WorkerError("its keeper made no folder for its files; is there room?") from None

    def is_gone(self) -> bool:
        """Whether the keeper itself has ended."""
        return self._keeper.poll() is not None

    def tell(self, order: Mapping[str, Any]) -> None:
        """Send one order. Raises :class:`ProcessEnd` where nobody is there."""
        assert self._keeper.stdin is not None
        try:
            self._keeper.stdin.write(json.dumps(order).encode() + b"\n")
            self._keeper.stdin.flush()
        except OSError:
            raise ProcessEnd(KEEPER_END) from None

    def next_answer(self, seconds: float) -> Reply:
        """The worker's next answer. Raises :class:`ProcessEnd` or ``TimeoutError``."""
        until = time.monotonic() + seconds
        while True:
            event = self.event(until)
            if "ended" in event:
                raise ProcessEnd(_how(event["ended"]))
            if "said" in event:
                with suppress(ValueError):
                    reply = json.loads(event["said"])
                    if isinstance(reply, dict):
                        answer: Reply = all_printable(reply)
                        return answer

    def is_alive(self) -> bool:
        """Whether the worker's process is alive."""
        with suppress(ProcessEnd, TimeoutError):
            self.tell({"poll": True})
            until = time.monotonic() + PROMPT
            while True:
                event = self.event(until)
                if "alive" in event:
                    return bool(event["alive"])
        return False

    def stop(self) -> None:
        """End the worker's process and all that came from it."""
        with suppress(ProcessEnd, TimeoutError):
            self.tell({"stop": True})
            until = time.monotonic() + PROMPT
            while "stopped" not in self.event(until):
                pass

    def event(self, until: float) -> dict[str, Any]:
        """The keeper's next word. Raises :class:`ProcessEnd` or ``TimeoutError``."""
        assert self._keeper.stdout is not None
        with selectors.DefaultSelector() as ready:
            ready.register(self._keeper.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                rest = until - time.monotonic()
                if rest <= 0 or not ready.select(rest):
                    raise TimeoutError
                data = os.read(self._keeper.stdout.fileno(), 1 << 16)
                if not data:
                    self._keeper.wait()
                    raise ProcessEnd(KEEPER_END)
                self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        event: dict[str, Any] = json.loads(line)
        return event

    def close(self) -> bool:
        """End the keeper and its worker; False if the keeper was killed before it could obey."""
        for pipe in (self._keeper.stdin, self._keeper.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        try:
            self._keeper.wait(15 + float(os.environ.get("MEGAMOE_LINGER") or 0))
        except subprocess.TimeoutExpired:
            self._keeper.kill()
            self._keeper.wait()
        return self._keeper.returncode == 0


def _how(event: Mapping[str, Any]) -> str:
    """``the backend ended its process (exit status 3; last words: ...)``."""
    code, last = event["code"], event["last"]
    if code is None:
        return f"its interpreter cannot be started ({last})"
    how = f"exit status {code}"
    if code < 0:
        with suppress(ValueError):
            how = signal.Signals(-code).name
        how = f"{how}, out of memory?" if code == -signal.SIGKILL else how
    words = f"; last words: {printable(last[:200])}" if last else ""
    return f"the backend ended its process ({how}{words})"
