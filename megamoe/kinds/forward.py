"""Kind ``forward``: the whole layer against its golden, and against recorded bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from megamoe import oracle
from megamoe.cases import Case, Kind
from megamoe.cases.forms import FORWARD
from megamoe.cases.kind import (
    ONLY_CUDA,
    lacks_cuda,
    oracle_tensors,
)
from megamoe.cases.recipes import forward_problem
from megamoe.golden import GoldenError, Made, StoredGolden, predicted, recorded, rows_of
from megamoe.judge import Finding, Verdict, forward_bits, judge_forward, of_findings
from megamoe.judge.judgements import nan_everywhere
from megamoe.kinds.rows import repeated
from megamoe.oracle.folding import leaves_bf16
from megamoe.predict import model
from megamoe.predict.explain import explain
from megamoe.predict.explain import said as changes_line
from megamoe.spec.contract import CONTRACTS, Contract
from megamoe.spec.forms import bits
from megamoe.spec.problem import Problem
from megamoe.spec.tensors import WEIGHTS
from megamoe.worker.exchange import Caller, Missing, Returned
from megamoe.worker.session import FOLDS_SCALES, Identity


@dataclass(frozen=True)
class Shown:
    """The output of a forward for one case, with all its tokens."""

    golden: StoredGolden
    problem: Problem
    inputs: str
    """The digest of its inputs."""
    actual: Mapping[str, Any]
    fingerprint: Mapping[str, Any] | None = None
    """The backend's fingerprint after the call, which may have compiled something."""


def inputs(case: Case) -> dict[str, Any]:
    """The fields of the problem."""
    return forward_problem(case).given


def golden(
    case: Case, given: Mapping[str, Any], classes: Sequence[str] | None, contract: Contract
) -> Made:
    """:meth:`megamoe.oracle.ForwardGolden.to_tensors` of the rows that the case judges."""
    problem = rows_of(Problem(**given), case.rows)
    point = case.params["family"] == "zero-freedom"
    # A point must be one whichever silu a kernel takes, so its proof allows the wider error.
    found = oracle.forward(problem, classes, contract=contract, any_silu=point)
    if point and classes is None and not found.zero_freedom:
        raise GoldenError(
            f"case {case.id} is declared zero-freedom, but {found.why[0]} (contract "
            f"{contract.revision}); change its recipes or its family"
        )
    return Made(dict(found.to_tensors()), found.zero_freedom)


def lacks(identity: Identity, case: Case, golden: StoredGolden, given: Mapping[str, Any]) -> str:
    """Some inputs have operands that a backend which folds scale factors cannot represent.

    A golden that stores digests has no codes to look at. Such a case has ordinary data.
    """
    if not identity.provides(FOLDS_SCALES):
        return ""
    problem = rows_of(Problem(**given), case.rows)
    codes = golden.full.get("l2_acts"), golden.full.get("l2_acts_sf")
    return "bfloat16 number for a scaled operand" if leaves_bf16(problem, *codes) else ""


def shown(runner: Any, case: Case) -> Shown:
    """Run a forward case once."""
    golden, given = runner.golden(case)
    if lacking := lacks(runner.session.identity, case, golden, given):
        raise Missing(lacking)
    with runner.caller() as call:
        returned = ask(call, case, given)
    return _shown(runner, case, golden, given, returned)


def ask(call: Caller, case: Case, given: Mapping[str, Any]) -> Returned:
    """The one call of the case. Raises :class:`Missing` if the case needs a GPU and there is
    none."""
    if lacks_cuda(case, call.device):
        raise Missing(ONLY_CUDA)
    return call.forward(Problem(**given))


def judge_returned(
    runner: Any, case: Case, golden: StoredGolden, given: Mapping[str, Any], returned: Returned
) -> Verdict:
    """Judge by the golden in any case, and by the recorded bits if they belong to the running
    build."""
    return judge_shown(runner, case, _shown(runner, case, golden, given, returned))


def _shown(
    runner: Any, case: Case, golden: StoredGolden, given: Mapping[str, Any], returned: Returned
) -> Shown:
    problem = Problem(**given)
    # The golden would not have been loaded for inputs of another digest.
    inputs = runner.store.entry(case)["inputs"]
    actual = forward_bits(returned.result, problem)
    return Shown(golden, problem, inputs, actual, returned.fingerprint)


