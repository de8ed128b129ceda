"""``megamoe bisect``: which commit, version or input moved the bits, and where it shows first."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megamoe.compare import ab, archive, classes, disk, stages, walk
from megamoe.compare.checkout import git, worktree
from megamoe.compare.job import Job, request_of
from megamoe.compare.probe import Prober, different
from megamoe.compare.running import contract_lines
from megamoe.compare.sides import Side, with_target
from megamoe.compare.state import State, key
from megamoe.printable import printable, quantity

OnStep = Callable[[dict[str, Any], bool], None]


def run(job: Job, on_step: OnStep, note: Callable[[str], None]) -> dict[str, Any]:
    """Bisect; returns the report. The checkout is never moved: git walks a worktree of its own.

    Raises ``ValueError`` if the ends do not allow a bisect, and
    :class:`megamoe.compare.disk.DiskFull`; the results so far are kept either way.
    """
    request = request_of(job)
    folder = job.folder or disk.cache_root() / "bisect" / key(request)
    with ExitStack() as stack:
        try:
            stack.enter_context(disk.lock(folder))
        except OSError as error:
            raise disk.cause_of(error) from error
        state = State.open(folder, request, job.fresh)
        if state.earlier_steps:
            note(f"resumed: {quantity(state.earlier_steps, 'step')} known from {folder}")
        prober = Prober(job.test, state, on_step)
        over = _over_git if job.where.good.kind == "git" and not job.where.sides else _over_list
        outcome, total, log = over(job, prober, stack, folder)
        ends = {f"{s['role']} end": s.get("facts", {}) for s in state.steps if "role" in s}
        for line in contract_lines(ends):
            note(line)
        for failure in list(prober.failures.values())[:3]:
            note(f"left out, since an end cannot run it: {failure}")
        return _report(job, prober, outcome, total, log, folder)


def _over_list(
    job: Job, prober: Prober, stack: ExitStack, folder: Path
) -> tuple[walk.Outcome, int, str]:
    sides = {side.text: side for side in job.where.sides}
    if len(sides) != len(job.where.sides):
        raise ValueError("the list names something twice; each may stand once")
    if len(sides) < 2:
        raise ValueError("a list needs at least two entries: a good one first, a bad one last")

    def tree_of(side: Side) -> Path | None:
        if side.kind != "git":
            return None
        assert side.repo is not None
        return stack.enter_context(worktree(side.repo, side.target, folder / "tree"))

    def end(text: str) -> dict[str, Any]:
        return prober.end(text, "", sides[text], tree_of(sides[text]))

    revs = list(sides)
    _ends(prober, lambda: end(revs[-1]), lambda: end(revs[0]), revs)

    def probe(text: str) -> str:
        return str(prober.step(text, "", sides[text], tree_of(sides[text]))["verdict"])

    return walk.over_list(revs, probe), len(revs) - 1, ""


def _over_git(
    job: Job, prober: Prober, stack: ExitStack, folder: Path
) -> tuple[walk.Outcome, int, str]:
    w = job.where
    home, good, bad = w.good.repo, w.good.target, w.bad.target
    assert home is not None
    walk.require_order(home, good, bad)
    tree = stack.enter_context(worktree(home, bad, folder / "tree"))

    def at(commit: str) -> tuple[str, str, Side, Path]:
        return commit, _subject(home, commit), with_target(w.good, commit), tree

    def end(commit: str) -> dict[str, Any]:
        walk.tidy(tree)
        git(tree, "checkout", "--detach", "--quiet", commit)
        return prober.end(*at(commit))

    _ends(prober, lambda: end(bad), lambda: end(good))
    among = walk.commits(home, good, bad, w.only)
    total = len(walk.commits(home, good, bad))
    if not among:
        raise ValueError(
            f"good and bad differ, but no commit between them touches {' '.join(w.only)}; "
            "widen --only, or leave it away"
        )
    if len(among) == 1:
        return walk.Outcome(among[0]), total, ""
    walk.tidy(tree)
    outcome, log = walk.over_git(
        tree, good, bad, w.only, lambda commit: str(prober.step(*at(commit))["verdict"]), folder
    )
    return outcome, total, log


def _ends(
    prober: Prober, bad: Callable[[], dict[str, Any]], good: Callable[[], dict[str, Any]],
    texts: Sequence[str] = (),
) -> None:  # fmt: skip
    """Check both ends, the bad one first, before anything else is built. ``texts``: the list that
    they are the ends of."""
    steps = {}
    before = {step["rev"] for step in prober.state.steps}
    for name, look in (("bad", bad), ("good", good)):
        step = look()
        if step["verdict"] in ("skip", "flaky"):
            what = "cannot be run" if step["verdict"] == "skip" else "is flaky"
            rest = texts[:-1] if name == "bad" else texts[1:]
            without = f"; without it: --over {shlex.join(rest)}" if len(rest) > 1 else ""
            raise ValueError(f"the {name} end {_short(step)} {what}: {step['reason']}{without}")
        if step["verdict"] not in ("seen", name):
            raise ValueError(
                f"the {name} end {_short(step)} is {step['verdict']}"
                f"{': ' + step['reason'] if step['reason'] else ''}; "
                + ("look earlier for a good one" if name == "good" else "is the failure gone?")
            )
        step["role"] = name
        steps[name] = step
        prober.on_step(step, step["rev"] in before)
    state = prober.state
    if prober.test.how == "bits":
        changes = different(steps["good"]["digests"], steps["bad"]["digests"])
        if not changes:
            raise ValueError(
                "both ends return the same bits in "
                f"{quantity(len(steps['good']['digests']), 'case')}; there is nothing to bisect: "
                "take a case that is red now (`megamoe check --backend "
                f"{shlex.quote(prober.test.backend)}` names some), cases that show small changes "
                "(--case 'forward/directed-*'), or other ends"
            )
        state.selection = sorted(changes)
        steps["good"]["verdict"], steps["bad"]["verdict"] = "good", "bad"
        prober.classify(steps["good"], steps["bad"], sorted(changes))
        steps["bad"]["reason"] = (
            f"other bits than the good end's in {quantity(len(changes), 'case')} "
            f"({classes.WORDS[steps['bad']['class']]})"
        )
    elif prober.test.how == "judge":
        state.selection = sorted(set(steps["good"]["digests"]) & set(steps["bad"]["digests"]))
    state.save()


# --- the report -------------------------------------------------------------------------------


def _report(
    job: Job, prober: Prober, outcome: walk.Outcome, total: int, log: str, folder: Path
) -> dict[str, Any]:
    state = prober.state
    hidden = ("digests", "facts", "role")
    place = {rev: i for i, rev in enumerate(_line(job))}
    report: dict[str, Any] = {
        "schema": 1, "kind": "bisect", "headline": "", "how": job.test.how,
        "backend": job.test.backend, "device": job.test.device, "range": total,
        "builds": state.builds, "narrowed": state.selection,
        "steps": [
            {k: v for k, v in s.items() if k not in hidden} | {"position": place.get(s["rev"])}
            for s in state.steps
        ],
        "first_bad": outcome.first_bad, "subject": "", "suspects": list(outcome.suspects),
        "last_good": None, "cases": [], "first_stage": None, "worst": None, "archive": None,
    }  # fmt: skip
    last_good = _last_good(job, state, outcome)
    report["last_good"] = last_good
    report["class"] = None
    bad = outcome.first_bad and state.find(outcome.first_bad)
    if outcome.first_bad and job.where.good.kind == "git" and not job.where.sides:
        assert job.where.good.repo is not None
        report["subject"] = _subject(job.where.good.repo, outcome.first_bad)
    if bad and job.test.how != "command":
        base = _with_bits(prober, last_good)
        changes = prober.changes_between(base, bad["rev"], sorted(bad["digests"]))
        _add_changes(report, changes)
        report["class"] = bad.get("class")
        report["headline"] = headline(report)
        target = job.archive or folder / "bisect.tar.gz"
        path = archive.write(target, job, prober, report, (base, bad["rev"]), log)
        report["archive"] = str(path)
    report["headline"] = headline(report)
    return report


def _subject(home: Path, commit: str) -> str:
    """A commit's first line: anybody's text, so without what a terminal would obey."""
    return printable(git(home, "show", "--no-patch", "--format=%s", commit))


def _with_bits(prober: Prober, rev: str) -> str:
    """The good step whose bits are kept: by bits, every good step has the good end's."""
    if prober.state.outputs(rev).exists():
        return rev
    return str(next(s["rev"] for s in prober.state.steps if s.get("role") == "good"))


