"""``megamoe explain`` names scale bytes of the groups beside, also in one half of each tile."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megamoe.backends import eager
from megamoe.backends.simulate import problem
from megamoe.commands import main as cli
from megamoe.explain import FromProblem, explain
from megamoe.explain.near import nearest
from megamoe.explain.tile_parts import part_rules
from megamoe.explain.words import causes, explanation
from megamoe.spec.contract import NEWEST
from megamoe.suite.at_hand import run
from tests.helpers.diagnosis import of_case, report_of
from tests.helpers.local import Local

HIDDEN, INTERMEDIATE = 256, 128
NAMES = {1: "each two neighbouring groups", 2: "each two neighbouring pairs of groups"}


@pytest.fixture(scope="module")
def varied():
    """Scale bytes that differ from group to group."""
    recipe = {"w13_scale": [116, 9], "w2_scale": [116, 9]}
    patch = [{"token": t, "channel": 32 * g, "count": 1, "bits": 0x4000 + 0x80 * (g * 3 % 7)}
             for t in range(4) for g in range(HIDDEN // 32)]  # fmt: skip
    return problem(
        7, tokens=4, hidden=HIDDEN, intermediate=INTERMEDIATE, weights_recipe=recipe,
        hidden_recipe={"patch": patch},
    )  # fmt: skip


def plant(monkeypatch, change):
    """``change`` gets and gives the operands of linear 1 and 2: the codes of some rows, their scale
    bytes, weights and their scale bytes."""
    right = eager.linear
    monkeypatch.setattr(eager, "linear", lambda *operands: right(*change(*operands)))


@pytest.mark.parametrize("bit", NAMES)
@pytest.mark.parametrize("side", ["weight", "activation"])
@pytest.mark.parametrize("linear", [1, 2])
def test_a_swap_of_groups_is_named_in_both_linears(varied, monkeypatch, linear, side, bit):
    def change(codes, sf, weight, weight_sf):
        groups = np.arange(sf.shape[1]) ^ bit
        if codes.shape[1] == (HIDDEN if linear == 1 else INTERMEDIATE):
            if side == "weight":
                weight_sf = weight_sf[:, groups]
            else:
                sf = sf[:, groups]
        return codes, sf, weight, weight_sf

    plant(monkeypatch, change)
    step = report_of(varied)["actual"]["explanations"][0]
    assert [(way["stage"], way["what"]) for way in step["exact"]] == [
        (f"linear {linear}", f"{side} scales of {NAMES[bit]} are swapped")
    ]


def plant_in_halves(monkeypatch, p):
    """Rows 8 to 15 of each tile of 16 take linear 2's activation scales of the group beside."""

    def change(codes, sf, weight, weight_sf):
        if (codes.shape[1], len(weight)) == (p.intermediate_size, p.hidden_size):
            sf, late = sf.clone(), np.arange(len(sf)) % 16 >= 8
            sf[late] = sf[late][:, np.arange(sf.shape[1]) ^ 1]
        return codes, sf, weight, weight_sf

    plant(monkeypatch, change)


def test_rows_in_which_the_cause_changes_nothing_do_not_hide_its_place(monkeypatch):
    """Two of 32 rows have scale bytes that are alike in pairs."""
    p = of_case("bell-one-expert-t65-bad-row-hidden")

    plant_in_halves(monkeypatch, p)
    lines = causes(report_of(p))
    assert lines[:3] == [
        "where: the second half of each tile of 16 rows of each expert: 32 rows",
        "  has the 30 of 65 tokens that are outside; in the others of these rows the cause changes "
        "nothing that was compared",
        "cause: linear 2: activation scales of each two neighbouring groups are swapped",
    ]


def test_in_some_slots_too_all_orders_that_fit_are_named(monkeypatch):
    """The scale bytes of the wrong slot of token 9 are a b a b: four orders are the same. Other
    tokens leave two of them."""
    p = of_case("skewed-routing-overflows-one-expert-t40")
    plant_in_halves(monkeypatch, p)
    session = Local(eager.EagerBackend())
    rows = {name: stage[9] for name, stage in run(p, session).items()}
    alone = explain(FromProblem(p), 9, 0, "fp32-ordered", rows, contract=NEWEST)["actual"]
    (step,) = alone["explanations"]
    swap = "activation scales of each two neighbouring groups are swapped"
    early = "activation scales are read one group early"
    assert len(step["exact"]) == 4 and {swap, early} <= {way["what"] for way in step["exact"]}
    assert all(way["where"] == "in slot 0 only" for way in step["exact"])
    assert explanation(step)[-1] == (
        "  the slots were chosen so that it fits: weaker than a cause of all slots; their scale "
        "bytes repeat every 2 groups, so further orders of them give the same values"
    )
    report = report_of(p)
    (step,) = report["actual"]["explanations"]
    assert [way["what"] for way in step["exact"]] == [early, swap]
    assert (
        "the second half of each tile of 16 rows of each expert: 39 rows"
        in (report["batch"]["rules"])
    )
    assert len(explanation(step)) == 4, "where a rule names the slots, nothing is weak"


def test_a_rule_that_comes_near_is_said_with_the_tokens_that_are_right():
    ids = np.zeros((64, 1), np.int64)
    rules = list(part_rules(ids, 1))
    assert rules[3].where == "the second half of each tile of 16 rows of each expert: 32 rows"
    wrong = np.arange(64) % 16 >= 8
    wrong[[14, 58]] = False
    assert (
        nearest(rules, wrong)
        == f"nearly: {rules[3].where}; but tokens 14 and 58 of these are right"
    )
    wrong[30:60] = False
    assert nearest(rules, wrong) == "", "too many are right"


def test_a_single_tile_has_no_halves():
    assert not list(part_rules(np.zeros((8, 1), np.int64), 1))


def last_columns(monkeypatch):
    """The last 128 columns of each linear are truncated to bfloat16: up, and channels 128 and later
    of the slot rows."""
    right = eager.linear

    def linear(*operands):
        sums = right(*operands)
        sums[:, -128:] = (sums[:, -128:].view(torch.int32) & -65536).view(torch.float32)
        return sums

    monkeypatch.setattr(eager, "linear", linear)


def test_a_cause_is_not_said_of_channels_that_are_right(monkeypatch):
    last_columns(monkeypatch)
    report = report_of(of_case("bell-h256-i128-drifts"), 0)
    lines = [line for line in causes(report) if line.startswith("cause")]
    assert lines == [
        "cause: gate and up: up is truncated to bfloat16",
        "cause: linear 2: slot rows are truncated to bfloat16, in channels 128 to 255 only",
    ]
    assert report["actual"]["y_elsewhere"] == {"outside": 0, "of": 128}


def test_a_chosen_element_that_is_right_is_said_to_be_right(tmp_path, capsys):
    """Also where other elements of the token are wrong."""
    p = of_case("bell-h256-i128-drifts")
    y = run(p, Local(eager.EagerBackend()))["y"]
    y[0, 200] ^= 0x4000
    save_file({"y": torch.from_numpy(y).view(torch.bfloat16)}, tmp_path / "y.safetensors")
    choice = ["--stage", "y", "--token", "0", "--channel"]
    command = ["explain", "bell-h256-i128-drifts", "--actual", f"{tmp_path}/y.safetensors", *choice]
    assert cli.main([*command, "201"]) == 0
    assert (
        "y at token 0 channel 201: right; channels 128 to 255 of this token: 1 of 128 outside"
        in capsys.readouterr().out.splitlines()
    )
    assert cli.main([*command, "200"]) == 0
    assert ": right" not in capsys.readouterr().out
