"""The keeper: it owns a worker's processes, its folder and its output, and outlives the judge.

It stands between the judge and the worker, so that the two share no descriptor. When the judge's
process ends, however it ends, the keeper reads the end of its standard input, kills every process
that came from the worker, removes the folder and ends too. It knows nothing of tensors or backends
and needs the standard library only. Its arguments are the number of the judge's process, which the
name of the folder holds, and where that folder is made.

Lines on standard input, JSON: ``{"start": {argv, cwd, env}}``, ``{"say": TEXT}``, ``{"stop": 1}``,
``{"poll": 1}``.
Lines on standard output: ``{"folder": PATH}`` first, then ``{"said": TEXT}`` for each answer of the
worker, and ``{"ended": {code, last}}`` when its process has ended by itself; ``{"stopped": true}``
and ``{"alive": BOOL}`` answer a stop and a poll.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

MARK: Final = b"@megamoe "
"""The prefix of a worker's answers, as in ``serve.py``, which needs torch and so cannot be imported
here."""
LONGEST: Final = 4 << 20
"""Bytes of one answer; a longer line is no answer."""
TAIL: Final = 4096
"""The number of bytes that are kept of a worker's output: its last lines."""
PR_SET_PDEATHSIG: Final = 1
PR_SET_CHILD_SUBREAPER: Final = 36
IGNORED_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)
"""The keeper ends in one way only: at the end of its standard input."""


