"""Deviations of the activations beyond plain SwiGLU: alpha and beta, swiglustep, SiTU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from megamoe.explain.life import Life
from megamoe.explain.ways import bound_of, clamped, in_bf16, silu
from megamoe.oracle.gates import Form, form_of, gate_table, up_table
from megamoe.spec.features import Activation
from megamoe.spec.formats import F32, F64, bf16_round

Deviation = tuple[str, dict[str, Any]]
Function = Callable[[F32], F32]


def catalogue(life: Life) -> Iterator[Deviation]:
    """The steps that deviate, by name; nothing for plain SwiGLU."""
    act, form = life.token.act, form_of(life.token.act, life.contract)
    if act.name == "situ":
        yield from _situ(form)
        return
    if act.alpha != 1:
        yield from _alpha(act, form)
    if act.beta != 0:
        yield from _beta(life, form)
    if act.name == "swiglustep" and act.clamp is not None:
        yield from _step(life, form)


# --- alpha and beta -----------------------------------------------------------------------------


def _sigmoid(argument: F64) -> F64:
    return 1 / (1 + np.exp(-argument))


def _times_sigmoid(gate: F32, argument: F64) -> F32:
    return (gate.astype(np.float64) * _sigmoid(argument)).astype(np.float32)


def _alpha(act: Activation, form: Form) -> Iterator[Deviation]:
    alpha = np.float32(act.alpha)

    def by(argument: Callable[[F32], Any]) -> dict[str, Any]:
        return {"silu": lambda g: _times_sigmoid(g, np.asarray(argument(g), np.float64))}

    yield "alpha is left out", {"silu": lambda g: silu(g, replace(form, alpha=1.0))}
    yield "the gate is multiplied by alpha too", {"silu": lambda g: silu(g, form) * alpha}
    yield "alpha is rounded to bfloat16", by(lambda g: g * in_bf16(np.array([alpha])))
    yield "alpha times the gate is rounded to bfloat16", by(lambda g: in_bf16(g * alpha))
    yield "alpha is 1.702", by(lambda g: g * np.float32(1.702))
    yield "the gate is divided by alpha in silu", by(lambda g: g / alpha)
    yield "alpha holds for negative gates only", by(lambda g: np.where(g < 0, g * alpha, g))
    if act.beta != 0:
        yield "beta stands for alpha", by(lambda g: g * np.float32(act.beta))


def _beta(life: Life, form: Form) -> Iterator[Deviation]:
    act, contract = life.token.act, life.contract
    beta = np.float32(act.beta)

    def before(gate: F32, up: F32) -> tuple[F32, F32]:
        return clamped(gate, up + beta, act, contract)

    yield "beta is left out", {"up": lambda u: u}
    yield "beta is 1", {"up": lambda u: u + np.float32(1)}
    yield "beta is subtracted", {"up": lambda u: u - beta}
    yield "up with beta is rounded to bfloat16", {"up": lambda u: in_bf16(u + beta)}
    yield "beta is added to silu, not to up", {"silu": lambda g: silu(g, form) + beta, "up": _same}
    if act.clamp is not None:
        yield "beta is added before the clamp", {"clamp": before, "up": _same}
        yield (
            "beta is added before the clamp and after it",
            {"clamp": before, "up": lambda u: u + beta},
        )


def _same(values: F32) -> F32:
    return values


# --- swiglustep ---------------------------------------------------------------------------------


def _step(life: Life, form: Form) -> Iterator[Deviation]:
    assert life.token.act.clamp is not None
    bound, exact = bound_of(life.token.act), np.float32(life.token.act.clamp)
    free = replace(form, most=None)

    def product(s: F32, u: F32, w: F32) -> F32:
        return np.fmin(s * u, exact) * w

    yield "silu is not clamped", {"silu": lambda g: silu(g, free)}
    yield (
        "the clamp's bound after silu is rounded to bfloat16",
        {"silu": lambda g: np.fmin(silu(g, free), bound)},
    )
    yield "NaN passes the clamp after silu", {"silu": lambda g: np.minimum(silu(g, free), exact)}
    yield (
        "the product of silu and up is clamped, not silu",
        {"silu": lambda g: silu(g, free), "product": product},
    )


# --- SiTU ---------------------------------------------------------------------------------------


def _situ(form: Form) -> Iterator[Deviation]:
    alpha, beta = form.alpha, form.beta

    def gate(function: Callable[[F64], F64]) -> Function:
        return lambda g: function(g.astype(np.float64)).astype(np.float32)

    def both(other: Form) -> dict[str, Any]:
        """Gate and up by the tables of other scales."""
        return {
            "silu": lambda g: gate_table(other)[bf16_round(g)],
            "up": lambda u: up_table(other)[bf16_round(u)],
        }

    def half(scale: float) -> Function:
        return gate(lambda v: scale * np.tanh(v / scale / 2))

    own = both(form)
    yield "alpha and beta are swapped", both(replace(form, alpha=beta, beta=alpha))
    if (alpha, beta) != (4.0, 25.0):
        functions = both(replace(form, alpha=4.0, beta=25.0))
        yield "alpha is 4 and beta is 25", functions
        yield "alpha is 4", {"silu": functions["silu"]}
    yield (
        "the tanh of the gate is not multiplied by alpha",
        {"silu": lambda g: own["silu"](g) / np.float32(alpha)},
    )
    yield (
        "the tanh of up is not multiplied by beta",
        {"up": lambda u: own["up"](u) / np.float32(beta)},
    )
    yield (
        "the sigmoid is that of the gate by alpha",
        {"silu": gate(lambda g: alpha * np.tanh(g / alpha) * _sigmoid(g / alpha))},
    )
    yield "the sigmoid is left out", {"silu": gate(lambda g: alpha * np.tanh(g / alpha))}
    yield "up goes without tanh", {"up": _same}
    yield (
        "the argument of up's tanh is not divided by beta",
        {"up": gate(lambda u: beta * np.tanh(u))},
    )
    yield (
        "the tanh is that of half its argument",
        {"silu": lambda g: (half(alpha)(g) * _sigmoid(g.astype(np.float64))).astype(np.float32),
         "up": half(beta)},
    )  # fmt: skip
    if form.tanh == "quotient" and (alpha, beta) == (4.0, 25.0):
        for name, function in _QUOTIENTS.items():
            yield name, {"silu": gate(lambda g, f=function: f(np.tanh(g / 4)))}  # type: ignore[misc]


_QUOTIENTS: dict[str, Callable[[F64], F64]] = {
    "the quotient has t for 2t": lambda t: t * (t + 1) ** 2 / (1 + t * t),
    "the quotient has 1 + t, not its square": lambda t: 2 * t * (t + 1) / (1 + t * t),
    "the quotient has 1 - t*t below": lambda t: 2 * t * (t + 1) ** 2 / (1 - t * t),
}
"""Functions of ``t = tanh(gate / 4)``; the right one is ``2t (1 + t)**2 / (1 + t*t)``."""
