"""What a judge does in its process: cases in, results out."""

from __future__ import annotations

import ctypes
import gc
import signal
from contextlib import suppress
from typing import Any, Final

import torch

from megamoe.cases import KINDS, kind_of
from megamoe.golden import Store, make, predicted, recorded
from megamoe.spec.contract import contract
from megamoe.suite.judges import Desk
from megamoe.suite.runner import Runner
from megamoe.worker.outcomes import NoRoom
from megamoe.worker.pool import Shared

PR_SET_PDEATHSIG: Final = 1

for _kind in KINDS:  # the fork server imports them once, for all judges
    kind_of(_kind)


def sit(pipe: Any, desk: Desk) -> None:
    """A judge's process: cases in, results out, until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who owns the run decides when it ends
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    torch.set_num_threads(desk.threads)
    gc.freeze()  # what was imported is no garbage: to look through it takes 0.1 s a case
    gc.enable()
    try:
        session = Shared(desk.address)
        identity = session.identity
        record = recorded.find(desk.root, identity.name, identity.facts)
        predictions = predicted.find(desk.root, identity.accumulator)
        runner = Runner(
            session, Store(desk.root, make, contract(identity.contract)), record, desk.timeout
        )
        runner.predictions = predictions
    except EOFError:  # the run has ended
        return
    except (ValueError, OSError) as error:
        with suppress(OSError):
            pipe.send(("cannot", str(error)))
        return
    gc.freeze()  # what is there stays: a collection after each case need not look at it
    with suppress(EOFError, OSError):
        pipe.send(("ready", None))
        while True:
            case, order = pipe.recv()
            runner.brief = order.brief
            runner.timeout, runner.has_learned = order.timeout or desk.timeout, bool(order.timeout)
            try:
                pipe.send(("done", desk.step(runner, case)))
            except NoRoom as full:
                pipe.send(("full", str(full)))
            gc.collect()  # a real model's weights must not wait for the next case's
