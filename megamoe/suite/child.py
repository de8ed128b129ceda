"""The suite's judging in a process of its own, where pytest-xdist is not at hand to give one.

A backend that crashes, hangs or leaves a sticky CUDA error behind takes its case with it; the next
case gets a new process.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import tempfile
from multiprocessing import connection, get_context
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Final

from megamoe.backends import load_backend
from megamoe.cases import Case
from megamoe.golden import Store, make, recorded
from megamoe.judge import Verdict
from megamoe.suite.run import Runner
from megamoe.suite.settings import Settings

START_SECONDS: Final = 300.0
"""For importing torch and making the backend."""
ENDED: Final = "the backend ended its process (a crash, an exit, or out of memory); run it alone"


def open_runner(settings: Settings) -> Runner:
    """Backend, goldens and what was recorded of it here. Raises what is wrong with either."""
    backend = load_backend(settings.backend, settings.device)
    kept = recorded.find(settings.root, backend, settings.device)
    return Runner(backend, Store(settings.root, make), settings.device, kept)


def last_seen(stack: str) -> str:
    """The innermost frame of the main thread, which a watchdog's stack lists last."""
    lines = stack.splitlines()
    threads = [i for i, line in enumerate(lines) if line.endswith("(most recent call first):")]
    frames = [line.strip() for line in lines[threads[-1] + 1 :]] if threads else []
    return frames[0] if frames else "C code"


class ChildRunner:
    """A :class:`Runner` in another process, which is replaced when it dies or is of no use."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.process: SpawnProcess | None = None
        self.pipe: Any = None
        self.details: list[dict[str, Any]] = []
        """As :attr:`Runner.details`."""
        handle, name = tempfile.mkstemp(prefix="megamoe-", suffix=".trace")
        os.close(handle)
        self.trace = Path(name)
        try:
            self._start()  # what is wrong with the backend is said before any case
        except ValueError:
            self.close()
            raise

    def run(self, case: Case) -> Verdict:
        """The verdict of one case, whatever happens to the process."""
        self.details = []
        if self.process is None:
            try:
                self._start()
            except ValueError as error:
                return Verdict(case.id, case.kind, "error", f"case {case.id}: {error}")
        self.trace.write_bytes(b"")
        try:
            self.pipe.send(case)
            said = self.pipe.recv()  # the child's own watchdog ends it, and this with it
        except (EOFError, OSError):
            self._stop()
            stack = self.trace.read_text()
            limit = self.settings.timeout
            text = f"no result within {limit:g} s, its process was ended, last seen in "
            reason = f"{text}{last_seen(stack)}" if stack else ENDED
            return Verdict(case.id, case.kind, "error", f"case {case.id}: {reason}")
        if said["lost"]:
            self._stop()
        self.details = said["details"]
        return Verdict.from_dict(said["verdict"])

    def close(self) -> None:
        """End the process."""
        self._stop()
        self.trace.unlink(missing_ok=True)

    def _start(self) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, self.settings, str(self.trace)), daemon=True
        )
        self.process.start()
        theirs.close()
        ready = connection.wait([self.pipe, self.process.sentinel], START_SECONDS)
        try:
            said = self.pipe.recv() if self.pipe in ready else "its process did not start"
        except (EOFError, OSError):
            said = "its process ended while the backend was made"
        if said:
            self._stop()
            raise ValueError(f"backend {self.settings.backend}: {said}")

    def _stop(self) -> None:
        if self.process is not None:
            self.process.kill()  # a spoiled CUDA context may not survive a polite exit
            self.process.join()
        if self.pipe is not None:
            self.pipe.close()
        self.process = self.pipe = None


def _serve(pipe: Any, settings: Settings, trace: str) -> None:
    """Judge cases until the other end closes."""
    try:
        runner = open_runner(settings)
    except ValueError as error:
        pipe.send(str(error).removeprefix(f"backend {settings.backend}: "))
        return
    pipe.send("")
    with Path(trace).open("w") as file:
        while True:
            try:
                case = pipe.recv()
            except (EOFError, OSError):
                return
            faulthandler.dump_traceback_later(settings.timeout, exit=True, file=file)
            verdict = runner.run(case)
            faulthandler.cancel_dump_traceback_later()
            said = {"verdict": verdict.to_dict(), "lost": runner.lost, "details": runner.details}
            pipe.send(said)
            del verdict
            gc.collect()  # a real model's weights must not wait for the next case's


__all__ = ["ENDED", "ChildRunner", "last_seen", "open_runner"]
