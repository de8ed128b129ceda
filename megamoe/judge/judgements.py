"""The judgement of a forward: three sharpnesses, depending on the stages that the backend shows.

- A zero-freedom golden is one point: every tensor of the output must have its bits.
- *Staged*: if the backend shows the codes of linear 2, they are judged by the envelope of the
  accumulator class. Then y is judged by linear 2 and the combine, recomputed exactly from these
  codes.
- *End to end*: if the backend shows only y, y is judged by the certified interval; the statistic
  stands beside it, but not for other formats than MXFP4, for which it is not calibrated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module, resources
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from megamoe import oracle
from megamoe.judge import elements
from megamoe.judge.elements import Place, place_of
from megamoe.judge.verdict import Finding
from megamoe.spec.accumulators import classes_of
from megamoe.spec.contract import Contract
from megamoe.spec.formats import E4M3_NAN, GROUP
from megamoe.spec.forms import BF16, E4M3, UE8M0, bits
from megamoe.spec.problem import Problem
from megamoe.spec.tensors import TENSORS

Array = npt.NDArray[Any]

STAGING: Final = ("x", "x_sf")
RESULTS: Final = ("l2_acts_sf", "l2_acts", "y")
"""Stages of a forward in the order in which findings name them, staging before the rest."""


class Golden(Protocol):
    """The part of a stored golden (:class:`megamoe.golden.store.StoredGolden`) that the judge
    uses."""

    zero_freedom: bool
    contract: Contract
    is_calibrated: bool
    """The statistic was calibrated on data of this kind."""

    def names(self) -> Sequence[str]:
        """Tensors of the golden."""

    def get(self, name: str) -> Array:
        """One tensor, from the store, or from the oracle if the store holds digests only."""

    def matches(self, name: str, actual: Array, nan: Array) -> bool:
        """Whether ``actual`` has the stored digests; False if there are no digests."""

    def other_rows(self, name: str, actual: Array) -> list[int] | None:
        """Rows with another digest, where a brief judgement is wanted and there are digests."""


class GoldenLacks(ValueError):
    """The golden lacks the data that the judgement of this backend needs."""


@dataclass(frozen=True)
class Judgement:
    """The findings of all tensors, and the names of the judgements."""

    findings: list[Finding]
    how: tuple[str, ...]


def judge_forward(
    actual: Mapping[str, Array], golden: Golden, accumulator: str, problem: Problem,
    tokens: Sequence[int] | None = None,
) -> Judgement:  # fmt: skip
    """Judge ``{stage: bits}`` of the rows ``tokens`` against their golden.

    ``problem`` holds the same rows on the CPU. ``accumulator`` is the backend's class. Raises
    :class:`GoldenLacks` where the golden has no envelope for the class.
    """
    ids = problem.topk_ids.numpy()
    place = _Places(ids, tokens)
    findings: list[Finding] = []
    how: list[str] = []
    if any(name in actual for name in STAGING):
        findings += _staging(actual, problem, place, golden.contract)
        how.append("bitwise")
    has_codes = "l2_acts" in actual and "l2_acts_sf" in actual
    if golden.zero_freedom:
        findings += _point(actual, golden, place)
        how.append("bitwise")
    elif has_codes:
        findings += _staged_findings(actual, golden, accumulator, problem, place)
        how.append("staged")
    else:
        findings.append(_end_to_end(actual["y"], golden, accumulator, problem, place))
        how.append("end-to-end")
        unlike = problem.only_y or not golden.is_calibrated
        statistic = None if unlike else _statistic()
        if statistic is not None:
            size = problem.intermediate_size
            alarms = statistic(actual["y"], golden.get("y"), ids, size, accumulator, tokens=tokens)
            if alarms:
                more = f", and {len(alarms) - 1} more" if len(alarms) > 1 else ""
                text = f"statistic: {alarms[0]}{more}"
                findings.append(Finding("y", actual["y"].size, text=text))
            how.append("statistic")
    return Judgement(findings, tuple(dict.fromkeys(how)))


def nan_everywhere(actual: Array, expected: Callable[[], Array]) -> bool:
    """y is NaN in every element although the golden has a number somewhere."""
    if not actual.size or not BF16.is_nan(actual).all():
        return False
    return not BF16.is_nan(expected()).all()  # comes last: the oracle may have to compute it


class _Places:
    """The rows and slots to judge."""

    def __init__(self, ids: Array, tokens: Sequence[int] | None) -> None:
        self.ids, self.tokens = ids, tokens
        self.live = (ids >= 0)[:, :, None]

    def of(self, name: str) -> Place:
        """The axes of a stage."""
        return place_of(name, self.tokens, self.ids)

    def mask(self, name: str) -> Array | None:
        """The part of a stage to compare; None: all of it."""
        return None if TENSORS[name].reads_masked else self.live


def _staging(
    actual: Mapping[str, Array], problem: Problem, place: _Places, contract: Contract
) -> list[Finding]:
    """Exposed x and x_sf: bitwise against the oracle."""
    stage = oracle.staging(
        bits(problem.hidden_states), problem.topk_weights.numpy(), problem.topk_ids.numpy(),
        contract,
    )  # fmt: skip
    out = []
    for name in STAGING:
        if name in actual:
            tensor, (output, right) = TENSORS[name], (actual[name], stage[name])
            pair = tensor.elements(output), tensor.elements(right)
            out.append(elements.bitwise(name, tensor.form_of(output), *pair, place.of(name)))
    return out


def _point(actual: Mapping[str, Array], golden: Golden, place: _Places) -> list[Finding]:
    """Zero freedom: y and, where shown, codes and exponents are the golden's bits."""
    out = []
    for name in RESULTS:
        if name not in actual:
            continue
        mask, where = place.mask(name), place.of(name)
        form = TENSORS[name].form_of(actual[name])
        output = actual[name] if mask is None else np.where(mask, actual[name], 0)
        if name == "l2_acts":
            output = observable_codes(output, actual.get("l2_acts_sf"))
        if golden.matches(name, output, form.is_nan(output)):
            out.append(Finding(name, output.size))
            continue
        rows = golden.other_rows(name, output)
        if rows is None:
            out.append(elements.bitwise(name, form, output, golden.get(name), where, mask))
        else:
            out.append(of_rows(name, output, rows, where))
    return out


