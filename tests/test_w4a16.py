"""MXFP4 weights beside bfloat16: oracle and ``eager`` against a plain implementation, and members.

No kernel on a GPU stands behind any of it here: the description was read in FlashInfer's source.
``torch._grouped_mm`` of a CPU is judged, as a kernel that this project did not write.
"""

from dataclasses import replace
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import torch

from megamoe import oracle
from megamoe.backends import eager_combine, eager_w4a16, simulate
from megamoe.backends.eager import EagerBackend
from megamoe.cases import golden_root, load_cases
from megamoe.commands.contract import EFFECTS
from megamoe.golden import Store, make, regenerate
from megamoe.golden.store import pack
from megamoe.judge import BAD
from megamoe.kernels.torch_grouped_mm import TorchGroupedMm
from megamoe.oracle.bf16_linear import EXACT, Rows, Weights, linear
from megamoe.oracle.combine import Combine
from megamoe.oracle.fused import fma
from megamoe.oracle.silu import silu_hull
from megamoe.oracle.units import HOPPER_16BIT, fused
from megamoe.spec.accumulators import FP32, FP32_ORDERED, OF_FORMAT
from megamoe.spec.contract import BASE
from megamoe.spec.dialects import DIALECTS
from megamoe.spec.formats import bf16_decode, bf16_key, bf16_round, e2m1_decode, ue8m0_decode
from megamoe.spec.forms import bits
from megamoe.suite.runner import Runner
from tests.helpers import plain_w4a16 as plain
from tests.helpers.local import Local

NOW = DIALECTS["w4a16"]
CASES = {c.id: c for c in load_cases() if c.params.get("weight_format") == "w4a16"}
SMALL = {"hidden": 128, "intermediate": 128, "experts": 2, "top_k": 2, "tokens": 1}
PROBLEMS = {
    "bell": {"top_k": 1},
    "clamped": {"top_k": 1, "clamp": 0.3003, "weights_recipe": {"w13_scale": [121, 2]}},
    "many-octaves": {"hidden_recipe": {"spread": 30, "log2_scale": -15}},
}


def make_problem(seed: int = 3, **params):
    base = {**SMALL, "clamp": "none", "weight_format": "w4a16", "fast_math": False}
    return simulate.problem(seed, **{**base, **params})


def values(y) -> list[list[Fraction]]:
    return [list(map(Fraction, row)) for row in bf16_decode(y).tolist()]


def inside(y, envelope) -> np.ndarray:
    key = bf16_key(y)
    return (bf16_key(envelope.y_lo) <= key) & (key <= bf16_key(envelope.y_hi))


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_oracle_and_eager_compute_what_was_read(name):
    problem = make_problem(**PROBLEMS[name])
    golden = oracle.forward(problem, contract=NOW)
    assert values(golden.y) == plain.forward(problem)
    output = EagerBackend(NOW).forward(problem)
    assert list(output) == ["y"]
    assert values(bits(output["y"])) == plain.forward(problem, "blocks")
    for envelope in golden.envelopes.values():
        assert inside(golden.y, envelope).all()
    assert inside(bits(output["y"]), golden.envelopes["fp32-ordered"]).all()


