"""One step of a bisect: create the environment, run the cases, say good, bad, skip or flaky.

A step that cannot be built or run is skipped, not blamed. A step that does not repeat its bits is
flaky, and skipped too. A full disk is neither: it ends the bisect and keeps all results so far.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from megamoe.cases import Case
from megamoe.compare import ab, classes, disk, stages
from megamoe.compare.command import by_command
from megamoe.compare.judged import Judge
from megamoe.compare.processes import CannotStart
from megamoe.compare.question import EXTRA_RUNS, Test, Unclear
from megamoe.compare.running import Answer, Inputs, NoAnswer, NotOffered, Running, ids_of
from megamoe.compare.sides import Ready, Side, ready
from megamoe.compare.state import State
from megamoe.judge import BadOutput, Verdict
from megamoe.worker.session import Identity

CLASSIFIED: Final = 8
"""Cases of a step whose moved bits are judged by every contract."""
Digests = dict[str, dict[str, str]]


@dataclass
class _Run:
    """The result of one process."""

    identity: Identity
    facts: dict[str, Any]
    digests: Digests = field(default_factory=dict)
    verdict: str = ""
    """good or bad, where the goldens decide."""
    reason: str = ""


class _Judging:
    """The goldens' verdicts within one step: the same bits have the same."""

    def __init__(self, root: Path) -> None:
        self.judge = Judge(root)
        self._known: dict[str, list[tuple[dict[str, str], Verdict]]] = {}

    def complaint(
        self, case: Case, given: Mapping[str, Any], answer: Answer, side: Running
    ) -> list[str]:
        """A line if the case fails. Raises the errors of :meth:`.Judge.verdict`."""
        known = self._known.setdefault(case.id, [])
        verdict = next((v for digests, v in known if digests == answer.digests), None)
        if verdict is None:
            verdict = self.judge.explained(case, given, answer, side)
            known.append((answer.digests, verdict))
        return [f"{case.id}: {verdict.reason}"] if verdict.status == "fail" else []


