"""The larger case that ``megamoe explain`` names where the data of one tells no cause."""

from __future__ import annotations

import argparse
import shlex
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Final

from megamoe.cases import Case, load_cases, shards
from megamoe.commands.explain_subject import Subject, element_of
from megamoe.commands.shared import further_options
from megamoe.commands.work import Work
from megamoe.explain import explain
from megamoe.explain.others import of_all_tokens
from megamoe.explain.words import is_certain, is_clear
from megamoe.golden import Store, make
from megamoe.judge import BAD, WORDS, judge_forward
from megamoe.spec.contract import contract
from megamoe.suite import at_hand
from megamoe.suite.routed import FULL_TILE, MANY_ROWS, routed
from megamoe.suite.runner import Runner
from megamoe.suite.settings import Settings
from megamoe.suite.similar import larger, of_tiles, plain
from megamoe.suite.telling import size, telling
from megamoe.worker.client import Worker
from megamoe.worker.exchange import NoOutput
from megamoe.worker.session import Session, WorkerError

Plain = Mapping[str, Any]
ENOUGH: Final = 2
"""The :func:`worth` of one cause alone, or of one place alone: no further red is explained."""

MAX_CASES: Final = 4
"""Larger cases that are judged."""
SECONDS: Final = 10.0
"""After this time none is begun; one that is known to take as long is none of them."""
_GREEN: Final = "green"
_NO_MORE: Final = "red too, and tells no more"
_LONG: Final = "red too, but there was no time to explain it"
_NOT_BEGUN: Final = f"not begun after {SECONDS:.0f} s"
_ORDER: Final = (_NO_MORE, _LONG, _NOT_BEGUN)
_LATE: Final = "larger cases, not explained in time: "
_TOGETHER: Final = " together with "
"""Between both sizes of a case."""


def is_short(case: Case, diagnosis: Plain) -> bool:
    """Whether this case tells no cause, or does not tell several apart, and another may."""
    if not diagnosis["actual"]:
        return False
    if diagnosis.get("batch", {}).get("is_empty_tokens"):
        return False  # no deviation gives a row that nobody wrote, in a larger case neither
    steps = diagnosis["actual"]["explanations"]
    if fits_several(diagnosis) or is_place_open(diagnosis):
        return True
    unclear = [step for step in steps if not is_clear(step)]
    is_doubtful = any(step["exact"] and not is_certain(step) for step in steps)
    return bool(unclear) and (is_doubtful or len(unclear) < len(steps) or telling(case) < 2)


def is_place_open(diagnosis: Plain) -> bool:
    """Whether several places fit, or a cause holds in some slots only and no place says which."""
    steps = (diagnosis["actual"] or {"explanations": []})["explanations"]
    rules = diagnosis.get("batch", {"rules": []})["rules"]
    in_some = any(way.get("where") for step in steps for way in step["exact"])
    return len(rules) > 1 or (in_some and not rules)


def fits_several(diagnosis: Plain) -> bool:
    """Whether ``explain`` says of several deviations, or several rules, that each fits."""
    steps = (diagnosis["actual"] or {"explanations": []})["explanations"]
    rules = diagnosis.get("batch", {"rules": []})["rules"]
    return len(rules) > 1 or any(len(step["exact"]) > 1 for step in steps)


def line(
    a: argparse.Namespace, case: Case, diagnosis: Plain, session: Session | None = None
) -> str:
    """The larger case to explain in place of ``case``, which has just been judged red; what it
    means if all pass; else why none tells more. Without a backend, which would have to run, the
    one that may be red. ``diagnosis``: that of ``case``; ``session``: where the backend
    answers, by default a new worker."""
    settings = Settings.read(lambda name: getattr(a, name, None))
    seconds = shards.durations(settings.root)
    cases = load_cases(settings.root)
    every = larger(case, cases)
    if is_place_open(diagnosis):
        first = of_tiles(case, cases)
        every = [*first, *(one for one in every if one not in first)]
    if not every and fits_several(diagnosis):  # chosen values: plain data may show the fault, too
        every = [one for one in plain(case, cases) if size(one) > size(case)]
    others = [one for one in every if seconds.get(one.id, shards.DEFAULT_SECONDS) < SECONDS]
    lacking = lacks(case, others)
    others.sort(key=lambda one: len(lacking[one.id]))
    tells = f"tells {'them apart' if fits_several(diagnosis) else 'more'}: "
    if not every:
        return f"no larger case {tells}none has the features and the chosen values of this one"
    if not others:
        return f"{_LATE}each is known to take {SECONDS:.0f} s or more, so none was judged"
    if not a.backend:
        return f"try a larger case, if it is red too: {others[0].id}{without(lacking, others[:1])}"
    with Work(f"judging larger cases; none begins after {SECONDS:.0f} s"):
        red, outcomes = _judge(settings, others, case, diagnosis, session)
    if red is not None:
        command = f"megamoe explain {red.id} --backend {shlex.quote(a.backend)}{further_options(a)}"
        return f"a larger case is red too, and tells more: `{command}`"
    if _GREEN not in outcomes or not {_NO_MORE, _LONG}.isdisjoint(outcomes):
        # What the opening is about stands first, and passes last.
        ranking = sorted(
            outcomes,
            key=lambda what: (
                _ORDER.index(what) if what in _ORDER else len(_ORDER) + (what == _GREEN)
            ),
        )
        these = "; ".join(f"{what}: {_ids(outcomes[what])}" for what in ranking)
        return _opening(outcomes, tells) + these
    passes = outcomes[_GREEN]
    # One with a smaller H or I says nothing of a fault that needs this one's.
    passes = [one for one in passes if not smaller(case, one)] or passes
    these = "a larger case passes" if len(passes) == 1 else "larger cases pass"
    return f"{these}: {_ids(passes)}{without(lacking, passes)}"


