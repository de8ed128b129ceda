"""Kind ``staging``: ``prepare`` writes codes, scale factors, ids and weights into the buffer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch

from megamoe.cases import Case
from megamoe.golden import StoredGolden
from megamoe.judge import Finding, Place, Verdict, bits, of_findings
from megamoe.spec.formats import unpack_sf
from megamoe.spec.forms import E4M3, F32, INT64, UE8M0
from megamoe.worker.exchange import Caller, Returned
from megamoe.worker.serve import POISON

INPUTS: Final = ("hidden_states", "topk_weights", "topk_ids")
_FORM: Final = {"x": E4M3, "topk_idx": INT64, "topk_weights": F32}


def judge(runner: Any, case: Case) -> Verdict:
    """Every bit of the batch's rows, and no byte written beyond them."""
    golden, given = runner.golden(case)
    with runner.caller() as call:
        returned = ask(call, case, given)
    return judge_returned(runner, case, golden, given, returned)


def ask(call: Caller, case: Case, given: Mapping[str, Any]) -> Returned:
    """The one call of the case."""
    return call.call("prepare", {n: given[n] for n in INPUTS}, blanks(case, given))


def judge_returned(
    runner: Any, case: Case, golden: StoredGolden, given: Mapping[str, Any], returned: Returned
) -> Verdict:
    """The verdict of what the call gave back."""
    tokens, ids = len(given["topk_ids"]), given["topk_ids"].numpy()
    findings = []
    for name, tensor in returned.blank.items():
        written, expected = bits(tensor[:tokens]), golden.get(name)
        if name == "x_sf":
            place = Place(("token", "channel"), 32, None, ids)
            pair = (unpack_sf(written), unpack_sf(expected))
            findings.append(runner.bitwise(name, UE8M0, *pair, place))
        else:
            last = "channel" if name == "x" else "slot"
            place = Place(("token", last), 1, None, ids)
            findings.append(runner.bitwise(name, _FORM[name], written, expected, place))
        findings.append(_untouched(name, tensor, tokens))
    return of_findings(case.id, case.kind, findings, ("bitwise",))


def blanks(case: Case, given: Any) -> dict[str, torch.Tensor]:
    """The buffer's tensors: at least one row more than the batch has."""
    tokens, top_k = given["topk_ids"].shape
    hidden, rows = case.params["hidden"], max(case.params["capacity"], tokens + 1)
    sizes = {
        "x": (torch.float8_e4m3fn, hidden), "x_sf": (torch.int32, hidden // 128),
        "topk_idx": (torch.int64, top_k), "topk_weights": (torch.float32, top_k),
    }  # fmt: skip
    return {n: torch.empty(rows, size, dtype=dtype) for n, (dtype, size) in sizes.items()}


def _untouched(name: str, tensor: torch.Tensor, tokens: int) -> Finding:
    """Rows beyond the batch keep what they held."""
    rest = bits(tensor[tokens:].contiguous().view(torch.uint8))
    changed = int((rest != POISON).sum())
    text = f"{name}: {changed} bytes of rows beyond the {tokens} tokens were written"
    return Finding(name, rest.size, text=text if changed else "")
