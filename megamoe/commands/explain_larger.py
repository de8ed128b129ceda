"""The larger case that ``megamoe explain`` names where the data of one tells no cause."""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from megamoe.cases import Case, load_cases, shards
from megamoe.commands.explain_subject import Subject, element_of
from megamoe.commands.shared import further_options
from megamoe.commands.work import Work
from megamoe.explain import explain
from megamoe.explain.others import of_all_tokens
from megamoe.explain.words import is_certain, is_clear
from megamoe.golden import Store, make
from megamoe.judge import BAD, judge_forward
from megamoe.spec.contract import contract
from megamoe.suite import at_hand
from megamoe.suite.routed import routed
from megamoe.suite.runner import Runner
from megamoe.suite.settings import Settings
from megamoe.suite.telling import larger
from megamoe.worker.client import Worker
from megamoe.worker.exchange import NoOutput
from megamoe.worker.session import Session, WorkerError

Plain = Mapping[str, Any]
ENOUGH: Final = 2
"""The :func:`worth` of one cause alone, or of one place alone: no further red is explained."""

TRIED: Final = 4
"""Larger cases that are judged."""
SECONDS: Final = 10.0
"""For all of them. None is begun after this time, and none that is known to take as long."""


def line(a: argparse.Namespace, case: Case, said: Plain) -> str:
    """The larger case to explain in place of ``case``, which has just been judged red; what it
    means if none is; empty where there is none, or where none tells more. Without a backend, which
    would have to run, the one that may be red. ``said``: what ``explain`` says of ``case``."""
    settings = Settings.read(lambda name: getattr(a, name, None))
    seconds = shards.durations(settings.root)
    found = larger(case, load_cases(settings.root))
    found = [one for one in found if seconds.get(one.id, shards.DEFAULT_SECONDS) < SECONDS]
    lacking = lacks(case, found)
    found.sort(key=lambda one: len(lacking[one.id]))
    if not found:
        return ""
    if not a.backend:
        return f"try a larger case, if it is red too: {found[0].id}{without(lacking, found[:1])}"
    with Work("judging larger cases"):
        red, passed = _judged(settings, found[:TRIED], case, said)
    if red is not None:
        command = f"megamoe explain {red.id} --backend {shlex.quote(a.backend)}{further_options(a)}"
        return f"a larger case is red too, and tells more: `{command}`"
    if not passed:
        return ""
    these = "a larger case passes" if len(passed) == 1 else "larger cases pass"
    return f"{these}: {', '.join(one.id for one in passed)}{without(lacking, passed)}"


def lacks(case: Case, others: Sequence[Case]) -> dict[str, list[str]]:
    """What the routing of ``case`` has and that of each other lacks, in words, by id."""
    own = routed(case)
    pairs = [(other.id, routed(other)) for other in others]
    return {name: own.beyond(its) if own and its else [] for name, its in pairs}


def without(lacking: Mapping[str, Sequence[str]], others: Sequence[Case]) -> str:
    """What none of ``others`` has: they say nothing of a fault that needs it."""
    each = [lacking[other.id] for other in others]
    of_all = [what for what in each[0] if all(what in one for one in each)]
    if not of_all:
        return ""
    has = "it does not have" if len(others) == 1 else "none of them has"
    return f"; {has} what this case has: {', '.join(of_all)}"


def worth(said: Plain) -> int:
    """How much ``explain`` says of a red: 1 for a certain cause and 1 if it is the only one, the
    same for a place; 0 for nothing."""
    steps = (said["actual"] or {"explanations": []})["explanations"]
    rules = said.get("batch", {"rules": []})["rules"]
    is_told = bool(steps) and bool(steps[0]["exact"]) and is_certain(steps[0])
    is_one = bool(steps) and all(map(is_clear, steps))
    return is_told + is_one + bool(rules) + (len(rules) == 1)


def _judged(
    settings: Settings, cases: Sequence[Case], case: Case, said: Plain
) -> tuple[Case | None, Sequence[Case]]:
    """The red of ``cases`` that tells most, and more than ``case``; those that pass, where no
    red is among them."""
    red, most, passed = None, worth(said), list[Case]()
    is_red, until = False, time.perf_counter() + SECONDS
    try:
        with Worker(settings.launch()) as worker:
            rule = contract(worker.identity.contract)
            runner = Runner(worker, Store(settings.root, make, rule), None, SECONDS)
            runner.brief = True
            for one in cases:
                if time.perf_counter() > until or rule.revision not in one.revisions:
                    continue
                verdict = runner.run(one)
                if verdict.status == "pass":
                    passed.append(one)
                if verdict.status not in BAD:
                    continue
                is_red = True
                takes = said["seconds"] * weights_of(one) / weights_of(case)
                if one.rows is not None or time.perf_counter() + takes > until:
                    continue  # the oracle, or the deviations, would take too long
                tells = worth(_said(Subject(one.id, settings.root), worker))
                if tells > most:
                    red, most = one, tells
                if most >= ENOUGH:
                    break
    except (WorkerError, NoOutput):  # it ran a moment ago; what was found stands
        pass
    return red, [] if is_red else passed


def weights_of(case: Case) -> int:
    """Weights of linear 1 that one token meets: the time of ``explain`` grows with them."""
    p = case.params
    count: int = p["hidden"] * p["intermediate"] * p["top_k"]
    return count


def _said(subject: Subject, session: Session) -> Plain:
    """What ``explain`` says of the output that the backend gives now."""
    rule, of_class = contract(session.identity.contract), session.identity.accumulator
    got = at_hand.run(subject.problem, session, SECONDS)
    findings = judge_forward(
        got, subject.golden(of_class, rule), of_class, subject.problem
    ).findings
    token, channel = element_of(findings, None, None, None)
    if token is None:
        return {"actual": None}
    rows = {name: stage[token] for name, stage in got.items()}
    said = explain(subject.source, token, channel or 0, of_class, rows, contract=rule)
    return said | of_all_tokens(
        said["actual"], got, token, subject.source, subject.problem, findings, of_class, rule
    )