def _line(job: Job) -> list[str]:
    """All that the walk could have tried, the good end first."""
    w = job.where
    if w.sides:
        return [side.text for side in w.sides]
    assert w.good.repo is not None
    return [w.good.target, *reversed(walk.commits(w.good.repo, w.good.target, w.bad.target))]


def _last_good(job: Job, state: State, outcome: walk.Outcome) -> str:
    """The good step nearest before the first bad one, or before all the suspects."""
    goods = [step["rev"] for step in state.steps if step["verdict"] == "good"]
    end = outcome.first_bad or outcome.suspects[-1]
    if job.where.sides:
        return str(max(goods, key=_line(job).index))
    home = job.where.good.repo
    assert home is not None
    before = [g for g in goods if git(home, "merge-base", g, end) == g]
    return str(min(before, key=lambda g: len(walk.commits(home, g, end))))


def _add_changes(report: dict[str, Any], changes: dict[str, dict[str, stages.Change]]) -> None:
    """Cases, the first stage over all of them, and the element farthest off in it."""
    cases: list[dict[str, Any]] = []
    for name, by_stage in changes.items():
        names = [stage for stage, m in by_stage.items() if m.count]
        if names:
            entry = {
                stage: {"elements": m.elements, "moved": m.count, "max_ulps": m.max_ulps}
                for stage, m in by_stage.items()
            }
            cases.append({"id": name, "first_stage": names[0], "stages": entry})
    cases.sort(key=lambda c: (stages.place(c["first_stage"]), c["id"]))
    report["cases"] = cases
    if not cases:
        return
    stage = report["first_stage"] = cases[0]["first_stage"]
    worst = [
        (c["id"], changes[c["id"]][stage]) for c in cases if changes[c["id"]].get(stage) is not None
    ]
    far = max(worst, key=lambda w: (w[1].count > 0, w[1].max_ulps is None, w[1].max_ulps or 0))
    plain = stages.worst_dict(stage, far[1].finding)
    report["worst"] = plain and {"case": far[0], **plain}
    report["first_text"] = f"{far[0]} {ab.stage_text(stage, far[1])}"