def operands(seed: int, rows: int = 6, outputs: int = 40, columns: int = 96, octaves: int = 24):
    """bfloat16 rows of many octaves as float64, weights, and both as one float64 product each."""
    rng = np.random.default_rng(seed)
    wide = np.ldexp(rng.normal(0, 1, (rows, columns)), rng.integers(-octaves, 1, (rows, columns)))
    packed = rng.integers(0, 256, (outputs, columns // 2), dtype=np.uint8)
    packed[: outputs // 2] *= rng.random((outputs // 2, columns // 2)) < 0.1  # few that are not 0
    scale = rng.integers(118, 136, (outputs, columns // 32), dtype=np.uint8)
    x = bf16_decode(bf16_round(wide)).astype(np.float64)
    numbers = e2m1_decode(packed) * np.repeat(ue8m0_decode(scale), 32, axis=1)
    return rng, x, Weights(packed, scale), x[:, None, :] * numbers[None]


@pytest.mark.parametrize("octaves", [2, 24, 60])
def test_exact_sums_are_those_of_fractions(octaves):
    _, x, weights, terms = operands(5, 3, 20, octaves=octaves)
    sums = linear(Rows.point(x), weights, [], exact=True)[EXACT]
    for at in np.ndindex(sums.shape):
        total = sum(map(Fraction, terms[at].tolist()), Fraction(0))
        nearest = bf16_round(np.array([float(total)]))  # no double here lies at a midpoint
        assert bf16_round(sums[at][None])[0] == nearest[0]
        is_exact = Fraction(float(sums[at])) == total
        assert (
            is_exact or abs(Fraction(float(sums[at])) - total) < Fraction(abs(float(total))) / 2**52
        )


@pytest.mark.parametrize("octaves", [2, 24])
def test_a_sum_in_any_order_and_direction_lies_in_its_interval(octaves):
    rng, x, weights, terms = operands(7, octaves=octaves)
    ends = linear(Rows.point(x), weights, [FP32, FP32_ORDERED])
    wide = terms.transpose(2, 0, 1)
    blocks = wide.reshape(-1, 32, *wide.shape[1:])
    count = 0
    for order in simulate.ORDERS:
        for rounding in ("nearest", "zero", "away", "up", "down"):
            total = simulate.add_up(wide, order, rounding, rng)
            low, high = ends["fp32"]
            assert ((low <= total) & (total <= high)).all(), (order, rounding)
            count += (total != linear(Rows.point(x), weights, [], exact=True)[EXACT]).sum()
            parts = [simulate.add_up(block, order, rounding, rng) for block in blocks]
            ordered = simulate.add_up(np.stack(parts), "ascending", rounding, rng)
            low, high = ends["fp32-ordered"]
            assert ((low <= ordered) & (ordered <= high)).all(), (order, rounding)
    assert count > 1000  # the orders differ from the exact sum at all


@pytest.mark.parametrize(
    "log2_scale", [0, -124]
)  # the latter: numbers below bfloat16's normal ones
def test_hoppers_instruction_for_bfloat16_lies_in_each_interval(log2_scale):
    _, x, weights, _ = operands(13, octaves=6)
    x = bf16_decode(bf16_round(np.ldexp(x, log2_scale))).astype(np.float64)
    numbers = weights.values.reshape(96, -1).T
    fields = [np.maximum(np.frexp(v)[1] - 1, -126) for v in (x, numbers)]
    fields = [np.where(v == 0, -4000, f) for v, f in zip((x, numbers), fields, strict=True)]
    total = np.zeros((len(x), len(numbers)))
    for at in range(0, 96, 16):
        part = slice(at, at + 16)
        terms = x[:, None, part] * numbers[None, :, part]
        field = np.maximum(fields[0][:, None, part] + fields[1][None, :, part], HOPPER_16BIT.floor)
        total = fused(HOPPER_16BIT, terms, field, total)
    ends = linear(Rows.point(x), weights, [FP32, FP32_ORDERED], exact=True)
    assert (total != ends[EXACT]).any()
    for name in ("fp32", "fp32-ordered"):
        assert ((ends[name][0] <= total) & (total <= ends[name][1])).all()


def test_an_interval_of_rows_holds_the_sums_of_each_row_in_it():
    rng, x, weights, _ = operands(9, rows=12)
    key = rng.integers(0, 3, x.shape) * (rng.random(x.shape) < 0.3)
    steps = np.ldexp(np.abs(x), -7) * key  # a few neighbours of some numbers
    low, high = (bf16_decode(bf16_round(x + s)).astype(np.float64) for s in (-steps, steps))
    ends = linear(Rows(low, high), weights, [FP32, FP32_ORDERED])
    for part in (0.0, 0.3, 1.0):
        inner = bf16_decode(bf16_round(low + (high - low) * part)).astype(np.float64)
        narrow = linear(Rows.point(inner), weights, [FP32, FP32_ORDERED])
        for name, (least, most) in narrow.items():
            assert ((ends[name][0] <= least) & (most <= ends[name][1])).all()


def test_infinities_and_nan_end_in_what_ieee_says():
    _, x, weights, _ = operands(11, rows=3)
    x[0, 5], x[1, 7], x[2, 0] = np.inf, np.nan, -np.inf
    ends = linear(Rows.point(x), weights, [FP32], exact=True)
    numbers = weights.values.reshape(96, -1)
    with np.errstate(invalid="ignore"):
        expected = (x[:, :, None] * numbers[None]).sum(axis=1)
    assert not np.isfinite(expected).any() and np.isinf(expected).any()
    for end in (ends[EXACT], *ends["fp32"]):
        np.testing.assert_array_equal(end, expected)
    high = np.where(np.arange(96) == 3, np.inf, 1.0)[None]
    low, top = linear(Rows(np.ones((1, 96)), high), weights, [FP32])["fp32"]
    assert (low == -np.inf).all() and (top == np.inf).all()


def test_where_a_sum_may_leave_fp32_on_its_way_nothing_is_known():
    problem = make_problem(top_k=1, tokens=3)
    problem.hidden_states[:2] = 0.0
    problem.hidden_states[0, :4] = torch.tensor([1.0, 1.0, -1.0, -1.0]) * 2.0**127
    problem.hidden_states[1, :3] = torch.tensor([1.0, -1.0, -1.0]) * 2.0**127
    problem.w13_weight[:, :, :2], problem.w13_weight_scale[:, :, 0] = 0x22, 127  # weights of 1
    golden = oracle.forward(problem, contract=NOW)
    assert not (golden.y[:2] & 0x7FFF).any() and golden.y[2].any()  # 0, and silu(-2^127) is -0
    own = golden.envelopes["fp32"]
    assert inside(golden.y, own).all()
    assert (own.y_lo[:2] == 0xFF80).all() and (own.y_hi[:2] == 0x7F80).all()
    assert np.isfinite(bf16_decode(own.y_hi[2])).all()


def test_silu_of_an_infinite_gate_has_no_error():
    gate = np.array([np.inf, 3.0], np.float32)
    hull = silu_hull(gate, np.array([np.inf, np.inf], np.float32), True)
    assert hull.low[0] == hull.high[0] == hull.high[1] == np.inf and hull.low[1] < 3


def test_a_product_and_a_sum_are_allowed_in_place_of_an_fma():
    rng = np.random.default_rng(2)
    row, weight, total = (rng.normal(0, 1, (2000, 1)).astype(np.float32) for _ in range(3))
    row = bf16_decode(bf16_round(row))
    combine = Combine(np.ones((2000, 1), bool), weight, NOW)
    interval = (row.astype(np.float64),) * 2
    low, high = (combine.accumulate(0, total, interval, end, False) for end in (0, 1))
    fused, apart = fma(row, weight, total), total + row * weight
    assert (fused != apart).sum() > 100
    assert (np.minimum(fused, apart) == low).all() and (np.maximum(fused, apart) == high).all()
    assert (combine.accumulate(0, total, interval) == fused).all()  # the reference point


def test_a_kernel_of_exact_sums_may_err_in_silu_and_combine_either_way(monkeypatch):
    problem = make_problem(seed=5, tokens=48, top_k=2, fast_math=True)
    envelopes = oracle.forward(problem, contract=NOW).envelopes
    own, low = envelopes["exact"], [bf16_key(envelopes[n].y_lo) for n in ("exact", "fp32")]
    assert (low[1] <= low[0]).all() and (bf16_key(own.y_lo) != bf16_key(own.y_hi)).any()
    monkeypatch.setattr(eager_w4a16, "linear", lambda x, w: (x.double() @ w.T).float())
    for multiply_add in (eager_combine.fma, lambda a, b, c: a * b + c):
        monkeypatch.setattr(eager_combine, "fma", multiply_add)
        for erring in (1 - 2.0**-23, 1 + 2.0**-23):  # of exp: two of its ulps are allowed
            exp = torch.Tensor.exp
            with monkeypatch.context() as patch:
                patch.setattr(torch.Tensor, "exp", lambda x, e=erring, of=exp: of(x) * e)
                y = bits(EagerBackend(NOW).forward(problem)["y"])
            assert inside(y, own).all()


def test_sums_in_bfloat16_are_outside(monkeypatch):
    problem = make_problem(seed=8, tokens=4)
    golden = oracle.forward(problem, contract=NOW)
    own = eager_w4a16.linear

    def short(rows, weights):
        half = rows.shape[1] // 2
        parts = [own(rows[:, at], weights[:, at]) for at in (slice(half), slice(half, None))]
        return parts[0].bfloat16().float() + parts[1].bfloat16().float()

    monkeypatch.setattr(eager_w4a16, "linear", short)
    y = bits(EagerBackend(NOW).forward(problem)["y"])
    assert not inside(y, golden.envelopes["fp32"]).all()


@cache
def store() -> Store:
    """Its manifest is read once: that takes longer than a case."""
    return Store(golden_root(), make, NOW)


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="this torch has no _grouped_mm")
@pytest.mark.parametrize(
    "name", ["bell-precise", "nan-token-becomes-the-bound", "operand-quantised"]
)
def test_torchs_grouped_product_of_a_cpu_passes(name):
    runner = Runner(Local(TorchGroupedMm()), store())
    assert runner.run(CASES[f"forward/w4a16-{name}"]).status == "pass"


# --- clauses ------------------------------------------------------------------------------------

OTHER = {
    "gate_up": ("gate-and-up-kept-in-fp32", "fp32"),
    "gate_up_order": ("silu-rounded-to-bf16", "up-gate"),
    "gate_clamped_below": ("clamp-bound-rounded-to-bf16", True),
    "clamp_nan": ("nan-token-becomes-the-bound", "first"),
    "silu_type": ("silu-rounded-to-bf16", "bf16"),
    "routing_weight": ("routing-weight-before-the-row-is-rounded", "accumulator"),
    "routing_type": ("routing-weight-rounded-to-bf16", "bf16"),
    "combine_order": ("slots-of-one-expert-cancel", "descending-slot"),
}
UNSEEN = {
    "features": "it decides which cases a contract knows",
    "weights": "it decides which cases a contract knows",
    "precise_silu": "the bound of silu is one relative error, which holds both forms",
}


@pytest.mark.parametrize("clause", OTHER)
def test_a_clause_that_is_changed_alone_is_seen(clause):
    name, value = OTHER[clause]
    case = CASES[f"forward/w4a16-{name}"]
    other = NOW.variant("other", "a test", **{clause: value})
    inputs = regenerate(case)
    tables = [pack(make(case, inputs, ["exact"], contract=c))[1] for c in (NOW, other)]
    assert tables[0] != tables[1]
    for mine, right in ((other, False), (NOW, True)):
        backend = EagerBackend(mine)
        backend.contracts = (NOW.revision,)
        assert (Runner(Local(backend), store()).run(case).status not in BAD) == right


@pytest.mark.parametrize(
    "change", [{"routing_weight": "accumulator", "gate_up": "fp32"}, {"silu_type": "bf16"}]
)
def test_oracle_and_eager_agree_under_the_other_values_too(change):
    other = NOW.variant("other", "a test", **change)
    problem = make_problem(seed=6, tokens=6, top_k=2)
    problem.topk_weights[0, 0] *= -1
    golden = oracle.forward(problem, contract=other)
    y = bits(EagerBackend(other).forward(problem)["y"])
    for envelope in (golden.envelopes["fp32"], golden.envelopes["fp32-ordered"]):
        assert inside(y, envelope).all() and inside(golden.y, envelope).all()


def test_each_clause_has_another_value_or_a_reason():
    assert {*OTHER, *UNSEEN} == {*NOW.clauses} <= {*EFFECTS}
    assert all(clause.evidence for clause in NOW.clauses.values())


# --- selection and refusals -----------------------------------------------------------------------


def test_the_dialect_knows_its_cases_and_its_classes():
    assert len(CASES) >= 14 and all([*c.revisions] == ["w4a16"] for c in CASES.values())
    golden = oracle.forward(make_problem(), contract=NOW)
    assert list(golden.envelopes) == list(OF_FORMAT["w4a16"]) and golden.only_y
    with pytest.raises(ValueError, match="class sm100-mxf8f6f4 is none of w4a16"):
        oracle.forward(make_problem(), ["sm100-mxf8f6f4"], contract=NOW)


def test_what_the_format_does_not_allow_is_said():
    for contract in (BASE, DIALECTS["sgl-sm90"]):
        with pytest.raises(ValueError, match=f"{contract.revision} has no rule for w4a16"):
            oracle.forward(make_problem(), contract=contract)
        with pytest.raises(ValueError, match="no rule for w4a16; take one of w4a16"):
            EagerBackend(contract).forward(make_problem())
    for byte in (1, 252, 255):
        problem = make_problem()
        problem.w2_weight_scale[:, 0, 0] = byte
        with pytest.raises(ValueError, match=f"w2_weight_scale of expert . has byte {byte}; give"):
            oracle.forward(problem, contract=NOW)
    problem = make_problem()  # a group of zeros may have any byte but 255
    problem.w2_weight[:, 0, :16], problem.w2_weight_scale[:, 0, 0] = 0x80, 1
    assert oracle.forward(problem, contract=NOW).y.any()
    problem.hidden_states[:], problem.w13_weight_scale[:] = 3e38, 140
    with pytest.raises(ValueError, match="a sum leaves fp32"):
        oracle.forward(problem, contract=NOW)
    for of in (EagerBackend(NOW).forward, lambda p: oracle.forward(p, contract=NOW)):
        with pytest.raises(ValueError, match="w4a16 goes without fp8-combine"):
            of(replace(make_problem(), combine_dtype="fp8"))
