"""``megamoe explain`` names slots without an expert, and offsets that count rows otherwise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megamoe.backends.eager import EagerBackend
from megamoe.backends.simulate import problem
from megamoe.commands import main as cli
from megamoe.explain import FromProblem, explain
from megamoe.explain.grouped import before
from megamoe.explain.places import fitting, in_batch
from megamoe.explain.unwritten import garbage, repeat_note
from megamoe.spec.contract import BASE
from megamoe.suite.at_hand import run
from tests.helpers.local import Local

IDS = np.array([[0, 1], [-1, 0], [1, -1], [-1, -1], [1, 0], [0, 1]])
"""Tokens 1 and 2 have one masked slot, token 3 has two."""
DEAD, SOME = np.arange(6) == 3, np.isin(np.arange(6), [1, 2])
AFTER = np.isin(np.arange(6), [1])


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        (DEAD, "the tokens without a live slot: 1 token"),
        (SOME | DEAD, "the tokens with a masked slot"),
        (SOME, "the tokens with a masked slot and a live one: 2 tokens"),
        (~DEAD, "all tokens with a live slot"),
        (AFTER, "the slots after a masked slot of their token: 1 slot"),
    ],
)
def test_wrong_tokens_that_have_masked_slots_are_named_so(wrong, where):
    assert where in [rule.where for rule in fitting(IDS, 2, wrong)]


def of_one_token(wrong, what="", ids=IDS, experts=2, slots=None):
    exact = [{"what": what}] if what else []
    token = int(np.argmax(wrong))
    departure = {"explanations": [{"exact": exact}]}
    return in_batch(departure, {}, token, ids, experts, wrong, slots or {})


def test_one_wrong_token_is_enough_only_if_it_is_the_one_without_a_live_slot():
    assert of_one_token(DEAD)["rules"] == ["the tokens without a live slot: 1 token"]
    assert of_one_token(AFTER)["rules"] == []


# --- offsets --------------------------------------------------------------------------------------


def rows(*experts_and_counts: tuple[int, int]) -> np.ndarray:
    return np.concatenate([np.full(many, e) for e, many in experts_and_counts])[:, None]


def test_masked_slots_that_count_for_expert_0_are_mentioned():
    ids = rows((-1, 16), (0, 16), (1, 16), (2, 16))  # expert 0 seems to have 32 rows
    wrong = np.arange(64) >= 32
    what = "slot 0 (expert 1) takes the weights of expert 0"
    batch = of_one_token(wrong, what, ids, 3, {32: {0}})
    masks = "with another expert's weights if masked slots (16) count as rows of expert 0"
    assert any(masks in rule for rule in batch["rules"]), batch["rules"]
    other = of_one_token(wrong, what.replace("of expert 0", "of expert 7"), ids, 3, {32: {0}})
    clamp = of_one_token(wrong, "the gate is clamped from below too", ids, 3, {32: {0}})
    for batch in (other, clamp):  # the weights are of another expert, or right
        assert batch["rules"] and not any("masked" in rule for rule in batch["rules"])


def test_a_full_tile_that_counts_twice_shifts_the_first_tile_of_later_experts():
    ids = rows((0, 5), (1, 16), (2, 20), (3, 4))
    wrong = np.zeros(45, bool)
    wrong[21:37] = wrong[41:] = True
    batch = of_one_token(wrong, ids=ids, experts=4)
    assert batch["rules"] == [
        "the 20 rows with another expert's weights if a full last tile counts twice "
        "(expert 1 has 16 rows), in tiles of 16 rows"
    ]


def test_three_experts_and_more_are_named_by_the_first():
    ids = rows((0, 5), (1, 3), (2, 9), (3, 4))
    batch = of_one_token(ids[:, 0] >= 1, ids=ids, experts=4)
    assert "experts 1 and later, at all of their 16 rows" in batch["rules"]
    assert batch["before"] == "", "5 rows are no full tile"


def test_the_expert_before_is_named_where_its_rows_fill_tiles():
    ids = rows((0, 5), (1, 16), (2, 20), (3, 4))
    batch = of_one_token(ids[:, 0] >= 2, ids=ids, experts=4)
    note = "expert 2 comes after expert 1, which has 16 rows: full tiles of 8 or 16"
    assert batch["rules"][0] == "experts 2 and 3, at all of their 24 rows"
    assert batch["before"] == before(ids, 4, ids >= 2) == note
    assert before(ids, 4, ids == 1) == before(ids, 4, ids == 0) == ""


# --- memory that nobody wrote ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def dead():
    p = problem(3, tokens=6, top_k=2, experts=2, hidden=128, intermediate=128)
    return replace(p, topk_ids=torch.from_numpy(IDS).to(p.topk_ids.dtype))


def test_a_second_call_says_whether_the_values_stay(dead):
    y = np.zeros((6, 128), np.uint16)
    assert not garbage(dead, y).any() and not garbage(dead, y | 0x8000).any()
    y[3, 2::4] = 7
    again = y.copy()
    again[0] = 1  # a token with live slots says nothing of memory
    assert garbage(dead, y).tolist() == DEAD.tolist() and repeat_note(dead, y, again) == ""
    again[3, 2] = 9
    assert repeat_note(dead, y, again) == (
        "a second call gives other values at 1 of 1 token without a live slot: it looks like "
        "memory that nobody wrote"
    )
    with_shared_output = replace(dead, shared_output=torch.zeros(6, 128).bfloat16())
    assert not garbage(with_shared_output, y).any()


def test_the_channels_of_such_values_are_no_pattern(dead):
    right = run(dead, Local(EagerBackend()))["y"]
    for token, text in ((3, ""), (0, "channels n with n modulo 4 = 2")):
        rows = {"y": right[token].copy()}
        rows["y"][2::4] ^= 0x3F00
        actual = explain(FromProblem(dead), token, 0, "fp32", rows, contract=BASE)["actual"]
        assert actual["stages"][-1]["channels"] == text


KERNEL = """
from megamoe.backends import load_backend

class Unwritten:
    name = "unwritten"
    accumulator = "fp32"
    calls = 0

    def forward(self, problem):
        self.calls += 1
        y = load_backend("eager").forward(problem)["y"]
        y[(problem.topk_ids < 0).all(dim=1), :32] = self.calls
        return y
"""


def test_explain_calls_a_kernel_twice_that_leaves_such_values(warm, tmp_path, capsys):
    (tmp_path / "k.py").write_text(KERNEL)
    case, backend = "many-rows-masked-slots-and-an-empty-expert", f"{tmp_path}/k.py:Unwritten"
    assert cli.main(["explain", case, "--backend", backend]) == 0
    output = capsys.readouterr().out
    assert (
        "where: the tokens without a live slot: 40 tokens\n"
        "  exactly the 40 of 200 tokens that are outside\n"
        "  a second call gives other values at 40 of 40 tokens without a live slot: "
    ) in output
    assert "of all tokens:" not in output
