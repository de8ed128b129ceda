"""The formula beside a deviation is what the deviation computes."""

from __future__ import annotations

import numpy as np
import pytest

from megamoe.backends.simulate import problem
from megamoe.explain import FromProblem
from megamoe.explain.deviations import activation
from megamoe.explain.formulas import FORMULAS, add_formulas
from megamoe.explain.life import live
from megamoe.explain.ways import in_bf16, right, silu
from megamoe.explain.words import explanation
from megamoe.spec.contract import BASE

CLAMP = 0.5


@pytest.fixture(scope="module")
def life_and_source():
    sizes = {"tokens": 2, "top_k": 2, "experts": 2, "hidden": 128, "intermediate": 128}
    source = FromProblem(problem(3, clamp=CLAMP, **sizes))
    return live(source, 0, [0], "fp32-ordered", BASE), source


@pytest.fixture(scope="module")
def ways(life_and_source):
    return {way.name: way for way in activation.catalogue(*life_and_source)}


def computed(way, sums, weights):
    """Activations ``(S, I)`` of a way."""
    gate, up = way.gate_up(sums, weights)
    return way.values(way.product(way.silu(gate), way.up(up), weights))


def read(formula, sums, w):
    """The same by the text of a formula, in fp32, or rounded once if it says so."""
    half = sums.shape[1] // 2
    wide = np.float64 if formula.startswith("fp32(") else np.float32
    gate_sum, up_sum = sums[:, :half].astype(np.float32), sums[:, half:].astype(np.float32)
    names = {
        "gate_sum": gate_sum, "up_sum": up_sum, "gate": in_bf16(gate_sum).clip(None, CLAMP),
        "up": in_bf16(up_sum).clip(-CLAMP, CLAMP).astype(wide), "w": w.astype(wide),
        "bf16": in_bf16,
        "silu": lambda gate: silu(gate).astype(wide), "fp32": lambda v: v.astype(np.float32),
        "fp16": lambda v: v.astype(np.float16).astype(np.float32),
    }  # fmt: skip
    text = formula.replace("gate sum", "gate_sum").replace("up sum", "up_sum")
    return eval(text, {"__builtins__": {}}, names)  # the text is the project's own


@pytest.mark.parametrize("name", FORMULAS)
def test_a_formula_is_what_the_deviation_computes(life_and_source, ways, name):
    rng = np.random.default_rng(7)
    size = 0.1 if " sum" in FORMULAS[name] else 1.0  # the clamp comes after these: out of reach
    sums, w = rng.normal(0, size, (2, 4096)), rng.random((2, 1)).astype(np.float32)
    want = computed(ways[name], sums, w)
    np.testing.assert_array_equal(read(FORMULAS[name], sums, w), want)
    assert (computed(right(life_and_source[0]), sums, w) != want).any(), "it is no deviation"


def test_the_formula_stands_beside_the_name(life_and_source):
    way = {"stage": "routing weight", "what": "up is multiplied by the weight first", "where": ""}
    step = {"differing": 4, "of": 528, "compared": "codes of token 0", "tried": 3, "not_tried": 0,
            "follows": False, "exact": [way], "partial": [], "decisions": 9, "tried_on": [],
            "alone": []}  # fmt: skip
    add_formulas(step, life_and_source[0])
    name = "routing weight: up is multiplied by the weight first"
    assert explanation(step)[0] == f"cause: {name}: silu(gate) * (up * w)"
