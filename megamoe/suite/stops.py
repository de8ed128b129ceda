"""A run that is stopped: Ctrl-C, SIGTERM, a closed terminal or pipe."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CLOSED_PIPE: Final = 128 + signal.SIGPIPE


class Stopped(Exception):
    """Somebody ends the run. ``code`` is the exit status that says so."""

    def __init__(self, why: str, code: int) -> None:
        super().__init__(why)
        self.code = code


@contextmanager
def stoppable() -> Iterator[None]:
    """In it the first signal raises :class:`Stopped`, and later ones wait for the end of it.

    So what has to be put in order is put in order once. A closed pipe is one, too. After it signals
    wait for :func:`release`, so that what was judged can be written whole.
    """
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def stop(number: int, frame: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(signal.Signals(number).name, 128 + number)

    for number in SIGNALS:
        signal.signal(number, stop)
    try:
        yield
    except BrokenPipeError:
        raise Stopped("the output was closed", CLOSED_PIPE) from None
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        for number, handler in before.items():
            signal.signal(number, handler)


def release() -> None:
    """From here on a signal ends the process again; one that waited does so now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
