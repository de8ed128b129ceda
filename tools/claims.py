"""Claims of accumulator classes that are red, by simulated kernel and by directed case.

    python tools/claims.py

Prints the table of ``docs/backends.md``. The cases are ``forward/claims-*``; y alone is judged, by
its interval, with no help from the codes or from the statistic. Exit 1 if a wrong claim is green
in every case, or a right one is red in any.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from megamoe import oracle
from megamoe.backends import simulate
from megamoe.backends.simulate import Kernel, to_fp32
from megamoe.cases import Case, load_cases
from megamoe.cases.recipes import forward_problem
from megamoe.spec.accumulators import ACCUMULATORS
from megamoe.spec.contract import BASE
from megamoe.spec.formats import F64, GROUP, U8, bf16_key

ROOT = Path(__file__).parents[1] / "golden"
WIDER = {
    "exact": tuple(ACCUMULATORS),  # the reference lies in every class
    "fp32": ("fp32",),
    "fp32-ordered": ("fp32-ordered", "fp32"),
    "sm90-e4m3": ("sm90-e4m3",),
    "sm90-e4m3-k32": ("sm90-e4m3-k32",),
    "sm100-mxf8f6f4": ("sm100-mxf8f6f4", "fp32-ordered", "fp32"),
}
"""Class to the classes that its members may claim."""


@dataclass(frozen=True)
class Subject:
    """A simulated kernel, described, with its narrowest class."""

    text: str
    kernel: Kernel
    inside: tuple[str, ...] = ()
    """Classes to which it does not belong, although it always lies in their intervals."""


def _linear(one: Callable[[F64, simulate.Rng], F64]) -> simulate.Linear:
    """A linear from a function of the products ``(K, R, N)``."""

    def linear(codes: U8, sf: U8, packed: U8, weight_sf: U8, rng: simulate.Rng) -> F64:
        return one(simulate.products(codes, sf, packed, weight_sf), rng)

    return linear


def _nearest(value: F64) -> F64:
    return to_fp32(value, "nearest", np.random.default_rng(0))


def _chain(terms: F64) -> F64:
    return simulate.add_up(terms, "ascending", "nearest", np.random.default_rng(0))


def _split(parts: int, strided: bool) -> simulate.Linear:
    """Split-K: ``parts`` partial sums, added at the end."""

    def one(terms: F64, rng: simulate.Rng) -> F64:
        del rng
        cut = [terms[i::parts] for i in range(parts)] if strided else np.split(terms, parts)
        return _chain(np.stack([_chain(part) for part in cut]))

    return _linear(one)


def _unit(bits: int, step: int, outside: bool) -> simulate.Linear:
    """The Blackwell unit with other numbers; ``outside``: a block from zero, added in fp32."""
    from mmasim.arithmetic.fdpa import MMA_ST_FDPA

    unit = MMA_ST_FDPA(bits, "RZ-FP32", step, -133, "e4m3", "e2m1")
    whole = simulate.block_scaled(unit, "e2m1", 0)

    def linear(codes: U8, sf: U8, packed: U8, weight_sf: U8, rng: simulate.Rng) -> F64:
        if not outside:
            return whole(codes, sf, packed, weight_sf, rng)
        main = np.zeros((len(codes), len(packed)))
        for g in range(sf.shape[1]):
            k, half = slice(g * GROUP, (g + 1) * GROUP), slice(g * GROUP // 2, (g + 1) * GROUP // 2)
            one = slice(g, g + 1)
            main = _nearest(
                main + whole(codes[:, k], sf[:, one], packed[:, half], weight_sf[:, one], rng)
            )
        return main

    return linear


def subjects() -> Iterator[Subject]:
    """Every row of the table."""

    def by_sum(text: str, accumulator: str, linear: simulate.Linear) -> Subject:
        return Subject(text, Kernel(text, accumulator, linear))

    def by_kernel(text: str, kernel: Kernel) -> Subject:
        return Subject(text, kernel)

    yield by_sum("the exact sum, to bfloat16", "exact", _linear(lambda t, _: t.sum(axis=0)))
    # Where the interval of fp32-ordered is no point, it spans a unit on both sides of the sum.
    once = by_sum("float64, then fp32", "fp32", _linear(lambda t, _: _nearest(t.sum(axis=0))))
    yield replace(once, inside=("fp32-ordered",))
    yield by_sum("one by one, descending", "fp32", _linear(lambda t, _: _chain(t[::-1])))
    for parts in (2, 4):
        yield by_sum(f"split-K by {parts}", "fp32", _split(parts, False))
    yield by_sum("four strided lanes", "fp32", _split(4, True))
    yield by_kernel("a random tree", simulate.plain("tree", "nearest"))
    yield by_sum(
        "one by one, ascending, to nearest", "fp32-ordered", _linear(lambda t, _: _chain(t))
    )
    yield by_kernel(
        "one by one, ascending, truncated", simulate.ordered("ascending", "zero", 32, fresh=False)
    )
    yield by_kernel("exact blocks of 32, added to nearest", simulate.blockwise("nearest"))
    yield by_kernel("exact blocks of 32, added truncated", simulate.blockwise("zero"))
    yield by_kernel("Hopper bf16: blocks of 16, 25 bits", simulate.hopper_bf16())
    yield by_sum("Blackwell in blocks of 16", "fp32-ordered", _unit(25, 16, outside=False))
    yield by_sum("Blackwell with 24 bits", "fp32-ordered", _unit(24, 32, outside=False))
    yield by_sum(
        "Blackwell, each block from zero, added in fp32",
        "fp32-ordered",
        _unit(25, 32, outside=True),
    )
    yield by_kernel("Blackwell mxf8f6f4", simulate.blackwell_mxf8f6f4())
    yield by_kernel("Hopper FP8, scales in the unit", simulate.hopper_e4m3())
    yield by_kernel(
        "Hopper FP8, each 32 from zero, added in fp32",
        simulate.hopper_e4m3_outside(GROUP, "nearest", "sm90-e4m3-k32"),
    )


def cases() -> list[Case]:
    """The directed cases."""
    return [c for c in load_cases(ROOT) if c.id.startswith("forward/claims-")]


def reds(subject: Subject, trials: list[Case]) -> dict[str, list[str]]:
    """The cases in which the y of ``subject`` lies outside, by claim."""
    out: dict[str, list[str]] = {name: [] for name in ACCUMULATORS}
    for case in trials:
        problem = forward_problem(case)
        y = bf16_key(simulate.forward(problem, subject.kernel, 0).y)
        for name, envelope in _golden(case).envelopes.items():
            low, high = (bf16_key(end) for end in (envelope.y_lo, envelope.y_hi))
            if ((y < low) | (y > high)).any():
                out[name].append(case.name.removeprefix("claims-"))
    return out


_GOLDENS: dict[str, oracle.ForwardGolden] = {}


def _golden(case: Case) -> oracle.ForwardGolden:
    if case.id not in _GOLDENS:
        _GOLDENS[case.id] = oracle.forward(forward_problem(case), contract=BASE)
    return _GOLDENS[case.id]


def table() -> tuple[list[str], list[str]]:
    """Markdown lines, and the faults in them."""
    trials = cases()
    lines = ["| simulated kernel | " + " | ".join(f"`{name}`" for name in ACCUMULATORS) + " |"]
    lines.append("|---" * (len(ACCUMULATORS) + 1) + "|")
    wrong = []
    for subject in subjects():
        right = (*WIDER[subject.kernel.accumulator], *subject.inside)
        cells = []
        for name, red in reds(subject, trials).items():
            if (name in right) == bool(red):
                wrong.append(f"{subject.text} claims {name}: red in {', '.join(red) or 'no case'}")
            word = "inside" if name in subject.inside else "may"
            cells.append(word if name in right else f"red: {len(red)}")
        lines.append(f"| {subject.text} | {' | '.join(cells)} |")
    return lines, wrong


def main() -> int:
    """The command line."""
    torch.set_num_threads(1)
    lines, wrong = table()
    print("\n".join(lines))
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
