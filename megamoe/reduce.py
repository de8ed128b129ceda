"""``megamoe reduce``: a failing problem made small while it still fails the same way.

Tokens first, since the oracle's time goes with them, then slots, experts, I and H in blocks of
128, over again until nothing moves, then the values. Each try runs the backend and is judged by
the oracle, as ``megamoe replay`` would; so whatever is left fails for that command too.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import torch

from megamoe.backends.eager import EagerBackend
from megamoe.golden import StoredGolden, rows_of
from megamoe.judge import Verdict
from megamoe.judge.formats import BF16
from megamoe.problem import Problem
from megamoe.replay import judge, judge_output, run
from megamoe.stored import WEIGHTS, capacity_for, used_experts

BLOCK: Final = 128
BATCHES: Final = (1, 3, 12)
"""Tokens judged at a time, the most suspicious first; then the rest at once."""
Log = Callable[[str], None]


class ReduceError(ValueError):
    """There is nothing to reduce, or it does not hold still; one line."""


@dataclass(frozen=True)
class Failure:
    """What must stay the same: how a verdict is bad, and in which output first."""

    status: str
    where: str
    """The first stage outside, or what was raised."""
    nan: bool

    @classmethod
    def of(cls, verdict: Verdict) -> Failure | None:
        """None where the verdict is not bad."""
        if verdict.status == "fail":
            first = verdict.findings[0]
            stage = first.stage if first.outside else f"{first.stage} statistic"
            return cls("fail", stage, first.worst is not None and first.worst.ulps is None)
        if verdict.status == "error":
            raised = re.search(r"the backend raised (\w+)", verdict.reason)
            text = raised[1] if raised else re.sub(r"[\d(].*", "", verdict.reason.split(": ")[-1])
            return cls("error", text, False)
        return None

    def __str__(self) -> str:
        nan = " with NaN" if self.nan else ""
        return f"{self.status} at {self.where}{nan}"


@dataclass
class Reduction:
    """A problem on its way down."""

    backend: Any
    problem: Problem
    failure: Failure
    verdict: Verdict
    device: str = "cpu"
    deadline: float = float("inf")
    log: Log = lambda line: None
    tries: int = 0
    _seen: dict[str, bool] = field(default_factory=dict)

    @property
    def late(self) -> bool:
        return time.perf_counter() > self.deadline

    def take(self, candidate: Problem) -> bool:
        """Whether ``candidate`` fails the same way; then it is the problem from now on."""
        if self.late:
            return False
        self.tries += 1
        verdict, _ = judge(candidate, self.backend, self.device, "reduced")
        if Failure.of(verdict) != self.failure:
            return False
        self.problem, self.verdict = candidate, verdict
        return True

    def keep(
        self, items: Sequence[int], make: Callable[[Problem, list[int]], Problem],
        guess: Sequence[int] = (),
    ) -> list[int]:  # fmt: skip
        """The fewest ``items`` with which ``make(problem, items)`` still fails: none can go.

        Delta debugging on the problem as it is when called: halves, then ever smaller parts; a
        ``guess`` is tried first, then each item alone where there are few.
        """
        before = self.problem

        def fails(part: list[int]) -> bool:
            return self.take(make(before, part))

        items = list(items)
        if len(items) < 2:
            return items
        for only in dict.fromkeys([*guess, *(items if len(items) <= 8 else ())]):
            if only in items and fails([only]):
                return [only]
        parts = 2
        while len(items) > 1 and not self.late:
            size = -(-len(items) // parts)
            chunks = [items[i : i + size] for i in range(0, len(items), size)]
            smaller = next((c for c in chunks if parts < len(items) and fails(c)), None)
            if smaller is not None:
                items, parts = smaller, 2
                continue
            rest = next(
                (r for c in chunks if (r := [i for i in items if i not in c]) and fails(r)), None
            )
            if rest is not None:
                items, parts = rest, max(2, parts - 1)
            elif parts >= len(items):
                break
            else:
                parts = min(len(items), parts * 2)
        return items

    def say(self, what: str) -> None:
        p = self.problem
        self.log(
            f"{what:<8} {p.num_tokens} tokens, {p.num_experts} experts, top-{p.top_k}, "
            f"H {p.hidden_size}, I {p.intermediate_size} ({self.tries} tries)"
        )


def start(
    backend: Any, problem: Problem, device: str = "cpu", golden: StoredGolden | None = None
) -> tuple[Problem, Failure, Verdict]:
    """How ``backend`` fails ``problem``. :class:`ReduceError` where it does not, or not twice.

    Without a ``golden`` the oracle would have to answer for all tokens; so the tokens that lie
    farthest from the ``eager`` backend's are judged first.
    """
    if golden is not None:
        verdict, _ = judge(problem, backend, device, "case", golden)
    else:
        verdict = _scouted(backend, problem, device)
    failure = Failure.of(verdict)
    if failure is None:
        reason = f": {verdict.reason}" if verdict.reason else ""
        raise ReduceError(
            f"backend {backend.name} does not fail this ({verdict.status}{reason}); nothing to "
            "reduce"
        )
    return problem, failure, verdict


def _scouted(backend: Any, problem: Problem, device: str) -> Verdict:
    if not problem.num_tokens:
        return judge(problem, backend, device, "case")[0]
    try:
        actual = run(problem, backend, device)
    except Exception:  # the runner says it in its own words
        return judge(rows_of(problem, [0]), _Again(backend, problem, device), "cpu", "case")[0]
    scout = run(problem, EagerBackend())
    far = np.abs(BF16.key(actual["y"]) - BF16.key(scout["y"])).max(axis=1)
    for name in ("l2_acts_sf", "l2_acts"):
        if name in actual:
            differ = actual[name] != scout[name]
            far = far + (differ & (problem.topk_ids.numpy() >= 0)[:, :, None]).sum(axis=(1, 2))
    order = np.argsort(-far, kind="stable").tolist()
    verdict, at = None, 0
    for size in (*BATCHES, len(order)):
        rows = sorted(order[at : at + size])
        at += size
        if not rows:
            break
        shown = {name: torch.from_numpy(bits[rows]) for name, bits in actual.items()}
        shown["y"] = shown["y"].view(torch.int16).view(torch.bfloat16)
        verdict = judge_output(rows_of(problem, rows), shown, backend.accumulator)
        if Failure.of(verdict):
            return _with_tokens(verdict, rows)
    assert verdict is not None
    return verdict


class _Again:
    """Raises what the backend raises on the whole problem, wherever it is asked."""

    def __init__(self, backend: Any, problem: Problem, device: str) -> None:
        self.name, self.accumulator = backend.name, backend.accumulator
        self._call = lambda: backend.forward(problem if device == "cpu" else problem.to(device))

    def forward(self, problem: Problem) -> Any:
        return self._call()


def _with_tokens(verdict: Verdict, rows: Sequence[int]) -> Verdict:
    """The worst element named by the token of the whole problem."""
    worst = verdict.worst
    if worst is None or worst.token is None:
        return verdict
    return replace(verdict, worst=replace(worst, token=rows[worst.token]))


def reduce(
    backend: Any, problem: Problem, device: str = "cpu", seconds: float = 100.0,
    golden: StoredGolden | None = None, log: Log = lambda line: None,
) -> Reduction:  # fmt: skip
    """Shrink ``problem`` (CPU tensors) for at most about ``seconds`` more than its first run."""
    problem, failure, verdict = start(backend, problem, device, golden)
    log(f"fails: {failure}")
    r = Reduction(backend, problem, failure, verdict, device, log=log)
    r.deadline = time.perf_counter() + seconds
    # The same again, through the path that every try takes: what does not hold still is not
    # followed. Of many tokens the worst alone is the cheapest way to see it.
    if not _tokens(r) and not r.take(problem):
        raise ReduceError(
            f"backend {backend.name} failed once ({failure}), then not again on the same input; "
            "it is not deterministic: `megamoe check` it with --case property/*repeat*"
        )
    r.say("tokens")
    size = None
    while size != _size(r.problem) and not r.late:
        size = _size(r.problem)
        for name, step in (("slots", _slots), ("experts", _experts), ("I", _intermediate),
                           ("H", _hidden), ("tokens", _tokens)):  # fmt: skip
            before = _size(r.problem)
            step(r)
            if _size(r.problem) != before:
                r.say(name)
    _values(r)
    r.say("values")
    if r.late:
        log(f"stopped after {seconds:g} s; give it more with --seconds")
    return r


def _size(p: Problem) -> tuple[int, ...]:
    return p.num_tokens, p.top_k, p.num_experts, p.intermediate_size, p.hidden_size


# --- sizes ------------------------------------------------------------------------------------


def _tokens(r: Reduction) -> bool:
    """Whether a try on tokens was taken, or there was only one."""

    def some(p: Problem, rows: list[int]) -> Problem:
        return replace(rows_of(p, rows), max_num_tokens=capacity_for(len(rows)))

    before, worst = r.problem, r.verdict.worst
    r.keep(range(before.num_tokens), some, [] if worst is None else [worst.token or 0])
    return r.problem is not before


def _slots(r: Reduction) -> None:
    def some(p: Problem, slots: list[int]) -> Problem:
        return replace(
            p,
            topk_ids=p.topk_ids[:, slots].contiguous(),
            topk_weights=p.topk_weights[:, slots].contiguous(),
        )

    worst = r.verdict.worst
    guess = [worst.slot] if worst is not None and worst.slot is not None else []
    r.keep(range(r.problem.top_k), some, guess)


def _experts(r: Reduction) -> None:
    """Only the experts that are used, then fewer: one's slots go to another."""
    r.take(_renumbered(r.problem))
    used = used_experts(r.problem).tolist()
    for gone in used[1:]:
        for kept in used:
            ids = r.problem.topk_ids
            if kept != gone and (ids == kept).any() and (ids == gone).any():
                merged = replace(r.problem, topk_ids=torch.where(ids == gone, kept, ids))
                if r.take(_renumbered(merged)) or r.take(merged):
                    return _experts(r)
    highest = max(used, default=0) + 1
    if highest < r.problem.num_experts:
        cut = {name: getattr(r.problem, name)[:highest] for name in WEIGHTS}
        r.take(replace(r.problem, **cut))
    return None


