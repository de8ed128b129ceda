"""NVFP4 weights: the oracle and ``eager`` against a plain implementation, and what is refused.

No kernel on a Blackwell stands behind any of it: the description was read in vLLM's source.
"""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from megamoe import oracle
from megamoe.backends import eager, eager_nvfp4, simulate
from megamoe.backends import oracle as exact
from megamoe.backends.eager import create
from megamoe.cases import golden_root, load_cases
from megamoe.cases.kind import CaseError
from megamoe.golden import Store, make, regenerate
from megamoe.judge import BadOutput, forward_bits
from megamoe.kinds.forward import KIND
from megamoe.oracle.nvfp4_codes import Requantise, e2m1_nearest, staged
from megamoe.spec.accumulators import ACCUMULATORS
from megamoe.spec.contract import NEWEST, REVISIONS
from megamoe.spec.formats import E2M1_TABLE, bf16_decode, bf16_key, bf16_round, e2m1_decode
from megamoe.spec.forms import bits
from megamoe.spec.problem import Problem
from megamoe.spec.tensors import TENSORS
from megamoe.suite.runner import Runner
from tests.helpers import plain_nvfp4
from tests.helpers.local import Local

CASES = [case for case in load_cases() if case.id.startswith("forward/nvfp4-")]
WIDE = {"weights_recipe": {"w13_scale": [0, 127], "w2_scale": [0, 127]}}
"""All scale bytes: sums that round in fp32."""
PROBLEMS = {
    "fast": {},
    "precise-clamp": {"fast_math": False, "clamp": 1.0},
    "oai": {"activation_alpha": 1.702, "activation_beta": 1.0, "clamp": 7.0},
    "alpha-beta-precise": {"activation_alpha": 0.7, "activation_beta": -0.3, "fast_math": False},
    "tiny": {"hidden_recipe": {"log2_scale": -45}, "weights_recipe": {"factors": [2.0**30, 1.0]}},
    "zero-rows": {"hidden_recipe": {"patch": [{"token": 0, "count": 256, "bits": 0}]}},
    "spread": {"hidden_recipe": {"spread": 14, "outlier_every": 40}},
    "small-activations": {"l2_activation_scale": 40.0},
    "large-activations": {"l2_activation_scale": 1e-5},
    "all-scale-bytes": WIDE,
    "masked": {"routing_recipe": {"mask": [[0, 1]]}, "fast_math": False},
}


def make_problem(seed: int = 3, **params) -> Problem:
    base = {
        "intermediate": 256, "experts": 2, "top_k": 2, "tokens": 1, "clamp": "none",
        "weight_format": "nvfp4", "l2_activation_scale": 0.003,
    }  # fmt: skip
    return simulate.problem(seed, **{**base, **params})


def values(y) -> list[list[Fraction]]:
    return [list(map(Fraction, row)) for row in bf16_decode(y).tolist()]


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_oracle_and_eager_compute_what_was_read(name):
    problem = make_problem(**PROBLEMS[name])
    golden = oracle.forward(problem, contract=NEWEST)
    right = plain_nvfp4.forward(problem)
    assert values(golden.y) == right
    output = create().forward(problem)
    assert list(output) == ["y"]
    key = bf16_key(bits(output["y"]))
    for envelope in (golden.envelopes[n] for n in ("fp32", "fp32-ordered")):
        assert (bf16_key(envelope.y_lo) <= key).all() and (key <= bf16_key(envelope.y_hi)).all()
    if name != "all-scale-bytes":
        assert golden.zero_freedom and values(bits(output["y"])) == right


def test_the_weight_comes_in_the_combine():
    problem = make_problem(routing_recipe={"weights": [[0.3, 0.9]]})
    y = oracle.forward(problem, contract=NEWEST).y
    assert values(y) == plain_nvfp4.forward(problem) != plain_nvfp4.forward(problem, True)


def test_a_bell_that_leaves_freedom_is_held_by_the_envelope_of_fp32():
    golden = oracle.forward(make_problem(tokens=4, **WIDE), contract=NEWEST)
    assert not golden.zero_freedom and golden.only_y
    ends = {name: (e.y_lo.tobytes(), e.y_hi.tobytes()) for name, e in golden.envelopes.items()}
    assert ends["exact"] == (golden.y.tobytes(),) * 2
    assert len({ends[name] for name in ACCUMULATORS if name != "exact"}) == 1
    names = set(golden.to_tensors())
    assert names == {"y"} | {f"{c}.y_{end}" for c in ACCUMULATORS for end in ("lo", "hi")}


