"""One case against one backend: regenerate, run, judge. No pytest in here.

Whatever a backend does, it gets a verdict: what it raises, a wrong dtype or shape, a golden that
cannot be used. A hang is somebody else's business (:mod:`megamoe.suite.plugin`), and so is a
process that is of no use afterwards (:attr:`Runner.lost`).
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch

from megamoe.cases import Case
from megamoe.formats import unpack_sf
from megamoe.golden import (
    GoldenError,
    Store,
    StoredGolden,
    digest_of,
    recorded,
    regenerate,
    rows_of,
)
from megamoe.judge import (
    BadOutput,
    Finding,
    GoldenLacks,
    Place,
    Verdict,
    bits,
    bitwise,
    checked,
    forward_bits,
    judge_forward,
    of_findings,
)
from megamoe.judge.formats import BYTE, E4M3, F32, INT32, INT64, UE8M0, Form
from megamoe.judge.forward import nan_everywhere
from megamoe.problem import Problem, provided
from megamoe.suite import detail, device_laws, errors, properties

CALLABLE: Final[Mapping[str, str]] = {
    "staging": "prepare",
    "eplb": "eplb_map",
    "forward": "forward",
    "property": "forward",
    "layout": "transform_weights",
}
"""What a backend must offer for a kind; an errors case knows by its action."""

POISON: Final = 0x5A
"""Bytes of a buffer before a call, so that what is not written shows."""


class BackendRaised(Exception):
    """The backend raised; the message is one line."""


class BackendDeclined(Exception):
    """The backend raised ``NotImplementedError``: it cannot do this here, and says why."""


@dataclass(frozen=True)
class Shown:
    """What a forward showed of one case, all its tokens."""

    golden: StoredGolden
    problem: Problem
    inputs: str
    """Digest of what it was given."""
    actual: Mapping[str, Any]


@dataclass
class Runner:
    """A backend, where it runs, and the goldens it is held to."""

    backend: Any
    store: Store
    device: str = "cpu"
    kept: recorded.Recorded | None = None
    """What was recorded of this backend on this class of machine."""
    lost: str = ""
    """Why this process can judge no further case: a CUDA error has spoiled it. Empty if it can."""
    details: list[detail.Detail] = field(default_factory=list)
    """Of the last case: what a report draws of its failure."""

    def run(self, case: Case) -> Verdict:
        """The verdict of one case, with the seconds it took."""
        return self._timed(case, lambda: getattr(self, f"_{case.kind}")(case))

    def run_and_show(self, case: Case) -> tuple[Verdict, Shown | None]:
        """The verdict of a forward case, and what was judged; None where nothing was shown."""
        made: list[Shown] = []

        def step() -> Verdict:
            made.append(self.shown(case))
            return self._judge_shown(case, made[0])

        verdict = self._timed(case, step)
        return verdict, made[0] if made else None

    def _timed(self, case: Case, step: Callable[[], Verdict]) -> Verdict:
        started = time.perf_counter()
        self.details = []
        verdict = self._after(self._judged(case, step))
        return replace(verdict, seconds=round(time.perf_counter() - started, 3))

    def _after(self, verdict: Verdict) -> Verdict:
        """The verdict, and whether this process has outlived the case."""
        self.lost = "" if verdict.status == "not-provided" else self._probe()
        if not self.lost:
            return verdict
        if verdict.status in ("fail", "error"):
            text = f"{verdict.reason}; after it the process is of no use ({self.lost})"
            return replace(verdict, reason=text)
        text = f"case {verdict.case_id}: after it the process is of no use ({self.lost})"
        return replace(verdict, status="error", reason=text)

    def _probe(self) -> str:
        """Empty if the process can go on. A sticky CUDA error comes back at every call."""
        try:
            usable = getattr(self.backend, "usable", None)
            if callable(usable) and not usable():
                return "the backend says that it can no longer be used"
            if self.device != "cpu":
                torch.cuda.synchronize()
        except Exception as error:
            return _one_line(error)
        return ""

    def _judged(self, case: Case, step: Callable[[], Verdict]) -> Verdict:
        needed = CALLABLE.get(case.kind)
        if needed is not None and not provided(self.backend, needed):
            return self._not_provided(case, needed)
        try:
            return step()
        except errors.NotProvided as missing:
            return self._not_provided(case, str(missing))
        except device_laws.Unmet as why:
            return Verdict(case.id, case.kind, "not-provided", str(why))
        except BackendDeclined as why:
            return Verdict(case.id, case.kind, "skip", f"the backend declined: {why}")
        except BadOutput as error:
            reason = f"case {case.id}: {error}"
        except BackendRaised as error:
            reason = f"case {case.id}: the backend raised {error}"
        except (GoldenError, GoldenLacks) as error:
            text = str(error)
            reason = text if case.id in text else f"case {case.id}: {text}"
        except MemoryError:
            reason = f"case {case.id}: out of memory; run with fewer workers (-n)"
        except Exception as error:
            reason = f"case {case.id}: cannot be judged: {_one_line(error)} ({place(error)})"
        return Verdict(case.id, case.kind, "error", reason)

    def _not_provided(self, case: Case, name: str) -> Verdict:
        return Verdict(case.id, case.kind, "not-provided", f"the backend has no {name}")

    # --- kinds --------------------------------------------------------------------------------

    def _forward(self, case: Case) -> Verdict:
        return self._judge_shown(case, self.shown(case))

    def shown(self, case: Case) -> Shown:
        """Run a forward case once. Raises what the backend or the golden gives cause for."""
        golden, problem = self._problem(case)
        # The golden would not have been loaded for inputs of another digest.
        return Shown(golden, problem, self.store.entry(case)["inputs"], self._forward_bits(problem))

    def _judge_shown(self, case: Case, shown: Shown) -> Verdict:
        """By the golden, always; and by the recorded bits where they are of what runs here."""
        state, moved, how = self._recorded(case, shown)
        actual = self._rows(case, shown.actual)
        verdict = self._judge_forward(case, shown.golden, shown.problem, actual, [], (), moved, how)
        return replace(verdict, recorded=state)

    def _recorded(self, case: Case, shown: Shown) -> tuple[str, list[Finding], tuple[str, ...]]:
        if self.kept is None:
            return "none", [], ()
        now = recorded.fingerprint(self.backend)
        state = self.kept.state(case.id, shown.inputs, now)
        if state != "same":
            return state, [], ()
        ids = shown.problem.topk_ids.numpy()
        entry = self.kept.data["cases"][case.id]
        found = recorded.moved(entry, shown.actual, ids, self.kept.machine)
        return "moved" if found else "matched", found, ("recorded",)

    def _property(self, case: Case) -> Verdict:
        golden, problem = self._problem(case)
        moved = self._moved(problem)

        def y_of(p: Problem) -> torch.Tensor:
            y = forward_bits(self._call(self.backend.forward, p), p)["y"]
            return torch.from_numpy(y.view("int16")).view(torch.bfloat16)

        law = case.params["law"]
        if law in device_laws.LAWS:
            found = device_laws.findings(self.backend, self._call, moved, law, self.device)
        else:
            found = properties.findings(y_of, moved, law)
        actual = self._rows(case, self._forward_bits(problem))
        return self._judge_forward(case, golden, problem, actual, found, ("law",))

    def _judge_forward(
        self, case: Case, golden: StoredGolden, problem: Problem, actual: dict[str, Any],
        before: list[Finding], how: tuple[str, ...], after: Sequence[Finding] = (),
        also: tuple[str, ...] = (),
    ) -> Verdict:  # fmt: skip
        accumulator = self.backend.accumulator
        narrowed = rows_of(problem, case.rows)
        judged = judge_forward(actual, golden, accumulator, narrowed, case.rows)
        found = [*before, *judged.findings, *after]
        verdict = of_findings(case.id, case.kind, found, (*how, *judged.how, *also))
        if verdict.status == "fail":
            self.details = detail.forward(
                actual, golden, accumulator, narrowed, case.rows, judged.findings
            )
            name = "y" if golden.zero_freedom else f"{accumulator}.y_lo"
            if nan_everywhere(actual["y"], golden.get(name)):
                reason = (
                    f"case {case.id}: y is NaN everywhere; look for a scale of zero, a buffer "
                    "that was never written, or an output that was never returned"
                )
                return replace(verdict, reason=reason)
        return verdict

    def _staging(self, case: Case) -> Verdict:
        golden, given = self._golden(case)
        tokens, top_k = given["topk_ids"].shape
        hidden, capacity = case.params["hidden"], max(case.params["capacity"], tokens + 1)
        out = {
            "x": torch.zeros(capacity, hidden, dtype=torch.uint8).view(torch.float8_e4m3fn),
            "x_sf": torch.zeros(capacity, hidden // 128, dtype=torch.int32),
            "topk_idx": torch.zeros(capacity, top_k, dtype=torch.int64),
            "topk_weights": torch.zeros(capacity, top_k),
        }
        out = {name: tensor.to(self.device) for name, tensor in out.items()}
        for tensor in out.values():
            tensor.view(torch.uint8).fill_(POISON)
        inputs = [given[n].to(self.device) for n in ("hidden_states", "topk_weights", "topk_ids")]
        self._call(self.backend.prepare, *inputs, *out.values())
        ids = given["topk_ids"].numpy()
        form = {"x": E4M3, "topk_idx": INT64, "topk_weights": F32}
        findings = []
        for name, tensor in out.items():
            written, expected = bits(tensor[:tokens]), golden.get(name)
            if name == "x_sf":
                place = Place(("token", "channel"), 32, None, ids)
                pair = (unpack_sf(written), unpack_sf(expected))
                findings.append(self._bitwise(name, UE8M0, *pair, place))
            else:
                last = "channel" if name == "x" else "slot"
                place = Place(("token", last), 1, None, ids)
                findings.append(self._bitwise(name, form[name], written, expected, place))
            findings.append(_untouched(name, tensor, tokens))
        return of_findings(case.id, case.kind, findings, ("bitwise",))

    def _eplb(self, case: Case) -> Verdict:
        golden, given = self._golden(case)
        moved = {name: tensor.to(self.device) for name, tensor in given.items()}
        ids = self._call(self.backend.eplb_map, *moved.values())
        wanted = given["topk_ids"]
        actual = checked("ids", ids, tuple(wanted.shape), (wanted.dtype,))
        load = bits(moved["expert_load_view"])
        form = INT32 if wanted.dtype == torch.int32 else INT64
        findings = [
            self._bitwise("ids", form, actual, golden.get("ids"), Place(("token", "slot"))),
            self._bitwise("load", INT32, load, golden.get("load"), Place(("expert",))),
        ]
        return of_findings(case.id, case.kind, findings, ("bitwise",))

    def _layout(self, case: Case) -> Verdict:
        golden, given = self._golden(case)
        names = ("w13", "w13_sf", "w2", "w2_sf")
        moved = [tensor.to(self.device) for tensor in given.values()]
        made = self._call(self.backend.transform_weights, *moved)
        if not isinstance(made, tuple | list) or len(made) != len(names):
            raise BadOutput(f"transform_weights must return a tuple of {', '.join(names)}")
        findings = []
        for name, tensor in zip(names, made, strict=True):
            packed = name.endswith("_sf")
            source = given[f"{name.removesuffix('_sf')}_weight"]
            shape = (*source.shape[:2], source.shape[2] // 64 if packed else source.shape[2])
            actual = checked(name, tensor, shape, (torch.int32 if packed else torch.uint8,))
            if packed and not tensor.transpose(1, 2).is_contiguous():
                text = f"{name} has strides {tensor.stride()}; it must be MN-major: a column of"
                findings.append(Finding(name, actual.size, text=f"{text} rows contiguous"))
            place = Place(("expert", "row", "channel"), 1 if not packed else 32)
            if golden.matches(name, actual):
                findings.append(Finding(name, actual.size))
                continue
            pair = (actual, golden.get(name))
            if packed:
                pair = (unpack_sf(pair[0]), unpack_sf(pair[1]))
            form: Form = UE8M0 if packed else BYTE
            findings.append(self._bitwise(name, form, *pair, place))
        return of_findings(case.id, case.kind, findings, ("bitwise",))

    def _errors(self, case: Case) -> Verdict:
        p = case.params
        complaint = errors.complaint(
            p["action"], p["args"], p["raises"], p["message"], self.backend
        )
        found = [Finding(p["action"], 1, text=complaint)]
        return of_findings(case.id, case.kind, found, ("error",))

    # --- parts --------------------------------------------------------------------------------

    def _bitwise(self, stage: str, form: Form, actual: Any, expected: Any, at: Place) -> Finding:
        found = bitwise(stage, form, actual, expected, at)
        if found.outside:
            made = detail.measure(stage, form, actual, expected, expected, at.axes, at.per_channel)
            self.details += detail.agreeing([made], [found])
        return found

    def _golden(self, case: Case) -> tuple[StoredGolden, dict[str, Any]]:
        """The golden and the regenerated inputs, whose bits are the ones it was made for."""
        self.store.entry(case)  # before any work: an unknown case is cheap to say
        given = regenerate(case)
        return self.store.load(case, digest_of(given)), given

    def _problem(self, case: Case) -> tuple[StoredGolden, Problem]:
        golden, given = self._golden(case)
        return golden, Problem(**given)

    def _moved(self, problem: Problem) -> Problem:
        """The problem for the backend: on its device, its small tensors its own to overwrite."""
        own = replace(
            problem,
            hidden_states=problem.hidden_states.clone(),
            topk_ids=problem.topk_ids.clone(),
            topk_weights=problem.topk_weights.clone(),
        )
        return own if self.device == "cpu" else own.to(self.device)

    def _forward_bits(self, problem: Problem) -> dict[str, Any]:
        return forward_bits(self._call(self.backend.forward, self._moved(problem)), problem)

    def _rows(self, case: Case, actual: Mapping[str, Any]) -> dict[str, Any]:
        if case.rows is None:
            return dict(actual)
        return {name: array[case.rows] for name, array in actual.items()}

    def _call(self, function: Any, *arguments: Any) -> Any:
        """The backend's own code, and nothing else, inside the guard."""
        try:
            result = function(*arguments)
            if self.device != "cpu":
                torch.cuda.synchronize()
            return result
        except NotImplementedError as error:
            raise BackendDeclined(_one_line(error)) from error
        except Exception as error:
            raise BackendRaised(f"{_one_line(error)} ({place(error)})") from error


def _untouched(name: str, tensor: torch.Tensor, tokens: int) -> Finding:
    """Rows beyond the batch keep what they held."""
    rest = bits(tensor[tokens:].contiguous().view(torch.uint8))
    changed = int((rest != POISON).sum())
    text = f"{name}: {changed} bytes of rows beyond the {tokens} tokens were written"
    return Finding(name, rest.size, text=text if changed else "")


def place(error: BaseException) -> str:
    """Where it was raised: file, line and function of the innermost frame outside pytest."""
    frames = traceback.extract_tb(error.__traceback__)
    pytests = ("_pytest", "pytest_timeout")
    ours = [f for f in frames if not any(p in f.filename for p in pytests)] or frames
    return f"{Path(ours[-1].filename).name}, line {ours[-1].lineno}, in {ours[-1].name}"


def _one_line(error: BaseException) -> str:
    if isinstance(error, torch.OutOfMemoryError):  # torch's line goes on with every process there
        tried = ". ".join(str(error).split(". ")[:2])
        return f"{type(error).__name__}: {tried}; run with fewer workers (-n, -j)"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
