"""The predicted cases on a backend: digests of what it shows, each judged as ``check`` does."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megamoe.cases import Case, select
from megamoe.confirm.document import ConfirmError
from megamoe.golden import predicted
from megamoe.kinds.forward import rows
from megamoe.suite import bits
from megamoe.suite.judges import Desk, Judges, threads_of
from megamoe.suite.runner import Runner
from megamoe.suite.settings import Settings
from megamoe.worker.pool import Pool
from megamoe.worker.session import Identity

OnCase = Callable[[Case, str], None]
"""Called once a case: the case, and what is wrong or ''."""


def ask(settings: Settings, accumulator: str, jobs: int, on_case: OnCase) -> tuple[Identity, Any]:
    """Who answered, and for each forward case ``inputs``, ``status``, ``stages`` and ``y``.

    A case that the backend declines is left out. :class:`ConfirmError` where the backend is of
    another class than the model.
    """
    out: dict[str, Any] = {}
    with Pool(settings.launch(threads_of(jobs)), 1) as pool:
        identity = pool.address.identity
        if identity.accumulator != accumulator:
            raise ConfirmError(
                f"backend {identity.name} is of class {identity.accumulator}, the model of "
                f"{accumulator}; name another with --model"
            )
        cases = select(settings.selection(identity.contract), "forward")
        jobs = max(1, min(jobs, len(cases)))
        desk = Desk(pool.address, settings.root, settings.timeout, answer, threads_of(jobs))

        def took(case: Case, result: Any) -> None:
            if isinstance(result, Exception):
                result = {"reason": f"case {case.id}: {result}"}
            if "stages" in result:
                out[case.id] = {n: v for n, v in result.items() if n != "reason"}
            on_case(case, result["reason"])

        with Judges(jobs, desk) as judges:
            judges.run(cases, lambda case: None, took)
    return identity, out


def record(settings: Settings, jobs: int, on_case: OnCase) -> dict[str, Any]:
    """The content of a recorded golden of the backend: three runs in two processes that agree.

    :class:`megamoe.golden.GoldenError` where they do not, or where a case does not pass.
    """
    with tempfile.TemporaryDirectory(prefix="megamoe-confirm-") as folder:
        path, _, _ = bits.record(settings, Path(folder), jobs, on_case, lambda identity: None)
        return dict(json.loads(path.read_text("utf-8")))


def answer(runner: Runner, case: Case) -> dict[str, Any]:
    """A judge's step: the verdict's status, and the digests of what was shown."""
    runner.brief = True
    verdict, view = runner.run_and_show(case)
    if view is None:
        return {"reason": verdict.reason}
    ids = view.problem.topk_ids.numpy()
    ids = ids if case.rows is None else ids[case.rows]
    prediction = predicted.under([], rows(case, view.actual), ids, ())
    out = {
        "inputs": view.inputs,
        "status": verdict.status,
        "reason": "",
        "stages": prediction["stages"],
    }
    return out | ({"y": prediction["y"]} if "y" in prediction else {})


__all__ = ["ask", "record"]
