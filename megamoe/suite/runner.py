"""One case against one backend: regenerate, have it run, judge. No pytest in here.

The backend answers in a worker (:mod:`megamoe.worker`); this process never imports it. Whatever it
does there, the case gets a verdict.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megamoe.cases import Case, kind_of
from megamoe.cases.needs import lacking
from megamoe.golden import (
    GoldenError,
    Store,
    StoredGolden,
    digest_of,
    predicted,
    recorded,
    regenerate,
)
from megamoe.judge import (
    HANG,
    LEARNED_LIMIT,
    BadOutput,
    Finding,
    GoldenLacks,
    Verdict,
    bitwise,
    detail,
    of_findings,
    place_of,
)
from megamoe.kinds import forward
from megamoe.kinds.forward import ForwardOutput
from megamoe.spec.contract import CONTRACTS, Contract, decides
from megamoe.spec.problem import Problem
from megamoe.spec.tensors import TENSORS
from megamoe.worker.exchange import (
    Caller,
    Missing,
    NoOutput,
    NoRoom,
    NotProvided,
    Refusal,
    WroteInput,
)
from megamoe.worker.session import Session, WorkerError

TIMEOUT = 120.0
"""Seconds that a backend may take for the calls of one case, where nothing else is said."""


class Runner:
    """A backend where it runs, and the goldens it is held to.

    ``record``: what was recorded of this backend on this class of machine. ``details`` are, after a
    case, what a report draws of its failure.
    """

    def __init__(
        self, session: Session, store: Store, record: recorded.Recording | None = None,
        timeout: float = TIMEOUT,
    ) -> None:  # fmt: skip
        self.session = session
        self.store = store
        self.record = record
        self.timeout = timeout
        self.has_learned = False
        """The time limit follows from other cases: nobody asked for it."""
        self.predictions: predicted.Predictions | None = None
        """The bits that a model gives of this backend's class."""
        self.explains = False
        """Look for the change of the model that explains an output inside and unlike it."""
        self.brief = False
        """Say what fails and where, without what only a picture needs and the oracle must make."""
        self.details: list[detail.Detail] = []
        self._call: Caller | None = None

    def run(self, case: Case) -> Verdict:
        """The verdict of one case, with the seconds it took."""
        kind = kind_of(case.kind)
        judge = kind.judge or Runner.judge_call

        def step() -> Verdict:
            if lacks := lacking(case, self.session.identity):  # before its inputs are made
                raise NotProvided(lacks)
            return judge(self, case)

        return self._timed_verdict(case, step)

    def judge_call(self, case: Case) -> Verdict:
        """The verdict of the one call of a case, for a kind that has no more than that."""
        kind = kind_of(case.kind)
        assert kind.ask is not None and kind.judge_outcome is not None
        judge = kind.judge_outcome
        golden, inputs = self.golden(case)
        if lacking := kind.lacks(self.session.identity, case, golden, inputs):
            raise Missing(lacking)
        with self.caller() as call:
            output = kind.ask(call, case, inputs)
        verdict = judge(self, case, golden, inputs, output)
        return self.under_others(case, verdict, lambda g: judge(self, case, g, inputs, output))

    def under_others(
        self, case: Case, verdict: Verdict, judge: Callable[[Any], Verdict]
    ) -> Verdict:
        """``verdict``; a fail says under which other contracts the same output is right.

        ``judge(golden)``: the verdict of that output by another golden.
        """
        if verdict.status != "fail":
            return verdict
        right: list[str] = []
        state = self.details, self.brief, self.record, self.predictions
        self.brief, self.record, self.predictions = True, None, None
        try:
            for names, golden in self.other_goldens(case):
                if judge(golden).status == "pass":
                    right += names
        except (GoldenError, GoldenLacks, BadOutput):
            pass  # nothing is known of another contract; what was found stands
        finally:
            self.details, self.brief, self.record, self.predictions = state
        return right_by_others(case, verdict, self.store.contract, right)

    def other_goldens(self, case: Case) -> Iterator[tuple[list[str], Any]]:
        """Each other golden of the case, and the revisions that it is of, the oldest first."""
        of_key: dict[str, list[str]] = {}
        for name in case.revisions:
            of_key.setdefault(self.store.under(CONTRACTS[name]).key(case), []).append(name)
        del of_key[self.store.key(case)]
        for names in of_key.values():
            golden = self.store.under(CONTRACTS[names[0]]).load(case)
            golden.brief = True
            yield names, golden

    def run_and_show(self, case: Case) -> tuple[Verdict, ForwardOutput | None]:
        """The verdict of a forward case, and what was judged; None where nothing was shown."""
        views: list[ForwardOutput] = []

        def show() -> ForwardOutput:
            views.append(forward.run(self, case))
            return views[0]

        return self.judge_view(case, show), views[0] if views else None

    def judge_view(self, case: Case, show: Callable[[], ForwardOutput]) -> Verdict:
        """The verdict of what ``show()`` gives; what that raises is a verdict too."""
        return self._timed_verdict(case, lambda: forward.judge_output(self, case, show()))

    # --- for the kinds --------------------------------------------------------------------------

    def caller(self) -> Caller:
        """Calls of one case, within its time."""
        self._call = Caller(self.session, self.timeout, fingerprint=self.record is not None)
        return self._call

    def golden(self, case: Case) -> tuple[StoredGolden, dict[str, Any]]:
        """The golden and the regenerated inputs, whose bits are the ones it was made for."""
        self.store.entry(case)  # before any work: an unknown case is cheap to say
        inputs = regenerate(case)
        golden = self.store.load(case, digest_of(inputs))
        golden.brief = self.brief
        return golden, inputs

    def problem(self, case: Case) -> tuple[StoredGolden, Problem]:
        """As :meth:`golden`, the inputs as a problem on the CPU."""
        golden, inputs = self.golden(case)
        return golden, Problem(**inputs)

    def bitwise(self, stage: str, actual: Any, expected: Any, ids: Any = None) -> Finding:
        """A finding on the bits of a tensor of ``TENSORS``; its detail is kept where it is bad.

        ``ids``: the experts of each slot, where the findings are to name them.
        """
        form, at = TENSORS[stage].form_of(actual), place_of(stage, ids=ids)
        actual, expected = (TENSORS[stage].elements(bits) for bits in (actual, expected))
        finding = bitwise(stage, form, actual, expected, at)
        if finding.outside and not self.brief:
            measurement = detail.measure(
                stage, form, actual, expected, expected, at.axes, at.per_channel
            )
            self.details += detail.agreeing([measurement], [finding])
        return finding

    def add_details(self, *arguments: Any) -> None:
        """Details of a forward; the arguments are those of :func:`megamoe.judge.detail.forward`."""
        if not self.brief:
            self.details = detail.forward(*arguments)

    # --- parts ----------------------------------------------------------------------------------

    def _timed_verdict(self, case: Case, step: Callable[[], Verdict]) -> Verdict:
        start = time.perf_counter()
        self.details, self._call = [], None
        verdict = self._judge(case, step)
        loss = self._loss()
        if loss:
            verdict = _with_loss(verdict, loss)
        seconds = round(time.perf_counter() - start, 3)
        return replace(verdict, seconds=seconds, by=self._by(), **self._turn())

    def _turn(self) -> dict[str, Any]:
        """The process of the case and its calls there; empty where it made none."""
        call = self._call
        return {"process": call.process, "calls": call.calls} if call and call.process else {}

    def _loss(self) -> str:
        return self._call.loss if self._call is not None else ""

    def _by(self) -> str:
        try:
            return self.session.identity.digest
        except WorkerError:
            return ""

    def _judge(self, case: Case, step: Callable[[], Verdict]) -> Verdict:
        try:
            return step()
        except NotProvided as missing:
            return Verdict(case.id, case.kind, "not-provided", missing.why)
        except Refusal as declined:
            return Verdict(case.id, case.kind, "skip", declined.why)
        except WroteInput as wrote:
            findings = [Finding("inputs", 1, text=wrote.why)]
            return of_findings(case.id, case.kind, findings, ("inputs",))
        except NoOutput as nothing:
            late = self.has_learned and HANG in nothing.why
            reason = f"{nothing.why}{LEARNED_LIMIT}" if late else nothing.why
        except (BadOutput, GoldenError, GoldenLacks, WorkerError) as error:
            reason = str(error)
        except MemoryError:
            reason = "out of memory; run with fewer judges (-n)"
        except NoRoom:
            raise  # the run ends: no further case has room either
        except Exception as error:
            reason = f"cannot be judged: {_one_line(error)} ({place(error)})"
        reason = reason if case.id in reason else f"case {case.id}: {reason}"
        return Verdict(case.id, case.kind, "error", reason)


def right_by_others(case: Case, verdict: Verdict, mine: Contract, right: Sequence[str]) -> Verdict:
    """A fail under ``mine`` of what is ``right`` under other contracts, if under any: says so."""
    if not right:
        return verdict
    other = CONTRACTS[right[0]]
    features = kind_of(case.kind).features(case)
    clauses = [n for n in mine.differences(other) if decides(n, case.kind, features)]
    values = ", ".join(f"{name} {other.clauses[name].value}" for name in clauses)
    reason = f"{verdict.reason}; right under {', '.join(right)} ({values})"
    return replace(verdict, reason=reason, right_under=tuple(right))


def _with_loss(verdict: Verdict, why: str) -> Verdict:
    """The verdict where the case left a process that can answer nothing more."""
    text = f"after it the process is of no use ({why})"
    if verdict.status in ("fail", "error"):
        return replace(verdict, reason=f"{verdict.reason}; {text}")
    return replace(verdict, status="error", reason=f"case {verdict.case_id}: {text}")


def place(error: BaseException) -> str:
    """Where it was raised: file, line and function of the innermost frame."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}, line {frame.lineno}, in {frame.name}"


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
