"""Predictions of all forward cases: computed, held to the certified envelope, and verified."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

import numpy as np

import megamoe
from megamoe.cases import Case
from megamoe.golden import (
    GoldenError,
    Store,
    digest_of,
    make,
    predicted,
    regenerate,
    rows_of,
)
from megamoe.golden.each import each
from megamoe.judge import judge_forward
from megamoe.predict.forward import Linears, Prediction, predict
from megamoe.predict.model import MODELS, Model
from megamoe.spec.builds import BUILDS
from megamoe.spec.contract import REVISIONS
from megamoe.spec.problem import Problem

OnResult = Callable[[Case, str], None]
"""Called once a case: the case, and what is wrong or ''."""
KERNELS: Final = tuple(name for name in REVISIONS if name in {b.revision for b in BUILDS.values()})
"""Contract revisions that a known build of the SM100 kernel follows."""
SOURCES: Final = (
    "oracle/*.py", "predict/forward.py", "predict/model.py", "predict/nvfp4.py",
    "predict/tables.py", "predict/silu/*.json", "spec/*.py",
)  # fmt: skip
"""The files that decide a predicted bit. The inputs have a digest of their own."""


def selection(cases: Sequence[Case]) -> list[Case]:
    """The forward cases among them that a kernel of the model knows, the longest first."""

    def work(case: Case) -> int:
        p = case.params
        return int(p["hidden"] * p["intermediate"] * p["tokens"] * p["top_k"])

    forwards = (c for c in cases if c.kind == "forward" and set(KERNELS) & set(c.revisions))
    return sorted(forwards, key=work, reverse=True)


def record(
    root: Path, cases: Sequence[Case], model: Model, jobs: int, on_result: OnResult, envelope: bool
) -> tuple[Path | None, list[str]]:
    """Write a candidate of ``cases``.

    With ``envelope`` each prediction must lie inside what its derived golden certifies.
    Cases of a candidate that the same sources made stay in it, so that a set can be made in parts.
    Returns the candidate's path and no line, or None and a line for each fault.
    """
    step = partial(entry, root, model.name, envelope)
    predictions, none, faults = {}, {}, []
    for case, result in each(step, selection(cases), jobs):
        fault = result if isinstance(result, str) else ""
        on_result(case, fault)
        if fault:
            faults.append(fault)
        elif "none" in result:
            none[case.id] = result["none"]
        else:
            predictions[case.id] = result
    if faults:
        return None, sorted(faults)
    path = root / predicted.CANDIDATES / f"{model.name}.json"
    path.parent.mkdir(exist_ok=True)
    (path.parent / ".gitignore").write_text("*\n", "utf-8")
    before = _before(path, model)
    cases_now = {k: v for k, v in before["cases"].items() if k not in none} | predictions
    none_now = {k: v for k, v in before["none"].items() if k not in predictions} | none
    predicted.write(path, document(model, cases_now, none_now))
    return path, []


def _before(path: Path, model: Model) -> Mapping[str, Any]:
    """A candidate that the same model and sources made, or an empty one."""
    new = document(model, {}, {})
    try:
        old = predicted.read(path).data
    except (FileNotFoundError, GoldenError):
        return new
    same = all(old[name] == new[name] for name in new if name not in ("cases", "none"))
    return old if same else new


def verify(
    root: Path, cases: Sequence[Case], model: Model, jobs: int, on_result: OnResult, envelope: bool
) -> list[str]:
    """Compute the predictions again; a line for each case that is not as it is kept.

    With ``envelope`` each is judged by its derived golden too.
    """
    predictions = predicted.read(root / predicted.FOLDER / f"{model.name}.json").data
    faults = []
    for case, result in each(partial(entry, root, model.name, envelope), selection(cases), jobs):
        fault = result if isinstance(result, str) else _apart(case, predictions, result)
        on_result(case, fault)
        if fault:
            faults.append(fault)
    return sorted(faults)


def document(model: Model, cases: Mapping[str, Any], none: Mapping[str, str]) -> dict[str, Any]:
    """The content of a file of predictions."""
    unit = model.unit
    describes = {
        "unit": f"{unit.name}: steps of {unit.step}, {unit.align_bits} bits aligned, "
                f"{unit.result_bits} kept; {unit.evidence}",
        "silu": f"megamoe/predict/silu/{model.silu}.json, tables {model.fast} and {model.precise}",
        "known": model.evidence, "assumed": model.assumptions,
    }  # fmt: skip
    return {
        "schema": predicted.SCHEMA, "what": predicted.WHAT, "model": model.name,
        "accumulator": model.accumulator, "describes": describes, "generator": generator(),
        "none": dict(none), "cases": dict(cases),
    }  # fmt: skip


@cache
def generator() -> dict[str, Any]:
    """Versions, and digests of the sources that decide predicted bits."""
    package = Path(megamoe.__file__).parent
    paths = sorted(p for pattern in SOURCES for p in package.glob(pattern))
    return {
        "megamoe": megamoe.__version__, "numpy": np.__version__,
        "sources": {
            str(p.relative_to(package)): hashlib.sha256(p.read_bytes()).hexdigest()[:16]
            for p in paths
        },
    }  # fmt: skip


def entry(root: Path, name: str, envelope: bool, case: Case) -> dict[str, Any]:
    """The prediction of a case under each contract with a kernel; ``none``: why there is none.

    With ``envelope`` :class:`GoldenError` where one lies outside what its class allows.
    """
    model = MODELS[name]
    inputs = regenerate(case)
    digest = digest_of(inputs)
    problem = rows_of(Problem(**inputs), case.rows)
    ids, linears = problem.topk_ids.numpy(), Linears(model)
    under: list[dict[str, Any]] = []
    checks: set[tuple[str, str]] = set()
    for revision in KERNELS:
        if revision not in case.revisions:
            continue
        try:
            prediction = predict(problem, model, REVISIONS[revision], linears)
        except ValueError as fault:
            return {"none": str(fault)}
        now = predicted.under([revision], prediction.stages, ids, prediction.assumptions)
        key = _store(root, revision).key(case) if envelope else ""
        if envelope and (key, str(now["stages"])) not in checks:
            _inside(root, case, revision, digest, problem, prediction, model.accumulator)
            checks.add((key, str(now["stages"])))
        same = [u for u in under if {**u, "contracts": []} == {**now, "contracts": []}]
        if same:
            same[0]["contracts"].append(revision)
        else:
            under.append(now)
    return {"inputs": digest, "under": under}


def _inside(
    root: Path,
    case: Case,
    revision: str,
    inputs: str,
    problem: Problem,
    prediction: Prediction,
    accumulator: str,
) -> None:
    golden = _store(root, revision).load(case, inputs)
    judgement = judge_forward(prediction.stages, golden, accumulator, problem, case.rows)
    bad = [f.text or f"{f.stage}: {f.outside} of {f.total} outside" for f in judgement.findings
           if f.bad]  # fmt: skip
    if bad:
        raise GoldenError(
            f"case {case.id}: the prediction under {revision} lies outside its golden "
            f"({bad[0]}); the model, or the bound, is wrong"
        )


@cache
def _store(root: Path, revision: str) -> Store:
    return Store(root, make, REVISIONS[revision])


def _apart(case: Case, predictions: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    before = predictions["cases"].get(case.id)
    if "none" in now:
        reason = predictions["none"].get(case.id)
        return "" if reason == now["none"] else f"case {case.id}: no prediction: {now['none']}"
    if before is None:
        return f"case {case.id}: it has no predicted golden; `megamoe golden predict` makes it"
    return "" if before == dict(now) else f"case {case.id}: computed again it has other bits"


__all__ = ["KERNELS", "document", "entry", "generator", "record", "selection", "verify"]
