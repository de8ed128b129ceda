"""Kind ``property``: a law of the layer, and the golden of the problem that it starts from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import numpy.typing as npt

from megamoe.cases import Case
from megamoe.cases.forms import LAUNCHED, PROPERTY
from megamoe.judge import (
    IN_LAW,
    BadOutput,
    Finding,
    Verdict,
    bitwise,
    checked,
    forward_bits,
    place_of,
)
from megamoe.kinds import forward, laws
from megamoe.kinds.rows import repeated
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
    excused = law in COUNTS_TOKENS and not runner.session.identity.batch_invariant
    with runner.caller() as call:

        def y_of(p: Problem) -> npt.NDArray[Any]:
            return forward_bits(call.forward(p).result, p)["y"]

        if excused:
            found = []
        elif law in LAUNCHED:
            found = launch_findings(runner, call, problem, law)
        else:
            found = laws.findings(y_of, problem, law)
        shown = forward_bits(call.forward(problem).result, problem)
    found += repeated(case, shown, problem)
    actual = forward.rows(case, shown)

    def judged(by: Any) -> Verdict:
        how = () if excused else ("law",)
        return forward.judged(runner, case, by, problem, actual, found, how)

    verdict = runner.under_others(case, judged(golden), judged)
    if excused and verdict.status == "pass":
        raise Missing(f"promise of law {law}: it says batch_invariant = False")
    return verdict


def launch_findings(runner: Any, call: Caller, problem: Problem, law: str) -> list[Finding]:
    """Variants that the worker ran, each against an ordinary ``forward``. ``BadOutput`` names every
    variant whose ``y`` has a wrong form."""
    base = forward_bits(call.forward(problem).result, problem)["y"]
    ids = problem.topk_ids.numpy()
    with laws.in_law(law):
        returned = call.act("launch", problem, law=law)
    labels, orders = returned.extra.get("labels", []), returned.extra.get("orders", [])
    if not labels or len(labels) != len(returned.result):
        raise BadOutput(f"law {law} gave {len(returned.result)} outputs for {len(labels)} variants")
    out, misshapen = [], dict[str, list[str]]()
    for label, order, y in zip(labels, orders, returned.result.values(), strict=True):
        try:
            actual = checked("y", y, tuple(base.shape), TENSORS["y"].dtypes)
        except BadOutput as error:
            misshapen.setdefault(str(error), []).append(label)
            continue
        place = place_of("y", order, ids[order])
        out.append(laws.named(law, label, bitwise("y", BF16, actual, base[order], place)))
    if misshapen:
        said = [f"{text} ({', '.join(labels)})" for text, labels in misshapen.items()]
        said += [found.text for found in out if found.bad]
        raise BadOutput(f"{'; '.join(said)}{IN_LAW}{law}")
    return out


KIND: Final = replace(forward.KIND, **vars(PROPERTY), judge=judge)
