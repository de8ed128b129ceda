"""MXFP4 weights and E4M3 rows with one scale: oracle and ``eager`` against a plain implementation.

No kernel on a GPU stands behind any of it here: the description was read in humming's source, and
in vLLM's for the layer around it.
"""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from megamoe import oracle
from megamoe.backends import eager_w4a8_token, simulate
from megamoe.backends.eager import EagerBackend
from megamoe.cases import golden_root, load_cases
from megamoe.commands.contract import EFFECTS
from megamoe.golden import Store, make, regenerate
from megamoe.golden.store import pack
from megamoe.judge import BAD
from megamoe.kernels import around, humming
from megamoe.kernels.torch_scaled_grouped_mm import TorchScaledGroupedMm
from megamoe.oracle.bf16_linear import E4M3, EXACT, Rows, Weights, linear
from megamoe.oracle.units import HOPPER_8BIT, fused
from megamoe.oracle.w4a8_token import Layer
from megamoe.spec.accumulators import OF_FORMAT, SM90_E4M3_ANY
from megamoe.spec.dialects import DIALECTS
from megamoe.spec.features import Activation
from megamoe.spec.formats import bf16_decode, bf16_key, bf16_round, e4m3_cast, e4m3_decode
from megamoe.spec.forms import bits
from megamoe.suite.runner import Runner
from tests.helpers import plain_w4a8_token as plain
from tests.helpers.local import Local
from tests.test_w4a16 import inside, values

NOW = DIALECTS["w4a8-token"]
CASES = {c.id: c for c in load_cases() if c.params.get("weight_format") == "w4a8-token"}
SMALL = {"hidden": 128, "intermediate": 128, "experts": 2, "top_k": 1, "tokens": 1}
PROBLEMS = {
    "bell": {},
    "below-the-floor": {
        "hidden_recipe": {"log2_scale": -112}, "weights_recipe": {"w13_scale": [222, 2]},
    },
    "clamped": {"clamp": 0.3003, "weights_recipe": {"w13_scale": [119, 2]}},
}  # fmt: skip


def make_problem(seed: int = 3, **params):
    base = {**SMALL, "clamp": "none", "weight_format": "w4a8-token", "fast_math": False}
    return simulate.problem(seed, **{**base, **params})


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_oracle_and_eager_compute_what_was_read(name):
    problem = make_problem(**PROBLEMS[name])
    golden = oracle.forward(problem, contract=NOW)
    assert values(golden.y) == plain.forward(problem)
    y = bits(EagerBackend(NOW).forward(problem)["y"])
    assert values(y) == plain.forward(problem, "blocks")
    for envelope in golden.envelopes.values():
        assert inside(golden.y, envelope).all()
    assert inside(y, golden.envelopes["fp32-ordered"]).all()


def layer(contract=NOW) -> Layer:
    return Layer(Activation("swiglu", None, 1.0, 0.0, False), contract, False)


@pytest.mark.parametrize("codes", ["reciprocal", "quotient"])
def test_codes_and_scales_of_an_interval_hold_those_of_each_value(codes):
    rng = np.random.default_rng(1)
    own = layer(NOW.variant("other", "a test", token_codes=codes))
    middle = np.ldexp(rng.normal(0, 1, (6, 256)), rng.integers(-12, 4, (6, 1)))
    middle[5] *= 2.0**-110  # below the floor
    width = np.abs(middle) * rng.choice([0, 2.0**-8, 0.2], middle.shape)
    low, high = (bf16_decode(bf16_round(middle + s)).astype(float) for s in (-width, width))
    rows, scale = own.quantised(low, high)
    assert (rows.low <= rows.high).all() and (scale[0] <= scale[1]).all()
    assert (scale[0] < scale[1])[:5].any() and (rows.low < rows.high)[:5].any()
    for _ in range(30):
        value = bf16_decode(bf16_round(low + (high - low) * rng.random(low.shape))).astype(float)
        point, (one, other) = own.quantised(value, value)
        assert (point.low == point.high).all() and (one == other).all()
        assert ((rows.low <= point.low) & (point.high <= rows.high)).all()
        assert ((scale[0] <= one) & (one <= scale[1])).all()


