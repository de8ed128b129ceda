"""Kind ``errors``: wrong calls, which must be refused in the contract's words, nothing written.

:mod:`megamoe.layer.acts` makes the call in the worker, through the module under test with the
backend plugged in, or through the backend's own ``prepare``. The cases hold the words of vLLM
0.24; under a contract whose module has another face the same call must be refused in that face's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from megamoe.cases import Case, Kind
from megamoe.cases.forms import ERRORS
from megamoe.cases.needs import ACTIONS
from megamoe.golden import OracleGolden
from megamoe.judge import OF_MODULE, Finding, Verdict, of_findings
from megamoe.spec.contract import contract
from megamoe.spec.texts import has_words, restated
from megamoe.worker.exchange import BackendFailure


def judge(runner: Any, case: Case) -> Verdict:
    """Judge that the call raised the right error with the right words, and wrote nothing before."""
    p = case.params
    if p["action"] not in ACTIONS:
        raise ValueError(f"unknown action {p['action']!r}; known: {', '.join(ACTIONS)}")
    revision, args = runner.session.identity.contract, p["args"]
    with runner.caller() as call:
        outcome = call.act("refuse", action=p["action"], args=args, contract=revision)
    refusal = outcome.extra.get("refused")
    if not isinstance(refusal, dict):
        raise BackendFailure("the worker did not say what the wrong call did")
    message = restated(
        p["message"], contract(revision),
        shard_id=args.get("shard_id", ""), parameter=args.get("parameter", ""),
    )  # fmt: skip
    words = has_words(p["message"], contract(revision))
    text = complaint(p["action"], refusal, p["raises"], message if words else None)
    findings = [Finding(p["action"], 1, text=text)]
    how = ("error", OF_MODULE) if ACTIONS[p["action"]] is None else ("error",)
    return of_findings(case.id, case.kind, findings, how)


def complaint(action: str, refusal: Mapping[str, Any], raises: str, message: str | None) -> str:
    """Empty if the call was refused as the contract demands; otherwise a line with its behaviour.

    ``message`` None: the contract has no words for it, and any exception is a refusal.

    ``refusal``: ``error``, the type and the text of the exception or None, and ``written``, the
    names of tensors that changed although the call was refused.
    """
    if refusal["error"] is None:
        expected = "any exception" if message is None else f"{raises}: {message}"
        return f"{action}: nothing was raised; expected {expected}"
    kind, text = refusal["error"]
    if message is not None and (kind != raises or text != message):
        return f"{action}: expected {raises}: {message} but got {kind}: {text}"
    if refusal["written"]:
        return f"{action}: refused, but {', '.join(refusal['written'])} had been written by then"
    return ""


KIND: Final = Kind(
    **vars(ERRORS),
    inputs=lambda case: {},
    golden=lambda case, inputs, classes, contract: OracleGolden({}),  # the case has the right text
    judge=judge,
    dump=None,
)
