"""``megamoe explain`` says where in the batch a fault is: an expert, a cut of rows, a token."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megamoe.backends.eager import EagerBackend
from megamoe.backends.simulate import problem
from megamoe.console import Console
from megamoe.explain import FromProblem, explain
from megamoe.explain.brief import brief
from megamoe.explain.places import fitting, in_batch
from megamoe.explain.rules import phrase, rows_of_experts
from megamoe.spec.contract import BASE
from megamoe.suite.at_hand import run
from tests.helpers.local import Local

EXPERTS = 5
SEVERAL = 150


def _ids():
    """Two different experts a token; a slot in seven has none."""
    rng = np.random.default_rng(5)
    ids = rng.random((SEVERAL, EXPERTS)).argsort(axis=1)[:, :2]
    ids[rng.random(ids.shape) < 1 / 7] = -1
    return ids.astype(np.int64)


IDS = _ids()
LIVE = IDS >= 0
ROWS = rows_of_experts(IDS, LIVE)
LAST = np.max(np.where(IDS[..., None] == np.arange(EXPERTS), ROWS[..., None], -1), axis=(0, 1))
TOKENS = np.arange(SEVERAL)[:, None] + 0 * IDS
FAULTS = {
    "expert 3 is dropped": IDS == 3,
    "experts 1 and 4 are dropped": (IDS == 1) | (IDS == 4),
    "rows 16 and later of each expert are dropped": ROWS >= 16,
    "rows 32 and later of expert 2 are dropped": (IDS == 2) & (ROWS >= 32),
    "rows 16 to 31 of each expert are dropped": ROWS // 16 == 1,
    "row 8 of an expert is dropped": ROWS == 8,
    "the last row of each tile of 16 rows of each expert is dropped": LIVE & (ROWS % 16 == 15),
    "the last row of each expert is dropped": LIVE & (LAST[IDS] == ROWS),
    "slot 1 of each token is dropped": LIVE & (np.arange(2) == 1),
    "the last token is dropped": LIVE & (TOKENS == SEVERAL - 1),
    "tokens 128 and later are dropped": LIVE & (TOKENS >= 128),
    "token 7 is dropped": LIVE & (TOKENS == 7),
}


def test_rows_of_an_expert_are_counted_over_the_batch():
    ids = np.array([[1, 0], [-1, 1], [1, 1]])
    assert rows_of_experts(ids, ids >= 0).tolist() == [[0, 0], [-1, 1], [2, 3]]


@pytest.mark.parametrize("fault", FAULTS)
def test_the_lost_slots_name_the_rule(fault):
    slots = FAULTS[fault]
    assert slots.any() and (slots & LIVE).sum() == slots.sum()
    texts = [rule.loss for rule in fitting(IDS, EXPERTS, slots.any(axis=1), slots)]
    assert any(one.startswith(fault.partition(" and later")[0]) for one in texts), texts
    assert len(texts) <= 2, "few rules give the same slots"


SIZES = [32, 24, 16, 21, 5]
"""Rows of five experts: two end with a full tile of 16, and one has no full tile."""
TAILS = {
    "the rows of each expert after its last full tile of 16 rows are dropped: 18 rows": [
        (1, range(16, 24)), (3, range(16, 21)), (4, range(5)),
    ],
    "the rows of each expert that has a full tile of 16 rows after the last one are dropped: "
    "13 rows": [(1, range(16, 24)), (3, range(16, 21))],
    "rows 16 and later of expert 3 are dropped: 5 rows beyond a capacity or a tile, those after "
    "its last full tile of 8 or 16 rows": [(3, range(16, 21))],
    "the last tile of 16 rows of each expert that ends with a full one is dropped: 32 rows": [
        (0, range(16, 32)), (2, range(16)),
    ],
    "the last row of each expert that ends with a full tile of 16 rows is dropped: 2 rows": [
        (0, [31]), (2, [15]),
    ],
}  # fmt: skip


@pytest.mark.parametrize("fault", TAILS)
def test_a_tile_at_the_end_of_an_expert_names_the_rule(fault):
    ids = np.repeat(np.arange(5), SIZES)
    rows = np.concatenate([np.arange(size) for size in SIZES])
    wrong = np.any([(ids == e) & np.isin(rows, [*at]) for e, at in TAILS[fault]], axis=0)
    rules = fitting(ids[:, None], 5, wrong, wrong[:, None])
    assert fault in [rule.loss for rule in rules] and len(rules) <= 2


def test_the_first_tile_of_each_expert_but_the_first_names_the_rule():
    """A search on the wrong side of an offset gives such a tile the expert before."""
    ids = np.repeat([0, 2, 3], [20, 24, 17])[:, None]
    rows = rows_of_experts(ids, ids >= 0)
    wrong = (ids > 0) & (rows < 16)
    (rule,) = fitting(ids, 4, wrong.any(axis=1), wrong)
    assert rule.where == "the first tile of 16 rows of each expert but expert 0: 32 rows"
    assert rule.experts is not None and not rule.loses()
    assert set(rule.experts[wrong & (ids == 3)].tolist()) == {2}
    few = np.array([[0], [1], [1]])
    places = [rule.where for rule in fitting(few, 2, few[:, 0] == 1)]
    assert "the first tile of 8 or more rows of each expert but expert 0: 2 rows" in places


MANY = np.random.default_rng(5).permuted(np.tile(np.arange(16), (24, 1)), axis=1)[:, :3]
"""Three of 16 experts for each of 24 tokens."""
PATTERNS = {
    "experts with odd numbers": MANY % 2 == 1,
    "experts n with n modulo 4 = 2": MANY % 4 == 2,
    "experts 8 to 15 (the second half)": MANY >= 8,
    "experts 4 to 7 (those of rank 1, if 4 ranks share them)": MANY // 4 == 1,
    "experts 11 and later": MANY >= 11,
}


@pytest.mark.parametrize("name", PATTERNS)
def test_experts_whose_numbers_follow_a_pattern_are_a_place(name):
    slots = PATTERNS[name]
    wrong = slots.any(axis=1)
    actual = {"explanations": [{"exact": [{"what": "gate and up are swapped"}]}]}
    places = {at: {*np.flatnonzero(slots[at]).tolist()} for at in np.flatnonzero(wrong)[:5]}

    def rules_of(wrong_experts):
        return in_batch(actual, {}, 0, MANY, 16, wrong, places, wrong_experts)["rules"]

    experts = {*MANY[slots].tolist()}
    assert rules_of(experts) == [f"{name}, at all of their {slots.sum()} rows"]
    if "later" not in name:
        assert not rules_of(experts - {min(experts)}), "not all of them are wrong"


def test_few_tokens_do_not_tell_a_pattern_of_experts():
    """Of ``y`` nobody knows which experts are wrong, so the tokens alone must tell."""
    slots = PATTERNS["experts n with n modulo 4 = 2"]
    name = "experts n with n modulo 4 = 2, at all of their"

    def rules_of(tokens):
        wrong = slots[:tokens].any(axis=1)
        actual = {"explanations": [{"exact": [{"what": "nibbles are swapped in each byte"}]}]}
        rules = in_batch(actual, {}, 0, MANY[:tokens], 16, wrong, {})["rules"]
        return [rule for rule in rules if rule.startswith(name)]

    assert rules_of(24) and not rules_of(12)


def test_slots_that_no_rule_gives_have_none():
    slots = FAULTS["expert 3 is dropped"].copy()
    slots[np.flatnonzero(slots.any(axis=1))[4]] = False
    assert not fitting(IDS, EXPERTS, slots.any(axis=1), slots)
    assert not fitting(IDS, EXPERTS, np.zeros(SEVERAL, bool))


def test_a_cut_is_the_roundest_row_that_gives_the_tokens():
    ids = np.zeros((70, 1), np.int64)
    wrong = np.arange(70) >= 64
    texts = [rule.loss for rule in fitting(ids, 1, wrong, wrong[:, None])]
    assert texts[0] == (
        "rows 64 and later of each expert are dropped: 6 rows beyond a capacity or a tile"
    )
    ids = np.array([[0, -1, -1], [0, -1, -1], [0, -1, -1], [0, 0, 0]])  # the last: rows 3 to 5
    texts = [rule.where for rule in fitting(ids, 1, np.arange(4) == 3)]
    assert "each expert, at rows 4 (or another of 3 to 5) and later: 2 rows" in texts


@pytest.mark.parametrize(
    ("wrong", "text"),
    [([0, 1, 2, 3], ""), ([3], "token 3 only, the last"), ([1], "token 1 only"),
     ([2, 3], "tokens 2 and later"), ([1, 2], "tokens 1 to 2"), ([0, 2], "tokens 0, 2")],
)  # fmt: skip
def test_tokens_in_words(wrong, text):
    assert phrase(np.isin(np.arange(4), wrong)) == text


# --- a kernel that loses them ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def many():
    recipe = {"w13_scale": [120, 2], "w2_scale": [120, 2]}
    return problem(
        3, tokens=24, top_k=2, experts=4, hidden=128, intermediate=128, weights_recipe=recipe
    )


CODES = ("l2_acts", "l2_acts_sf", "y")


def report_of(p, loss, shows):
    """The last wrong token of a kernel that leaves out the slots ``loss``, and the batch."""
    ids = torch.where(torch.from_numpy(loss), -1, p.topk_ids)
    stages = run(replace(p, topk_ids=ids), Local(EagerBackend()))
    stages["l2_acts"][loss], stages["l2_acts_sf"][loss] = 0, 0
    stages = {name: stages[name] for name in shows}
    wrong = loss.any(axis=1)
    token = int(np.flatnonzero(loss.sum(axis=1) == 1)[-1])
    rows = {name: stage[token] for name, stage in stages.items()}
    report = explain(FromProblem(p), token, 0, "fp32-ordered", rows, contract=BASE)
    return report, in_batch(
        report["actual"], stages, token, p.topk_ids.numpy(), p.num_experts, wrong, {}
    )


@pytest.mark.parametrize(
    ("fault", "shows"),
    [("expert", CODES), ("cut", ("y",))],
)
def test_a_kernel_that_loses_rows_is_told_which(many, fault, shows):
    ids = many.topk_ids.numpy()
    rows = rows_of_experts(ids, ids >= 0)
    loss = {"expert": ids == 2, "cut": rows >= 8}[fault]
    _, batch = report_of(many, loss, shows)
    assert batch["is_lost"] and batch["wrong"] == loss.any(axis=1).sum()
    assert batch["rules"][0].startswith({
        "expert": f"expert 2 is dropped: none of its rows is computed ({(ids == 2).sum()} rows)",
        "cut": "rows 8 and later of each expert are dropped",
    }[fault])  # fmt: skip


def test_experts_that_take_each_others_rows_are_named(many):
    ids = many.topk_ids
    token = next(t for t in range(24) if (ids[t] == 1).any() and not (ids[t] == 2).any())
    swapped = torch.where(ids == 1, 2, torch.where(ids == 2, 1, ids))
    stages = run(replace(many, topk_ids=swapped), Local(EagerBackend()))
    rows = {name: stage[token] for name, stage in stages.items()}
    departure = explain(FromProblem(many), token, 0, "fp32-ordered", rows, contract=BASE)["actual"]
    slot = int((ids[token] == 1).nonzero()[0])
    name = f"slot {slot} (expert 1) takes the weights of expert 2"
    assert [[way["what"] for way in step["exact"]] for step in departure["explanations"]] == [
        [name]
    ] * 2


def test_the_rule_of_the_batch_stands_first(capsys):
    way = {"stage": "requantise", "what": "zero", "where": ""}
    step = {"differing": 1, "of": 2, "compared": "codes of token 0", "tried": 3, "not_tried": 0,
            "follows": False, "exact": [way], "partial": [], "decisions": 9,
            "tried_on": [], "alone": []}  # fmt: skip
    stages = [{"stage": "y", "outside": 1, "of": 128}]
    actual = {"parts_at": {"stage": "y", "where": "w"}, "explanations": [step], "worst": None,
              "stages": stages}  # fmt: skip
    report = {
        "case": "forward/a",
        "actual": actual,
        "token": 0,
        "channel": 0,
        "accumulator_from": "",
    }
    batch = {"tokens": 9, "wrong": 3, "is_lost": False, "rules": ["expert 5, at all of its 3 rows"]}
    brief({**report, "batch": batch}, Console(width=150))
    assert capsys.readouterr().out.splitlines()[1:5] == [
        "where: expert 5, at all of its 3 rows",
        "  exactly the 3 of 9 tokens that are outside",
        "cause: requantise: zero",
        "  explains the 1 wrong value of 2 codes of token 0",
    ]
    brief({**report, "batch": {**batch, "is_lost": True, "rules": ["a", "b"]}}, Console(width=150))
    assert capsys.readouterr().out.splitlines()[1:6] == [
        "cause: one of these 2, which this data cannot tell apart:", "  a", "  b",
        "  each explains exactly the 3 of 9 tokens that are outside",
        "seen at token 0 as: requantise: zero",
    ]  # fmt: skip


def test_the_batch_is_told_by_the_cause_of_the_first_wrong_step():
    """Codes are wrong in some other way, and y is zero besides: no slot is lost."""
    ids, wrong = np.array([[0, 1], [1, 2], [2, 0]]), np.ones(3, bool)
    first, second = ({"exact": [{"what": what}]} for what in ("relu stands for silu", "y is zero"))
    batch = in_batch({"explanations": [first, second]}, {}, 0, ids, 3, wrong, {})
    assert batch == {"tokens": 3, "wrong": 3, "which": "", "slots": 6, "wrong_slots": None,
                    "is_lost": False, "rules": [], "near": "", "before": "",
                    "is_empty_tokens": False}  # fmt: skip
    zeros = {"y": np.zeros((3, 128), np.uint16)}
    batch = in_batch({"explanations": [second]}, zeros, 0, ids, 3, wrong, {})
    assert batch["is_lost"] and "all tokens are dropped" in batch["rules"]
    zeros["y"][0, 100] = 0x3F80
    assert not in_batch({"explanations": [second]}, zeros, 0, ids, 3, wrong, {})["is_lost"], (
        "other channels of the token are no zeros"
    )
