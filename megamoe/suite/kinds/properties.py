"""Kind ``property``: a law of the layer, and the golden of the problem that it starts from."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from megamoe.cases import Case
from megamoe.judge import BadOutput, Finding, Verdict, bitwise, checked, forward_bits, place_of
from megamoe.layer import launch_laws
from megamoe.spec.forms import BF16
from megamoe.spec.problem import Problem
from megamoe.spec.tensors import TENSORS
from megamoe.suite import laws
from megamoe.suite.kinds import forward
from megamoe.worker.exchange import Caller, Missing


def judge(runner: Any, case: Case) -> Verdict:
    """The law first, then the golden."""
    golden, problem = runner.problem(case)
    law = case.params["law"]
    with runner.caller() as call:

        def y_of(p: Problem) -> npt.NDArray[Any]:
            return forward_bits(call.forward(p).result, p)["y"]

        if law in launch_laws.LAWS:
            found = launch_findings(runner, call, problem, law)
        else:
            found = laws.findings(y_of, problem, law)
        shown = forward_bits(call.forward(problem).result, problem)
    actual = forward.rows(case, shown)
    return forward.judged(runner, case, golden, problem, actual, found, ("law",))


def launch_findings(runner: Any, call: Caller, problem: Problem, law: str) -> list[Finding]:
    """Variants that the worker ran, each against an ordinary ``forward``."""
    identity = runner.session.identity
    _, needs_run, needs_cuda = launch_laws.LAWS[law]
    if needs_run and not identity.provides("run"):
        raise Missing("run")
    if needs_cuda and not identity.device.startswith("cuda"):
        raise Missing(f"CUDA device, which law {law} needs; use --device cuda")
    base = forward_bits(call.forward(problem).result, problem)["y"]
    ids = problem.topk_ids.numpy()
    returned = call.act("launch", problem, law=law)
    labels, orders = returned.extra.get("labels", []), returned.extra.get("orders", [])
    if not labels or len(labels) != len(returned.result):
        raise BadOutput(f"law {law} gave {len(returned.result)} outputs for {len(labels)} variants")
    out = []
    for label, order, y in zip(labels, orders, returned.result.values(), strict=True):
        actual = checked("y", y, tuple(base.shape), TENSORS["y"].dtypes)
        place = place_of("y", order, ids[order])
        out.append(laws.named(law, label, bitwise("y", BF16, actual, base[order], place)))
    return out
