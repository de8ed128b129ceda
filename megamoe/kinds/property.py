"""Kind ``property``: a law of the layer, and the golden of the problem that it starts from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy.typing as npt

from megamoe.cases import Case
from megamoe.cases.forms import LAUNCH_LAWS, PROPERTY
from megamoe.cases.laws import MODES
from megamoe.judge import (
    IN_LAW,
    RAISED,
    BadOutput,
    Finding,
    Verdict,
    bitwise,
    forward_bits,
    in_variant,
    place_of,
    tensor_bits,
)
from megamoe.kinds import forward, laws
from megamoe.kinds.rows import twin_findings
from megamoe.spec.forms import BF16
from megamoe.spec.problem import Problem
from megamoe.spec.tensors import TENSORS
from megamoe.worker.exchange import BackendFailure, Caller, CallResult, Missing

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
    """Variants that the worker ran, each against an ordinary ``forward``.

    One exception names all variants that raised, and all with another ``y``: who mends one sees the
    others too. ``BadOutput`` names every variant whose ``y`` has a wrong form.
    """
    base = forward_bits(call.forward(problem).result, problem)["y"]
    ids = problem.topk_ids.numpy()
    bad, out = list[str](), list[Finding]()
    errors, misshapen = list[tuple[str, str, str]](), dict[str, list[str]]()
    for outcome in _launches(call, problem, law):
        labels, orders = outcome.extra.get("labels", []), outcome.extra.get("orders", [])
        errors += outcome.extra.get("errors", [])
        if len(labels) != len(outcome.result):
            raise BadOutput(
                f"law {law} gave {len(outcome.result)} outputs for {len(labels)} variants"
            )
        for label, order, y in zip(labels, orders, outcome.result.values(), strict=True):
            try:
                actual = tensor_bits("y", y, tuple(base.shape), TENSORS["y"].dtypes)
            except BadOutput as error:
                misshapen.setdefault(str(error), []).append(label)
                bad.append(label)
                continue
            finding = bitwise("y", BF16, actual, base[order], place_of("y", order, ids[order]))
            out.append(laws.relabel(law, label, finding))
            bad += [label] if finding.bad else []
    if errors:
        raise BackendFailure(f"{_exception_of(errors, bad)}{IN_LAW}{law}")
    if misshapen:
        texts = [f"{text} ({', '.join(labels)})" for text, labels in misshapen.items()]
        texts += [finding.text for finding in out if finding.bad]
        raise BadOutput(f"{'; '.join(texts)}{IN_LAW}{law}")
    if not out:
        raise BadOutput(f"law {law} gave no output")
    return out


def _launches(call: Caller, problem: Problem, law: str) -> Iterator[CallResult]:
    """The answers of the worker; of a law of torch's modes, one of each of its processes."""
    if law not in MODES:
        with laws.in_law(law):
            yield call.act("launch", problem, law=law)
        return
    for modes in MODES[law]:
        with laws.in_law(law, modes[0]):
            outcome = call.act("launch", problem, apart=True, law=law, processes=[modes])
        yield outcome


def _exception_of(errors: Sequence[tuple[str, str, str]], others: Sequence[str]) -> str:
    """One exception for all, by text, with the place of the first; ``others`` are the variants with
    another output."""
    labels: dict[str, list[str]] = {}
    for label, text, _ in errors:
        labels.setdefault(text, []).append(in_variant(label))
    lines = [f"{', '.join(under)}: {text}" for text, under in labels.items()]
    lines += [f"{', '.join(map(in_variant, others))}: another output"] if others else []
    return f"{RAISED} RuntimeError: {'; '.join(lines)} ({errors[0][2]})"


KIND: Final = replace(forward.KIND, **vars(PROPERTY), judge=judge)
