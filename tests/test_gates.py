"""Gate and up functions: the point against decimals, the bounds against kernels that err."""

from __future__ import annotations

from decimal import Context, Decimal
from typing import Final

import numpy as np
import pytest

from megamoe.oracle import gates
from megamoe.oracle.elementary import fast_exp_ulps, tanh_rounded
from megamoe.spec.contract import BASE, MEGAMOE_2026_09, MEGAMOE_SGL
from megamoe.spec.features import Activation
from megamoe.spec.formats import bf16_decode, bf16_key

BITS = np.arange(1 << 16, dtype=np.uint16)
with np.errstate(invalid="ignore"):
    VALUES = bf16_decode(BITS)
FINITE = np.isfinite(VALUES)
SITU: Final = {"tanhf": BASE, "sigmoid": MEGAMOE_2026_09, "quotient": MEGAMOE_SGL}
"""The contract of each form."""


def act(name: str = "swiglu", clamp=None, alpha=1.0, beta=0.0, fast=True) -> Activation:
    return Activation(name, clamp, alpha, beta, fast)


def test_tanh_is_rounded_once():
    arguments = np.random.default_rng(0).normal(0, 3, 1000).astype(np.float32)
    arguments = np.concatenate([arguments, np.float32(2.0) ** np.arange(-40, 6, dtype=np.float32)])
    context = Context(prec=120)
    for argument, actual in zip(arguments, tanh_rounded(arguments.astype(np.float64)), strict=True):
        power = context.exp(2 * Decimal(float(argument)))
        exact = context.divide(context.subtract(power, 1), context.add(power, 1))
        near = [np.nextafter(actual, np.float32(s)) for s in (-np.inf, np.inf)]
        distance = abs(Decimal(float(actual)) - exact)
        assert all(distance <= abs(Decimal(float(other)) - exact) for other in near)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.702, -1.0])
def test_silu_with_alpha_has_alpha_in_the_sigmoid_alone(alpha, fast):
    table = gates.gate_table(gates.form_of(act(alpha=alpha, fast=fast), BASE))
    with np.errstate(all="ignore"):
        wide = VALUES.astype(np.float64)
        want = wide / (1 + np.exp(-np.float64(np.float32(alpha)) * wide))
    ordinary = FINITE & (np.abs(want) > 1e-30) & (np.abs(wide) < 60)
    assert np.allclose(table[ordinary], want[ordinary], rtol=1e-5)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("alpha", [0.5, 1.702, -1.0])
def test_silu_with_alpha_of_an_erring_kernel_is_within_the_bounds(alpha, fast):
    """exp 2 ulps off either way (and what __expf may add), the reciprocal 1, and flushes."""
    form = gates.form_of(act(alpha=alpha, fast=fast), BASE)
    bounds, gate = gates.gate_bounds(form), VALUES[FINITE].astype(np.float64)
    with np.errstate(all="ignore"):
        argument = (VALUES * np.float32(alpha))[FINITE].astype(np.float64)
        for sign in (-1, 0, 1):
            ulps = fast_exp_ulps(argument) - 0.5 if fast else 1  # half a one is to round
            exp = (np.exp(-argument) * (1 + sign * ulps * 2.0**-23)).astype(np.float32)
            denominator = np.float32(1) + exp
            reciprocal = (1 / denominator.astype(np.float64) * (1 - sign * 2.0**-24)).astype("f4")
            actual = gate * reciprocal if fast else gate / denominator
            actual = actual.astype(np.float32)
            assert (bounds.low[FINITE] <= actual).all() and (actual <= bounds.high[FINITE]).all()


def test_swiglustep_bounds_the_gated_value_and_nothing_becomes_nan():
    form = gates.form_of(act("swiglustep", clamp=3.3), BASE)
    table = gates.gate_table(form)
    assert table[~np.isnan(table)].max() == np.float32(3.3) and not np.isnan(table).any()
    assert table[bf16_key(BITS) == 0].tolist() == [0, 0]
    assert (table[FINITE] <= np.float32(3.3)).all()


def test_beta_is_one_addition():
    form = gates.form_of(act(beta=1.0), BASE)
    bounds = gates.up_bounds(form)
    with np.errstate(invalid="ignore"):
        want = VALUES + np.float32(1)
    for table in (gates.up_table(form), bounds.low, bounds.high):
        np.testing.assert_array_equal(table, want)