class Keeper:
    """One worker at a time, with all processes that it starts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.worker: subprocess.Popen[bytes] | None = None
        self.tail = b""
        self.lines: dict[int, bytes] = {0: b""}
        """The unfinished line of each descriptor: the bytes after the last newline."""
        self.selector = selectors.DefaultSelector()
        self.selector.register(0, selectors.EVENT_READ, self._on_order)

    def run(self) -> None:
        """Serve until standard input ends."""
        _tell({"folder": str(self.folder)})
        with suppress(EOFError, BrokenPipeError):
            while True:
                for key, _ in self.selector.select(0.05 if self.worker else None):
                    key.data(key.fd)
                self._look()

    def end(self) -> None:
        """Kill the remaining processes and remove the folder; the judge may still be writing into
        it.

        MEGAMOE_LINGER: seconds in which the worker may end by itself before that. A tool that
        watches a process, such as compute-sanitizer, writes its report when the process ends.
        """
        linger = float(os.environ.get("MEGAMOE_LINGER") or 0)
        if linger and self.worker is not None and self.worker.stdin is not None:
            with suppress(OSError, subprocess.TimeoutExpired):
                self.worker.stdin.close()
                self.worker.wait(linger)
        self._kill()
        for _ in range(50):
            shutil.rmtree(self.folder, ignore_errors=True)
            if not self.folder.exists():
                return
            time.sleep(0.02)

    def _on_order(self, descriptor: int) -> None:
        for line in self._lines(descriptor):
            order = json.loads(line)
            if "say" in order and self.worker is not None and self.worker.stdin is not None:
                with suppress(OSError):  # it has ended: the next look says so
                    self.worker.stdin.write(order["say"].encode() + b"\n")
                    self.worker.stdin.flush()
            elif "stop" in order:
                self._kill()
                _tell({"stopped": True})
            elif "poll" in order:
                self._look()
                _tell({"alive": self.worker is not None})
            elif "start" in order:
                self._start(order["start"])

    def _start(self, how: dict[str, Any]) -> None:
        self._kill()
        self.tail = b""
        try:
            self.worker = subprocess.Popen(
                how["argv"], cwd=how["cwd"], env=how["env"], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                preexec_fn=_as_ever,
            )  # fmt: skip
        except OSError as error:
            _tell({"ended": {"code": None, "last": f"{how['argv'][0]}: {error.strerror}"}})
            return
        assert self.worker.stdout is not None and self.worker.stderr is not None
        self.lines[self.worker.stdout.fileno()] = b""
        self.selector.register(self.worker.stdout.fileno(), selectors.EVENT_READ, self._on_answer)
        self.selector.register(self.worker.stderr.fileno(), selectors.EVENT_READ, self._on_output)

    def _on_answer(self, descriptor: int) -> None:
        try:
            lines = self._lines(descriptor)
        except EOFError:  # closed: the judge waits until the process ends or the time is over
            self.selector.unregister(descriptor)
            return
        for line in lines:
            if line.startswith(MARK):
                _tell({"said": line[len(MARK) :].decode(errors="replace")})
            else:
                self.tail = (self.tail + line + b"\n")[-TAIL:]

    def _on_output(self, descriptor: int) -> None:
        data = os.read(descriptor, 1 << 16)
        if not data:
            self.selector.unregister(descriptor)
        self.tail = (self.tail + data)[-TAIL:]

    def _lines(self, descriptor: int) -> list[bytes]:
        data = os.read(descriptor, 1 << 16)
        if not data:
            raise EOFError
        *lines, rest = (self.lines[descriptor] + data).split(b"\n")
        self.lines[descriptor] = rest if len(rest) <= LONGEST or not descriptor else b""
        return lines

    def _look(self) -> None:
        """Whether the worker has ended by itself."""
        if self.worker is None or self.worker.poll() is None:
            return
        code = self.worker.returncode
        for pipe, act in (
            (self.worker.stdout, self._on_answer),
            (self.worker.stderr, self._on_output),
        ):
            if pipe is not None:  # its last output before that
                os.set_blocking(pipe.fileno(), False)
                with suppress(BlockingIOError, KeyError):
                    while pipe.fileno() in self.selector.get_map():
                        act(pipe.fileno())
        self._kill()
        _tell({"ended": {"code": code, "last": self.last()}})

    def last(self) -> str:
        """The last line that was printed."""
        lines = [line.strip() for line in self.tail.decode(errors="replace").splitlines()]
        return next((line for line in reversed(lines) if line), "")[:300]

    def _kill(self) -> None:
        """Kill every process that came from the worker: its session, and all processes that left
        the session."""
        worker, self.worker = self.worker, None
        if worker is None:
            return
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(worker.pid, signal.SIGKILL)
        until = time.monotonic() + 10
        while time.monotonic() < until:
            for process in _descendants(os.getpid()):
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(process, signal.SIGKILL)
            worker.poll()
            if not _has_children():
                break
            time.sleep(0.005)
        for pipe in (worker.stdin, worker.stdout, worker.stderr):
            if pipe is None:
                continue
            with suppress(KeyError, ValueError):
                self.selector.unregister(pipe.fileno())
            self.lines.pop(pipe.fileno(), None)
            with suppress(OSError):
                pipe.close()


def _has_children() -> bool:
    """Collect dead processes, and say whether a process is left.

    The kernel gives every orphan to this process, so without a child there is no descendant.
    ``/proc`` cannot prove that: a process that starts during the reading is in no list.
    """
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _descendants(root: int) -> list[int]:
    """Processes under ``root`` as ``/proc`` shows them one by one, zombies left out.

    Some can be missing, where a parent ends between two reads. Empty where there is no ``/proc``.
    """
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = entry.read_text(errors="replace").rpartition(") ")
        except OSError:
            continue
        status, parent = rest.split()[:2]
        if status not in "ZX":
            parents.setdefault(int(parent), []).append(int(name.split(" ", 1)[0]))
    processes, todo = [], [root]
    while todo:
        children = parents.get(todo.pop(), [])
        processes += children
        todo += children
    return processes


def _as_ever() -> None:
    """In the worker, before its program: signals as usual, and no life after the keeper's."""
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # nobody wants the file of a core dump


def _prctl(option: int, value: int) -> None:
    with suppress(OSError, AttributeError):  # Linux only; elsewhere the session is all there is
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _tell(event: dict[str, Any]) -> None:
    data = json.dumps(event).encode() + b"\n"
    while data:
        data = data[os.write(1, data) :]


def main() -> None:
    """Keep until the judge is gone."""
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    judge, *where = sys.argv[1:]
    folder = tempfile.mkdtemp(prefix=f"megamoe-{judge}-", dir=where[0] if where else None)
    keeper = Keeper(Path(folder))
    try:
        keeper.run()
    finally:
        keeper.end()


if __name__ == "__main__":
    main()
