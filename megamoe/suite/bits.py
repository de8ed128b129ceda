"""``megamoe golden record-bits``: a backend's own bits, if three runs in two processes agree.

Two runs share a worker, in which other cases ran before and between. The third is in a worker of
its own, over the cases in reverse order. What one run leaves behind for another shows so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from megamoe.cases import Case, load_cases, select
from megamoe.golden import GoldenError, recorded
from megamoe.judge import BadOutput, forward_bits
from megamoe.suite.judges import Desk, Judges, Step, threads_of
from megamoe.suite.runner import Runner
from megamoe.suite.settings import Settings
from megamoe.worker.exchange import NoOutput
from megamoe.worker.pool import Pool
from megamoe.worker.session import Identity

OnCase = Callable[[Case, str], None]
"""Called once a case and process: the case, and what is wrong or ''."""


REFUSALS: Final = ("skip", "not-provided")
"""Of a case that the backend does not run, by its own word."""


def record(
    settings: Settings,
    out: Path,
    jobs: int,
    on_case: OnCase,
    on_identity: Callable[[Identity], None],
) -> tuple[Path, int, int]:
    """Record every forward case that ``settings.case`` selects; returns file, cases, declined.

    ``on_identity`` is told who is recorded. ``jobs`` judges share one worker. Raises
    :class:`GoldenError`, with nothing written, where the backend has no fingerprint, a case does
    not pass its golden, the worker's process ends, a binary differs between the two workers, or a
    bit moves.
    """
    with Pool(settings.launch(threads_of(jobs)), 1) as pool:
        identity = pool.address.identity
        on_identity(identity)
        if identity.fingerprint is None:
            raise GoldenError(
                f"backend {identity.name} has no fingerprint(); without it nobody can tell later "
                "whether the same kernel runs (docs/goldens.md)"
            )
        cases = select(settings.selection(identity.contract), "forward")
        if not cases:
            raise GoldenError("no forward case is selected; record-bits records forward cases only")
        first = _all(pool, twice, settings, cases, jobs, on_case)
    wrong = [
        f"case {k}: {r['reason'].removeprefix(f'case {k}: ')}"
        for k, r in first.items()
        if r["status"] not in ("pass", *REFUSALS)
    ]
    if wrong:
        more = f"; and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise GoldenError(f"nothing recorded: {wrong[0]}{more}; `megamoe check` shows it")
    passes = [c for c in cases if first[c.id]["status"] == "pass"]
    if not passes:
        reason = next(iter(first.values()))["reason"]
        raise GoldenError(f"nothing recorded: no case was run; {reason}")
    with Pool(settings.launch(threads_of(jobs)), 1) as pool:
        second = _all(pool, once, settings, passes[::-1], jobs, on_case)
    for case in passes:
        if second[case.id]["reason"]:
            raise GoldenError(f"nothing recorded: {second[case.id]['reason']}")
    _agree(passes, first, second)
    build = _merge([r["fingerprint"] for r in (*first.values(), *second.values())])
    refusals = {k: r["reason"] for k, r in first.items() if r["status"] in REFUSALS}
    for case in select(load_cases(settings.root), "forward", glob=settings.case):
        if identity.contract not in case.revisions:
            refusals[case.id] = f"contract {identity.contract} does not know what it asks"
    entries = {c.id: first[c.id]["entry"] for c in passes}
    data = recorded.build(
        identity.name, identity.accumulator, identity.contract, identity.facts, build, entries,
        refusals,
    )  # fmt: skip
    return recorded.write(out, data), len(entries), len(refusals)


def _all(
    pool: Pool, step: Step, settings: Settings, cases: Sequence[Case], jobs: int, on_case: OnCase
) -> dict[str, dict[str, Any]]:
    """What ``step`` gives for every case."""
    out: dict[str, dict[str, Any]] = {}

    def took(case: Case, result: Any) -> None:
        if isinstance(result, Exception):
            raise GoldenError(f"nothing recorded: case {case.id}: {result}")
        out[case.id] = result
        on_case(case, result["reason"])

    jobs = max(1, min(jobs, len(cases)))
    desk = Desk(pool.address, settings.root, settings.timeout, step, threads_of(jobs))
    with Judges(jobs, desk) as judges:
        judges.run(cases, lambda case: None, took)
    return out


def _agree(
    cases: Sequence[Case], first: Mapping[str, Any], second: Mapping[str, Any]
) -> None:  # fmt: skip
    lines = []
    for case in cases:
        runs = [*first[case.id]["runs"], *second[case.id]["runs"]]
        stages = sorted({n for run in runs for n in run}, key=recorded.STAGES.index)
        for name in stages:
            digests = [run.get(name) for run in runs]
            if len(set(digests)) > 1:
                where = "in one worker" if digests[0] != digests[1] else "in another worker"
                lines.append(f"case {case.id}: {name} moved {where}")
                break
    if lines:
        more = f", and {len(lines) - 3} more" if len(lines) > 3 else ""
        raise GoldenError(
            f"nothing recorded: the runs do not agree: {'; '.join(lines[:3])}{more}; look for "
            "float atomics, a race, or memory that is read before it is written"
        )


def _merge(builds: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    """One fingerprint of all calls; each worker compiled what its cases needed."""
    fingerprints = [build for build in builds if build is not None]
    binaries: dict[str, str] = {}
    for build in fingerprints:
        for name in ("sources", "options"):
            if build[name] != fingerprints[0][name]:
                raise GoldenError(f"nothing recorded: the backend's {name} changed while it ran")
        for name, digest in build["binaries"].items():
            if binaries.setdefault(name, digest) != digest:
                raise GoldenError(
                    f"nothing recorded: {name} was compiled to different binaries in two "
                    "processes; give each its own name"
                )
    return {**{n: fingerprints[0][n] for n in ("sources", "options")}, "binaries": binaries}


# --- steps of a judge -------------------------------------------------------------------------


def twice(runner: Runner, case: Case) -> dict[str, Any]:
    """Judge one run; its digests, and those of a second run."""
    verdict, view = runner.run_and_show(case)
    out: dict[str, Any] = {
        "status": verdict.status, "reason": verdict.reason, "runs": [], "fingerprint": None,
    }  # fmt: skip
    if view is None or verdict.status != "pass":
        return out
    ids = view.problem.topk_ids.numpy()
    again = once(runner, case)
    out["entry"] = recorded.entry(view.actual, ids, view.inputs)
    out["runs"] = [recorded.digests(view.actual, ids), *again["runs"]]
    out["fingerprint"] = again["fingerprint"]
    return out | ({"status": "error", "reason": again["reason"]} if again["reason"] else {})


def once(runner: Runner, case: Case) -> dict[str, Any]:
    """The digests of one run, and the fingerprint after it."""
    try:
        _, problem = runner.problem(case)
        with runner.caller() as call:
            call.fingerprint = True
            output = call.forward(problem)
        bits = forward_bits(output.result, problem)
    except (NoOutput, BadOutput, GoldenError) as error:
        why = error.why if isinstance(error, NoOutput) else str(error)
        return {"reason": f"case {case.id}: {why}", "runs": [], "fingerprint": None}
    runs = [recorded.digests(bits, problem.topk_ids.numpy())]
    return {"reason": "", "runs": runs, "fingerprint": output.fingerprint}
