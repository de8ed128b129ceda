"""Kind ``layout``: ``transform_weights`` gives the kernel-side weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch

from megamoe import oracle
from megamoe.cases import Case, Kind
from megamoe.cases.forms import LAYOUT
from megamoe.cases.kind import Parts
from megamoe.cases.weights import expert_weights
from megamoe.golden import Made, StoredGolden
from megamoe.judge import BadOutput, Finding, Verdict, checked, of_findings
from megamoe.spec.contract import Contract
from megamoe.spec.tensors import OPERATIONS, TENSORS, WEIGHTS
from megamoe.worker.exchange import Caller, Returned

NAMES: Final = OPERATIONS["transform_weights"].returns


def inputs(case: Case) -> dict[str, Any]:
    """Checkpoint-layout weights of ``experts`` experts (or of those in ``touched``), uint8."""
    p = case.params
    chosen = p.get("touched") or range(p["experts"])
    made = [
        expert_weights(
            case.seed, int(e), p["hidden"], p["intermediate"], p.get("weights_recipe", {})
        )
        for e in chosen
    ]
    return {
        name: torch.from_numpy(np.stack([m[i] for m in made])) for i, name in enumerate(WEIGHTS)
    }


def golden(
    case: Case, given: Mapping[str, Any], classes: Sequence[str] | None, contract: Contract
) -> Made:
    """``w13``, ``w13_sf``, ``w2`` and ``w2_sf``."""
    return Made(dict(oracle.layout(*(given[name].numpy() for name in WEIGHTS))))


def ask(call: Caller, case: Case, given: Mapping[str, Any]) -> Returned:
    """The one call of the case."""
    return call.call("transform_weights", given)


def judge_returned(
    runner: Any, case: Case, golden: StoredGolden, given: Mapping[str, Any], returned: Returned
) -> Verdict:
    """Every byte, and scale factors whose columns of rows are contiguous."""
    result = returned.result
    if not isinstance(result, tuple) or len(result) != len(NAMES):
        raise BadOutput(f"transform_weights must return a tuple of {', '.join(NAMES)}")
    experts, rows, half = given["w13_weight"].shape
    sizes = {"E": experts, "I": rows // 2, "H": 2 * half}
    findings = []
    for name, tensor in zip(NAMES, result, strict=True):
        wanted = TENSORS[name]
        actual = checked(name, tensor, wanted.sizes(sizes), wanted.dtypes)
        if wanted.packed and not tensor.transpose(1, 2).is_contiguous():
            text = f"{name} has strides {tensor.stride()}; it must be MN-major: a column of"
            findings.append(Finding(name, actual.size, text=f"{text} rows contiguous"))
        if golden.matches(name, actual):
            findings.append(Finding(name, actual.size))
            continue
        findings.append(runner.bitwise(name, actual, golden.get(name)))
    return of_findings(case.id, case.kind, findings, ("bitwise",))


KIND: Final = Kind(
    **vars(LAYOUT),
    inputs=inputs,
    golden=golden,
    ask=ask,
    judge_returned=judge_returned,
    parts=Parts(NAMES),
)