def summed(order, rounding, rng):
    """A linear of ``eager``'s whose sums are taken in another way, all within fp32."""

    def linear(numbers, sf, packed, weight_sf):
        x = numbers.double() * sf.double().repeat_interleave(16, -1)
        scale = weight_sf.view(torch.float8_e4m3fn).double().repeat_interleave(16, -1)
        w = torch.from_numpy(e2m1_decode(packed.numpy())) * scale
        if order != "mxf4nvf4":
            terms = x.numpy().T[:, :, None] * w.numpy().T[:, None, :]
            total = simulate.add_up(terms, order, rounding, rng)
        else:  # the instruction, where the alignment to 35 bits loses nothing
            total = np.zeros((len(x), len(w)))
            for part in (slice(k, k + 64) for k in range(0, x.shape[1], 64)):
                total = simulate.to_fp32(total + (x[:, part] @ w[:, part].T).numpy(), "zero", rng)
        return torch.from_numpy(total).float()

    return linear


@pytest.mark.parametrize("change", [WIDE, {**WIDE, "clamp": 1.0, "fast_math": False}])
def test_sums_in_any_order_stay_inside(monkeypatch, change):
    problem = make_problem(seed=17, tokens=6, experts=4, **change)
    envelope = oracle.forward(problem, ["fp32"], contract=NEWEST).envelopes["fp32"]
    rng, other = np.random.default_rng(5), 0
    kinds = [(o, r) for o in simulate.ORDERS for r in ("nearest", "zero", "up", "mixed")]
    for order, rounding in [*kinds, ("mxf4nvf4", "zero")]:
        monkeypatch.setattr(eager_nvfp4, "linear", summed(order, rounding, rng))
        y = bits(create().forward(problem)["y"])
        key = bf16_key(y)
        assert (bf16_key(envelope.y_lo) <= key).all(), (order, rounding)
        assert (key <= bf16_key(envelope.y_hi)).all(), (order, rounding)
        other += int((key != bf16_key(envelope.y_lo)).sum())
    assert other


def test_e2m1_to_nearest_even_for_every_bfloat16():
    with np.errstate(invalid="ignore"):
        value = bf16_decode(np.arange(65536, dtype=np.uint16))
    value = value[np.isfinite(value) & (np.abs(value) < 64) & (np.abs(value) > 2.0**-12)]
    expected = [plain_nvfp4.nearest(Fraction(float(v))) for v in value]
    assert list(map(Fraction, e2m1_nearest(value).tolist())) == expected
    assert e2m1_nearest(np.float32([np.inf, -np.inf, 9])).tolist() == [6, -6, 6]
    assert set(np.abs(e2m1_nearest(value))) == set(np.abs(E2M1_TABLE))


def test_what_staging_makes_of_nan_infinity_and_zero():
    rows = np.zeros((4, 256), np.float32)
    rows[0] = np.nan
    rows[1, :32], rows[1, 5] = 1.0, np.nan
    rows[2, 7], rows[2, 8] = np.inf, 3.0
    numbers, sf, scale = staged(bf16_round(rows))
    floor = np.uint32(0x25D67506).view(np.float32)
    assert scale[0, 0] == scale[3, 0] == floor and not numbers[[0, 3]].any()
    assert (sf[[0, 3]] == 1).all() and numbers[1, 5] == 0 and (numbers[1, :5] == 6).all()
    assert np.isinf(scale[2, 0]) and not numbers[2].any() and (sf[2] == 1).all()


def test_what_requantisation_makes_of_nan_and_infinity():
    rule = Requantise(np.float32(0.5))
    acts = np.zeros((3, 16), np.float32)
    acts[1, 0], acts[1, 1], acts[2, 3] = np.inf, -np.inf, np.nan
    sf = rule.bytes_of(np.abs(acts))
    assert sf.ravel().tolist() == [0x01, 0x7E, 0x01]
    least = 6 * 2.0**-9
    assert rule.values_of(acts, sf)[:, :4].tolist() == [
        [0, 0, 0, 0], [6 * 448, -6 * 448, 0, 0], [0, 0, 0, least],
    ]  # fmt: skip


