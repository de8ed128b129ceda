"""One step of a bisect: make the environment, run the cases, say good, bad, skip or flaky.

What cannot be built or run is skipped, not blamed. What does not repeat itself is flaky, and
skipped too. A full disk is neither: it ends the bisect, with everything found out so far kept.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from megamoe.cases import Case
from megamoe.compare import ab, disk, stages
from megamoe.compare.child import Child
from megamoe.compare.sides import (
    CannotStart,
    Options,
    Ready,
    Side,
    clean_environment,
    ready,
    wait_and_end,
)
from megamoe.compare.state import State

EXTRA_RUNS: Final = 2
"""Runs more, once two have disagreed, so that a report can say how often."""
SKIP: Final = 125
"""Exit status of a command that cannot tell, as in ``git bisect run``."""

Digests = dict[str, dict[str, str]]


@dataclass(frozen=True)
class Test:
    """What makes a step good or bad."""

    cases: Sequence[Case]
    root: Path
    backend: str
    device: str = "cpu"
    how: str = "bits"
    """bits: the good end's bits or others; judge: the goldens' verdict; command: exit status."""
    command: str = ""
    repeat: int = 2
    timeout: float = 120.0
    options: Options = field(default_factory=Options)


class Unclear(Exception):
    """A run that says nothing: the step is skipped, for this reason."""


@dataclass
class Prober:
    """Asks one environment after the other."""

    test: Test
    state: State
    said: Callable[[dict[str, Any], bool], None]
    """Called with each step, and whether it was known already."""
    failed: dict[str, str] = field(default_factory=dict)
    """Cases that an end could not run, and why: the bisect goes on without them."""
    _requests: dict[str, dict[str, Any]] = field(default_factory=dict)

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
            step |= self._command(made) if self.test.how == "command" else self._cases(rev, made)
        except (CannotStart, Unclear) as error:
            step["reason"] = str(error)
        except OSError as error:
            raise disk.said(error) from error
        step["seconds"] = round(time.monotonic() - started, 2)
        return step, True

    # --- by bits and by verdict ---------------------------------------------------------------

    def chosen(self) -> list[Case]:
        """The cases asked for: all of them at the ends, then those that tell the ends apart."""
        few = self.state.narrowed
        return [c for c in self.test.cases if few is None or c.id in few]

    def request(self, case: Case) -> dict[str, Any]:
        """The inputs of a case, written once."""
        known = self._requests.get(case.id)
        if known is None:
            path = self.state.folder / "inputs" / f"{case.id.replace('/', '--')}.pt"
            known = self._requests[case.id] = stages.write_inputs(case, path)
        return known

    def _cases(self, rev: str, made: Ready) -> dict[str, Any]:
        runs: list[Digests] = []
        verdicts: list[tuple[str, str]] = []
        wanted = self.test.repeat
        facts: dict[str, Any] = {}
        judging = self.test.how == "judge"
        again = self.state.folder / "outputs" / "again" if judging else None
        # The next process imports torch while this one computes.
        children = [self._child(made) for _ in range(wanted)]
        try:
            while len(runs) < wanted:
                folder = self.state.outputs(rev) if not runs else again
                with children.pop(0) if children else self._child(made) as child:
                    digests, facts = self._run(child, folder)
                if judging and digests in runs:  # the same bits have the same verdict
                    verdicts.append(verdicts[runs.index(digests)])
                elif judging and folder:
                    verdicts.append(self._judged(facts, digests, folder))
                runs.append(digests)
                seen = {v for v, _ in verdicts}
                differs = len(seen) > 1 if judging else any(r != runs[0] for r in runs)
                if differs:
                    wanted = self.test.repeat + EXTRA_RUNS
        finally:
            for child in children:
                child.close()
        if len({v for v, _ in verdicts}) == 1:
            return {"verdict": verdicts[0][0], "reason": verdicts[0][1], "digests": runs[0],
                    "facts": facts}  # fmt: skip
        if all(run == runs[0] for run in runs) and not verdicts:
            return {"verdict": "seen", "digests": runs[0], "facts": facts}
        return {"verdict": "flaky", "reason": _how_flaky(runs, verdicts), "facts": facts}

    def _child(self, made: Ready) -> Child:
        return Child(made, self.test.backend, self.test.device, self.test.timeout)

    def _run(self, child: Child, folder: Path | None) -> tuple[Digests, dict[str, Any]]:
        """Every case in one process. Raises :class:`Unclear` where one gives no bits."""
        found: Digests = {}
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        child.greet()
        for case in self.chosen():
            out = {"out": str(folder / f"{case.id.replace('/', '--')}.pt")} if folder else {}
            reply = child.run({**self.request(case), **out})
            if "missing" in reply or "declined" in reply:
                continue
            if "digests" in reply:
                found[case.id] = reply["digests"]
                continue
            failed = f"{case.id}: {' '.join(map(str, *reply.items()))}"
            if self.state.narrowed is not None:
                raise Unclear(failed)
            self.failed[case.id] = failed  # at an end: do without the case, if others run
        if not found:
            first = next(iter(self.failed.values()), "")
            raise Unclear(first or "the backend has nothing that the cases ask for")
        return found, child.facts

    def _judged(self, facts: Mapping[str, Any], digests: Digests, folder: Path) -> tuple[str, str]:
        """Good if no case is outside its golden."""
        bad = []
        for case in self.chosen():
            if case.id in digests:
                shown = stages.read_bits(folder / f"{case.id.replace('/', '--')}.pt")
                verdict, _ = stages.judge(case, shown, facts, self.test.root)
                if verdict.status == "fail":
                    bad.append(f"{case.id}: {verdict.reason}")
        more = f"; and {len(bad) - 1} more cases" if len(bad) > 1 else ""
        return ("bad", bad[0] + more) if bad else ("good", "")

    def _against_good(self, step: dict[str, Any]) -> None:
        """Compare a seen step with the good end."""
        good = next(s for s in self.state.steps if s.get("role") == "good")
        moved = different(good["digests"], step["digests"])
        missing = [case for case in self.state.narrowed or [] if case not in step["digests"]]
        if missing:
            step |= {"verdict": "skip", "reason": f"the backend does not offer {missing[0]}"}
            return
        step["verdict"] = "bad" if moved else "good"
        if moved:
            case, names = next(iter(moved.items()))
            found = self.moved_between(good["rev"], step["rev"], [case])[case]
            more = f"; and {len(moved) - 1} more cases" if len(moved) > 1 else ""
            step["reason"] = f"{case}: {ab.stage_text(names[0], found[names[0]])}{more}"

    def moved_between(
        self, left: str, right: str, cases: Sequence[str]
    ) -> dict[str, dict[str, stages.Moved]]:
        """What moved between the kept bits of two steps, case by case."""
        known = {case.id: case for case in self.test.cases}
        out = {}
        for name in cases:
            file = f"{name.replace('/', '--')}.pt"
            a, b = (self.state.outputs(rev) / file for rev in (left, right))
            if a.exists() and b.exists():
                ids = stages.ids_of(self.request(known[name]))
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

    # --- by command ---------------------------------------------------------------------------

    def _command(self, made: Ready) -> dict[str, Any]:
        codes: list[int] = []
        wanted = self.test.repeat
        while len(codes) < wanted:
            codes.append(self._exit_of(made))
            if len(set(map(_of_code, codes))) > 1:
                wanted = self.test.repeat + EXTRA_RUNS
        verdicts = Counter(_of_code(code) for code in codes)
        if len(verdicts) > 1:
            return {"verdict": "flaky", "reason": f"exit status {', '.join(map(str, codes))}"}
        verdict = _of_code(codes[0])
        return {"verdict": verdict, "reason": "" if verdict == "good" else f"exit {codes[0]}"}

    def _exit_of(self, made: Ready) -> int:
        log = self.state.folder / "logs" / "command.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = clean_environment()
        environment["PYTHONPATH"] = os.pathsep.join(made.front)
        environment["MEGAMOE_PYTHON"] = made.argv[-1]
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*made.argv[:-1], "sh", "-c", self.test.command],
                cwd=made.cwd, env=environment, stdout=out, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=disk.held(),
            )  # fmt: skip
            code = wait_and_end(process, self.test.timeout)
        if code is None:
            raise Unclear(f"the command took more than {self.test.timeout:g} s")
        if code:
            disk.blame("", log)
        if code < 0 or code > 127:
            raise Unclear(f"the command was ended by signal {-code if code < 0 else code - 128}")
        return code


def _of_code(code: int) -> str:
    return {0: "good", SKIP: "skip"}.get(code, "bad")


def different(good: Digests, other: Digests) -> dict[str, list[str]]:
    """Case to stages whose bits differ, of the cases that both have."""
    found = {k: stages.signature(good[k], other[k]) for k in good if k in other}
    return {case: names for case, names in found.items() if names}


def _how_flaky(runs: Sequence[Digests], verdicts: Sequence[tuple[str, str]]) -> str:
    if verdicts:
        counts = Counter(v for v, _ in verdicts)
        return f"{len(runs)} runs do not agree: {', '.join(f'{n} {v}' for v, n in counts.items())}"
    kinds = len({repr(sorted((c, sorted(d.items())) for c, d in run.items())) for run in runs})
    moved = next((m for run in runs[1:] if (m := different(runs[0], run))), {})
    case, names = next(iter(moved.items()), ("the cases that run", [""]))
    where = f"{case}: {' '.join(names[:1])}"
    return f"{len(runs)} runs gave {kinds} different results, first at {where}"