def _renumbered(p: Problem) -> Problem:
    """Experts 0 .. n-1 are those that are used."""
    used = used_experts(p)
    if not len(used):
        return p
    place = torch.full((p.num_experts,), -1)
    place[used] = torch.arange(len(used))
    ids = torch.where(p.topk_ids >= 0, place[p.topk_ids.clamp_min(0)], -1)
    weights = {name: getattr(p, name)[used] for name in WEIGHTS}
    return replace(p, topk_ids=ids, **weights)


def _intermediate(r: Reduction) -> None:
    def some(p: Problem, blocks: list[int]) -> Problem:
        i = p.intermediate_size
        one = torch.cat([torch.arange(b * BLOCK, (b + 1) * BLOCK) for b in blocks])
        both = torch.cat([one, one + i])
        return replace(
            p,
            w13_weight=p.w13_weight[:, both],
            w13_weight_scale=p.w13_weight_scale[:, both],
            w2_weight=_columns(p.w2_weight, blocks, BLOCK // 2),
            w2_weight_scale=_columns(p.w2_weight_scale, blocks, BLOCK // 32),
        )

    r.keep(range(r.problem.intermediate_size // BLOCK), some, _at(r, ("l2_acts", "l2_acts_sf")))


def _hidden(r: Reduction) -> None:
    def some(p: Problem, blocks: list[int]) -> Problem:
        rows = torch.cat([torch.arange(b * BLOCK, (b + 1) * BLOCK) for b in blocks])
        return replace(
            p,
            hidden_states=_columns(p.hidden_states, blocks, BLOCK),
            w13_weight=_columns(p.w13_weight, blocks, BLOCK // 2),
            w13_weight_scale=_columns(p.w13_weight_scale, blocks, BLOCK // 32),
            w2_weight=p.w2_weight[:, rows],
            w2_weight_scale=p.w2_weight_scale[:, rows],
        )

    r.keep(range(r.problem.hidden_size // BLOCK), some, _at(r, ("y", "x", "x_sf")))


def _columns(tensor: torch.Tensor, blocks: list[int], size: int) -> torch.Tensor:
    return torch.cat([tensor[..., b * size : (b + 1) * size] for b in blocks], -1).contiguous()


def _at(r: Reduction, stages: tuple[str, ...]) -> list[int]:
    """The block of the worst element, where its channel is of this axis."""
    worst = r.verdict.worst
    if worst is None or worst.channel is None or worst.stage not in stages:
        return []
    return [worst.channel // BLOCK]


# --- values -----------------------------------------------------------------------------------


def _values(r: Reduction) -> None:
    """Plainer scalars, then as many zeros as it takes, then plainer numbers."""
    r.take(replace(r.problem, activation_clamp=None))
    r.take(replace(r.problem, topk_weights=torch.ones_like(r.problem.topk_weights)))
    for name, axis, size in (
        ("hidden_states", 1, 32), ("w2_weight", 1, 8), ("w2_weight", 2, 16),
        ("w13_weight", 2, 16), ("w13_weight", 1, 8),
    ):  # fmt: skip
        tensor: torch.Tensor = getattr(r.problem, name)
        if not r.late:
            r.keep(range(tensor.shape[axis] // size), _zeroed(name, axis, size))
    ones = torch.ones_like(r.problem.hidden_states)
    there = r.problem.hidden_states != 0
    for plain in (torch.where(there, ones, 0.0), _power_of_two(r.problem.hidden_states)):
        if r.take(replace(r.problem, hidden_states=plain.to(torch.bfloat16))):
            break
    for name in ("w13_weight_scale", "w2_weight_scale"):
        scale = getattr(r.problem, name)
        r.take(replace(r.problem, **{name: torch.full_like(scale, int(scale.float().median()))}))


def _zeroed(name: str, axis: int, size: int) -> Callable[[Problem, list[int]], Problem]:
    """Only these parts of a tensor keep their values; the rest is zero."""

    def some(p: Problem, parts: list[int]) -> Problem:
        tensor: torch.Tensor = getattr(p, name)
        kept = torch.zeros_like(tensor)
        for part in parts:
            at = (slice(None),) * axis + (slice(part * size, (part + 1) * size),)
            kept[at] = tensor[at]
        return replace(p, **dict[str, Any]({name: kept}))

    return some


def _power_of_two(values: torch.Tensor) -> torch.Tensor:
    """bfloat16 without its fraction bits."""
    return (values.view(torch.int16) & -128).view(torch.bfloat16)