@pytest.mark.parametrize("clamp", ["none", 2.0])
def test_nan_and_infinity_do_not_reach_y(clamp):
    """An infinite value makes a row's gates NaN: bounds with a clamp, codes of 6 without one."""
    recipe = {"patch": [{"token": 0, "bits": 0x7F80}, {"token": 1, "bits": 0x7FC0}]}
    problem = make_problem(tokens=2, clamp=clamp, hidden_recipe=recipe)
    golden = oracle.forward(problem, contract=NEWEST)
    y = bits(create().forward(problem)["y"])
    assert (golden.y == y).all() and golden.zero_freedom
    assert np.isfinite(bf16_decode(golden.y)).all() and golden.y[0].any()


# --- cases --------------------------------------------------------------------------------------


class Early:
    """``eager`` with the routing weight at an earlier place, one slot of one token at a time."""

    name, accumulator, features = "early", "fp32-ordered", ("nvfp4",)

    def __init__(self, patch, place):
        self.patch, self.place = patch, place

    def forward(self, problem):
        plain, rows = eager_nvfp4.requantise, torch.zeros(*problem.hidden_states.shape)
        for token, slot in (problem.topk_ids >= 0).nonzero().tolist():
            ids, weight = problem.topk_ids[:, slot, None], problem.topk_weights[token, slot]
            alone = replace(problem, topk_ids=ids, topk_weights=torch.ones(len(ids), 1))
            alone = alone.at_rows(torch.tensor([token]))
            if self.place == "activation":
                self.patch.setattr(
                    eager_nvfp4, "requantise", lambda acts, s, w=weight: plain(acts * w, s)
                )
                rows[token] += create().forward(alone)["y"][0].float()
            else:
                row = create().forward(alone)["y"][0].float() * weight
                rows[token] += row.bfloat16().float() if self.place == "row" else row
        return rows.bfloat16()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_is_green_by_eager_and_by_the_oracle(case):
    store = Store(golden_root(), make, NEWEST)
    for backend in (create(), exact.create()):
        verdict = Runner(Local(backend), store).run(case)
        assert verdict.status == "pass", verdict.reason
        assert "statistic" not in verdict.how
    assert case.revisions == ["2026-11"]


@pytest.mark.parametrize(
    ("name", "place", "status"),
    [
        ("routing-weight-before-the-combine", "activation", "fail"),
        ("routing-weight-before-the-combine", "row", "fail"),
        ("routing-weight-before-the-combine", "combine", "pass"),
        ("product-rounded-before-the-sum", "combine", "fail"),
    ],
)
def test_a_routing_weight_before_the_combine_is_red(monkeypatch, name, place, status):
    """One that rounds the product before it adds is seen where a pair cancels, and hardly else."""
    case = next(c for c in CASES if name in c.id)
    backend = Early(monkeypatch, place)
    verdict = Runner(Local(backend), Store(golden_root(), make, NEWEST)).run(case)
    assert verdict.status == status, verdict.reason


MUTANTS = [
    ("_amax(value).clamp_min", "_amax(value.abs() * 0 + 6).clamp_min"),
    ("* _fp32(1 / 2688, value)", "/ 2700.0"),
    ("* _fp32(1 / 2688, value)", "* _fp32(1 / 2688, value).bfloat16().float()"),
    ("(_amax(groups) * _fp32(1 / 6, value))", "(_amax(groups) * _fp32(1 / 4, value))"),
    ("e2m1(groups / sf).nan_to_num(nan=0.0)", "e2m1(groups / sf).nan_to_num(nan=6.0)"),
    (".nan_to_num(nan=_NAN_BECOMES)", ".nan_to_num(nan=0.0)"),
    ("gate_up *= x_scale[token] * factor_13[expert]", "gate_up *= x_scale[token]"),
    ("gate_up *= x_scale[token] * factor_13[expert]",
     "gate_up = gate_up.bfloat16().float() * (x_scale[token] * factor_13[expert])"),
    ("factor_2[expert] * layer_scale", "factor_2[expert] * 0.003"),
    ("factor_2[expert] *", "factor_2[0] *"),
    ("torch.minimum(_amax(groups), divisor * _MOST)", "_amax(groups.clamp_min(0))"),
    ("groups * (1.0 / (sf * scale))", "(groups / 1.001) / (sf * scale)"),
    ("return in_range.to(torch.float8_e4m3fn).float()", "return in_range.log2().ceil().exp2()"),
    ("_LEAST, _MOST = 2.0**-9, 448.0", "_LEAST, _MOST = 2.0**-6, 448.0"),
    ("_LEAST, _MOST = 2.0**-9, 448.0", "_LEAST, _MOST = 2.0**-9, 240.0"),
    ("torch.where(below % 2 == 0, below, above)", "above"),
    ("for group in range(sf.shape[1]):", "for group in range(sf.shape[1] - 1):"),
    ("scales[:, group]\n", "scales[:, group // 2 * 2]\n"),
    ("packed & 15, packed >> 4", "packed >> 4, packed & 15"),
    ("(down * (factor_2", "(down.bfloat16() * (factor_2"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(MUTANTS)))
