"""Kind ``property``: a law of the layer, and the golden of the problem that it starts from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import numpy.typing as npt

from megamoe.cases import Case
from megamoe.cases.forms import LAUNCH_LAWS, MODE_LAWS, PROPERTY
from megamoe.judge import (
    IN_LAW,
    BadOutput,
    Finding,
    Verdict,
    bitwise,
    forward_bits,
    place_of,
    tensor_bits,
)
from megamoe.kinds import forward, laws
from megamoe.kinds.rows import twin_findings
from megamoe.spec.forms import BF16
from megamoe.spec.problem import Problem
from megamoe.spec.tensors import TENSORS
from megamoe.worker.exchange import Caller, Missing

COUNTS_TOKENS: Final = ("batch-invariance", "padding-rows", "replica-choice")
"""Laws that change how many tokens a call or an expert has. A backend with ``batch_invariant =
False`` does not promise them; a token's place among the others must not matter all the same."""


def judge(runner: Any, case: Case) -> Verdict:
    """The law first, then the golden.

    A law that the backend does not promise is ``not-provided``, where the golden is met.
    """
    golden, problem = runner.problem(case)
    law = case.params["law"]
    is_excused = law in COUNTS_TOKENS and not runner.session.identity.batch_invariant
    with runner.caller() as call:

        def y_of(p: Problem) -> npt.NDArray[Any]:
            return forward_bits(call.forward(p).result, p)["y"]

        if is_excused:
            findings = []
        elif law in LAUNCH_LAWS:
            findings = launch_findings(runner, call, problem, law)
        else:
            findings = laws.findings(y_of, problem, law)
        output = forward_bits(call.forward(problem).result, problem)
    findings += twin_findings(case, output, problem)
    actual = forward.rows(case, output)

    def verdict_of(by: Any) -> Verdict:
        how = () if is_excused else ("law",)
        return forward.verdict_of(runner, case, by, problem, actual, findings, how)

    verdict = runner.under_others(case, verdict_of(golden), verdict_of)
    if is_excused and verdict.status == "pass":
        raise Missing(f"promise of law {law}: it says batch_invariant = False")
    return verdict


def launch_findings(runner: Any, call: Caller, problem: Problem, law: str) -> list[Finding]:
    """Variants that the worker ran, each against an ordinary ``forward``. ``BadOutput`` names every
    variant whose ``y`` has a wrong form."""
    base = forward_bits(call.forward(problem).result, problem)["y"]
    ids = problem.topk_ids.numpy()
    with laws.in_law(law):
        outcome = call.act("launch", problem, apart=law in MODE_LAWS, law=law)
    labels, orders = outcome.extra.get("labels", []), outcome.extra.get("orders", [])
    if not labels or len(labels) != len(outcome.result):
        raise BadOutput(f"law {law} gave {len(outcome.result)} outputs for {len(labels)} variants")
    out, misshapen = [], dict[str, list[str]]()
    for label, order, y in zip(labels, orders, outcome.result.values(), strict=True):
        try:
            actual = tensor_bits("y", y, tuple(base.shape), TENSORS["y"].dtypes)
        except BadOutput as error:
            misshapen.setdefault(str(error), []).append(label)
            continue
        place = place_of("y", order, ids[order])
        out.append(laws.relabel(law, label, bitwise("y", BF16, actual, base[order], place)))
    if misshapen:
        texts = [f"{text} ({', '.join(labels)})" for text, labels in misshapen.items()]
        texts += [finding.text for finding in out if finding.bad]
        raise BadOutput(f"{'; '.join(texts)}{IN_LAW}{law}")
    return out


KIND: Final = replace(forward.KIND, **vars(PROPERTY), judge=judge)
