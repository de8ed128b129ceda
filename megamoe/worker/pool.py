"""Workers that several judges share: the number of backends does not depend on the number of
judges.

The pool lives in the process that owns the run. A judge connects to it from a process of its own
and asks through a :class:`Shared` session; the pool hands the first request of a case to a worker
that is free, and the others of the case to the same one (:mod:`.seats`). On a GPU one worker serves
all judges, so a kernel is compiled once.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import os
import pickle
import secrets
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from megamoe.worker.client import Worker
from megamoe.worker.seats import Seats
from megamoe.worker.session import Identity, Launch, Reply, WorkerError
from megamoe.worker.team import Ranks, Team


@dataclass(frozen=True)
class Address:
    """The address of a pool, and the data that a judge needs of its backend. It can be pickled."""

    name: str
    key: bytes
    identity: Identity
    folder: Path

    def packed(self) -> str:
        """The same as text, for pytest-xdist, which passes no objects."""
        return base64.b64encode(pickle.dumps(self)).decode()

    @staticmethod
    def unpacked(text: str) -> Address:
        """The inverse of :meth:`packed`."""
        address: Address = pickle.loads(base64.b64decode(text))
        return address


class Pool:
    """``count`` workers, or one team of ``ranks``. Use as a context manager, or close it."""

    def __init__(self, launch: Launch, count: int, ranks: Ranks | None = None) -> None:
        """Raises :class:`WorkerError` where the backend cannot be loaded."""
        self._closed = False
        count = count if ranks is None else 1
        numbers = itertools.count(1)
        first = Worker(launch, numbers=numbers) if ranks is None else Team(launch, ranks)
        self._workers: list[Worker | Team] = [first]
        try:
            # The others import torch while the first loads the backend.
            for _ in range(count - 1):
                self._workers.append(Worker(launch, numbers=numbers))
            identity = first.identity
        except BaseException:
            self.close()
            raise
        for worker in self._workers:
            worker.like = identity
        self._seats = Seats(self._workers)
        name = (
            f"\0megamoe-{os.getpid()}-{secrets.token_hex(8)}"  # no file that could be left behind
        )
        key = secrets.token_bytes(16)
        self._listener = Listener(name, "AF_UNIX", backlog=64, authkey=key)
        self.address = Address(name, key, replace(identity, state={}), first.folder)
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def sources(self) -> dict[str, str]:
        """The Python files of the backend that its processes imported so far: path, relative to the
        backend's file, to sha256."""
        return {path: sha for worker in self._workers for path, sha in worker.sources.items()}

    def close(self) -> None:
        """End every worker; a judge that still waits gets no answer."""
        self._closed = True
        listener = getattr(self, "_listener", None)
        if listener is not None:
            listener.close()
        for worker in self._workers:
            worker.retire()  # none may make a folder again that another has removed
        for worker in self._workers:
            worker.close()
        shutil.rmtree(self._workers[0].folder, ignore_errors=True)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection = self._listener.accept()
            except Exception:  # closed, or a stranger without the key
                continue
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        with connection, contextlib.suppress(EOFError, OSError):
            try:
                while True:
                    request, seconds = connection.recv()
                    with self._seats.worker(id(connection), request.get("case", "")) as worker:
                        try:
                            reply = worker.ask(request, seconds)
                        except Exception as error:
                            reply = {"broken": f"its worker cannot be asked ({error})"}
                    connection.send(reply)
            finally:
                self._seats.leave(id(connection))


class Shared:
    """A judge's session with a pool."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._connection = Client(address.name, "AF_UNIX", authkey=address.key)

    @property
    def identity(self) -> Identity:
        return self._address.identity

    @property
    def folder(self) -> Path:
        return self._address.folder

    def ask(self, request: Mapping[str, Any], seconds: float) -> Reply:
        """See :meth:`megamoe.worker.session.Session.ask`; the wait for a free worker does not
        count."""
        try:
            self._connection.send((dict(request), seconds))
            reply: Reply = self._connection.recv()
        except (EOFError, OSError):
            raise WorkerError("the run has ended") from None
        return reply

    def close(self) -> None:
        """Leave the pool."""
        self._connection.close()
