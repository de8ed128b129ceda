"""``megamoe reduce``: shrink a failing case to the smallest file that fails."""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from megamoe.cases import Case
from megamoe.cases.stored import load, used_experts
from megamoe.cases.stored_names import free_names, new_file, origin, title
from megamoe.commands import reduce_after
from megamoe.commands.shared import (
    backend_of,
    forward_case,
    of_a_law,
    passes_now,
    picture_of,
    replay_command,
    root_of,
)
from megamoe.commands.work import Work
from megamoe.explain import FromProblem, explain
from megamoe.explain.others import of_all_tokens
from megamoe.explain.words import apart, causes, read_from
from megamoe.golden import Store, make, regenerate
from megamoe.judge import Verdict
from megamoe.printable import quantity
from megamoe.reduce import Failure, Passes, Reduction, keep, reduce, store
from megamoe.spec.contract import contract
from megamoe.spec.problem import Problem
from megamoe.suite import at_hand
from megamoe.suite.settings import Settings
from megamoe.worker.exchange import NoOutput
from megamoe.worker.session import Session

MAX_NAMES: Final = 6
"""Further causes or files of earlier runs that a sentence names."""
_LITTLE: Final = 1 << 27
"""Multiplications of a linear for which the oracle answers in seconds."""


def run(a: argparse.Namespace) -> int:
    """Shrink it, write the file, and show that the file fails in the same way."""
    if a.after:
        return reduce_after.run(a)
    out, earlier = new_file(a.out) if a.out else Path(), list[Path]()
    start = time.perf_counter()
    problem, case, about = _subject(a)
    if not a.out:
        *earlier, out = default_names(Path(a.subject).stem if case is None else case.name)
    again = replay_command(str(out), a.backend, a.device, a.contract)
    with backend_of(a) as (worker, settings), Work("running the whole problem") as work:
        golden, last = None, None  # the last reduction, for Ctrl-C

        def watch(reduction: Reduction) -> None:
            nonlocal last
            last = reduction
            work.now(f"reducing: try {reduction.tries}")

        if case is not None and case.rows is None:
            golden = Store(settings.root, make, contract(worker.identity.contract)).load(case)
        try:
            r = reduce(worker, problem, a.seconds, golden, work.say, settings.timeout, watch)
        except KeyboardInterrupt:
            if last is None or last.problem is problem:
                raise
            size = store(last, out, {**about, "backend": a.backend})
            work.say(
                f"stopped: {out}, {size / 1024:.0f} KiB, is the smallest problem that failed so "
                f"far\nreproduce: {again}"
            )
            raise
        except Passes as passes:
            if case is not None and case.kind == "property":
                raise Passes(of_a_law(case, a.backend, "reduce")) from passes
            raise Passes(f"{passes}; {_passes(a, case, settings)}") from passes
        about["backend"] = a.backend
        for name in Causes().about():  # of the file that is reduced now
            about.pop(name, None)
        causes_before, causes_after = Causes(), Causes()
        if r.original is not None and r.original.status == "fail":
            work.now("looking for the cause in the whole problem and in the reduced one")
            has_golden = golden is not None
            causes_before = causes_of_whole(
                worker, problem, r.original, settings.timeout, has_golden
            )
            causes_after = causes_of(worker, r.problem, r.verdict, settings.timeout)
            about |= causes_before.about()
        fewer = r.with_a_token_fewer()
        work.now("reading the file back")
        verdict, size = keep(r, out, about, settings.timeout)
    print()
    print(picture_of(verdict, title(str(out), about), a.backend, again))
    tokens, experts = r.problem.num_tokens, len(used_experts(r.problem))
    if note := token_need(tokens, fewer):
        print(f"\n{note}")
    if causes_before.lines:
        print(causes_before.text(a.subject))
        if others := further_causes(causes_after.names - causes_before.names, out.name):
            print(f"  ({others})")
    seconds = time.perf_counter() - start
    print(f"\n{out}: {size / 1024:.0f} KiB, {quantity(tokens, 'token')}, "
          f"{quantity(experts, 'expert')} used, after {quantity(r.tries, 'try', 'tries')} in "
          f"{seconds:.0f} s")  # fmt: skip
    if earlier:
        more = f" and {len(earlier) - MAX_NAMES} more" if len(earlier) > MAX_NAMES else ""
        print(f"unchanged: {', '.join(map(str, earlier[:MAX_NAMES]))}{more}, from earlier runs")
    print(f"reproduce: {again}")
    return 0


def _passes(a: argparse.Namespace, case: Case | None, settings: Settings) -> str:
    """What to do where there is nothing to reduce."""
    if case is None:
        command = replay_command(a.subject, a.backend, a.device, a.contract)
        return passes_now(a.subject, command, "", a.backend)
    options = settings.again()
    command = f"megamoe check --backend {shlex.quote(a.backend)} --case {case.id}{options}"
    return passes_now(case.id, command, case.id, a.backend, options)