def judge_shown(runner: Any, case: Case, what: Shown) -> Verdict:
    """The verdict on the output."""
    state, moved, how = _recorded(runner, case, what)
    moved = [*moved, *repeated(case, what.actual, what.problem)]
    actual = rows(case, what.actual)
    verdict = judged(runner, case, what.golden, what.problem, actual, [], (), moved, how)
    verdict = replace(verdict, recorded=state)
    return verdict if runner.predictions is None else _predicted(runner, case, what, verdict, moved)


def _predicted(
    runner: Any, case: Case, what: Shown, verdict: Verdict, moved: Sequence[Finding]
) -> Verdict:
    """``verdict`` with what the shown bits are to the model's; its status stays."""
    kept: predicted.Predictions = runner.predictions
    narrowed, actual = rows_of(what.problem, case.rows), rows(case, what.actual)
    ids, revision = narrowed.topk_ids.numpy(), runner.session.identity.contract
    state, unlike = kept.compare(case.id, revision, what.inputs, actual, ids)
    if unlike is None:
        return replace(verdict, predicted=state)
    outside = any(finding not in moved for finding in verdict.findings)
    said = unlike.line()
    if runner.explains and not runner.brief:
        changes = explain(narrowed, actual, model(kept.model), CONTRACTS[revision])
        said = f"{said}; {changes_line(changes)}"
    return replace(verdict, predicted="outside" if outside else "inside", unlike=said)


def rows(case: Case, actual: Mapping[str, Any]) -> dict[str, Any]:
    """The rows that the case judges."""
    if case.rows is None:
        return dict(actual)
    return {name: array[case.rows] for name, array in actual.items()}


def judged(
    runner: Any, case: Case, golden: StoredGolden, problem: Problem, actual: dict[str, Any],
    before: Sequence[Finding], how: tuple[str, ...], after: Sequence[Finding] = (),
    also: tuple[str, ...] = (),
) -> Verdict:  # fmt: skip
    """The golden's verdict, with further findings before and after its own."""
    accumulator = runner.session.identity.accumulator
    narrowed = rows_of(problem, case.rows)
    result = judge_forward(actual, golden, accumulator, narrowed, case.rows)
    found = [*before, *result.findings, *after]
    verdict = of_findings(case.id, case.kind, found, (*how, *result.how, *also))
    if verdict.status != "fail":
        return verdict
    runner.add_details(actual, golden, accumulator, narrowed, case.rows, result.findings)
    name = "y" if golden.zero_freedom else f"{accumulator}.y_lo"
    if nan_everywhere(actual["y"], lambda: golden.get(name)):
        reason = (
            f"case {case.id}: y is NaN everywhere; look for a scale of zero, a buffer "
            "that was never written, or an output that was never returned"
        )
        return replace(verdict, reason=reason)
    return verdict


def _recorded(runner: Any, case: Case, what: Shown) -> tuple[str, list[Finding], tuple[str, ...]]:
    kept = runner.kept
    if kept is None:
        return "none", [], ()
    revision = runner.session.identity.contract
    state = kept.state(case.id, what.inputs, what.fingerprint, revision)
    if state != "same":
        return state, [], ()
    ids = what.problem.topk_ids.numpy()
    found = recorded.moved(kept.data["cases"][case.id], what.actual, ids, kept.machine)
    return "moved" if found else "matched", found, ("recorded",)


def dump(case: Case, given: Mapping[str, Any], made: Made, contract: Contract) -> dict[str, Any]:
    """Every stage of the oracle; of the weights only the experts that an id names."""
    problem = rows_of(Problem(**given), case.rows)
    experts = problem.topk_ids[problem.topk_ids >= 0].unique()
    stage = {} if problem.only_y else oracle.staging(
        bits(problem.hidden_states), problem.topk_weights.numpy(), problem.topk_ids.numpy(),
        contract,
    )  # fmt: skip
    between: dict[str, Any] = {}
    oracle.forward(problem, (), contract=contract, trace=between)
    return {
        "input.experts": experts,
        **{f"input.{n}": given[n][experts] for n in (*WEIGHTS, *problem.expert_factors)},
        **{f"oracle.{name}": tensor for name, tensor in (stage | between).items()},
        **oracle_tensors(case, given, made, contract),
    }


KIND: Final = Kind(
    **vars(FORWARD),
    inputs=inputs,
    golden=golden,
    ask=ask,
    lacks=lacks,
    judge_returned=judge_returned,
    dump=dump,
)
