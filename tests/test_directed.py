"""Faults between the sums that ordinary data hides: each is red on a directed case, by y alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megamoe import oracle
from megamoe.backends import simulate
from megamoe.cases import load_cases
from megamoe.cases.directed import expert_weights
from megamoe.cases.recipes import forward_problem
from megamoe.spec.contract import BASE, REVISIONS
from megamoe.spec.formats import (
    GROUP,
    bf16_decode,
    bf16_key,
    bf16_round,
    e2m1_decode,
    e4m3_cast,
    ue8m0_ceil,
    ue8m0_decode,
)

ROOT = Path(__file__).parents[1] / "golden"
CASES = {c.name: c for c in load_cases(ROOT) if c.id.startswith("forward/directed-")}
KERNEL = simulate.blockwise("nearest")
f = np.float32


def flush(x):
    return np.where(np.abs(x) < f(2.0**-126), np.copysign(f(0), x), x).astype(x.dtype)


def parts(gate_up, clamp):
    assert clamp is None
    gate, up = np.split(bf16_decode(bf16_round(gate_up)), 2, axis=1)
    with np.errstate(all="ignore"):
        d = f(1) + np.exp(-gate.astype(np.float64)).astype(f)
    return gate, up, d


def activation(how):
    """``simulate.swiglu`` computed in another way."""

    def swiglu(gate_up, weight, clamp, *rest):
        del rest
        gate, up, d = parts(gate_up, clamp)
        with np.errstate(all="ignore"):
            return how(gate, up, d, weight).astype(f)

    return swiglu


def by_tanh(gate, up, d, weight, slack=0.0):
    del d
    tanh = (np.tanh(gate.astype(np.float64) / 2) * (1 - slack)).astype(f)
    return f(0.5) * gate * (f(1) + tanh) * up * weight


LOG2_E = f(1.4426950408889634)


def exp2_of_a_rounded_product(gate):
    """1 + exp(-gate) by an exp2 that is exact, of an argument that is not."""
    return f(1) + np.exp2((-gate * LOG2_E).astype(np.float64)).astype(f)


ACTIVATIONS = {
    "(g*u)*sigmoid": lambda g, u, d, w: (g * u * (f(1) / d)) * w,
    "(g*u)/d": lambda g, u, d, w: (g * u / d) * w,
    "silu*(u*w)": lambda g, u, d, w: (g / d) * (u * w),
    "one rounding": lambda g, u, d, w: (g / d).astype(np.float64) * u * w,
    "exp2": lambda g, u, d, w: g / exp2_of_a_rounded_product(g) * u * w,
    "g*(1/d)": lambda g, u, d, w: (g * (f(1) / d)) * u * w,
    "exp2 and 1/d": lambda g, u, d, w: g * (f(1) / exp2_of_a_rounded_product(g)) * u * w,
    "tanh": by_tanh,
    "tanh.approx": lambda g, u, d, w: by_tanh(g, u, d, w, 2.0**-11),
    "flushed up": lambda g, u, d, w: (g / d) * flush(u) * w,
    "flushed product": lambda g, u, d, w: flush((g / d) * u) * w,
    "flushed activation": lambda g, u, d, w: flush((g / d) * u * w),
}


def flushed_scale(values):
    """``simulate.requantise`` whose scale is flushed."""
    grouped = values.reshape(len(values), -1, GROUP)
    amax = np.abs(grouped).max(axis=-1)
    exponent = ue8m0_ceil(flush(amax * (f(1) / f(448))))
    codes = e4m3_cast(np.ldexp(grouped.astype(np.float64), 127 - exponent[..., None]))
    return codes.reshape(values.shape), exponent.astype(np.uint8)


def flushed_rows(values):
    """``bf16_round`` of a sum that is flushed."""
    return bf16_round(flush(np.asarray(values)))


def flushed_combine(slots, live):
    total = np.zeros((len(slots), slots.shape[2]), f)
    for k in range(slots.shape[1]):
        total[live[:, k]] = flush(total[live[:, k]] + bf16_decode(slots[live[:, k], k]))
    return bf16_round(total)


FAULTS = {
    **{(name, "swiglu"): activation(how) for name, how in ACTIVATIONS.items()},
    ("flushed scale", "requantise"): flushed_scale,
    ("flushed rows", "bf16_round"): flushed_rows,
    ("flushed combine", "combine"): flushed_combine,
}
SEES = {
    "product-order": ["(g*u)*sigmoid", "(g*u)/d", "silu*(u*w)", "one rounding"],
    "precise-silu-by-exp2": ["exp2", "exp2 and 1/d"],
    "precise-silu-by-a-reciprocal": ["g*(1/d)"],
    "silu-by-tanh": ["tanh", "tanh.approx"],
    "silu-by-tanh-precise": ["tanh", "tanh.approx"],
    "subnormal-up": ["flushed up"],
    "subnormal-product": ["flushed product"],
    "subnormal-activation": ["flushed activation"],
    "subnormal-scale": ["flushed scale"],
    "subnormal-rows": ["flushed rows", "flushed combine"],
}


@pytest.fixture(scope="module")
def golden():
    by_name = {}

    def of(name):
        if name not in by_name:
            problem = forward_problem(CASES[f"directed-{name}"])
            by_name[name] = problem, oracle.forward(problem, contract=BASE)
        return by_name[name]

    return of


def outside(problem, golden):
    """Outputs of y outside fp32-ordered's interval."""
    envelope = golden.envelopes[KERNEL.accumulator]
    y = bf16_key(simulate.forward(problem, KERNEL, 0).y)
    return int(((y < bf16_key(envelope.y_lo)) | (y > bf16_key(envelope.y_hi))).sum())


