"""``megamoe golden record-bits``: a backend's own bits, if three runs in two processes agree.

Two runs share a process, in which other cases ran before and between; the third is in a process of
its own, over the cases in reverse order. What one run leaves behind for another shows so.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from megamoe.backends import load_backend
from megamoe.cases import Case, select
from megamoe.golden import GoldenError, Store, make, recorded
from megamoe.suite.run import Runner
from megamoe.suite.settings import Settings

Done = Callable[[Case, str], None]
"""Called once a case and process: the case, and what is wrong or ''."""


def record(settings: Settings, out: Path, jobs: int, done: Done) -> tuple[Path, int, int]:
    """Record every forward case that ``settings.case`` selects; returns file, cases, declined.

    Raises :class:`GoldenError`, with nothing written, where the backend has no fingerprint, a case
    does not pass its golden, a process dies, a binary differs between processes, or a bit moves.
    """
    backend = load_backend(settings.backend, settings.device)
    if recorded.fingerprint(backend) is None:
        raise GoldenError(
            f"backend {backend.name} has no fingerprint(); without it nobody can tell later "
            "whether the same kernel runs (docs/goldens.md)"
        )
    cases = select(settings.selection(), "forward")
    if not cases:
        raise GoldenError("no forward case is selected; record-bits records forward cases only")
    first = _in_processes(_twice, settings, cases, jobs, done)
    wrong = [
        f"case {k}: {r['reason'].removeprefix(f'case {k}: ')}"
        for k, r in first.items()
        if r["status"] not in ("pass", "skip")
    ]
    if wrong:
        more = f"; and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise GoldenError(f"nothing recorded: {wrong[0]}{more}; `megamoe check` shows it")
    kept = [c for c in cases if first[c.id]["status"] == "pass"]
    if not kept:
        reason = next(iter(first.values()))["reason"]
        raise GoldenError(f"nothing recorded: no case was run; {reason}")
    second = _in_processes(_once, settings, kept[::-1], jobs, done)
    _agree(kept, first, second)
    build = _merged([r["fingerprint"] for r in (*first.values(), *second.values())])
    declined = {k: r["reason"] for k, r in first.items() if r["status"] == "skip"}
    entries = {c.id: first[c.id]["entry"] for c in kept}
    data = recorded.build(backend, settings.device, build, entries, declined)
    return recorded.write(out, data), len(entries), len(declined)


def _agree(
    cases: Sequence[Case], first: Mapping[str, Any], second: Mapping[str, Any]
) -> None:  # fmt: skip
    lines = []
    for case in cases:
        runs = [*first[case.id]["runs"], *second[case.id]["runs"]]
        stages = sorted({n for run in runs for n in run}, key=recorded.STAGES.index)
        for name in stages:
            seen = [run.get(name) for run in runs]
            if len(set(seen)) > 1:
                where = "in one process" if seen[0] != seen[1] else "in another process"
                lines.append(f"case {case.id}: {name} moved {where}")
                break
    if lines:
        more = f", and {len(lines) - 3} more" if len(lines) > 3 else ""
        raise GoldenError(
            f"nothing recorded: the runs do not agree: {'; '.join(lines[:3])}{more}; look for "
            "float atomics, a race, or memory that is read before it is written"
        )


def _merged(builds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One fingerprint of all processes; each compiled what its cases needed."""
    binaries: dict[str, str] = {}
    for build in builds:
        for name in ("sources", "options"):
            if build[name] != builds[0][name]:
                raise GoldenError(f"nothing recorded: the backend's {name} changed while it ran")
        for name, digest in build["binaries"].items():
            if binaries.setdefault(name, digest) != digest:
                raise GoldenError(
                    f"nothing recorded: {name} was compiled to different binaries in two "
                    "processes; give each its own name"
                )
    return {**{n: builds[0][n] for n in ("sources", "options")}, "binaries": binaries}


# --- in a process of its own ------------------------------------------------------------------

_RUNNERS: list[Runner] = []


def _in_processes(
    step: Callable[[Case], dict[str, Any]], settings: Settings, cases: Sequence[Case], jobs: int,
    done: Done,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    out: dict[str, dict[str, Any]] = {}
    jobs = max(1, min(jobs, len(cases)))
    with ProcessPoolExecutor(jobs, get_context("spawn"), _open, (settings, jobs)) as pool:
        futures = {pool.submit(step, case): case for case in cases}
        for future in as_completed(futures):
            case = futures[future]
            try:
                out[case.id] = future.result()
            except BrokenProcessPool as error:
                raise GoldenError(
                    "nothing recorded: the backend ended its process (a crash, or out of memory); "
                    "`megamoe check` shows in which case"
                ) from error
            done(case, out[case.id]["reason"])
    return out


def _open(settings: Settings, jobs: int) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    backend = load_backend(settings.backend, settings.device)
    _RUNNERS.append(Runner(backend, Store(settings.root, make), settings.device))


def _twice(case: Case) -> dict[str, Any]:
    """Judge one run; its digests, and those of a second run."""
    runner = _RUNNERS[0]
    verdict, shown = runner.run_and_show(case)
    out: dict[str, Any] = {"status": verdict.status, "reason": verdict.reason, "runs": []}
    if shown is not None and verdict.status == "pass":
        ids = shown.problem.topk_ids.numpy()
        out["entry"] = recorded.entry(shown.actual, ids, shown.inputs)
        out["runs"].append(recorded.digests(shown.actual, ids))
        out["runs"] += _once(case)["runs"]
    out["fingerprint"] = recorded.fingerprint(runner.backend)
    return out


def _once(case: Case) -> dict[str, Any]:
    runner = _RUNNERS[0]
    try:
        shown = runner.shown(case)
    except Exception as error:
        raise GoldenError(f"nothing recorded: case {case.id}: {error}") from error
    runs = [recorded.digests(shown.actual, shown.problem.topk_ids.numpy())]
    return {"reason": "", "runs": runs, "fingerprint": recorded.fingerprint(runner.backend)}
