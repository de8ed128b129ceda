"""The judgement of one output: the judge of ``megamoe check``, without its processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from megamoe.api.problems import LoadedCase, contract_for, origin_of
from megamoe.cases import Case, CaseError, kind_of
from megamoe.cases.recipes import forward_problem
from megamoe.golden import Store, digest_of, make, regenerate
from megamoe.judge import Finding, Verdict, forward_bits, of_findings, picture, tensor_bits
from megamoe.kinds import forward
from megamoe.kinds.forward import ForwardOutput
from megamoe.spec.accumulators import classes_of
from megamoe.spec.contract import CONTRACTS, Contract
from megamoe.spec.forms import bits
from megamoe.spec.problem import Output, Problem
from megamoe.spec.tensors import OPERATIONS, TENSORS
from megamoe.suite.at_hand import GoldenNow, judge_output
from megamoe.suite.runner import Runner
from megamoe.worker.exchange import CallResult
from megamoe.worker.session import Identity


@dataclass(frozen=True)
class Judgement:
    """What the judge says of one output. It is true in a condition where the output is right."""

    verdict: Verdict
    """Status, reason, worst element and findings, as ``megamoe check`` reports them."""
    accumulator: str
    """The class that was claimed; empty where bits alone decide."""
    contract: str
    """The contract revision that was judged under."""
    again: str
    """Python that gives the same inputs again."""

    @property
    def ok(self) -> bool:
        """The output was judged, and it is right."""
        return self.verdict.status == "pass"

    @property
    def findings(self) -> Sequence[Finding]:
        """One for each tensor that is wrong: how many elements, where, and the worst of them."""
        return self.verdict.findings

    def __bool__(self) -> bool:
        return self.ok

    def __repr__(self) -> str:
        """One line: the status, the reason, and what was judged under; `str` has the picture."""
        reason = f": {self.verdict.reason}" if self.verdict.reason else ""
        claim = f"accumulator {self.accumulator}, " if self.accumulator else ""
        return f"<Judgement {self.verdict.status}{reason}; {claim}contract {self.contract}>"

    def __str__(self) -> str:
        under = f"accumulator {self.accumulator}, " if self.accumulator else ""
        first, *lines = picture(self.verdict, "").splitlines()[:-1]  # the last is for `check`
        lines += [f"under:  {under}contract {self.contract}", f"again:  {self.again}"]
        return "\n".join([first.rstrip(": "), *lines])


def judge(
    what: Problem | LoadedCase, output: Output | tuple[torch.Tensor, ...], *,
    accumulator: str | None = None, contract: str | None = None,
) -> Judgement:  # fmt: skip
    """Judge what a kernel returned for a problem, or for a case of the suite.

    ``what``: a :class:`megamoe.spec.problem.Problem`, which the oracle answers now, or a case of
    :func:`megamoe.load_case`, which is held to its stored golden.

    ``output`` of a forward: ``y`` (T, H) bfloat16, or a mapping with ``y`` and any of ``x``,
    ``x_sf``, ``l2_acts`` and ``l2_acts_sf``. Of the other kinds: a mapping, or a tuple in this
    order: staging ``x, x_sf, topk_idx, topk_weights``; eplb ``ids, load``; layout
    ``w13, w13_sf, w2, w2_sf``. :data:`megamoe.spec.tensors.TENSORS` has shapes and dtypes. The
    tensors may lie on any device.

    ``accumulator``: the class that the kernel claims, for a forward. ``contract``: the revision;
    None: the newest that knows the problem.

    A wrong output, one of a wrong shape, and an input that the kernel changed are a judgement that
    is not ``ok``. Raises ``ValueError``, one line, where the question itself means nothing: an
    unknown class, a revision that does not know the problem, a case of kind errors. A property
    case is judged by its golden alone: its law needs more calls than one.
    """
    if isinstance(what, LoadedCase):
        return _of_case(what, output, accumulator, contract)
    if not isinstance(what, Problem):
        raise TypeError(
            f"judge takes a problem or a loaded case, not {type(what).__name__}; see "
            "megamoe.problem and megamoe.load_case"
        )
    return _of_problem(what, output, accumulator, contract)


def _class(accumulator: str | None, weight_format: str) -> str:
    classes = classes_of(weight_format)
    if accumulator not in classes:
        raise ValueError(
            f"accumulator is {accumulator!r}; name the class that the kernel claims, one of "
            f"{', '.join(classes)} for {weight_format} weights"
        )
    return str(accumulator)


# --- a problem --------------------------------------------------------------------------------


def _of_problem(
    problem: Problem, output: Any, accumulator: str | None, revision: str | None
) -> Judgement:
    claim, features = _class(accumulator, problem.weight_format), set(problem.features)
    revisions = tuple(n for n, c in CONTRACTS.items() if c.takes(features))
    if not revisions:
        raise ValueError(f"no contract knows {', '.join(problem.features)} together")
    asks = f"asks {', '.join(problem.features)}" if features else "has MXFP4 weights and no feature"
    contract = contract_for(revision, revisions, f"a problem that {asks}")
    origin = origin_of(problem)
    name, again = "problem", "the same problem; megamoe did not draw it"
    own = problem.to("cpu")
    golden = GoldenNow(own, claim, contract)
    if origin is not None:
        name, again = origin.case.name, origin.call
        fresh = forward_problem(origin.case)  # what the kernel did to its copy counts for nothing
        golden = GoldenNow(fresh, claim, contract)
        golden.is_calibrated = origin.is_calibrated
        if input_name := changed_input(own.arguments, fresh.arguments):
            return _wrote(f"forward/{name}", "forward", input_name, claim, contract, again)
        own = fresh
    verdict = judge_output(own, output, claim, contract, name, golden, others=True)
    return Judgement(verdict, claim, contract.revision, again)


# --- a case -----------------------------------------------------------------------------------


class _Anybody:
    """Stands where a runner has its session: of outputs that somebody brings."""

    folder = None

    def __init__(self, accumulator: str, contract: Contract) -> None:
        # A case for GPUs alone is one here too: its output is at hand.
        self.identity = Identity(
            "observed", accumulator, (*OPERATIONS,), contract.revision, facts={"device": "cuda"}
        )


class _Runner(Runner):
    """A runner that calls nobody."""

    def judge_step(self, case: Case, step: Callable[[], Verdict]) -> Verdict:
        """The verdict of ``step``; what it raises is a verdict too."""
        return self._timed_verdict(case, step)


def _of_case(
    subject: LoadedCase, output: Any, accumulator: str | None, revision: str | None
) -> Judgement:
    case, kind = subject.case, kind_of(subject.kind)
    if kind.ask is None:
        raise CaseError(
            f"case {case.id} judges wrong calls, which one output cannot show; run `megamoe check "
            f"--backend B --case {case.id}`"
        )
    claim = (
        _class(accumulator, case.params.get("weight_format", "mxfp4")) if kind.is_forward else ""
    )
    contract = contract_for(revision, subject.contracts, f"case {case.id}")
    again = f"megamoe.load_case({case.id!r})"
    inputs = regenerate(case)
    if input_name := changed_input(subject.inputs, inputs):
        return _wrote(case.id, case.kind, input_name, claim, contract, again)
    session: Any = _Anybody(claim, contract)
    runner = _Runner(session, Store(subject.root, make, contract))

    def step() -> Verdict:
        golden = runner.store.load(case, digest_of(inputs))
        if kind.is_forward:
            problem = Problem(**inputs)
            view = ForwardOutput(golden, problem, "", forward_bits(output, problem))

            def of(one: Any) -> Verdict:
                return forward.judge_output(runner, case, replace(view, golden=one))

            return runner.under_others(case, of(golden), of)
        assert kind.judge_outcome is not None
        verdict_of, tensors = kind.judge_outcome, _returns(case, inputs, output)

        def by(one: Any) -> Verdict:
            return verdict_of(runner, case, one, inputs, tensors)

        return runner.under_others(case, by(golden), by)

    verdict = runner.judge_step(case, step)
    return Judgement(verdict, claim, contract.revision, again)


_STAGES = {"staging": "prepare", "eplb": "eplb_map", "layout": "transform_weights"}
"""Kind of case to the operation whose results it judges."""


def _returns(case: Case, inputs: Mapping[str, Any], output: Any) -> CallResult:
    """The tensors as a worker would have brought them."""
    names = OPERATIONS[_STAGES[case.kind]].returns
    if isinstance(output, tuple) and len(output) == len(names):
        output = dict(zip(names, output, strict=True))
    if not isinstance(output, Mapping) or set(output) != set(names):
        raise ValueError(
            f"a case of kind {case.kind} is judged by {', '.join(names)}; give a mapping of these, "
            "or a tuple in this order"
        )
    brought = {n: t.detach().cpu() if isinstance(t, torch.Tensor) else t for n, t in output.items()}
    if case.kind == "layout":
        return CallResult(tuple(brought[n] for n in names))
    if case.kind == "eplb":
        shape, load = tuple(inputs["expert_load_view"].shape), brought["load"]
        tensor_bits("load", load, shape, TENSORS["load"].dtypes)
        return CallResult(brought["ids"], inputs={"expert_load_view": load})
    tokens, top_k = inputs["topk_ids"].shape
    sizes = {"T": tokens, "K": top_k, "H": case.params["hidden"]}
    for name in names:
        tensor_bits(name, brought[name], TENSORS[name].sizes(sizes), TENSORS[name].dtypes)
    return CallResult(None, blank=brought)


# --- inputs that were changed -----------------------------------------------------------------

_INOUT = ("expert_load_view",)


def changed_input(now: Mapping[str, Any], fresh: Mapping[str, Any]) -> str:
    """The first input whose bits are not those that were given; empty for none."""
    for name, was in fresh.items():
        if name in _INOUT or not isinstance(was, torch.Tensor):
            continue
        if not np.array_equal(bits(now[name]), bits(was)):
            return name
    return ""


def _wrote(
    case_id: str, kind: str, name: str, claim: str, contract: Contract, again: str
) -> Judgement:
    text = f"input {name} is not what was given: the kernel, or somebody else, wrote into it"
    verdict = of_findings(case_id, kind, [Finding("inputs", 1, text=text)], ("inputs",))
    return Judgement(verdict, claim, contract.revision, again)
