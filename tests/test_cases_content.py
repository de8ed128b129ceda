"""What the case files must cover: counts, shapes, models, edges, and every failure seen in public.

The cases themselves run in the suite; here stands only that none of them went missing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import pytest

from megamoe import oracle
from megamoe.cases import KINDS, Case, load_cases, recipes
from megamoe.cases.forms import LAWS
from megamoe.cases.needs import ACTIONS
from megamoe.kinds import laws
from megamoe.spec.contract import BASE, CONTRACTS
from megamoe.spec.models import MODELS
from megamoe.spec.problem import Problem

CASES = load_cases()
BY_ID = {case.id: case for case in CASES}
FORWARD = [c for c in CASES if c.kind == "forward"]
ZERO = [c for c in FORWARD if c.params["family"] == "zero-freedom"]
EDGES = (
    0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 96, 97,
    127, 128, 129, 191, 192, 193, 383, 384, 385,
)  # fmt: skip


def shape(case: Case) -> tuple[int, int, int, int]:
    p = case.params
    return p["hidden"], p["intermediate"], p["experts"], p["top_k"]


def recipe(case: Case, of: str) -> Mapping[str, Any]:
    return case.params.get(f"{of}_recipe", {})


def test_there_are_enough_cases_of_every_kind() -> None:
    count = Counter(c.kind for c in CASES)
    assert sum(count.values()) >= 300
    assert set(count) == set(KINDS) and min(count.values()) >= 10
    assert len(ZERO) >= 120
    assert len({shape(c) for c in FORWARD}) >= 40
    assert {c.tier for c in CASES} == {"quick", "full"}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("family", ["zero-freedom", "envelope"])
def test_every_model_stands_at_its_real_sizes(model: str, family: str) -> None:
    m = MODELS[model]
    real = (m.hidden_size, m.intermediate_size, m.local_experts(8), m.top_k)
    cases = [c for c in FORWARD if c.params["family"] == family and shape(c) == real]
    assert cases, f"{model}: no {family} case at {real}"
    if family == "zero-freedom":
        assert any(c.tier == "quick" for c in cases)
        assert any(recipe(c, "weights").get("w2") == "probe" for c in cases)


@pytest.mark.parametrize("tokens", EDGES)
def test_token_counts_at_every_block_edge(tokens: int) -> None:
    """As rows of one expert and as rows of a batch, and in staging."""
    here = [c for c in ZERO if c.params["tokens"] == tokens]
    one = [c for c in here if recipe(c, "routing").get("kind") == "same"]
    assert any(c.params["top_k"] == 1 for c in one)
    assert tokens == 0 or any(c.params["top_k"] == 2 for c in here)
    assert any(c.kind == "staging" and c.params["tokens"] == tokens for c in CASES)


@pytest.mark.parametrize("clamp", ["none", 10, 7, 0])
@pytest.mark.parametrize("fast_math", [True, False])
def test_clamps_with_either_silu(clamp: object, fast_math: bool) -> None:
    cases = [c for c in ZERO if c.params["clamp"] == clamp and c.params["fast_math"] is fast_math]
    assert cases


def test_experts_top_k_and_sizes_at_their_ends() -> None:
    assert {1, 112, 896} <= {c.params["experts"] for c in ZERO}
    assert {1, 16, 32} <= {c.params["top_k"] for c in ZERO}
    assert {128, 7168} <= {c.params["hidden"] for c in ZERO}
    assert {128, 384, 2304, 3072} <= {c.params["intermediate"] for c in ZERO}
    assert any(shape(c)[2:] == (1, 1) for c in ZERO)
    assert {384, 8192} <= {c.params["capacity"] for c in ZERO}


def crowded(case: Case) -> bool:
    """Many rows an expert, and channels in whole tiles of 256: kernels have a path for these."""
    p = case.params
    return many(p["tokens"] * p["top_k"], p["experts"]) and p["hidden"] % 256 == 0


def many(rows: int, experts: int) -> bool:
    """More than any kernel here takes as few."""
    return rows > 16 * min(rows, experts)


def test_long_contractions_for_few_and_for_many_rows() -> None:
    """Beyond a ring of four copies and a loop body of four steps, with every remainder."""
    for many, ring in ((False, 4), (True, 3)):
        of = [c for c in ZERO if crowded(c) is many and c.rows is None and c.params["tokens"] > 1]
        hidden = {c.params["hidden"] // 128 for c in of}
        inter = {c.params["intermediate"] // 128 for c in of}
        assert {h % ring for h in hidden if h > ring} == set(range(ring))
        assert {i % 4 for i in inter if i > 4} == set(range(4))


@pytest.mark.parametrize("fast_math", [True, False])
@pytest.mark.parametrize("clamp", ["none", 10])
@pytest.mark.parametrize("tokens", [192, 193, 194])
def test_many_rows_at_the_edges_of_a_tile(tokens: int, clamp: object, fast_math: bool) -> None:
    """64, 65, 128 and 129 rows of an expert, with either silu and either kind of scales."""
    params = {"tokens": tokens, "clamp": clamp, "fast_math": fast_math}
    cases = [c for c in ZERO if crowded(c) and params.items() <= c.params.items()]
    assert cases and all(c.rows is None for c in cases)
    if (clamp == "none") is not fast_math:
        largest = {max(recipe(c, "weights").get("w13_scale", [0])) for c in cases}
        assert any(byte > 128 for byte in largest)


def test_laws_are_tried_between_few_and_many_rows() -> None:
    for law in ("batch-invariance", "padding-rows", "masked-slots", "replica-choice", "ep-size"):
        of = [c for c in CASES if c.kind == "property" and c.params["law"] == law]
        small = [recipes.forward_problem(c) for c in of if c.params["hidden"] in (512, 1024)]
        assert any(paths(law, p) == {False, True} for p in small), law


def paths(law: str, problem: Problem) -> set[bool]:
    """Whether the problem and its variants have many rows an expert."""
    problems = [problem, *(v.problem for v in laws.variants(problem, law))]
    return {many(p.num_tokens * p.top_k, p.num_experts) for p in problems}


def test_every_law_and_every_wrong_call_has_a_case() -> None:
    laws = [c for c in CASES if c.kind == "property"]
    for family in ("zero-freedom", "envelope"):
        assert {c.params["law"] for c in laws if c.params["family"] == family} == set(LAWS)
    assert {c.params["action"] for c in CASES if c.kind == "errors"} == set(ACTIONS)


PUBLIC_FAILURES = {
    "capacity-dependent output": "forward/capacity-8192-changes-output",
    "32-bit offset at a large capacity": "forward/capacity-65536-changes-output",
    "scale stride wrong from the second pool block on": "forward/second-pool-block-scale-stride-*",
    "weight folded before or after amax": "forward/weight-folded-after-amax-*",
    "result changes with the token count": "property/batch-invariance-broken-at-a-block-edge-*",
    "amax within a unit of 448*2^k, staging": "staging/amax-at-448x2k-or-a-step-beside-43e1",
    "amax within a unit of 448*2^k, requantise": "forward/requant-amax-one-unit-above-448x2k",
    "scale byte by a logarithm, requantise": "forward/requant-amax-*-at-40-exponents",
    "scale byte by a logarithm, staging": "staging/amax-448x2k-at-142-exponents",
    "groups with tiny amax, staging": "staging/amax-floor-1e-4-*",
    "groups with tiny amax, requantise": "forward/tiny-activations-floored-*",
    "groups with zero amax": "staging/zero-group-divides-by-zero",
    "NaN from a scale of zero on padding rows": "forward/padding-rows-in-a-batch-of-masked-tail",
    "scale stored rounded, quantised exact": "staging/amax-448x2k-mixed-with-smaller-values",
    "ids of -1": "staging/masked-ids-sign-lost-*",
    "ids of num_experts and 2^31-1": "eplb/ids-out-of-range-*",
    "ids passed through staging": "staging/ids-out-of-range-changed",
    "expert 0 skipped": "forward/expert-0-skipped",
    "expert 0 not counted": "eplb/expert-0-not-counted",
    "one local expert, top-1": "forward/one-local-expert-top-1-*",
    "a rank or batch with zero tokens": "forward/expert-block-edge-t0",
    "a rank that serves no slot": "forward/no-token-has-a-live-slot",
    "remap of an empty batch": "eplb/no-tokens",
    "over-capacity batch": "errors/over-capacity-writes-before-it-raises",
    "routing scale dropped": "forward/routing-scale-*-dropped",
    "padding counted in the load": "eplb/all-slots-masked",
    "map points at an expert that does not exist": "eplb/map-points-beyond-the-load",
    "I = 2304": "forward/shape-i2304-*",
    "I = 2304, layout": "layout/intermediate-2304-*",
    "stale bytes in the buffer": "property/stale-buffer-broken",
    "token counts at block edges": "forward/token-block-edge-t*",
    "one corrupt row of a tile": "forward/one-corrupt-row-of-a-tile-*",
    "older replica choice": "eplb/replica-hash-differs-*",
    "requantise floor of later revisions": "forward/requantise-floored-at-1e-4-or-byte-105-*",
    "bf16 before requantisation": "forward/codes-rounded-twice-*",
    "gate bounded below": "forward/gate-bounded-below-clamp-*",
    "clamp kept in fp32": "forward/clamp-*-as-fp32-flips-codes",
}


@pytest.mark.parametrize("failure", PUBLIC_FAILURES)
def test_every_failure_seen_in_public_has_a_case(failure: str) -> None:
    assert any(fnmatchcase(case, PUBLIC_FAILURES[failure]) for case in BY_ID)


def test_special_values_reach_staging() -> None:
    bits = set()
    for case in (c for c in CASES if c.kind == "staging"):
        hidden = recipe(case, "hidden")
        bits |= {hidden.get("bits"), *(p["bits"] for p in hidden.get("patch", ()))}
    expected = {0, 0x8000, 0x0001, 0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0x7F7F, 0x38D1, 0x38D2}
    assert expected <= bits
    for exact in (0x43E0, 0x40E0, 0x3A60, 0x4A60):  # 448 * 2^k
        assert {exact - 1, exact, exact + 1} <= bits


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_a_case_says_what_breaks(case: Case) -> None:
    assert re.search("[a-z]{3}", case.name), "a name is more than a size"
    assert len(case.breaks) >= 25 and case.breaks.endswith(".") and case.breaks[0].isupper()


def test_forward_data_of_envelopes_is_of_ordinary_size() -> None:
    """Gates mostly within +-10, outputs neither vanishing nor overflowing, on one middle case."""
    case = BY_ID["forward/bell-h512-i256-drifts"]
    golden = oracle.forward(recipes.forward_problem(case, [0]), ["exact"], contract=BASE)
    y = (golden.y.astype(np.uint32) << 16).view(np.float32)
    assert 0.05 < y.std() < 5 and np.unique(golden.codes).size > 100


@pytest.mark.parametrize(
    "name",
    [
        "combine-reversed-cancelling-pair",
        "combine-as-a-tree",
        "combine-order-by-expert-not-by-slot",
    ],
)
def test_combine_cases_depend_on_the_order(name: str) -> None:
    """Descending slots give other bits, so a kernel that adds them so is caught."""
    problem = recipes.forward_problem(BY_ID[f"forward/{name}"])
    other = BASE.variant("other", "a test", combine_order="descending-slot")
    ascending, descending = (
        oracle.forward(problem, ["exact"], contract=contract).y for contract in (BASE, other)
    )
    assert (descending != ascending).any()


@pytest.mark.parametrize(
    ("name", "byte"), [("at", 128), ("one-unit-above", 129), ("one-unit-below", 128)]
)
def test_requantise_cases_stand_at_the_power_of_two(name: str, byte: int) -> None:
    name = f"forward/requant-amax-{name}-448x2k"
    golden = oracle.forward(recipes.forward_problem(BY_ID[name]), contract=BASE)
    assert set(golden.sf.ravel()) == {byte} and golden.zero_freedom


def test_the_fast_silu_leaves_both_exponents_open() -> None:
    name = "forward/requant-amax-at-448x2k-fast-silu-undecided"
    envelope = oracle.forward(recipes.forward_problem(BY_ID[name]), contract=BASE).envelopes[
        "exact"
    ]
    assert (envelope.sf_lo == 128).all() and (envelope.sf_hi == 129).all()


@pytest.mark.parametrize(
    "case", [c for c in ZERO if c.params["hidden"] <= 256 and c.params["tokens"] == 1],
    ids=lambda c: c.name,
)  # fmt: skip
def test_small_zero_freedom_cases_are_proven(case: Case) -> None:
    """All are proven when goldens are made; these few show that the proof can be had here."""
    contract = CONTRACTS[case.revisions[0]]
    golden = oracle.forward(recipes.forward_problem(case), any_silu=True, contract=contract)
    assert golden.zero_freedom, golden.why
