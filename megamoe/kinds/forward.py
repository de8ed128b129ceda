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
    needs_cuda,
    oracle_tensors,
)
from megamoe.cases.recipes import forward_problem
from megamoe.golden import GoldenError, OracleGolden, StoredGolden, predicted, recorded, rows_of
from megamoe.judge import Finding, Verdict, forward_bits, judge_forward, of_findings
from megamoe.judge.judgements import nan_everywhere
from megamoe.kinds.rows import twin_findings
from megamoe.oracle.folding import leaves_bf16
from megamoe.predict import model
from megamoe.predict.explain import describe as changes_line
from megamoe.predict.explain import explain
from megamoe.spec.contract import CONTRACTS, Contract
from megamoe.spec.forms import bits
from megamoe.spec.problem import Problem
from megamoe.spec.tensors import WEIGHTS
from megamoe.worker.exchange import Caller, CallResult, Missing, NotProvided
from megamoe.worker.session import FOLDS_SCALES, Identity


@dataclass(frozen=True)
class ForwardOutput:
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
    return forward_problem(case).arguments


def golden(
    case: Case, inputs: Mapping[str, Any], classes: Sequence[str] | None, contract: Contract
) -> OracleGolden:
    """:meth:`megamoe.oracle.ForwardGolden.to_tensors` of the rows that the case judges."""
    problem = rows_of(Problem(**inputs), case.rows)
    point = case.params["family"] == "zero-freedom"
    # A point must be one whichever silu a kernel takes, so its proof allows the wider error.
    result = oracle.forward(problem, classes, contract=contract, any_silu=point)
    if point and classes is None and not result.zero_freedom:
        raise GoldenError(
            f"case {case.id} is declared zero-freedom, but {result.why[0]} (contract "
            f"{contract.revision}); change its recipes or its family"
        )
    return OracleGolden(dict(result.to_tensors()), result.zero_freedom)


def lacks(identity: Identity, case: Case, golden: StoredGolden, inputs: Mapping[str, Any]) -> str:
    """Some inputs have operands that a backend which folds scale factors cannot represent.

    A golden that stores digests has no codes to look at. Such a case has ordinary data.
    """
    if not identity.provides(FOLDS_SCALES):
        return ""
    problem = rows_of(Problem(**inputs), case.rows)
    codes = golden.full.get("l2_acts"), golden.full.get("l2_acts_sf")
    return "bfloat16 number for a scaled operand" if leaves_bf16(problem, *codes) else ""


def run(runner: Any, case: Case) -> ForwardOutput:
    """Run a forward case once."""
    golden, inputs = runner.golden(case)
    if lacking := lacks(runner.session.identity, case, golden, inputs):
        raise Missing(lacking)
    with runner.caller() as call:
        outcome = ask(call, case, inputs)
    return _output(runner, case, golden, inputs, outcome)


def ask(call: Caller, case: Case, inputs: Mapping[str, Any]) -> CallResult:
    """The one call of the case. Raises :class:`NotProvided` if the case needs a GPU and there is
    none."""
    if lacks_cuda(case, call.device):
        raise NotProvided(needs_cuda(ONLY_CUDA))
    return call.forward(Problem(**inputs))


def judge_outcome(
    runner: Any, case: Case, golden: StoredGolden, inputs: Mapping[str, Any], outcome: CallResult
) -> Verdict:
    """Judge by the golden in any case, and by the recorded bits if they belong to the running
    build."""
    return judge_output(runner, case, _output(runner, case, golden, inputs, outcome))


def _output(
    runner: Any, case: Case, golden: StoredGolden, inputs: Mapping[str, Any], outcome: CallResult
) -> ForwardOutput:
    problem = Problem(**inputs)
    # The golden would not have been loaded for inputs of another digest.
    digest = runner.store.entry(case)["inputs"]
    actual = forward_bits(outcome.result, problem)
    return ForwardOutput(golden, problem, digest, actual, outcome.fingerprint)


def judge_output(runner: Any, case: Case, what: ForwardOutput) -> Verdict:
    """The verdict on the output."""
    state, after, how = _compare_recording(runner, case, what)
    after = [*after, *twin_findings(case, what.actual, what.problem)]
    actual = rows(case, what.actual)
    verdict = verdict_of(runner, case, what.golden, what.problem, actual, [], (), after, how)
    verdict = replace(verdict, recorded=state)
    return (
        verdict
        if runner.predictions is None
        else _with_prediction(runner, case, what, verdict, after)
    )


