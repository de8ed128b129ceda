"""Kind ``layout``: ``transform_weights`` gives the kernel-side weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch

from megamoe.cases import Case
from megamoe.golden import StoredGolden
from megamoe.judge import BadOutput, Finding, Place, Verdict, checked, of_findings
from megamoe.spec.formats import unpack_sf
from megamoe.spec.forms import BYTE, UE8M0, Form
from megamoe.worker.exchange import Caller, Returned

NAMES: Final = ("w13", "w13_sf", "w2", "w2_sf")


def judge(runner: Any, case: Case) -> Verdict:
    """Every byte, and scale factors whose columns of rows are contiguous."""
    golden, given = runner.golden(case)
    with runner.caller() as call:
        returned = ask(call, case, given)
    return judge_returned(runner, case, golden, given, returned)


def ask(call: Caller, case: Case, given: Mapping[str, Any]) -> Returned:
    """The one call of the case."""
    return call.call("transform_weights", given)


def judge_returned(
    runner: Any, case: Case, golden: StoredGolden, given: Mapping[str, Any], returned: Returned
) -> Verdict:
    """The verdict of what the call gave back."""
    result = returned.result
    if not isinstance(result, tuple) or len(result) != len(NAMES):
        raise BadOutput(f"transform_weights must return a tuple of {', '.join(NAMES)}")
    findings = []
    for name, tensor in zip(NAMES, result, strict=True):
        packed = name.endswith("_sf")
        source = given[f"{name.removesuffix('_sf')}_weight"]
        shape = (*source.shape[:2], source.shape[2] // 64 if packed else source.shape[2])
        actual = checked(name, tensor, shape, (torch.int32 if packed else torch.uint8,))
        if packed and not tensor.transpose(1, 2).is_contiguous():
            text = f"{name} has strides {tensor.stride()}; it must be MN-major: a column of"
            findings.append(Finding(name, actual.size, text=f"{text} rows contiguous"))
        if golden.matches(name, actual):
            findings.append(Finding(name, actual.size))
            continue
        pair = (actual, golden.get(name))
        if packed:
            pair = (unpack_sf(pair[0]), unpack_sf(pair[1]))
        place = Place(("expert", "row", "channel"), 32 if packed else 1)
        form: Form = UE8M0 if packed else BYTE
        findings.append(runner.bitwise(name, form, *pair, place))
    return of_findings(case.id, case.kind, findings, ("bitwise",))
