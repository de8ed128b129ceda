"""A run that is stopped: Ctrl-C, SIGTERM, a closed terminal or pipe."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CLOSED_PIPE: Final = 128 + signal.SIGPIPE


_ARRIVALS: list[int] = []
"""The signal that came, if one did."""


class Stop(BaseException):
    """Somebody ends the run. ``code`` is the exit status that says so.

    It is no ``Exception``: code that takes any failure of a judge or a backend for a verdict must
    let it through.
    """

    def __init__(self, why: str, code: int) -> None:
        super().__init__(why)
        self.code = code


@contextmanager
def stoppable() -> Iterator[None]:
    """In it the first signal raises :class:`Stop`, and later ones wait for the end of it.

    So what has to be put in order is put in order once. A closed pipe is one, too. After it signals
    wait for :func:`release`, so that what was judged can be written whole.
    """
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    # What is ignored stays so: nohup and a shell's background jobs mean it.
    before = {n: handler for n, handler in handlers.items() if handler != signal.SIG_IGN}
    _ARRIVALS.clear()

    def stop(number: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        _ARRIVALS.append(number)
        check_stop()

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    except BrokenPipeError:
        raise Stop("the output was closed", CLOSED_PIPE) from None
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        for number, handler in before.items():
            signal.signal(number, handler)


def check_stop() -> None:
    """Raise :class:`Stop` where a signal came.

    Whoever waits long calls it now and then. What a handler raises is lost where it interrupts a
    finaliser, and the signal would be forgotten.
    """
    if _ARRIVALS:
        raise Stop(signal.Signals(_ARRIVALS[0]).name, 128 + _ARRIVALS[0])


def release() -> None:
    """From here on a signal ends the process again; one that waited does so now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