def erring(form: str, alpha: float, beta: float, fast: bool, sign: int, values: np.ndarray):
    """SiTU's gate and up in float64, each instruction off by what is documented, then rounded."""
    off = sign * 2.0**-23

    def fl(value):
        return value.astype(np.float32).astype(np.float64)

    def sigmoid(x):
        ulps = fast_exp_ulps(x) - 0.5 if fast else 1  # half a one is to round
        value = 1 / fl(1 + fl(np.exp(-x) * (1 + ulps * off)))
        return fl(value * (1 + off / 2)) if fast else fl(value)

    def tanh(x, approximate=False):
        error = sign * 2.0**-11 if approximate else off
        return fl(np.clip(np.tanh(x) * (1 + error), -1, 1))

    def bent(x, scale):
        if form == "sigmoid":
            return fl(fl(2 * sigmoid(2 * fl(x * fl(np.float64(1) / scale))) - 1) * scale)
        return fl(tanh(fl(x / scale), form == "quotient" and fast) * scale)

    if form == "quotient" and (alpha, beta) == (4.0, 25.0):
        t = tanh(fl(values * 0.25), fast)
        s = fl(t + 1)
        gate = fl(fl(2 * t * fl(s * s)) / fl(t * t + 1) * (1 + (off if fast else 0)))
        at = fl(values * np.float64(np.float32(0.04))) if fast else fl(values / 25)
        return gate, fl(tanh(at, fast) * 25)
    return fl(bent(values, np.float64(alpha)) * sigmoid(values)), bent(values, np.float64(beta))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("scales", [(4.0, 25.0), (2.0, 8.0), (1.0, 0.5)])
@pytest.mark.parametrize("form", SITU)
def test_situ_of_an_erring_kernel_is_within_the_bounds(form, scales, fast):
    situ = gates.form_of(act("situ", None, *scales, fast), SITU[form])
    bounds = gates.gate_bounds(situ), gates.up_bounds(situ)
    with np.errstate(all="ignore"):
        for sign in (-1, 0, 1):
            values = erring(form, *scales, fast, sign, VALUES[FINITE].astype(np.float64))
            for actual, bound in zip(values, bounds, strict=True):
                assert (bound.low[FINITE] <= actual).all() and (actual <= bound.high[FINITE]).all()


@pytest.mark.parametrize("form", SITU)
def test_the_point_of_situ_is_within_its_bounds_and_what_the_formula_says(form):
    situ = gates.form_of(act("situ", None, 4.0, 25.0, False), SITU[form])
    wide = VALUES[FINITE].astype(np.float64)
    with np.errstate(all="ignore"):
        want = 4 * np.tanh(wide / 4) / (1 + np.exp(-wide)), 25 * np.tanh(wide / 25)
    tables = gates.gate_table(situ), gates.up_table(situ)
    for table, formula, bound in zip(
        tables, want, (gates.gate_bounds(situ), gates.up_bounds(situ)), strict=True
    ):
        assert np.allclose(table[FINITE], formula, rtol=1e-5, atol=1e-5)
        assert ((bound.low <= table) & (table <= bound.high))[FINITE].all()


def test_extremes_are_those_of_the_arguments_between():
    """The tables of SiTU are not monotone: each run of arguments is looked up as a whole."""
    bounds = gates.gate_bounds(gates.form_of(act("situ", None, 4.0, 25.0, True), MEGAMOE_SGL))
    order = BITS[FINITE][np.argsort(bf16_key(BITS[FINITE]), kind="stable")]
    rng = np.random.default_rng(1)
    for start in rng.integers(0, len(order) - 3000, 200):
        part = order[start : start + int(rng.integers(1, 3000))]
        low, high, _ = bounds.over(part[:1], part[-1:])
        assert (low[0], high[0]) == (bounds.low[part].min(), bounds.high[part].max())


def test_a_nan_argument_is_a_nan():
    bounds = gates.gate_bounds(gates.form_of(act(), BASE))
    low, high, _ = bounds.over(np.array([0x7FC0], np.uint16), np.array([0x7FC0], np.uint16))
    assert np.isnan(low[0]) and np.isnan(high[0])
