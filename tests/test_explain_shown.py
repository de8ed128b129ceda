"""``megamoe explain`` reads a number from the output: a code for zero, another slot's weight."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megamoe.backends.eager import EagerBackend
from megamoe.backends.simulate import problem
from megamoe.explain import FromProblem, departure, explain
from megamoe.explain.deviations import shown
from megamoe.explain.deviations.by_expert import sorted_weights
from megamoe.explain.deviations.shown import OTHER_SLOTS, zeros
from megamoe.spec.contract import BASE
from megamoe.suite.at_hand import run
from tests.helpers.local import Local

_CODE = np.uint8(0x28)
_OF_OTHERS = "routing weights are those of other slots: "


@pytest.fixture(scope="module")
def right():
    """Five tokens; zeros of both signs among the hidden states of token 1."""
    p = problem(3, tokens=5, top_k=3, hidden=128, intermediate=128,
                   weights_recipe={"w13_scale": [120, 2], "w2_scale": [120, 2]})  # fmt: skip
    hidden = p.hidden_states.clone()
    hidden[1, ::7], hidden[1, 14::28] = 0.0, -0.0
    return replace(p, hidden_states=hidden)


@pytest.fixture(scope="module")
def stages(right):
    return run(right, Local(EagerBackend(BASE)))


def rows_of(p, weights, token=1):
    """The stages of a token with other routing weights than ``p`` says."""
    wrong = replace(p, topk_weights=torch.tensor(weights, dtype=torch.float32))
    return {k: v[token] for k, v in run(wrong, Local(EagerBackend(BASE))).items()}


def names(p, rows, token=1):
    answer = explain(FromProblem(p), token, 0, "fp32-ordered", rows, contract=BASE)["actual"]
    return [way["what"] for step in answer["explanations"] for way in step["exact"]]


@pytest.fixture(scope="module")
def moved_weights(right):
    """Weights where slots 0 and 2 of token 1 and slot 1 of token 2 have those of other slots."""
    w = right.topk_weights.numpy().copy()
    w[1, 0], w[1, 2], w[2, 1] = w[4, 2], w[3, 1], w[0, 0]
    return w


def test_a_slot_with_the_routing_weight_of_another_slot_is_named(right, moved_weights):
    assert names(right, rows_of(right, moved_weights)) == [
        _OF_OTHERS + "slot 0 of token 1 takes that of slot 2 of token 4, "
        "slot 2 of token 1 takes that of slot 1 of token 3"
    ]


def test_it_is_one_cause_for_all_tokens(right, moved_weights):
    rows, only = rows_of(right, moved_weights, 2), frozenset([OTHER_SLOTS])
    answer = departure(FromProblem(right), 2, 0, "fp32-ordered", rows, BASE, only)
    (way,) = answer["explanations"][0]["exact"]
    assert way["what"] == f"{_OF_OTHERS}slot 1 of token 2 takes that of slot 0 of token 0"


def test_a_weight_that_two_slots_have_names_neither(right, moved_weights):
    weights = right.topk_weights.clone()
    weights[3, 0] = weights[4, 2]
    p = replace(right, topk_weights=weights)
    assert not names(p, rows_of(p, moved_weights))


def test_a_weight_that_no_slot_has_gets_no_name(right):
    weights = right.topk_weights.numpy().copy()
    weights[1, 0] *= 0.7
    assert not names(right, rows_of(right, weights))


def test_a_batch_of_many_weights_has_one_near_to_any_number(right):
    """One of 3000 weights may give the same codes as one that no slot has."""
    many = replace(
        right, hidden_states=right.hidden_states.repeat(200, 1),
        topk_ids=right.topk_ids.repeat(200, 1),
        topk_weights=torch.linspace(0.3, 1, 3000).view(3, 1000).T.contiguous(),
    )  # fmt: skip
    count = 0
    for factor in (0.7, 0.71, 0.72, 0.73):
        one = right.topk_weights.clone()
        one[1] = many.topk_weights[1]
        one[1, 2] *= factor
        count += bool(names(many, rows_of(replace(right, topk_weights=one), one.tolist())))
    assert not count


def test_tiles_that_a_batch_does_not_tell_apart_are_one_name(right):
    """Fifteen slots: the second expert's rows lie past the last slot for each size of a tile."""
    by_name = dict(sorted_weights(FromProblem(right), 1))
    matches = [
        name for name in by_name if name.endswith("; past the last slot they are that of the last")
    ]
    assert [name.partition("a multiple of ")[2].partition(";")[0] for name in matches] == [
        "16, 32, 64 or 128"
    ]
    assert all(set(weights) == {0, 1, 2} for weights in by_name.values())


def _zero(codes):
    return (codes & 0x7F) == 0


def test_a_code_in_place_of_zeros_is_named(right, stages):
    rows = {k: v[1].copy() for k, v in stages.items()}
    minus = rows["x"] == 0x80
    rows["x"][_zero(rows["x"])] = _CODE
    assert names(right, rows) == ["zeros become 0x28 (0.25)"]
    rows["x"][minus] |= 0x80
    assert names(right, rows) == ["zeros become 0x28 (0.25) with their sign"]


def test_a_code_in_place_of_values_that_round_to_zero_is_named(right):
    hidden = right.hidden_states.clone()
    hidden[1, 5::32], hidden[1, 6] = 1e-7, 1e3
    p = replace(right, hidden_states=hidden)
    rows = {k: v[1].copy() for k, v in run(p, Local(EagerBackend(BASE))).items()}
    x = rows["x"].copy()
    rows["x"][_zero(x)] = _CODE
    assert names(p, rows) == ["values that round to zero, and zeros, become 0x28 (0.25)"]
    rows["x"][5::32] = x[5::32]
    assert names(p, rows) == ["zeros become 0x28 (0.25)"]


def test_without_a_zero_only_values_that_round_to_zero_are_named():
    """Where no value is zero, nobody can say of zeros alone what they become."""
    values, codes = np.float32([1e-7, 1]), np.uint8([0, 0x38])
    actual = np.uint8([_CODE, 0x38])
    subjects = [name.partition(" become")[0] for name, _ in zeros(values, codes, actual)]
    assert set(subjects) == {"values that round to zero, and zeros,"}


def test_a_code_in_place_of_zero_activations_is_named(right):
    weights = right.topk_weights.clone()
    weights[1, 2] = 0
    p = replace(right, topk_weights=weights)
    rows = {k: v[1].copy() for k, v in run(p, Local(EagerBackend(BASE))).items()}
    rows["l2_acts"][_zero(rows["l2_acts"])] = _CODE
    assert "zeros become 0x28 (0.25)" in names(p, rows)


@pytest.mark.filterwarnings("error")
def test_codes_of_either_sign_suggest_no_weight():
    """Half of them have the sign of their value: the median of the ratios is zero."""
    slot = SimpleNamespace(value=np.ones(32, np.float32), weight=np.float32(0.5))
    codes = np.array([0x38, 0xB8] * 16, np.uint8)  # 1 and -1
    scale, weights = np.array([127], np.uint8), np.array([0.25, 1.0], np.float32)
    assert shown._near(slot, codes, scale, weights).size == 0
    assert shown._near(slot, codes & 0x7F, scale, np.array([0.25, 0.501], np.float32)).tolist() == [
        np.float32(0.501)
    ]
