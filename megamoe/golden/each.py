"""A step of every case, over several processes: to record, verify or predict goldens."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from functools import partial
from multiprocessing import get_context, parent_process
from typing import Any, Final

import torch

from megamoe.cases import Case
from megamoe.golden.places import GoldenError

OnResult = Callable[[Case, str], None]
"""Called once a case: the case, and an error or ''."""
_PR_SET_PDEATHSIG: Final = 1


def each(
    step: Callable[[Case], Any], cases: Sequence[Case], jobs: int
) -> Iterator[tuple[Case, Any]]:
    """Each case with the result of ``step``, over ``jobs`` processes; in place of a result, an
    exception gives its message in one line."""
    guard = partial(_guard, step)
    if jobs <= 1:
        for case in cases:
            yield case, guard(case)
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(jobs, context, begin, (threads,)) as pool:
        futures = {pool.submit(guard, case): case for case in cases}
        for future in as_completed(futures):
            try:
                yield futures[future], future.result()
            except Exception as error:  # a worker that was killed takes its case with it
                yield futures[future], f"case {futures[future].id}: the worker died: {error}"


def errors_of(
    step: Callable[[Case], str], cases: Sequence[Case], jobs: int, on_result: OnResult
) -> list[str]:
    """The errors of a step, one line each; the step of a case gives an error or ``""``."""
    errors = []
    for case, error in each(step, cases, jobs):
        on_result(case, error)
        if error:
            errors.append(error)
    return errors


def begin(threads: int) -> None:
    """Set-up of a process of the pool: it ends with its parent, which may be killed."""
    torch.set_num_threads(threads)
    with suppress(OSError, AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    starter = parent_process()
    if starter is None or not starter.is_alive():  # killed while this one imported torch
        os._exit(1)


def _guard(step: Callable[[Case], Any], case: Case) -> Any:
    try:
        return step(case)
    except GoldenError as error:
        return str(error)
    except Exception as error:
        return f"case {case.id}: {type(error).__name__}: {error}"
