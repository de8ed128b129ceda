"""Judges in processes of their own, each with one case at a time.

They share the workers of a :class:`megamoe.worker.pool.Pool`, so one judges while another's case
runs. A judge runs no code but megamoe's; should one end all the same (memory), it costs the case
that it had, and another takes its place.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, forkserver, get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from megamoe.cases import Case
from megamoe.suite.stops import check_stop
from megamoe.worker.outcomes import NoRoom
from megamoe.worker.pool import Address

if TYPE_CHECKING:
    from megamoe.suite.runner import Runner

Step = Callable[["Runner", Case], Any]
"""What a judge does with a case, a function of a module; its result can be pickled."""


@dataclass(frozen=True)
class Order:
    """How a judge runs a case."""

    brief: bool = False
    """:attr:`Runner.brief`."""
    timeout: float | None = None
    """Seconds, learned from other cases; None: those of the desk."""


class JudgeError(ValueError):
    """A judge cannot start; one line."""


class JudgeEnd(Exception):
    """The process of a judge ended in a case."""


@dataclass(frozen=True)
class Desk:
    """What each judge is given, once."""

    address: Address
    root: Path
    timeout: float
    step: Step
    threads: int


def get_ready() -> Any:
    """Start the server that judges are forks of: one import of torch for all of them.

    It imports beside whoever called, so a run calls this before it waits for its backend.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["megamoe.suite.mortal", "megamoe.suite.sitting"])
    forkserver.ensure_running()
    return context


class Judges:
    """``count`` judges. Use as a context manager, or close it."""

    def __init__(self, count: int, desk: Desk) -> None:
        self._desk = desk
        self._context = get_ready()
        self._all: dict[Any, Any] = {}
        """The pipe to each judge, and its process."""
        try:
            for _ in range(count):
                self._hire()
        except BaseException:  # stopped meanwhile
            self.close()
            raise

    def run(
        self, cases: Iterable[Case], on_start: Callable[[Case], None],
        on_result: Callable[[Case, Any], None], order: Callable[[Case], Order] = lambda _: Order(),
    ) -> None:  # fmt: skip
        """Every case once, in this order; ``on_result`` gets the step's result or an exception.

        ``cases`` is asked for the next one when a judge is free, so it may end when it likes.
        ``order(case)`` says how the next case is run.
        Raises :class:`NoRoom` where the folder of exchanged files is full.
        """
        waiting, is_over = iter(cases), False
        at_work: dict[Any, Case] = {}
        idle: list[Any] = []
        while True:
            while idle and not is_over:
                case = next(waiting, None)
                is_over = case is None
                if case is None:
                    break
                pipe = idle.pop()
                at_work[pipe] = case
                with suppress(OSError):  # its end is seen below
                    pipe.send((case, order(case)))
                on_start(case)
            if is_over and not at_work:
                return
            check_stop()
            for each in connection.wait([p for p in self._all if p not in idle], 0.5):
                pipe = cast(Any, each)
                try:
                    what, value = pipe.recv()
                except (EOFError, OSError):
                    what, value = "ended", self._dismiss(pipe)
                if what == "ready":
                    idle.append(pipe)
                elif what == "cannot":
                    raise JudgeError(value)
                elif what == "full":
                    raise NoRoom(value)
                elif pipe in at_work:
                    on_result(at_work.pop(pipe), value)
                    if what == "done":
                        idle.append(pipe)
                elif not at_work and not idle:
                    raise JudgeError(f"a judge cannot start: {value}")
                if what == "ended":
                    self._hire()

    def close(self) -> None:
        """End every judge now."""
        processes = [process for process in self._all.values() if process.pid is not None]
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        for pipe in self._all:
            pipe.close()
        self._all = {}

    def __enter__(self) -> Judges:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hire(self) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_sit, args=(theirs, self._desk), daemon=True)
        self._all[ours] = process
        process.start()
        theirs.close()

    def _dismiss(self, pipe: Any) -> JudgeEnd:
        process = self._all.pop(pipe)
        pipe.close()
        process.join(10)
        code = process.exitcode
        how = f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"
        return JudgeEnd(
            f"its judge, a process of megamoe, ended ({how}); out of memory? Use fewer judges (-n)"
        )


def _sit(pipe: Any, desk: Desk) -> None:
    """A judge's process. What it imports is there already: it is a fork of the server."""
    from megamoe.suite.sitting import sit

    sit(pipe, desk)


def threads_of(processes: int) -> int:
    """Threads for each of so many processes: a pool in each would fight over the cores."""
    return max(1, (os.cpu_count() or 1) // max(1, processes))
