"""Kind ``eplb``: ``eplb_map`` gives physical ids and adds to the load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megamoe.cases import Case
from megamoe.golden import StoredGolden
from megamoe.judge import Verdict, checked, of_findings
from megamoe.spec.forms import bits
from megamoe.worker.exchange import Caller, Returned


def judge(runner: Any, case: Case) -> Verdict:
    """Every id and every count; the load is the one input that the call may write into."""
    golden, given = runner.golden(case)
    with runner.caller() as call:
        returned = ask(call, case, given)
    return judge_returned(runner, case, golden, given, returned)


def ask(call: Caller, case: Case, given: Mapping[str, Any]) -> Returned:
    """The one call of the case."""
    return call.call("eplb_map", given, own=("expert_load_view",))


def judge_returned(
    runner: Any, case: Case, golden: StoredGolden, given: Mapping[str, Any], returned: Returned
) -> Verdict:
    """The verdict of what the call gave back."""
    wanted = given["topk_ids"]
    actual = checked("ids", returned.result, tuple(wanted.shape), (wanted.dtype,))
    load = bits(returned.inputs["expert_load_view"])
    findings = [runner.bitwise(n, t, golden.get(n)) for n, t in (("ids", actual), ("load", load))]
    return of_findings(case.id, case.kind, findings, ("bitwise",))