def chain(x, w, splits, rng):
    """Steps of Hopper's FP8 instruction from zero for each split of K, added in fp32 at random."""
    fields = [np.maximum(np.frexp(v)[1] - 1, low) for v, low in ((x, -6), (w, -126))]
    fields = [np.where(v == 0, -4000, f) for v, f in zip((x, w), fields, strict=True)]
    parts = []
    for steps in np.array_split(np.arange(x.shape[1] // 32), splits):
        total = np.zeros((len(x), len(w)))
        for at in steps * 32:
            part = slice(at, at + 32)
            field = np.maximum(fields[0][:, None, part] + fields[1][None, :, part], -126)
            total = fused(HOPPER_8BIT, x[:, None, part] * w[None, :, part], field, total)
        parts.append(total)
    order = rng.permutation(len(parts))
    return simulate.add_up(np.stack([parts[i] for i in order]), "ascending", "nearest", rng)


@pytest.mark.parametrize("splits", [1, 3, 8])
def test_hoppers_fp8_instruction_lies_in_its_class_however_k_is_split(splits):
    rng = np.random.default_rng(splits)
    x = np.asarray(e4m3_decode(e4m3_cast(rng.normal(0, 60, (8, 512)))), np.float64)
    x[4:] = np.asarray(e4m3_decode(e4m3_cast(rng.normal(0, 2.0**-6, (4, 512)))))  # subnormal too
    weights = Weights(
        rng.integers(0, 256, (64, 256), dtype=np.uint8), rng.integers(118, 130, (64, 16), np.uint8)
    )
    numbers = weights.values.reshape(512, -1).T
    ends = linear(Rows.point(x, E4M3), weights, [SM90_E4M3_ANY], exact=True)
    low, high = ends["sm90-e4m3-any"]
    total = chain(x, numbers, splits, rng)
    assert (total != ends[EXACT]).mean() > 0.5
    assert ((low <= total) & (total <= high)).all()
    few = np.where(np.arange(512) % 128 == 5, x, 0.0)  # four products, which 13 bits may not hold
    low, high = linear(Rows.point(few, E4M3), weights, [SM90_E4M3_ANY])["sm90-e4m3-any"]
    total = chain(few, numbers, splits, rng)
    assert ((low <= total) & (total <= high)).all()


def test_a_sum_that_is_too_long_for_the_bound_says_nothing():
    x = np.where(np.arange(8192) % 8, 0.0, 1.0)[None]
    packed = np.full((32, 4096), 0x22, np.uint8)
    for scale, fits in ((127, True), (np.arange(256) % 20 + 117, False)):  # 13 bits hold 1024
        of = Weights(packed, np.broadcast_to(np.asarray(scale, np.uint8), (32, 256)))
        low, high = linear(Rows.point(x, E4M3), of, [SM90_E4M3_ANY])["sm90-e4m3-any"]
        assert ((low == high) == fits).all() and (np.isinf(high) == (not fits)).all()


def test_a_number_that_is_none_makes_its_whole_row_nan():
    rng = np.random.default_rng(4)
    x = bf16_decode(bf16_round(rng.normal(0, 1, (4, 64)))).astype(np.float64)
    x[0, 3], x[1, 5] = np.inf, np.nan
    rows, _ = layer().quantised(x, x)
    assert np.isnan(rows.low[:2]).all() and rows.special.tolist() == [True, True, False, False]
    high = x.copy()
    high[2, 7] = np.inf
    rows, _ = layer().quantised(x, high)
    assert rows.unbounded.tolist() == [False, False, True, False]
    weights = Weights(np.full((32, 32), 0x20, np.uint8), np.full((32, 2), 127, np.uint8))
    low, top = layer().linear(x, high, weights, [SM90_E4M3_ANY])["sm90-e4m3-any"]
    assert np.isnan(low[:2]).all() and (low[2] == -np.inf).all() and (top[2] == np.inf).all()
    codes, scale = eager_w4a8_token.quantise(torch.from_numpy(x).bfloat16(), NOW)
    nan = codes.view(torch.float8_e4m3fn).float().isnan()
    assert nan.any(1).tolist() == [True, True, False, False] and scale[0].isinf().all()


def test_the_adapters_quantise_as_the_contract_says():
    rows = make_problem(tokens=4).hidden_states
    rows[2], rows[3] = 0.0, rows[3] * 2.0**-110
    codes, scale = around.per_row(rows)
    own = eager_w4a8_token.quantise(rows, NOW)
    assert torch.equal(codes.view(torch.uint8) & 0x7F, own[0] & 0x7F)  # -0 is +0 in eager
    assert torch.equal(scale, own[1]) and humming.FACTS.accumulator in OF_FORMAT["w4a8-token"]


@cache
def store() -> Store:
    """Its manifest is read once: that takes longer than a case."""
    return Store(golden_root(), make, NOW)


def scaled_grouped_mm(rows, weight, of_row, of_column, *, offs, out_dtype, use_fast_accum):
    """torch's function in float64, with the demands of its code for a GPU."""
    assert rows.dtype == weight.dtype == torch.float8_e4m3fn and rows.is_contiguous()
    assert weight.shape == (len(offs), rows.shape[1], of_column.shape[1])
    assert weight.transpose(1, 2).is_contiguous() and of_column.is_contiguous()
    assert of_row.is_contiguous() and of_row.shape == rows.shape[:1] and offs.dtype == torch.int32
    assert out_dtype == torch.bfloat16 and not use_fast_accum
    expert = torch.searchsorted(offs.long(), torch.arange(len(rows)), right=True)
    acc = torch.einsum("rk,rkn->rn", rows.double(), weight.double()[expert]).float()
    return (acc * of_row[:, None] * of_column[expert]).bfloat16()


@pytest.mark.parametrize(
    "name",
    ["codes-by-a-quotient", "scale-of-another-group-h256-i256", "masked-slots-and-zero-rows"],
)
def test_torchs_scaled_product_gets_the_rows_and_weights_of_the_contract(monkeypatch, name):
    monkeypatch.setattr(torch, "_scaled_grouped_mm", scaled_grouped_mm, raising=False)
    case = CASES[f"forward/w4a8-token-{name}"]
    assert Runner(Local(TorchScaledGroupedMm()), store()).run(case).status == "pass"
    monkeypatch.setattr(around, "LIFT", 7)  # 6 becomes 768: E4M3 ends at 448
    assert Runner(Local(TorchScaledGroupedMm()), store()).run(case).status != "pass"


# --- clauses ------------------------------------------------------------------------------------

OTHER = {
    "token_scale_floor": ("tiny-rows-below-the-floor", 1e-10),
    "token_codes": ("codes-by-a-quotient", "quotient"),
    "gate_up": ("gate-and-up-kept-in-fp32", "fp32"),
    "gate_up_order": ("ordinary-data-precise", "up-gate"),
    "gate_clamped_below": ("clamp-bound-rounded-to-bf16", True),
    "clamp_nan": ("nan-token-becomes-the-bound", "first"),
    "silu_type": ("gate-and-up-kept-in-fp32", "bf16"),
    "routing_weight": ("routing-weight-before-the-row-is-rounded", "accumulator"),
    "routing_type": ("routing-weight-before-the-row-is-rounded", "bf16"),
    "combine_order": ("slots-of-one-expert-cancel", "descending-slot"),
}
UNSEEN = {
    "features": "it decides which cases a contract knows",
    "weights": "it decides which cases a contract knows",
    "cast_saturates": "the largest value of a row becomes 448, and no infinity reaches a cast",
    "precise_silu": "the bound of silu is one relative error, which holds both forms",
}


@pytest.mark.parametrize("clause", OTHER)
def test_a_clause_that_is_changed_alone_is_seen(clause):
    name, value = OTHER[clause]
    case = CASES[f"forward/w4a8-token-{name}"]
    other = NOW.variant("other", "a test", **{clause: value})
    inputs = regenerate(case)
    tables = [pack(make(case, inputs, ["exact"], contract=c))[1] for c in (NOW, other)]
    assert tables[0] != tables[1]
    for mine, right in ((other, False), (NOW, True)):
        backend = EagerBackend(mine)
        backend.contracts = (NOW.revision,)
        assert (Runner(Local(backend), store()).run(case).status not in BAD) == right


def test_each_clause_has_another_value_or_a_reason():
    assert {*OTHER, *UNSEEN} == {*NOW.clauses} <= {*EFFECTS}
    assert all(clause.evidence for clause in NOW.clauses.values())


# --- selection and refusals -----------------------------------------------------------------------


def test_the_dialect_knows_its_cases_and_its_classes():
    assert len(CASES) >= 14 and all([*c.revisions] == ["w4a8-token"] for c in CASES.values())
    golden = oracle.forward(make_problem(), contract=NOW)
    assert list(golden.envelopes) == list(OF_FORMAT["w4a8-token"]) and golden.only_y
    key = [bf16_key(e) for e in (golden.envelopes["sm90-e4m3-any"].y_lo, golden.y)]
    assert (key[0] < key[1]).any()  # 13 bits leave ordinary data open


def test_what_the_format_does_not_allow_is_said():
    with pytest.raises(ValueError, match="w4a16 has no rule for w4a8-token"):
        oracle.forward(make_problem(), contract=DIALECTS["w4a16"])
    with pytest.raises(ValueError, match="no rule for w4a8-token; take one of w4a8-token"):
        EagerBackend(DIALECTS["w4a16"]).forward(make_problem())
    problem = make_problem()
    problem.w2_weight_scale[:, 0, 0] = 90
    with pytest.raises(
        ValueError, match=r"w2_weight_scale of expert . has bytes 90 and 1.*11 apart"
    ):
        oracle.forward(problem, contract=NOW)
    problem.w2_weight[:, 0, :16] = 0x08  # of zeros alone the scale does not matter
    assert oracle.forward(problem, contract=NOW).y.any()
    with pytest.raises(ValueError, match="w4a8-token goes without fp8-combine"):
        oracle.forward(replace(make_problem(), combine_dtype="fp8"), contract=NOW)
