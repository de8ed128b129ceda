"""``megamoe explain`` names a slot that is zero, and its place; all ways to zeros are one cause.

The fault is that of a grouped kernel: the rows of a block that no slot fills have index 0, and are
written without a mask, so slot 0 of token 0 gets the result of a row of zeros.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from megamoe.backends.eager import EagerBackend
from megamoe.backends.simulate import problem
from megamoe.cases.stored import StoredProblem, to_bytes
from megamoe.commands import main as cli
from megamoe.explain import FromProblem, explain
from megamoe.explain.deviations.zeros import ACTIVATIONS, SUMS
from megamoe.explain.others import of_all_tokens
from megamoe.explain.places import ZERO_SLOT, ZERO_Y, in_batch, one_slot
from megamoe.explain.words import apart, causes, is_clear, is_named
from megamoe.oracle.swiglu import requant_exponent
from megamoe.spec.contract import BASE, CONTRACTS, NEWEST
from megamoe.suite.at_hand import judge, run
from tests.helpers.local import Local


@pytest.fixture(scope="module")
def right():
    recipe = {"w13_scale": [120, 2], "w2_scale": [120, 2]}
    return problem(
        3, tokens=3, top_k=2, experts=3, hidden=128, intermediate=128, weights_recipe=recipe
    )


class Unmasked(EagerBackend):
    """Writes rows of zeros to slot 0 of token 0."""

    name = "unmasked"

    def forward(self, problem):
        ids = problem.topk_ids.clone()
        ids[0, 0] = -1
        out = super().forward(replace(problem, topk_ids=ids))
        out["l2_acts"].view(torch.uint8)[0, 0] = 0
        zero = requant_exponent(np.zeros(1, np.float32), self.contract)[0]
        out["l2_acts_sf"][0, 0] = int(zero)
        return out


def report_of(p, contract=NEWEST):
    """The report of token 0 and of the batch."""
    session = Local(Unmasked(contract))
    stages, findings = run(p, session), judge(p, session)[0].findings
    source, of_class = FromProblem(p), session.identity.accumulator
    rows = {name: stage[0] for name, stage in stages.items()}
    report = explain(source, 0, 0, of_class, rows, contract=contract)
    actual = report["actual"]
    return report | of_all_tokens(actual, stages, 0, source, p, findings, of_class, contract)


@pytest.fixture(scope="module")
def report(right):
    return report_of(right)


def test_a_slot_of_zeros_is_named_with_its_place(report):
    where, exactly, cause, explains = causes(report)
    assert where == (
        "where: one slot of the batch: token 0 slot 0, the first "
        "(a padding row with index 0 writes there)"
    )
    assert exactly == "  exactly the 1 of 3 tokens that is outside"
    assert cause.startswith(f"cause: linear 1: {SUMS}, in slot 0 only (as would be if ")
    assert explains.startswith("  explains all 132 wrong values of ")


def test_ways_to_the_same_zeros_are_one_cause(report):
    """H is 128, and the experts beside have zeros for weights."""
    (step,) = report["actual"]["explanations"]
    head, *others = step["exact"]
    assert {way["same_as"] for way in others} == {head["what"]} == {SUMS}
    assert apart(step["exact"]) == [head] and is_named(step) and not is_clear(step)
    names = [way["what"] for way in others]
    assert {"the last 128 of K are lost", "weights are those of the expert before"} < {*names}
    few, every = causes(report)[2], causes(report, every=True)[2]
    assert few.endswith('; or in 4 more ways: `explain --json` has them, under "causes")')
    assert len(names) == 7 and every.endswith(f" (as would be if {'; if '.join(names)})")


def test_right_tokens_refute_the_ways_and_not_the_zeros(right):
    """Of one slot a token, the right tokens show that neither weights nor K are lost."""
    one = replace(right, topk_ids=right.topk_ids[:, :1].contiguous(),
                  topk_weights=right.topk_weights[:, :1].contiguous())  # fmt: skip
    (step,) = report_of(one)["actual"]["explanations"]
    assert [way["what"] for way in step["exact"]] == [SUMS]


def test_without_a_floor_the_slot_looks_left_out(right):
    report = report_of(right, CONTRACTS["sgl"])
    head, *others = report["actual"]["explanations"][0]["exact"]
    assert head["what"] == ZERO_SLOT and {way["same_as"] for way in others} == {ZERO_SLOT}
    assert causes(report)[0].startswith("cause: one slot is dropped: token 0 slot 0, the first (")


def test_a_routing_weight_that_is_infinite_does_not_hide_zeros(right):
    weights = right.topk_weights.clone()
    weights[0, 0] = torch.inf
    (step,) = report_of(replace(right, topk_weights=weights))["actual"]["explanations"]
    assert step["exact"][0]["what"] == ACTIVATIONS


def test_a_cause_of_all_slots_is_not_taken_for_zeros(right):
    """NaN becomes zero, in the one slot that has NaN: the zeros of this slot are no cause."""
    weights = right.topk_weights.clone()
    weights[0, 0] = torch.nan
    p = replace(right, topk_weights=weights)
    rows = {name: stage[0] for name, stage in run(p, Local(EagerBackend(BASE))).items()}
    rows["l2_acts"][0] = 0
    departure = explain(FromProblem(p), 0, 0, "fp32", rows, contract=BASE)["actual"]
    exact = departure["explanations"][0]["exact"]
    assert "NaN becomes zero" in [way["what"] for way in exact]
    assert not any(way["where"] for way in exact)


@pytest.mark.parametrize("shows", [("y",), ("l2_acts", "l2_acts_sf", "y")])
def test_y_that_is_zero_is_one_cause(right, shows):
    one = replace(right, topk_ids=torch.tensor([[2, -1]] * 3))
    stages = run(one, Local(EagerBackend(NEWEST)))
    rows = {name: stages[name][0] for name in shows}
    rows["y"] = np.zeros_like(rows["y"])
    (step,) = explain(FromProblem(one), 0, 0, "fp32", rows, contract=NEWEST)["actual"][
        "explanations"
    ]
    head, *others = step["exact"]
    same = {way["what"] for way in others if way.get("same_as") == head["what"]}
    assert head["what"] == ZERO_Y
    assert {"slot 0 (expert 2) is lost", "the last 128 of K are lost"} <= same


def test_json_has_every_cause_at_its_top(right, report, tmp_path, capsys):
    output = Unmasked(NEWEST).forward(right)
    path = tmp_path / "p.safetensors"
    path.write_bytes(to_bytes(StoredProblem(right, output, {"contract": "2026-11"})))
    assert cli.main(["explain", str(path), "--contract", "2026-11", "--json", "-"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert next(iter(document)) == "causes" and document["causes"] == causes(report, every=True)


# --- places ---------------------------------------------------------------------------------------

IDS = np.array([[0, 1], [1, 2], [2, -1]])


def place(*slots):
    """What is said of the wrong ``slots``, pairs of token and slot, that no rule gives."""
    by_token = {t: {k for at, k in slots if at == t} for t, _ in slots}
    wrong = np.isin(np.arange(3), [*by_token])
    batch = in_batch({"explanations": [{"exact": []}]}, {}, slots[0][0], IDS, 3, wrong, by_token)
    lines = causes({"batch": batch, "actual": {"explanations": []}})
    return lines[0].removeprefix("where: ")


def test_one_slot_and_the_count_of_several_are_places():
    assert place((1, 1)) == "one slot of the batch: token 1 slot 1"
    assert place((0, 0)).endswith(", the first (a padding row with index 0 writes there)")
    assert place((1, 0), (1, 1)) == "token 1 only: 1 of 3 tokens, 2 of 5 slots outside"
    assert place((0, 1), (2, 0)) == (
        "tokens 0, 2: 2 of 3 tokens, 2 of 5 slots outside; no known rule gives exactly these"
    )


def test_the_last_slot_is_said_to_be_the_last():
    last = one_slot(np.array([[False, False], [False, True]]))
    assert last.where.endswith(
        "token 1 slot 1, the last (an index that is held to the range writes there)"
    )