def observable_codes(codes: Array, sf: Array | None) -> Array:
    """``(..., I)`` E4M3 codes as far as an output can show them, which is how goldens hold them.

    +0 stands for both zeros, and NaN for every code of a group whose UE8M0 byte ``sf`` is 255.
    """
    out = np.where(codes == 0x80, 0, codes).astype(np.uint8)
    if sf is not None:
        out[np.repeat(sf == 0xFF, GROUP, axis=-1)] = E4M3_NAN
    return out


def of_rows(name: str, output: Array, rows: Sequence[int], place: Place) -> Finding:
    """The finding without the oracle: the rows whose digests differ."""
    tokens = [place.token(row) if "token" in place.axes else row for row in rows]
    text = f"{name}: {len(rows)} of {len(output)} rows have other bits, the first is {tokens[0]}"
    return Finding(name, output.size, text=f"{text}; run it alone to see the elements")


def _staged_findings(
    actual: Mapping[str, Array], golden: Golden, accumulator: str, problem: Problem, place: _Places
) -> list[Finding]:
    envelope = _golden_of_class(golden, accumulator, problem).envelopes[accumulator]
    live = place.live
    sf = np.where(live, actual["l2_acts_sf"], 0).astype(np.uint8)
    codes = np.where(live, actual["l2_acts"], 0).astype(np.uint8)
    where = place.of("l2_acts_sf")
    findings = [
        elements.interval("l2_acts_sf", UE8M0, sf, envelope.sf_lo, envelope.sf_hi, where, live)
    ]
    low, high = envelope.code_interval(sf)
    where = place.of("l2_acts")
    findings.append(elements.key_interval("l2_acts", E4M3, codes, low, high, where, live))
    y_low, y_high = oracle.combine_interval(problem, codes, sf, accumulator, golden.contract)
    findings.append(elements.interval("y", BF16, actual["y"], y_low, y_high, place.of("y")))
    return findings


def _end_to_end(
    y: Array, golden: Golden, accumulator: str, problem: Problem, place: _Places
) -> Finding:
    _require_class(golden, accumulator, problem)
    low, high = golden.get(f"{accumulator}.y_lo"), golden.get(f"{accumulator}.y_hi")
    return elements.interval("y", BF16, y, low, high, place.of("y"))


def _require_class(golden: Golden, accumulator: str, problem: Problem) -> None:
    classes = classes_of(problem.weight_format)
    if accumulator not in classes:
        raise GoldenLacks(
            f"accumulator class {accumulator!r} is none of {problem.weight_format} weights; claim "
            f"one of {', '.join(classes)}"
        )
    if f"{accumulator}.y_lo" not in golden.names():
        raise GoldenLacks(
            f"the golden has no envelope for accumulator class {accumulator!r}; record it again "
            "with `megamoe golden record`"
        )


def _golden_of_class(golden: Golden, accumulator: str, problem: Problem) -> oracle.ForwardGolden:
    """The oracle's own object, with one class only."""
    _require_class(golden, accumulator, problem)
    names = [n for n in golden.names() if "." not in n or n.rpartition(".")[0] == accumulator]
    return oracle.ForwardGolden.from_tensors(
        {name: golden.get(name) for name in names}, golden.contract
    )


def _statistic() -> Callable[..., Sequence[Any]] | None:
    """The second test for backends that show y only, where it has been calibrated."""
    if not resources.files("megamoe.judge").joinpath("statistic.json").is_file():
        return None
    check: Callable[..., Sequence[Any]] = import_module("megamoe.judge.statistic").check
    return check