def test_a_planted_fault_is_red(monkeypatch, number):
    old, new = MUTANTS[number]
    source = Path(eager_nvfp4.__file__).read_text()
    assert source.count(old) == 1
    names = {"__name__": "mutant"}
    exec(compile(source.replace(old, new), "mutant", "exec"), names)
    monkeypatch.setattr(eager, "forward_nvfp4", names["forward_nvfp4"])
    runner = Runner(Local(create()), Store(golden_root(), make, NEWEST))
    assert any(runner.run(case).status == "fail" for case in CASES)


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"activation": "situ", "activation_beta": 1.0}, "nvfp4 goes without situ"),
        ({"activation": "swiglustep", "clamp": 1.0}, "nvfp4 goes without swiglustep"),
        ({"combine_dtype": "fp8"}, "nvfp4 goes without fp8-combine"),
        ({"shared_recipe": {}}, "nvfp4 goes without shared-expert"),
        ({"shared_output_recipe": {}}, "nvfp4 goes without shared-output"),
        ({"intermediate": 384}, "nvfp4 takes multiples of 256, not H 256 and I 384"),
        ({"l2_activation_scale": 0.0}, "l2_activation_scale from 2"),
        ({"weight_format": "fp4"}, "weight_format must be one of mxfp4, nvfp4"),
        ({"weight_format": "mxfp4"}, "l2_activation_scale needs weight_format = 'nvfp4'"),
    ],
)
def test_a_case_that_is_none_is_one_line(change, text):
    params = {
        "hidden": 256, "intermediate": 256, "tokens": 1, "family": "envelope",
        "weight_format": "nvfp4", "l2_activation_scale": 1.0, "activation_alpha": 1.0,
        "activation_beta": 0.0, **change,
    }  # fmt: skip
    with pytest.raises(CaseError, match=text):
        KIND.complete("here", params)


def test_scales_and_factors_that_are_none_are_refused():
    problem = make_problem()
    with pytest.raises(ValueError, match="byte above 0x7E"):
        scale = problem.w2_weight_scale + 0x80
        oracle.forward(replace(problem, w2_weight_scale=scale), contract=NEWEST)
    for factor in (0.0, -1.0, float("inf"), float("nan")):
        wrong = replace(problem, w13_weight_scale_2=torch.full((2,), factor))
        with pytest.raises(ValueError, match="above 0, finite"):
            oracle.forward(wrong, contract=NEWEST)
    wrong = replace(
        make_problem(hidden_recipe={"log2_scale": 120}), w13_weight_scale_2=torch.full((2,), 1e30)
    )
    with pytest.raises(ValueError, match="leaves fp32"):
        oracle.forward(wrong, contract=NEWEST)


def test_another_stage_than_y_is_one_line():
    problem = make_problem()
    y = torch.zeros(1, 256, dtype=torch.bfloat16)
    assert [*forward_bits({"y": y}, problem)] == ["y"]
    with pytest.raises(BadOutput, match="returned l2_acts of an NVFP4 problem"):
        forward_bits({"y": y, "l2_acts": y}, problem)


# --- the data ------------------------------------------------------------------------------------


def test_its_tensors_have_the_shapes_that_are_documented():
    problem = make_problem()
    for name, tensor in problem.expert_factors.items():
        assert tuple(tensor.shape) == TENSORS[name].sizes(problem.letters)
        assert tensor.dtype == TENSORS[name].dtypes[0]
    assert problem.w13_weight_scale.shape == (2, 512, 16)
    assert problem.w2_weight_scale.shape == (2, 256, 16)
    assert Problem(**problem.arguments).arguments.keys() == problem.arguments.keys()
    assert problem.features == ("nvfp4",)
    assert [n for n, c in REVISIONS.items() if "nvfp4" in c.features.value] == ["2026-11"]


def test_the_fields_of_it_are_not_given_by_another_problem():
    case = next(c for c in load_cases() if c.id == "forward/shared-expert-lost")
    assert not {n for n in regenerate(case) if "scale_2" in n or "format" in n}
