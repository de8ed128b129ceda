"""Deviations between linear 1 and the activations: gate and up, clamp, silu, routing weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch

from megamoe.explain.deviations import exponential, weights
from megamoe.explain.deviations.features import catalogue as of_features
from megamoe.explain.deviations.roundings import flushed
from megamoe.explain.deviations.rows import other_weights
from megamoe.explain.deviations.sums import GATE_UP, LAST, Pair, without_last
from megamoe.explain.life import Life
from megamoe.explain.sources import Source
from megamoe.explain.ways import Way, bound_of, clamped, halves, in_bf16, right, silu
from megamoe.oracle.gates import form_of
from megamoe.spec.features import Activation
from megamoe.spec.formats import F32, F64


def catalogue(life: Life, source: Source) -> Iterator[Way]:
    """Deviations from the sums of linear 1 to the fp32 activations."""
    own = right(life)
    for name, change in GATE_UP.items():
        yield own.variant(name, "gate and up", halves=change)
    if life.token.intermediate > LAST:  # else all of up, which makes all activations zero
        name = f"the last {LAST} of the 2I rows are left out: their sums are zero"
        yield own.variant(name, "linear 1", halves=lambda s: own.halves(without_last(s)))
    for name, steps in _clamps(life):
        yield own.variant(name, "clamp", **steps)
    for name, function in _silus(life).items():
        yield own.variant(name, "silu", silu=function)
    for name, steps in exponential.catalogue(life):
        yield own.variant(name, "silu", **steps)
    yield own.variant("silu is taken of up, not of the gate", "silu", halves=_swapped_silu(life))
    yield own.variant("subnormal up is flushed to zero", "clamp", clamp=_flushed_up(life))
    for name, steps in of_features(life):
        yield own.variant(name, life.token.act.name, **steps)
    for name, steps in (*weights.elsewhere(life), *_products()):
        yield own.variant(name, "routing weight", **steps)
    for name, others in other_weights(life, source).items():
        yield own.variant(
            name, "routing weight", weight=lambda slot, w=others: w.get(slot.slot, slot.weight)
        )


# --- the clamp ----------------------------------------------------------------------------------


def _clamps(life: Life) -> Iterator[tuple[str, dict[str, Any]]]:
    act = life.token.act
    c = life.contract
    if act.clamp is None:
        for name, of in (("clamp 10", 10.0), ("clamp 7", 7.0)):
            other = replace(act, clamp=of)
            yield (
                f"gate and up are clamped, by {name}",
                {"clamp": lambda g, u, a=other: clamped(g, u, a, c)},
            )
        return
    bound = bound_of(act)

    def both(gate: F32, up: F32) -> Pair:
        return clamped(gate, up, act, c)

    step = act.name == "swiglustep"  # the gate is not clamped then, but silu is
    drops = c.clamp_drops_nan.value
    other_nan = c.variant(c.revision, "a deviation", clamp_drops_nan=not drops)
    exact = np.float32(act.clamp)
    ways: dict[str, Callable[[F32, F32], Pair]] = {
        "the clamp is missing": lambda g, u: (g, u),
        "up is not clamped": lambda g, u: (both(g, u)[0], u),
        "NaN passes the clamp of up": lambda g, u: (
            both(g, u)[0], np.where(np.isnan(u), u, both(g, u)[1]),
        ),
        "NaN of up becomes the upper bound": lambda g, u: (
            both(g, u)[0], np.where(np.isnan(u), bound, both(g, u)[1]),
        ),
        "NaN of up becomes zero": lambda g, u: (
            both(g, u)[0], np.where(np.isnan(u), np.float32(0), both(g, u)[1]),
        ),
        "NaN of the gate becomes minus the bound": lambda g, u: (
            np.where(np.isnan(g), -bound, both(g, u)[0]), both(g, u)[1],
        ),
        "the gate is clamped from below too": lambda g, u: (
            np.fmax(both(g, u)[0], -bound), both(g, u)[1],
        ),
        "the gate is not clamped": lambda g, u: (g, both(g, u)[1]),
        "up is not clamped from below": lambda g, u: (both(g, u)[0], np.fmin(u, bound)),
        "gate and up have each other's clamp": lambda g, u: (
            np.fmax(both(g, u)[0], -bound), np.fmin(u, bound),
        ),
        "up is not clamped from above": lambda g, u: (both(g, u)[0], np.fmax(u, -bound)),
        "NaN passes the clamp" if drops else "NaN becomes a bound in the clamp": (
            lambda g, u: clamped(g, u, act, other_nan)
        ),
        "NaN passes the clamp of the gate": lambda g, u: (
            np.where(np.isnan(g), g, both(g, u)[0]), both(g, u)[1],
        ),
        "the clamp's bound is not rounded to bfloat16": lambda g, u: (
            g if step else np.fmin(g, exact), np.fmin(np.fmax(u, -exact), exact),
        ),
    }  # fmt: skip
    for name, clamp in ways.items():
        yield name, {"clamp": clamp}

    def gated(gate: F32) -> F32:
        return np.fmin(silu(gate, form_of(act, c)), bound)

    if step:
        yield (
            "the gate is clamped before silu too",
            {"clamp": lambda g, u: (np.fmin(g, bound), both(g, u)[1])},
        )
        return
    yield (
        "the clamp comes after silu",
        {"clamp": lambda g, u: (g, both(g, u)[1]), "silu": gated},
    )
    yield from _of_products(bound)


def _of_products(bound: np.float32) -> Iterator[tuple[str, dict[str, Any]]]:
    """The clamp on the product of silu and up, in place of the one on gate and up or besides."""

    def clip(values: F32, above_only: bool) -> F32:
        return np.fmin(values if above_only else np.fmax(values, -bound), bound)

    def before(above_only: bool) -> Callable[[F32, F32, F32], F32]:
        return lambda s, u, w: clip(s * u, above_only) * w

    def after(above_only: bool) -> Callable[[F32, F32, F32], F32]:
        return lambda s, u, w: clip(s * u * w, above_only)

    for above_only, how in ((False, "clamped"), (True, "clamped from above only")):
        for product, factors in ((before, "silu and up"), (after, "silu, up and routing weight")):
            name = f"the product of {factors} is {how}"
            step = {"product": product(above_only)}
            yield f"{name}, not gate and up", {**step, "clamp": lambda g, u: (g, u)}
            yield f"{name}, and gate and up too", step


# --- silu ---------------------------------------------------------------------------------------


def _sigmoid_times(gate: F32, factor: float) -> F32:
    wide = gate.astype(np.float64)
    return (wide / (1 + np.exp(-factor * wide))).astype(np.float32)


def _gelu(gate: F32) -> F32:
    wide = torch.from_numpy(gate.astype(np.float64))
    return torch.nn.functional.gelu(wide).numpy().astype(np.float32)


def _gelu_tanh(gate: F32) -> F32:
    wide = torch.from_numpy(gate.astype(np.float64))
    return torch.nn.functional.gelu(wide, approximate="tanh").numpy().astype(np.float32)


_OTHER_DIVISION: Final = {"g/d": "g*(1/d)", "g*(1/d)": "g/d"}


def _silus(life: Life) -> dict[str, Callable[[F32], F32]]:
    form = form_of(life.token.act, life.contract)
    silus: dict[str, Callable[[F32], F32]] = {
        "silu is missing": lambda g: g,
        "relu stands for silu": lambda g: np.maximum(g, np.float32(0)),
        "gelu stands for silu": _gelu,
        "gelu by tanh stands for silu": _gelu_tanh,
        "silu has the factor 1.702 of the fast gelu": lambda g: _sigmoid_times(g, 1.702),
        "silu is rounded to bfloat16": lambda g: in_bf16(silu(g, form)),
        "silu is rounded to fp16": lambda g: silu(g, form).astype(np.float16).astype(np.float32),
        "a sigmoid stands for silu": lambda g: (1 / (1 + np.exp(-g.astype(np.float64)))).astype(
            np.float32
        ),
        "tanh stands for silu": np.tanh,
        "relu squared stands for silu": lambda g: np.square(np.maximum(g, np.float32(0))),
    }
    if life.token.act != Activation("swiglu", life.token.act.clamp, 1.0, 0.0, True):
        silus["plain silu stands for the activation"] = lambda g: silu(g)
    if form.division in _OTHER_DIVISION:
        other = replace(form, division=_OTHER_DIVISION[form.division])
        name = f"the precise silu is {other.division}, not {form.division}"
        silus[name] = lambda g: silu(g, other)
    return silus


def _swapped_silu(life: Life) -> Callable[[F64], Pair]:
    """The clamp then meets the wrong one too; without a clamp this is gate and up swapped."""

    def read(sums: F64) -> Pair:
        gate, up = clamped(*halves(sums, life.contract), life.token.act, life.contract)
        return up, gate

    return read


def _flushed_up(life: Life) -> Callable[[F32, F32], Pair]:
    def clamp(gate: F32, up: F32) -> Pair:
        gate, up = clamped(gate, up, life.token.act, life.contract)
        return gate, flushed(up)

    return clamp


# --- products -----------------------------------------------------------------------------------


def _products() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "the routing weight is applied twice", {"product": lambda s, u, w: s * u * w * w}
    yield (
        "the routing weight is rounded to bfloat16",
        {"product": lambda s, u, w: s * u * in_bf16(w)},
    )
    yield (
        "the routing weight is rounded to fp16",
        {"product": lambda s, u, w: s * u * w.astype(np.float16).astype(np.float32)},
    )

    def once(s: F32, u: F32, w: F32) -> F32:
        return (s.astype(np.float64) * u * w).astype(np.float32)

    yield "the products with up and with the weight are rounded once", {"product": once}
    yield (
        "the subnormal product of silu and up is flushed to zero",
        {"product": lambda s, u, w: flushed(s * u) * w},
    )
    yield "up is multiplied by the weight first", {"product": lambda s, u, w: s * (u * w)}
    yield "up is left out", {"product": lambda s, u, w: s * w}
    yield "the gate is left out", {"product": lambda s, u, w: u * w}
    yield "the product is rounded to bfloat16", {"product": lambda s, u, w: in_bf16(s * u) * w}
