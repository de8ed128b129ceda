"""``megamoe ab LEFT RIGHT``: two environments, the same inputs, bit for bit."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from megamoe.cases import Case
from megamoe.compare import classes, disk, stages
from megamoe.compare.checkout import git, worktree
from megamoe.compare.judged import Judge
from megamoe.compare.processes import CannotStart
from megamoe.compare.running import COMPARABLE, Answer, NoAnswer, NoOffer, Running, ids_of
from megamoe.compare.sides import Options, Side, ready
from megamoe.compare.stages import Change
from megamoe.golden import GoldenError, regenerate
from megamoe.judge import BadOutput
from megamoe.printable import part, quantity
from megamoe.worker.choice import AUTO

OnResult = Callable[[dict[str, Any]], None]
NAMES: Final = ("left", "right")
UNTRACKED_LIMIT: Final = 3
"""Untracked files, or folders of them, that a note names."""


@dataclass(frozen=True)
class Question:
    """The two sides, and the options of the comparison."""

    sides: tuple[Side, Side]
    backends: tuple[str, str]
    cases: Sequence[Case]
    root: Path
    device: str = "cpu"
    timeout: float = 120.0
    options: Options = field(default_factory=Options)
    contract: str = AUTO


def run(q: Question, on_result: OnResult) -> dict[str, Any]:
    """Compare case by case; ``on_result`` is called with each case's result. Returns the report.

    Raises :class:`CannotStart` if a side cannot be created or started at all.
    """
    cases = [case for case in q.cases if case.kind in COMPARABLE]
    if not cases:
        raise ValueError("no case with tensors is selected; errors cases cannot be compared")
    results = []
    judge = Judge(q.root)
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="megamoe-ab-")))
        # Both are started before either is waited for: importing torch is most of the time.
        sides = [stack.enter_context(_start(q, i, work, stack)) for i in (0, 1)]
        for i, side in enumerate(sides):
            _on_side(q, i, side.greet)
        for case in cases:
            result = _one(case, sides, judge)
            on_result(result)
            results.append(result)
        facts = [side.facts for side in sides]
    return _report(q, results, facts)


def _start(q: Question, i: int, work: Path, stack: ExitStack) -> Running:
    side = q.sides[i]

    def make() -> Running:
        tree = None
        if side.kind == "git":
            assert side.repo is not None
            tree = stack.enter_context(worktree(side.repo, side.target, work / NAMES[i]))
        runtime = ready(side, disk.cache_root(), tree, q.options)
        return Running(runtime, q.backends[i], q.device, q.timeout, q.contract)

    return _on_side(q, i, make)


def _on_side(q: Question, i: int, step: Callable[[], Running]) -> Running:
    """``step()``; an error says which side it is of."""
    try:
        return step()
    except CannotStart as error:
        raise CannotStart(f"{NAMES[i]} side {q.sides[i].text}: {error}") from error


def _one(case: Case, sides: Sequence[Running], judge: Judge) -> dict[str, Any]:
    """One case on both sides."""
    inputs = regenerate(case)
    result: dict[str, Any] = {"id": case.id, "status": "error", "stages": {}, "first_stage": None}
    replies = [_reply(side, case, inputs) for side in sides]
    lacks = [one for one in replies if isinstance(one, NoOffer)]
    if len(lacks) == len(sides):
        reason = f"neither side has it: {lacks[0].what}"
        return {**result, "status": "not-provided", "reason": reason}
    answers = []
    for name, one in zip(NAMES, replies, strict=True):
        if isinstance(one, NoAnswer):
            return {**result, "reason": f"{name}: {one}"}
        answers.append(one)
    outputs = [stages.in_order(answer.bits) for answer in answers]
    by_stage = stages.compare(outputs[0], outputs[1], ids_of(case, inputs))
    if not by_stage:
        return {**result, "reason": "the two sides show no stage in common"}
    changes = [name for name, stage in by_stage.items() if stage.count]
    result["status"] = "moved" if changes else "identical"
    result["stages"] = {name: _stage(stage) for name, stage in by_stage.items()}
    result["class"] = classes.SAME
    result["one_sided"] = sorted(set(outputs[0]) ^ set(outputs[1]))
    if changes:
        result["first_stage"] = changes[0]
        result["worst"] = stages.worst_dict(changes[0], by_stage[changes[0]].finding)
        result["reason"] = stage_text(changes[0], by_stage[changes[0]])
        right = _judge(case, inputs, answers, sides, judge, result)
        result["class"] = classes.of_step(*right)
        result["right_under"] = dict(zip(NAMES, right, strict=True))
        result["reason"] += f" ({classes.describe(result['class'], *right)})"
        again = [_reply(side, case, inputs) for side in sides]
        result["unsteady"] = [
            name for name, one, now in zip(NAMES, answers, again, strict=True)
            if isinstance(now, NoAnswer) or now.digests != one.digests
        ]  # fmt: skip
    return result


def _reply(side: Running, case: Case, inputs: Mapping[str, Any]) -> Answer | NoAnswer:
    try:
        return side.ask(case, inputs)
    except NoAnswer as why:
        return why


def _stage(stage: Change) -> dict[str, Any]:
    out = {"elements": stage.elements, "moved": stage.count, "max_ulps": stage.max_ulps,
           "outside_left": None, "outside_right": None}  # fmt: skip
    return {**out, "text": stage.text} if stage.text else out


def stage_text(name: str, stage: Change) -> str:
    """``l2_acts: 12 of 4096 elements, at most 1 ULP``."""
    if stage.text:
        return f"{name}: {stage.text}"
    far = {None: "NaN on one side", 0: "signs of zero or payloads of NaN only"}.get(
        stage.max_ulps, f"at most {stage.max_ulps} ULP"
    )
    return f"{name}: {stage.count} of {stage.elements} elements, {far}"


def _judge(
    case: Case, inputs: Mapping[str, Any], answers: Sequence[Answer], sides: Sequence[Running],
    judge: Judge, result: dict[str, Any],
) -> list[list[str]]:  # fmt: skip
    """Judge both sides by the goldens, for every stage of the comparison.

    Returns the contracts under which each side is right.
    """
    right = []
    for name, answer, side in zip(NAMES, answers, sides, strict=True):
        own = {}
        try:
            verdict, outside = judge.verdict(case, inputs, answer, side)
        except (GoldenError, BadOutput, KeyError) as error:
            result[f"verdict_{name}"] = f"cannot be judged: {error}"
        else:
            own[side.identity.contract] = verdict
            result[f"verdict_{name}"] = verdict.status
            for stage, entry in result["stages"].items():
                entry[f"outside_{name}"] = outside.get(stage, 0)
        accumulator = side.identity.accumulator
        right.append(judge.right_under(case, inputs, answer.bits, accumulator, own))
    return right


# --- the report -------------------------------------------------------------------------------


def _report(
    q: Question, results: list[dict[str, Any]], facts: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    cases = [r for r in results if r["status"] != "not-provided"]
    first = next((r["first_stage"] for r in _by_stage(cases)), None)
    sides = [
        {"text": side.text, "kind": side.kind, **fact, "asked": backend}
        for side, backend, fact in zip(q.sides, q.backends, facts, strict=True)
    ]
    report = {
        "schema": 1, "kind": "ab", "left": sides[0], "right": sides[1], "headline": "",
        "first_stage": first, "cases": cases,
        "not_compared": [r["id"] for r in results if r["status"] == "not-provided"],
    }  # fmt: skip
    report["headline"] = headline(report)
    return report


def _by_stage(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    changes = [r for r in results if r["status"] == "moved"]
    return sorted(changes, key=lambda r: stages.place(r["first_stage"]))


def exit_code(report: dict[str, Any]) -> int:
    """0: all identical; 1: something moved; 2: nothing moved, but not all could be compared."""
    statuses = [case["status"] for case in report["cases"]]
    if "moved" in statuses:
        return 1
    return 2 if "error" in statuses or not statuses else 0


def headline(report: dict[str, Any]) -> str:
    """A line for a pull request: the two sides, and the answer."""
    left, right = (_name(report[name]) for name in NAMES)
    if left == right:  # two files, say, whose backends have one name
        left, right = (_name(report[name], "asked") for name in NAMES)
    cases = report["cases"]
    versus = f"A/B {left} -> {right}"
    changes = _by_stage(cases)
    failures = sum(case["status"] == "error" for case in cases)
    rest = f"; {failures} could not be compared" if failures else ""
    same = [case for case in cases if case["status"] == "identical"]
    if changes:
        worst = changes[0]
        stage = worst["stages"][worst["first_stage"]]
        far = "NaN" if stage["max_ulps"] is None else f"{stage['max_ulps']} ULP"
        outs = [stage[f"outside_{n}"] for n in NAMES]
        verdict = "" if None in outs else f"; wrong elements: left {outs[0]}, right {outs[1]}"
        counts = Counter(case["class"] for case in changes)
        kinds = ", ".join(
            f"{counts[name]} {classes.WORDS[name]}" for name in classes.CLASSES if counts[name]
        )
        shaky = sorted({n for case in changes for n in case["unsteady"]})
        doubt = f"; {' and '.join(shaky)} does not repeat its own bits" if shaky else ""
        return (
            f"{versus}: {part(len(changes), len(cases), 'case')} moved ({kinds}), first at "
            f"{worst['first_stage']} (as {worst['id']}: {stage['moved']} of {stage['elements']} "
            f"elements, at most {far}{verdict}){doubt}{rest}"
        )
    if not same:
        return f"{versus}: could not be compared ({quantity(failures, 'case')} failed to run)"
    elements = sum(s["elements"] for case in same for s in case["stages"].values())
    names = sorted({n for case in same for n in case["stages"]}, key=stages.place)
    return (
        f"{versus}: identical bit for bit in {part(len(same), len(cases), 'case')} "
        f"({elements:,} elements of {', '.join(names)}){rest}"
    )


def _name(side: dict[str, Any], backend: str = "backend") -> str:
    text = str(side["text"])
    commit = str(side.get("commit", ""))[:10]
    name = f"{text} ({commit})" if commit and commit not in text else text
    return f"{name}, {side.get(backend, side['backend'])}"


def describe(repo: Path | None) -> str:
    """A note where a checkout has what a revision does not show; '' where it has nothing."""
    lines = [] if repo is None else git(repo, "status", "--porcelain", check=False).splitlines()
    files = [line[3:] for line in lines if line.startswith("?? ")]
    has = ["uncommitted changes"] if len(files) < len(lines) else []
    if files:
        more = ", ..." if len(files) > UNTRACKED_LIMIT else ""
        names = ", ".join(files[:UNTRACKED_LIMIT]) + more
        has.append(f"untracked files ({names})")
    if not has:
        return ""
    contents = " and ".join(has)
    return f"{repo} has {contents}; a revision is compared without them (`this` has them)"
