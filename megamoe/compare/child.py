"""A side at work: a process of its own that answers with the bits of one case at a time."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from megamoe.compare import disk, show
from megamoe.compare.sides import HOME, CannotStart, Ready, clean_environment, end_group

START_SECONDS: Final = 300.0
"""For importing torch and making the backend."""


class Child:
    """``show.py`` in the environment ``ready``; a dead one is replaced at the next case."""

    def __init__(self, ready: Ready, backend: str, device: str, timeout: float) -> None:
        self.ready = ready
        self.backend = _located(backend, ready)
        self.device = device
        self.timeout = timeout
        self.facts: dict[str, Any] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the child
        self._buffer = b""
        self._spawn()

    def greet(self) -> Child:
        """Wait until the backend is made. Raises :class:`CannotStart`, with the reason."""
        self._greet()
        return self

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one case: ``digests``, or ``raised``, ``declined`` or ``missing``.

        Raises :class:`megamoe.compare.disk.DiskFull`; everything else that goes wrong, a crash and
        a hang included, is an answer.
        """
        if self._process is None:
            try:
                self._spawn()
                self._greet()
            except CannotStart as error:
                return {"raised": str(error)}
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(dict(request)).encode() + b"\n")
            self._process.stdin.flush()
            reply = self._read(self.timeout)
        except (TimeoutError, EOFError, BrokenPipeError) as error:
            text = self._ended(error, self.timeout)
            self.close()
            return {"raised": text}
        if "disk" in reply:
            raise disk.full(reply["disk"])
        for text in reply.values():
            if isinstance(text, str):
                disk.blame(text)
        return reply

    def close(self) -> None:
        """End the process, and what it started."""
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe:
                    with contextlib.suppress(OSError):
                        pipe.close()
            end_group(self._process)
            self._process = None

    def _spawn(self) -> None:
        script = str(Path(show.__file__).resolve())
        self._errors.seek(0)
        self._errors.truncate()
        self._buffer = b""
        try:
            self._process = subprocess.Popen(
                [*self.ready.argv, script], cwd=self.ready.cwd, env=clean_environment(),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise CannotStart(f"{self.ready.argv[0]} cannot be started: {error.strerror}") from None

    def _greet(self) -> None:
        assert self._process is not None
        hello = {
            "front": list(self.ready.front), "back": [str(HOME)], "backend": self.backend,
            "device": self.device,
        }  # fmt: skip
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(hello).encode() + b"\n")
            self._process.stdin.flush()
            reply = self._read(START_SECONDS)
        except (TimeoutError, EOFError, BrokenPipeError) as error:
            text = self._ended(error, START_SECONDS)
            self.close()
            raise CannotStart(f"{self.ready.argv[0]} did not start: {text}") from None
        if "error" in reply:
            self.close()
            text = str(reply["error"])
            start = "" if text.startswith(f"BackendError: backend {self.backend}") else (
                f"backend {self.backend}: ")  # fmt: skip
            raise CannotStart(start + text.removeprefix("BackendError: "))
        self.facts = {**reply["ready"], **self.ready.facts}

    def _read(self, limit: float) -> dict[str, Any]:
        """The next answer; other lines, as a dev shell's greeting, are not ours."""
        assert self._process is not None and self._process.stdout is not None
        end = time.monotonic() + limit
        mark = show.MARK.encode()
        with selectors.DefaultSelector() as ready:
            ready.register(self._process.stdout, selectors.EVENT_READ)
            while True:
                while b"\n" in self._buffer:
                    line, _, self._buffer = self._buffer.partition(b"\n")
                    if line.startswith(mark):
                        reply: dict[str, Any] = json.loads(line[len(mark) :])
                        return reply
                left = end - time.monotonic()
                if left <= 0 or not ready.select(left):
                    raise TimeoutError
                got = os.read(self._process.stdout.fileno(), 1 << 16)
                if not got:
                    raise EOFError
                self._buffer += got

    def _ended(self, error: BaseException, limit: float) -> str:
        if isinstance(error, TimeoutError):
            return f"no result within {limit:g} s, its process was ended"
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace")
        disk.blame(said)
        last = [line.strip() for line in said.splitlines() if line.strip()][-1:]
        return f"its process ended ({last[0][:200] if last else 'it said nothing'})"


def _located(spec: str, ready: Ready) -> str:
    """A backend's file with its whole path: in a revision's tree if it is there, else from here."""
    name, _, attribute = spec.rpartition(":")
    if not name.endswith(".py"):
        return spec
    for folder in (*ready.front, os.getcwd()):  # noqa: PTH109
        path = Path(folder) / Path(name).expanduser()
        if path.is_file():
            return f"{path}:{attribute}"
    return f"{Path(name).expanduser().absolute()}:{attribute}"
