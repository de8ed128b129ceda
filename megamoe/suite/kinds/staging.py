"""Kind ``staging``: ``prepare`` writes codes, scale factors, ids and weights into the buffer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch

from megamoe.cases import Case
from megamoe.golden import StoredGolden
from megamoe.judge import Finding, Verdict, of_findings
from megamoe.spec.forms import bits
from megamoe.spec.tensors import OPERATIONS, TENSORS
from megamoe.worker.exchange import Caller, Returned
from megamoe.worker.serve import POISON

PREPARE: Final = OPERATIONS["prepare"]


def judge(runner: Any, case: Case) -> Verdict:
    """Every bit of the batch's rows, and no byte written beyond them."""
    golden, given = runner.golden(case)
    with runner.caller() as call:
        returned = ask(call, case, given)
    return judge_returned(runner, case, golden, given, returned)


def ask(call: Caller, case: Case, given: Mapping[str, Any]) -> Returned:
    """The one call of the case."""
    return call.call("prepare", {n: given[n] for n in PREPARE.takes}, blanks(case, given))


def judge_returned(
    runner: Any, case: Case, golden: StoredGolden, given: Mapping[str, Any], returned: Returned
) -> Verdict:
    """The verdict of what the call gave back."""
    tokens, ids = len(given["topk_ids"]), given["topk_ids"].numpy()
    findings = []
    for name, tensor in returned.blank.items():
        findings.append(runner.bitwise(name, bits(tensor[:tokens]), golden.get(name), ids))
        findings.append(_untouched(name, tensor, tokens))
    return of_findings(case.id, case.kind, findings, ("bitwise",))


def blanks(case: Case, given: Any) -> dict[str, torch.Tensor]:
    """The buffer's tensors: at least one row more than the batch has."""
    tokens, top_k = given["topk_ids"].shape
    rows = max(case.params["capacity"], tokens + 1)
    sizes = {"T": rows, "K": top_k, "H": case.params["hidden"]}
    made = [TENSORS[name] for name in PREPARE.returns]
    return {t.name: torch.empty(t.sizes(sizes), dtype=t.dtypes[0]) for t in made}


def _untouched(name: str, tensor: torch.Tensor, tokens: int) -> Finding:
    """Rows beyond the batch keep what they held."""
    rest = bits(tensor[tokens:].contiguous().view(torch.uint8))
    changed = int((rest != POISON).sum())
    text = f"{name}: {changed} bytes of rows beyond the {tokens} tokens were written"
    return Finding(name, rest.size, text=text if changed else "")
