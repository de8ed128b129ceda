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
from megamoe.golden import OracleGolden, StoredGolden
from megamoe.judge import BadOutput, Finding, Verdict, of_findings, tensor_bits
from megamoe.spec.contract import Contract
from megamoe.spec.tensors import OPERATIONS, TENSORS, WEIGHTS
from megamoe.worker.exchange import Caller, CallResult

NAMES: Final = OPERATIONS["transform_weights"].returns


def inputs(case: Case) -> dict[str, Any]:
    """Checkpoint-layout weights of ``experts`` experts (or of those in ``touched``), uint8."""
    p = case.params
    experts = p.get("touched") or range(p["experts"])
    weights = [
        expert_weights(
            case.seed, int(e), p["hidden"], p["intermediate"], p.get("weights_recipe", {})
        )
        for e in experts
    ]
    return {
        name: torch.from_numpy(np.stack([m[i] for m in weights])) for i, name in enumerate(WEIGHTS)
    }


def golden(
    case: Case, inputs: Mapping[str, Any], classes: Sequence[str] | None, contract: Contract
) -> OracleGolden:
    """``w13``, ``w13_sf``, ``w2`` and ``w2_sf``."""
    return OracleGolden(dict(oracle.layout(*(inputs[name].numpy() for name in WEIGHTS))))


def ask(call: Caller, case: Case, inputs: Mapping[str, Any]) -> CallResult:
    """The one call of the case."""
    return call.call("transform_weights", inputs)


def judge_outcome(
    runner: Any, case: Case, golden: StoredGolden, inputs: Mapping[str, Any], outcome: CallResult
) -> Verdict:
    """Every byte, and scale factors whose columns of rows are contiguous."""
    result = outcome.result
    if not isinstance(result, tuple) or len(result) != len(NAMES):
        raise BadOutput(f"transform_weights must return a tuple of {', '.join(NAMES)}")
    experts, rows, half = inputs["w13_weight"].shape
    sizes = {"E": experts, "I": rows // 2, "H": 2 * half}
    findings = []
    for name, tensor in zip(NAMES, result, strict=True):
        spec = TENSORS[name]
        actual = tensor_bits(name, tensor, spec.sizes(sizes), spec.dtypes)
        if spec.packed and not tensor.transpose(1, 2).is_contiguous():
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
    judge_outcome=judge_outcome,
    parts=Parts(NAMES),
)