@dataclass
class Prober:
    """Asks one environment after the other."""

    test: Test
    state: State
    said: Callable[[dict[str, Any], bool], None]
    """Called with each step, and whether it was known already."""
    failed: dict[str, str] = field(default_factory=dict)
    """Cases that an end could not run, and why: the bisect goes on without them."""
    inputs: Inputs = field(default_factory=Inputs)

    def __post_init__(self) -> None:
        self.judge = Judge(self.test.root)

    def step(self, rev: str, subject: str, side: Side, tree: Path | None) -> dict[str, Any]:
        """Good, bad, skip or flaky; once the ends are known. Known steps cost nothing."""
        known = self.state.find(rev)
        if known is not None and known["verdict"] != "seen":
            self.said(known, True)
            return known
        made, built = self._made(rev, subject, side, tree)
        if made["verdict"] == "seen" and self.test.how == "bits":
            self._against_good(made)
        self.state.add(made, built)
        self._forget(made)
        self.said(made, False)
        return made

    def end(self, rev: str, subject: str, side: Side, tree: Path | None) -> dict[str, Any]:
        """An end; by bits it is only seen, since nothing is there to compare with yet."""
        known = self.state.find(rev)
        if known is None:
            known, built = self._made(rev, subject, side, tree)
            if known["verdict"] in ("skip", "flaky"):
                return known  # not kept: the next try may mend it
            self.state.add(known, built)
        return known

    def _made(
        self, rev: str, subject: str, side: Side, tree: Path | None
    ) -> tuple[dict[str, Any], bool]:
        disk.require_room(self.state.folder)
        started = time.monotonic()
        step: dict[str, Any] = {"rev": rev, "subject": subject, "verdict": "skip", "reason": ""}
        try:
            made = ready(side, disk.cache_root(), tree, self.test.options)
            step |= (
                by_command(self.test, made, self.state.folder)
                if self.test.how == "command"
                else self._cases(rev, made)
            )
        except (CannotStart, Unclear) as error:
            step["reason"] = str(error)
        except OSError as error:
            raise disk.said(error) from error
        step["seconds"] = round(time.monotonic() - started, 2)
        return step, True

    # --- by bits and by verdict ---------------------------------------------------------------

    def chosen(self) -> list[Case]:
        """The cases of the step: all cases at the ends, then those that tell the ends apart."""
        few = self.state.narrowed
        return [c for c in self.test.cases if few is None or c.id in few]

    def kept(self, rev: str, case_id: str) -> Path:
        """The folder with the bits of a step, as safetensors."""
        return self.state.outputs(rev) / f"{case_id.replace('/', '--')}.safetensors"

    def _cases(self, rev: str, made: Ready) -> dict[str, Any]:
        runs: list[_Run] = []
        wanted = self.test.repeat
        judging = _Judging(self.test.root) if self.test.how == "judge" else None
        # The next process imports torch while this one computes.
        sides = [self._side(made) for _ in range(wanted)]
        try:
            while len(runs) < wanted:
                with sides.pop(0) if sides else self._side(made) as side:
                    if runs:
                        side.worker.like = runs[0].identity
                    runs.append(self._run(side, "" if runs else rev, judging))
                if judging:
                    differs = len({run.verdict for run in runs}) > 1
                else:
                    differs = any(run.digests != runs[0].digests for run in runs)
                if differs:
                    wanted = self.test.repeat + EXTRA_RUNS
        finally:
            for side in sides:
                side.close()
        first = runs[0]
        same = {"digests": first.digests, "facts": first.facts}
        if judging and len({run.verdict for run in runs}) == 1:
            return {"verdict": first.verdict, "reason": first.reason, **same}
        if not judging and all(run.digests == first.digests for run in runs):
            return {"verdict": "seen", **same}
        return {"verdict": "flaky", "reason": _how_flaky(runs), "facts": runs[-1].facts}

    def _side(self, made: Ready) -> Running:
        t = self.test
        return Running(made, t.backend, t.device, t.timeout, t.contract)

    def _run(self, side: Running, rev: str, judging: _Judging | None) -> _Run:
        """Every case in one process; the bits are kept where ``rev`` is named.

        Raises :class:`Unclear` where a case gives none.
        """
        run = _Run(side.identity, side.facts)
        bad = []
        for case in self.chosen():
            given = self.inputs.of(case)
            try:
                answer = side.ask(case, given)
                if judging:
                    bad += judging.complaint(case, given, answer, side)
            except NotOffered:
                continue
            except (NoAnswer, BadOutput) as why:
                failed = f"{case.id}: {why}"
                if self.state.narrowed is not None:
                    raise Unclear(failed) from None
                self.failed[case.id] = failed  # at an end: do without the case, if others run
                continue
            run.digests[case.id] = answer.digests
            if rev:
                stages.write_bits(self.kept(rev, case.id), answer.bits)
        if not run.digests:
            first = next(iter(self.failed.values()), "")
            raise Unclear(first or "the backend has nothing that the cases ask for")
        if judging:
            more = f"; and {len(bad) - 1} more cases" if len(bad) > 1 else ""
            run.verdict, run.reason = ("bad", bad[0] + more) if bad else ("good", "")
        return run

    def _against_good(self, step: dict[str, Any]) -> None:
        """Compare a seen step with the good end."""
        good = next(s for s in self.state.steps if s.get("role") == "good")
        moved = different(good["digests"], step["digests"])
        missing = [case for case in self.state.narrowed or [] if case not in step["digests"]]
        if missing:
            step |= {"verdict": "skip", "reason": f"the backend does not offer {missing[0]}"}
            return
        step["verdict"] = "bad" if moved else "good"
        self.classify(good, step, list(moved))
        if moved:
            case, names = next(iter(moved.items()))
            found = self.moved_between(good["rev"], step["rev"], [case])[case]
            more = f"; and {len(moved) - 1} more cases" if len(moved) > 1 else ""
            said = step["classes"].get(case, step["class"])
            text = ab.stage_text(names[0], found[names[0]])
            step["reason"] = f"{case}: {text} ({said}){more}"

    def classify(self, good: Mapping[str, Any], step: dict[str, Any], moved: Sequence[str]) -> None:
        """Classify the moved bits of a step: within the class, another contract, outside.

        Only the :data:`CLASSIFIED` first cases count: each has to be judged by every contract.
        """
        known = {case.id: case for case in self.test.cases}
        step["class"], step["classes"], found = classes.SAME, {}, []
        for name in moved[:CLASSIFIED]:
            given, right = self.inputs.of(known[name]), []
            for one in (good, step):
                path = self.kept(one["rev"], name)
                bits = stages.read_bits(path) if path.exists() else {}
                accumulator = one["facts"]["accumulator"]
                right.append(self.judge.right_under(known[name], given, bits, accumulator))
            found.append(classes.of_step(*right))
            step["classes"][name] = classes.said(found[-1], *right)
        step["class"] = classes.worst(found)

    def moved_between(
        self, left: str, right: str, cases: Sequence[str]
    ) -> dict[str, dict[str, stages.Moved]]:
        """The bits that moved between the stored outputs of two steps, case by case."""
        known = {case.id: case for case in self.test.cases}
        out = {}
        for name in cases:
            a, b = (self.kept(rev, name) for rev in (left, right))
            if a.exists() and b.exists():
                ids = ids_of(known[name], self.inputs.of(known[name]))
                out[name] = stages.compare(stages.read_bits(a), stages.read_bits(b), ids)
        return out

    def _forget(self, step: Mapping[str, Any]) -> None:
        """Keep the bits of the ends and of the nearest bad step; by verdict, also of good ones."""
        if step["verdict"] in ("skip", "flaky"):
            self.state.drop_outputs(step["rev"])
        middle = [s for s in self.state.steps if "role" not in s]
        if step["verdict"] == "bad":
            self.state.drop_outputs(*(s["rev"] for s in middle[:-1] if s["verdict"] == "bad"))
        elif step["verdict"] == "good" and self.test.how == "bits":
            self.state.drop_outputs(step["rev"])  # they are the good end's


def different(good: Digests, other: Digests) -> dict[str, list[str]]:
    """Case to stages whose bits differ, of the cases that both have."""
    found = {k: stages.signature(good[k], other[k]) for k in good if k in other}
    return {case: names for case, names in found.items() if names}


def _how_flaky(runs: Sequence[_Run]) -> str:
    counts = Counter(run.verdict for run in runs)
    if len(counts) > 1:
        return f"{len(runs)} runs do not agree: {', '.join(f'{n} {v}' for v, n in counts.items())}"
    found = [run.digests for run in runs]
    kinds = len({repr(sorted((c, sorted(d.items())) for c, d in one.items())) for one in found})
    moved = next((m for one in found[1:] if (m := different(found[0], one))), {})
    case, names = next(iter(moved.items()), ("the cases that run", [""]))
    where = f"{case}: {' '.join(names[:1])}"
    return f"{len(runs)} runs gave {kinds} different results, first at {where}"