def _opening(outcomes: Mapping[str, Sequence[Case]], tells: str) -> str:
    """The start of the line where no larger case tells more; no verdict on one that was not
    explained."""
    is_late = not {_LONG, _NOT_BEGUN}.isdisjoint(outcomes)
    if _NO_MORE in outcomes:
        return f"no larger case {'that was explained ' * is_late}{tells}"
    return _LATE if is_late else "no larger case was explained: "


def _ids(cases: Sequence[Case]) -> str:
    return ", ".join(one.id for one in cases)


def lacks(case: Case, others: Sequence[Case]) -> dict[str, list[str]]:
    """What the routing of ``case`` has and that of each other lacks, and the sizes of which the
    other has less, in words, by id."""
    own = routed(case)
    pairs = [(other, routed(other)) for other in others]
    return {
        other.id: (own.beyond(its) if own and its else []) + smaller(case, other)
        for other, its in pairs
    }


def smaller(case: Case, other: Case) -> list[str]:
    """``I 640`` where ``other`` has a smaller I, the same of H, and then both sizes together."""
    sizes = {"H": "hidden", "I": "intermediate"}
    own = {f"{letter} {case.params.get(name)}": name for letter, name in sizes.items()}
    less = [
        size for size, name in own.items() if other.params.get(name, 0) < case.params.get(name, 0)
    ]
    return [*less, _TOGETHER.join(own)] if less else []


def without(lacking: Mapping[str, Sequence[str]], others: Sequence[Case]) -> str:
    """What none of ``others`` has: they say nothing of a fault that needs it."""
    each = [lacking[other.id] for other in others]
    of_all = [what for what in each[0] if all(what in one for one in each)]
    if any(what.startswith(MANY_ROWS) for what in of_all):
        # None has the rows of a full tile, so they do not say that a full one is what decides.
        of_all = [what for what in of_all if not what.startswith(FULL_TILE)]
    if any(what.startswith(("H ", "I ")) and _TOGETHER not in what for what in of_all):
        of_all = [what for what in of_all if _TOGETHER not in what]
    if not of_all:
        return ""
    has = "it does not have" if len(others) == 1 else "none of them has"
    return f"; {has} what this case has: {', '.join(of_all)}"


def worth(diagnosis: Plain) -> int:
    """How much ``explain`` says of a red: 1 for a certain cause and 1 if it is the only one, the
    same for a place; 0 for nothing."""
    steps = (diagnosis["actual"] or {"explanations": []})["explanations"]
    rules = diagnosis.get("batch", {"rules": []})["rules"]
    has_cause = bool(steps) and bool(steps[0]["exact"]) and is_certain(steps[0])
    is_one = bool(steps) and all(map(is_clear, steps))
    return has_cause + is_one + bool(rules) + (len(rules) == 1)


def _judge(
    settings: Settings, cases: Sequence[Case], case: Case, diagnosis: Plain, session: Session | None
) -> tuple[Case | None, Mapping[str, Sequence[Case]]]:
    """The red of ``cases`` that tells most, and more than ``case``; and what became of each that
    was looked at, in words."""
    red, most = None, worth(diagnosis)
    outcomes, running = defaultdict[str, list[Case]](list), list[Case]()
    until = time.perf_counter() + SECONDS
    try:
        with nullcontext(session) if session else Worker(settings.launch()) as worker:
            rule = contract(worker.identity.contract)
            runner = Runner(worker, Store(settings.root, make, rule), None, SECONDS)
            runner.brief = True
            candidates = [one for one in cases if rule.revision in one.revisions]
            if not candidates:
                outcomes[f"not of contract {rule.revision}"] += cases[:MAX_CASES]
            for one in candidates[:MAX_CASES]:
                if time.perf_counter() > until:
                    outcomes[_NOT_BEGUN].append(one)
                    continue
                running = [one]
                status = runner.run(one).status
                if status not in BAD:
                    outcomes[_GREEN if status == "pass" else WORDS[status]].append(one)
                    continue
                takes = diagnosis["seconds"] * weights_of(one) / weights_of(case)
                if one.rows is not None or time.perf_counter() + takes > until:
                    # The oracle, or the deviations, would take too long.
                    outcomes[_LONG].append(one)
                    continue
                tells = worth(_diagnosis(Subject(one.id, settings.root), worker))
                if tells > most:
                    red, most = one, tells
                else:
                    outcomes[_NO_MORE].append(one)
                if red is not None and most >= ENOUGH:
                    break
    except (WorkerError, NoOutput):  # it ran a moment ago; what was found stands
        outcomes["the backend gave no output"] += running or cases[:MAX_CASES]
    return red, outcomes


def weights_of(case: Case) -> int:
    """Weights of linear 1 that one token meets: the time of ``explain`` grows with them."""
    p = case.params
    count: int = p["hidden"] * p["intermediate"] * p["top_k"]
    return count


def _diagnosis(subject: Subject, session: Session) -> Plain:
    """What ``explain`` says of the output that the backend gives now."""
    rule, of_class = contract(session.identity.contract), session.identity.accumulator
    actual = at_hand.run(subject.problem, session, SECONDS)
    findings = judge_forward(
        actual, subject.golden(of_class, rule), of_class, subject.problem
    ).findings
    token, channel = element_of(findings, None, None, None)
    if token is None:
        return {"actual": None}
    rows = {name: stage[token] for name, stage in actual.items()}
    diagnosis = explain(subject.source, token, channel or 0, of_class, rows, contract=rule)
    return diagnosis | of_all_tokens(
        diagnosis["actual"],
        actual,
        token,
        subject.source,
        subject.problem,
        findings,
        of_class,
        rule,
    )