def _with_prediction(
    runner: Any, case: Case, what: ForwardOutput, verdict: Verdict, after: Sequence[Finding]
) -> Verdict:
    """``verdict`` with what the bits of the output are to the model's; its status stays."""
    predictions: predicted.Predictions = runner.predictions
    part, actual = rows_of(what.problem, case.rows), rows(case, what.actual)
    ids, revision = part.topk_ids.numpy(), runner.session.identity.contract
    state, unlike = predictions.compare(case.id, revision, what.inputs, actual, ids)
    if unlike is None:
        return replace(verdict, predicted=state)
    outside = any(finding not in after for finding in verdict.findings)
    text = unlike.line()
    if runner.explains and not runner.brief:
        changes = explain(part, actual, model(predictions.model), CONTRACTS[revision])
        text = f"{text}; {changes_line(changes)}"
    return replace(verdict, predicted="outside" if outside else "inside", unlike=text)


def rows(case: Case, actual: Mapping[str, Any]) -> dict[str, Any]:
    """The rows that the case judges."""
    if case.rows is None:
        return dict(actual)
    return {name: array[case.rows] for name, array in actual.items()}


def verdict_of(
    runner: Any, case: Case, golden: StoredGolden, problem: Problem, actual: dict[str, Any],
    before: Sequence[Finding], how: tuple[str, ...], after: Sequence[Finding] = (),
    also: tuple[str, ...] = (),
) -> Verdict:  # fmt: skip
    """The golden's verdict, with further findings before and after its own."""
    accumulator = runner.session.identity.accumulator
    part = rows_of(problem, case.rows)
    result = judge_forward(actual, golden, accumulator, part, case.rows)
    findings = [*before, *result.findings, *after]
    verdict = of_findings(case.id, case.kind, findings, (*how, *result.how, *also))
    if verdict.status != "fail":
        return verdict
    runner.add_details(actual, golden, accumulator, part, case.rows, result.findings)
    name = "y" if golden.zero_freedom else f"{accumulator}.y_lo"
    if nan_everywhere(actual["y"], lambda: golden.get(name)):
        reason = (
            f"case {case.id}: y is NaN everywhere; look for a scale of zero, a buffer "
            "that was never written, or an output that was never returned"
        )
        return replace(verdict, reason=reason)
    return verdict


def _compare_recording(
    runner: Any, case: Case, what: ForwardOutput
) -> tuple[str, list[Finding], tuple[str, ...]]:
    recording = runner.record
    if recording is None:
        return "none", [], ()
    revision = runner.session.identity.contract
    state = recording.state(case.id, what.inputs, what.fingerprint, revision)
    if state != "same":
        return state, [], ()
    ids = what.problem.topk_ids.numpy()
    findings = recorded.differences(
        recording.data["cases"][case.id], what.actual, ids, recording.machine
    )
    return "moved" if findings else "matched", findings, ("recorded",)


def dump(
    case: Case, inputs: Mapping[str, Any], golden: OracleGolden, contract: Contract
) -> dict[str, Any]:
    """Every stage of the oracle; of the weights only the experts that an id names."""
    problem = rows_of(Problem(**inputs), case.rows)
    experts = problem.topk_ids[problem.topk_ids >= 0].unique()
    stage = {} if problem.only_y else oracle.staging(
        bits(problem.hidden_states), problem.topk_weights.numpy(), problem.topk_ids.numpy(),
        contract,
    )  # fmt: skip
    between: dict[str, Any] = {}
    oracle.forward(problem, (), contract=contract, trace=between)
    return {
        "input.experts": experts,
        **{f"input.{n}": inputs[n][experts] for n in (*WEIGHTS, *problem.expert_factors)},
        **{f"oracle.{name}": tensor for name, tensor in (stage | between).items()},
        **oracle_tensors(case, inputs, golden, contract),
    }


KIND: Final = Kind(
    **vars(FORWARD),
    inputs=inputs,
    golden=golden,
    ask=ask,
    lacks=lacks,
    judge_outcome=judge_outcome,
    dump=dump,
)
