"""Draw and judge until something fails or the time is over."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from megamoe.cases import Case, kind_of
from megamoe.cases.stored_names import free_names
from megamoe.fuzz.draw import FuzzCase, draw
from megamoe.fuzz.failure import FindCauses, Remains, shrink, store
from megamoe.fuzz.step import judge_problem
from megamoe.fuzz.tally import Tally
from megamoe.judge import Verdict
from megamoe.spec.contract import CONTRACTS
from megamoe.spec.dialects import Dialect
from megamoe.suite.judges import Desk, Judges, get_ready, threads_of
from megamoe.suite.settings import Settings
from megamoe.suite.stops import Stop, stoppable
from megamoe.worker.client import Worker
from megamoe.worker.exchange import NoRoom
from megamoe.worker.pool import Pool
from megamoe.worker.session import Identity


@dataclass(frozen=True)
class Options:
    """The options of a run."""

    seed: int
    seconds: float
    """Seconds after which no problem begins; the running problems are finished."""
    problems: int | None = None
    """No problem of this number or a higher one is judged."""
    only: int | None = None
    """This one alone."""
    wide: bool = False
    """Also problems whose scaled operands are no bfloat16 numbers."""
    reduce_seconds: float = 100.0
    out: str | None = None
    """The file that is left, a new one; None: the first free name of seed and number."""


@dataclass
class Outcome:
    """The end of a run."""

    tally: Tally
    first: tuple[FuzzCase, Verdict] | None = None
    """The red of the lowest number."""
    remains: Remains | None = None
    """The file of that red, or the reason why there is none."""
    stop_reason: str = ""
    code: int = 0
    """Exit status of a run that was stopped."""


def fuzz(
    settings: Settings, options: Options, judges: int, workers: int, console: Console,
    again: Callable[[int], str] = str, find: FindCauses | None = None,
) -> Outcome:  # fmt: skip
    """Judge drawn problems with ``settings.backend``; raises errors of one line for the command.

    ``again(number)``: the command that judges that problem alone, for the message. ``find``: looks
    for the causes of the red, before it is reduced.
    """
    if options.only is not None:
        judges = workers = 1
    outcome = Outcome(Tally(console))
    identity: Identity | None = None
    try:
        with stoppable():
            get_ready()
            launch = settings.launch(threads_of(max(judges, workers)))
            with Pool(launch, workers) as pool:
                identity = pool.address.identity
                if not identity.provides("forward"):
                    raise ValueError(f"backend {settings.backend} has no forward, which fuzz calls")
                tally = outcome.tally = Tally(console)
                tally.say(f"seed {options.seed}, {identity.contract_line}")
                step: Any = partial(judge_problem, options.wide)
                desk = Desk(
                    pool.address, settings.root, settings.timeout, step, threads_of(judges)
                )  # fmt: skip
                with Judges(judges, desk) as bench, _display(tally):
                    bench.run(
                        _problems(options, identity, tally), _nothing, partial(_on_result, tally)
                    )
            if tally.reds:
                remains = _keep(outcome, options, identity, again)
                with Worker(launch) as fresh:  # where no earlier problem has left anything behind
                    outcome.remains = shrink(
                        remains, fresh, options.reduce_seconds, settings.timeout, tally.say, find
                    )
    except Stop as stop:
        outcome.stop_reason, outcome.code = str(stop), stop.code
    except NoRoom as full:
        outcome.stop_reason, outcome.code = str(full), 2
    if identity is not None and outcome.tally.reds and outcome.remains is None:
        _keep(outcome, options, identity, again)  # it was stopped before the red had its file
    return outcome


def _keep(
    outcome: Outcome, options: Options, identity: Identity, again: Callable[[int], str]
) -> Remains:
    """Say which problem failed first, and write it whole."""
    tally = outcome.tally
    case, verdict = tally.reds[min(tally.reds)]
    if outcome.first is None:
        outcome.first = case, verdict
        tally.say(f"{tally.line()}\n\nproblem {case.number} of seed {options.seed} "
                  f"({case.profile}): {verdict.status}, {verdict.reason}\n"
                  f"alone: {again(case.number)}")  # fmt: skip
        for number in sorted(tally.reds)[1:]:
            tally.say(f"red too, judged at the same time: problem {number}, {again(number)}")
    names = [Path(options.out)] if options.out else free_names(f"fuzz-{options.seed}-{case.number}")
    *earlier, out = names
    if earlier:
        tally.say(f"unchanged: {', '.join(map(str, earlier))}, from earlier runs")
    outcome.remains = store(case, verdict, out, options.seed, identity)
    return outcome.remains


def _problems(options: Options, identity: Identity, tally: Tally) -> Iterator[FuzzCase]:
    """The problems for the backend, in the order of their numbers, until no further one should
    begin."""
    _refuse_dialects(identity)
    until = time.monotonic() + options.seconds
    numbers = itertools.count() if options.problems is None else range(options.problems)
    for number in numbers if options.only is None else [options.only]:
        if options.only is None and (time.monotonic() > until or tally.reds):
            return
        case = draw(options.seed, number)
        lacks = _lacking(case, identity)
        if lacks:
            tally.skips[lacks] += 1
        else:
            yield case


def _lacking(case: FuzzCase, identity: Identity) -> str:
    """The feature that the backend or the contract lacks; empty if there is none."""
    contract = CONTRACTS[identity.contract]
    for feature in kind_of("forward").features(case):
        if feature not in contract.features.value:
            return f"contract {contract.revision} has no rule for feature {feature}"
        if not identity.provides(feature):
            return f"the backend does not compute feature {feature}"
    return ""


def _refuse_dialects(identity: Identity) -> None:
    """``ValueError`` where no problem that is drawn can be judged."""
    contract = CONTRACTS[identity.contract]
    if isinstance(contract, Dialect):
        name = contract.revision
        raise ValueError(
            f"fuzz draws no problems with weights of contract {name} ({contract.weights.value}); "
            f"`megamoe check --contract {name}` judges its cases"
        )


def _nothing(case: Case) -> None:
    """A judge has taken the problem."""


def _on_result(tally: Tally, case: Case, result: Any) -> None:
    assert isinstance(case, FuzzCase)
    if isinstance(result, Exception):
        verdict = Verdict(case.id, case.kind, "error", f"{result}")
        tally.problems += 1
        tally.reds[case.number] = case, verdict
    else:
        tally.add(case, result)
    tally.progress()


def _display(tally: Tally) -> AbstractContextManager[Any]:
    if not tally.console.is_terminal:
        return nullcontext()
    return Live(
        get_renderable=lambda: Text(tally.line()), console=tally.console, refresh_per_second=4,
        transient=True,
    )  # fmt: skip