def token_need(tokens: int, fewer: str) -> str:
    """What the number of tokens says of the fault; empty where it says nothing. ``fewer``: the
    status with one token fewer."""
    if fewer != "pass":
        return ""
    passes = "1 token passes" if tokens == 2 else f"{tokens - 1} tokens pass"
    return f"it needs {tokens} tokens: {passes}"


def default_names(subject: str) -> list[Path]:
    """The default names of the file for a case, or for a file without its ending: those that exist
    already, then the first that is free."""
    return free_names(f"reduced-{subject.removeprefix('reduced-')}")


def further_causes(names: Collection[str], file: str) -> str:
    """The causes that fit the reduced file only, for a sentence; without names if they are more
    than :data:`MAX_NAMES`, and empty where there are none."""
    if not names:
        return ""
    fit = quantity(len(names), "further cause fits", "further causes fit")
    listing = f": {'; '.join(sorted(names))}" if len(names) <= MAX_NAMES else ""
    return f"{fit} {file}, which has fewer values to tell them apart{listing}"


@dataclass(frozen=True)
class Causes:
    """What explains a red: lines for a person, and the names of the causes that fit exactly."""

    lines: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    read_from: str = ""
    """The tokens that were looked at."""
    every: list[str] = field(default_factory=list)
    """``lines`` with the causes that are left out for a person."""

    def about(self) -> dict[str, Any]:
        """What the reduced file says of them."""
        return {"causes": self.lines, "causes_read_from": self.read_from, "every_cause": self.every}

    def text(self, subject: str) -> str:
        """The lines under a heading that names ``subject``; begins with an empty line."""
        return "\n".join([f"\nread from {self.read_from} of {subject}:", *self.lines])


def causes_of(
    session: Session, problem: Problem, verdict: Verdict, timeout: float, is_whole: bool = True
) -> Causes:
    """The causes of ``verdict`` on ``problem``, by all values of its worst token, and, if the
    verdict ``is_whole``, by all tokens that are wrong. Empty where the verdict has no worst token,
    or the backend does not answer again."""
    worst = verdict.worst
    if worst is None or worst.token is None:
        return Causes()
    try:
        actual = at_hand.run(problem, session, timeout)
    except NoOutput:
        return Causes()
    rows = {name: bits[worst.token] for name, bits in actual.items()}
    channel = worst.channel or 0 if worst.stage == "y" else 0
    identity = session.identity
    source, rule = FromProblem(problem), contract(identity.contract)
    diagnosis = explain(source, worst.token, channel, identity.accumulator, rows, contract=rule)
    if is_whole:
        diagnosis |= of_all_tokens(
            diagnosis["actual"], actual, worst.token, source, problem, verdict.findings,
            identity.accumulator, rule,
        )  # fmt: skip
    steps = diagnosis["actual"]["explanations"]
    names = {way["what"] for step in steps for way in apart(step["exact"])}
    few, every = ([f"  {line}" for line in causes(diagnosis, every=of)] for of in (False, True))
    return Causes(few, names, read_from(diagnosis), every)


def causes_of_whole(
    session: Session, problem: Problem, verdict: Verdict, timeout: float, has_golden: bool = False
) -> Causes:
    """The causes of the ``verdict`` that a reduction began with; by all tokens that are wrong,
    where that verdict is of all tokens or takes little to compute."""
    whole, is_whole = _whole(session, problem, verdict, has_golden, timeout)
    return causes_of(session, problem, whole, timeout, is_whole)


def _whole(
    session: Session, problem: Problem, verdict: Verdict, has_golden: bool, timeout: float
) -> tuple[Verdict, bool]:
    """The verdict on all tokens, and whether it is that: without a golden, ``verdict`` is of a few
    tokens, and the oracle answers for all of them only where that takes little."""
    if has_golden:
        return verdict, True
    p = problem
    if p.num_tokens * p.top_k * p.hidden_size * p.intermediate_size > _LITTLE:
        return verdict, False
    again, _ = at_hand.judge(problem, session, "case", timeout=timeout)
    return (again, True) if Failure.of(again) == Failure.of(verdict) else (verdict, False)


def _subject(a: argparse.Namespace) -> tuple[Problem, Case | None, dict[str, Any]]:
    """The problem, its case where it is of one, and its origin."""
    if Path(a.subject).suffix == ".safetensors":
        record = load(Path(a.subject))
        name = Path(a.subject).name
        about = {**record.about, "reduced_from": name, "origin": origin(record.about) or name}
        return record.problem, None, about
    case = forward_case(root_of(a), a.subject, "reduce")
    return Problem(**regenerate(case)), case, {"reduced_from": case.id}
