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
from megamoe.compare.running import Answer, Inputs, NoAnswer, NoOffer, Running, ids_of
from megamoe.compare.sides import Ready, Side, ready
from megamoe.compare.state import State
from megamoe.judge import BadOutput, Verdict
from megamoe.worker.session import Identity

CLASS_LIMIT: Final = 8
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
        self._verdicts: dict[str, list[tuple[dict[str, str], Verdict]]] = {}

    def complaint(
        self, case: Case, inputs: Mapping[str, Any], answer: Answer, side: Running
    ) -> list[str]:
        """A line if the case fails. Raises the errors of :meth:`.Judge.verdict`."""
        verdicts = self._verdicts.setdefault(case.id, [])
        verdict = next((v for digests, v in verdicts if digests == answer.digests), None)
        if verdict is None:
            verdict = self.judge.full_verdict(case, inputs, answer, side)
            verdicts.append((answer.digests, verdict))
        return [f"{case.id}: {verdict.reason}"] if verdict.status == "fail" else []


@dataclass
class Prober:
    """Asks one environment after the other."""

    test: Test
    state: State
    on_step: Callable[[dict[str, Any], bool], None]
    """Called with each step, and whether it was known already."""
    failures: dict[str, str] = field(default_factory=dict)
    """Cases that an end could not run, and why: the bisect goes on without them."""
    inputs: Inputs = field(default_factory=Inputs)

    def __post_init__(self) -> None:
        self.judge = Judge(self.test.root)

    def step(self, rev: str, subject: str, side: Side, tree: Path | None) -> dict[str, Any]:
        """Good, bad, skip or flaky; once the ends are known. Known steps cost nothing."""
        earlier = self.state.find(rev)
        if earlier is not None and earlier["verdict"] != "seen":
            self.on_step(earlier, True)
            return earlier
        step, is_build = self._make_step(rev, subject, side, tree)
        if step["verdict"] == "seen" and self.test.how == "bits":
            self._against_good(step)
        self.state.add(step, is_build)
        self._forget(step)
        self.on_step(step, False)
        return step

    def end(self, rev: str, subject: str, side: Side, tree: Path | None) -> dict[str, Any]:
        """An end; by bits it is only seen, since nothing is there to compare with yet."""
        step = self.state.find(rev)
        if step is None:
            step, is_build = self._make_step(rev, subject, side, tree)
            if step["verdict"] in ("skip", "flaky"):
                return step  # not kept: the next try may mend it
            self.state.add(step, is_build)
        return step

    def _make_step(
        self, rev: str, subject: str, side: Side, tree: Path | None
    ) -> tuple[dict[str, Any], bool]:
        disk.require_room(self.state.folder)
        start = time.monotonic()
        step: dict[str, Any] = {"rev": rev, "subject": subject, "verdict": "skip", "reason": ""}
        try:
            runtime = ready(side, disk.cache_root(), tree, self.test.options)
            step |= (
                by_command(self.test, runtime, self.state.folder)
                if self.test.how == "command"
                else self._cases(rev, runtime)
            )
        except (CannotStart, Unclear) as error:
            step["reason"] = str(error)
        except OSError as error:
            raise disk.cause_of(error) from error
        step["seconds"] = round(time.monotonic() - start, 2)
        return step, True

    # --- by bits and by verdict ---------------------------------------------------------------

    def selection(self) -> list[Case]:
        """The cases of the step: all cases at the ends, then those that tell the ends apart."""
        few = self.state.selection
        return [c for c in self.test.cases if few is None or c.id in few]

    def bits_path(self, rev: str, case_id: str) -> Path:
        """The folder with the bits of a step, as safetensors."""
        return self.state.outputs(rev) / f"{case_id.replace('/', '--')}.safetensors"

    def _cases(self, rev: str, runtime: Ready) -> dict[str, Any]:
        runs: list[_Run] = []
        target = self.test.repeat
        judging = _Judging(self.test.root) if self.test.how == "judge" else None
        # The next process imports torch while this one computes.
        sides = [self._side(runtime) for _ in range(target)]
        try:
            while len(runs) < target:
                with sides.pop(0) if sides else self._side(runtime) as side:
                    if runs:
                        side.worker.like = runs[0].identity
                    runs.append(self._run(side, "" if runs else rev, judging))
                if judging:
                    differs = len({run.verdict for run in runs}) > 1
                else:
                    differs = any(run.digests != runs[0].digests for run in runs)
                if differs:
                    target = self.test.repeat + EXTRA_RUNS
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

    def _side(self, runtime: Ready) -> Running:
        t = self.test
        return Running(runtime, t.backend, t.device, t.timeout, t.contract)

    def _run(self, side: Running, rev: str, judging: _Judging | None) -> _Run:
        """Every case in one process; the bits are kept where ``rev`` is named.

        Raises :class:`Unclear` where a case gives none.
        """
        run = _Run(side.identity, side.facts)
        bad = []
        for case in self.selection():
            inputs = self.inputs.of(case)
            try:
                answer = side.ask(case, inputs)
                if judging:
                    bad += judging.complaint(case, inputs, answer, side)
            except NoOffer:
                continue
            except (NoAnswer, BadOutput) as why:
                failure = f"{case.id}: {why}"
                if self.state.selection is not None:
                    raise Unclear(failure) from None
                self.failures[case.id] = failure  # at an end: do without the case, if others run
                continue
            run.digests[case.id] = answer.digests
            if rev:
                stages.write_bits(self.bits_path(rev, case.id), answer.bits)
        if not run.digests:
            first = next(iter(self.failures.values()), "")
            raise Unclear(first or "the backend has nothing that the cases ask for")
        if judging:
            more = f"; and {len(bad) - 1} more cases" if len(bad) > 1 else ""
            run.verdict, run.reason = ("bad", bad[0] + more) if bad else ("good", "")
        return run

    def _against_good(self, step: dict[str, Any]) -> None:
        """Compare a seen step with the good end."""
        good = next(s for s in self.state.steps if s.get("role") == "good")
        changes = different(good["digests"], step["digests"])
        missing = [case for case in self.state.selection or [] if case not in step["digests"]]
        if missing:
            step |= {"verdict": "skip", "reason": f"the backend does not offer {missing[0]}"}
            return
        step["verdict"] = "bad" if changes else "good"
        self.classify(good, step, list(changes))
        if changes:
            case, names = next(iter(changes.items()))
            by_stage = self.changes_between(good["rev"], step["rev"], [case])[case]
            more = f"; and {len(changes) - 1} more cases" if len(changes) > 1 else ""
            label = step["classes"].get(case, classes.WORDS[step["class"]])
            text = ab.stage_text(names[0], by_stage[names[0]])
            step["reason"] = f"{case}: {text} ({label}){more}"

    def classify(
        self, good: Mapping[str, Any], step: dict[str, Any], changes: Sequence[str]
    ) -> None:
        """Classify the moved bits of a step: within the class, another contract, outside.

        Only the :data:`CLASS_LIMIT` first cases count: each has to be judged by every contract.
        """
        by_id = {case.id: case for case in self.test.cases}
        step["class"], step["classes"], kinds = classes.SAME, {}, []
        for name in changes[:CLASS_LIMIT]:
            inputs, right = self.inputs.of(by_id[name]), []
            for one in (good, step):
                path = self.bits_path(one["rev"], name)
                bits = stages.read_bits(path) if path.exists() else {}
                accumulator = one["facts"]["accumulator"]
                right.append(self.judge.right_under(by_id[name], inputs, bits, accumulator))
            kinds.append(classes.of_step(*right))
            step["classes"][name] = classes.describe(kinds[-1], *right)
        step["class"] = classes.worst(kinds)

    def changes_between(
        self, left: str, right: str, cases: Sequence[str]
    ) -> dict[str, dict[str, stages.Change]]:
        """The bits that moved between the stored outputs of two steps, case by case."""
        by_id = {case.id: case for case in self.test.cases}
        out = {}
        for name in cases:
            a, b = (self.bits_path(rev, name) for rev in (left, right))
            if a.exists() and b.exists():
                ids = ids_of(by_id[name], self.inputs.of(by_id[name]))
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
    by_case = {k: stages.signature(good[k], other[k]) for k in good if k in other}
    return {case: names for case, names in by_case.items() if names}


def _how_flaky(runs: Sequence[_Run]) -> str:
    counts = Counter(run.verdict for run in runs)
    if len(counts) > 1:
        return f"{len(runs)} runs do not agree: {', '.join(f'{n} {v}' for v, n in counts.items())}"
    digests = [run.digests for run in runs]
    kinds = len({repr(sorted((c, sorted(d.items())) for c, d in one.items())) for one in digests})
    changes = next((m for one in digests[1:] if (m := different(digests[0], one))), {})
    case, names = next(iter(changes.items()), ("the cases that run", [""]))
    where = f"{case}: {' '.join(names[:1])}"
    return f"{len(runs)} runs gave {kinds} different results, first at {where}"