def headline(report: dict[str, Any]) -> str:
    """A line with the first bad step, the bits that moved, and the certainty."""
    effort = f"{quantity(report['builds'], 'build')} for {quantity(report['range'], 'candidate')}"
    if report["first_bad"] is None:
        names = ", ".join(_name(r) for r in report["suspects"][:6])
        more = len(report["suspects"]) - 6
        return (
            f"bisect: the first bad one is one of {len(report['suspects'])}: {names}"
            f"{f' and {more} more' if more > 0 else ''} (the others between could not be judged); "
            f"last good {_name(report['last_good'])}; {effort}"
        )
    what = f"; first at {report['first_text']}" if report.get("first_text") else ""
    word = classes.WORDS.get(report.get("class") or "")
    what = f"; its bits are {word}{what}" if word else what
    also = f", {len(report['cases'])} cases" if len(report["cases"]) > 1 else ""
    subject = f" ({report['subject']})" if report["subject"] else ""
    return (
        f"bisect: first bad {_name(report['first_bad'])}{subject}, last good "
        f"{_name(report['last_good'])}{what}{also}; {effort}"
    )


def _name(rev: str) -> str:
    return rev[:12] if len(rev) == 40 and rev.isalnum() else rev


def _short(step: dict[str, Any]) -> str:
    return f"{_name(step['rev'])}{' (' + step['subject'] + ')' if step['subject'] else ''}"


__all__: Sequence[str] = ("headline", "run")