def test_the_table_of_faults_names_the_cases():
    assert {f"directed-{name}" for name in SEES} == set(CASES)
    assert {name for names in SEES.values() for name in names} == {name for name, _ in FAULTS}


@pytest.mark.parametrize("name", SEES)
def test_every_class_decides_the_case_and_a_right_kernel_is_green(golden, name):
    problem, result = golden(name)
    assert result.zero_freedom or not result.why[0].startswith("exact"), result.why
    for envelope in result.envelopes.values():
        assert envelope.is_point(result.y, result.codes, result.sf)
    assert result.y.any()
    assert not outside(problem, result)


@pytest.mark.parametrize(("name", "fault"), [(n, x) for n, faults in SEES.items() for x in faults])
def test_the_fault_is_red(golden, monkeypatch, name, fault):
    place = next(where for label, where in FAULTS if label == fault)
    problem, result = golden(name)
    monkeypatch.setattr(simulate, place, FAULTS[fault, place])
    assert outside(problem, result)


def test_every_contract_decides_the_cases_too():
    """None has an envelope that is wide, whichever floor and precise form it has."""
    for contract in REVISIONS.values():
        for case in CASES.values():
            result = oracle.forward(forward_problem(case), contract=contract)
            assert all(
                envelope.is_point(result.y, result.codes, result.sf)
                for envelope in result.envelopes.values()
            ), case.name


def test_a_directed_weight_is_what_was_asked_for():
    recipe = {
        "acts": [[0, 3, 2, -7, 1.25], [1, 40, 1, 0.375, 0]],
        "sums": [{"w": [[3, 1, 1.5]], "scale": [-4]}, {"w": [[40, 1, -6]]}],
    }
    w13, sf13, w2, sf2 = expert_weights(128, 128, recipe)
    value = e2m1_decode(w13) * np.repeat(ue8m0_decode(sf13), GROUP, axis=1)
    assert (value[3:5, 0] + value[3:5, 1] / 8).tolist() == [-7, -7]
    assert (value[131:133, 0] + value[131:133, 1] / 8).tolist() == [1.25, 1.25]
    assert value[40, 32] == 0.375
    assert np.count_nonzero(w13) == 5  # bytes, of two weights each
    value = e2m1_decode(w2) * np.repeat(ue8m0_decode(sf2), GROUP, axis=1)
    assert value[0, 3] == 1.5 / 16
    assert value[1, 40] == -6
    assert value[2, 3] == -1.5 / 16


@pytest.mark.parametrize(
    "recipe",
    [{"acts": [[0, 0, 1, 1.3, 1]]}, {"act": []}, {"sums": [{"w": [], "scale": [0] * 5}]}],
)
def test_a_weight_that_cannot_be_had_is_one_line(recipe):
    with pytest.raises(ValueError, match="weights recipe 'directed'"):
        expert_weights(128, 128, {"acts": [], "sums": [{"w": []}], **recipe})
