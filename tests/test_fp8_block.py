"""FP8 weights in blocks: oracle and ``eager`` against a plain implementation, and refusals.

No kernel on a Hopper stands behind any of it here: the description was read in published packages.
"""

from dataclasses import replace
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import torch

from megamoe import oracle
from megamoe.backends import eager_fp8_block, simulate
from megamoe.backends.eager import EagerBackend
from megamoe.cases import golden_root, load_cases
from megamoe.cases.block_weights import block_weights
from megamoe.commands.contract import EFFECTS
from megamoe.commands.main import main
from megamoe.golden import Store, make, regenerate
from megamoe.golden.store import pack
from megamoe.judge import BAD, BadOutput, forward_bits
from megamoe.kinds.forward import KIND
from megamoe.kinds.property import KIND as PROPERTY
from megamoe.oracle.block_scaled import Codes, linear
from megamoe.oracle.fp8_block import Requantise
from megamoe.oracle.silu import silu, silu_hull
from megamoe.oracle.units import HOPPER_8BIT, aligned
from megamoe.spec.accumulators import FP32_ORDERED, OF_FORMAT
from megamoe.spec.contract import BASE, REVISIONS
from megamoe.spec.dialects import DIALECTS
from megamoe.spec.formats import BLOCK, bf16_decode, bf16_key, e4m3_decode, e4m3_key
from megamoe.spec.forms import bits
from megamoe.spec.problem import Problem
from megamoe.suite.runner import Runner
from tests.helpers import plain_fp8_block as plain
from tests.helpers.local import Local

NOW, OLD = DIALECTS["sgl-sm90"], DIALECTS["sgl-sm90-0.1.4"]
BOTH = {c.revision: c for c in (OLD, NOW)}
CASES = {c.id: c for c in load_cases() if c.params.get("weight_format") == "fp8-block"}
SMALL = {"hidden": 256, "intermediate": 128, "experts": 2, "top_k": 1, "tokens": 1}
PROBLEMS = {
    "bell": {},
    "clamped-every-code": {"weights_recipe": {"w13": "every", "w2": "every"}, "clamp": 0.3003},
    "below-both-floors": {
        "hidden_recipe": {"log2_scale": -45}, "routing_recipe": {"log2_scale": -36},
        "weights_recipe": {"w13_scale": [30, 2], "w2_scale": [20, 2]},
    },
}  # fmt: skip


def problem_of(seed: int = 3, **params) -> Problem:
    base = {**SMALL, "clamp": "none", "weight_format": "fp8-block", "fast_math": False}
    return simulate.problem(seed, **{**base, **params})


def values(y) -> list[list[Fraction]]:
    return [list(map(Fraction, row)) for row in bf16_decode(y).tolist()]


def inside(y, envelope) -> np.ndarray:
    key = bf16_key(y)
    return (bf16_key(envelope.y_lo) <= key) & (key <= bf16_key(envelope.y_hi))


@pytest.mark.parametrize(
    ("name", "contract"),
    [*((name, NOW) for name in PROBLEMS), *((name, OLD) for name in ("bell", "below-both-floors"))],
    ids=lambda v: getattr(v, "revision", v),
)
def test_the_oracle_and_eager_compute_what_was_read(name, contract):
    problem, old = problem_of(**PROBLEMS[name]), contract is OLD
    golden = oracle.forward(problem, contract=contract)
    assert values(golden.y) == plain.forward(problem, old)
    output = EagerBackend(contract).forward(problem)
    assert list(output) == ["y"]
    assert values(bits(output["y"])) == plain.forward(problem, old, "fma")
    assert inside(bits(output["y"]), golden.envelopes["fp32-ordered"]).all()


def test_a_product_and_a_sum_are_allowed_in_place_of_an_fma(monkeypatch):
    problem = problem_of(seed=5, tokens=4)
    operands = [t.contiguous() for t in eager_fp8_block.stage(problem.hidden_states, NOW)]
    weights = problem.w13_weight[0], problem.w13_weight_scale[0]
    fused = eager_fp8_block.linear(*operands, *weights)
    monkeypatch.setattr(eager_fp8_block, "fma", lambda a, b, c: a * b + c)
    apart = eager_fp8_block.linear(*operands, *weights)
    assert (fused != apart).any()
    codes = Codes.point(operands[0].numpy(), operands[1].numpy())
    arrays = (t.numpy() for t in weights)
    low, high = linear(codes, *arrays, [FP32_ORDERED])["fp32-ordered"]
    both = torch.stack([fused, apart]).numpy()
    assert (low <= both).all() and (both <= high).all()


def hopper(align_bits, add):
    """A linear of ``eager`` whose runs are chains of Hopper's FP8 instruction."""
    unit = replace(HOPPER_8BIT, align_bits=align_bits, result_bits=align_bits)

    def linear(codes, scale, weight, weight_scale):
        run = codes.shape[1] // scale.shape[1]
        x, w = (e4m3_decode(t.numpy()).astype(np.float64) for t in (codes, weight))
        field_x, field_w = (
            np.where(v == 0, -60, np.maximum(np.frexp(v)[1] - 1, -6)) for v in (x, w)
        )
        acc = torch.zeros(len(codes), len(weight))
        for at in range(scale.shape[1]):
            total = np.zeros((len(x), len(w)))
            for k in range(at * run, at * run + run, 32):
                part = slice(k, k + 32)
                terms = x[:, None, part] * w[None, :, part]
                top = (field_x[:, None, part] + field_w[None, :, part]).max(axis=-1)
                field = np.where(top > -30, top, unit.floor)
                total = aligned(unit, terms, field, total, np.zeros_like(total), axis=2)
            own = weight_scale[:, at * run // BLOCK].repeat_interleave(BLOCK)
            acc = add(scale[:, at, None] * own, torch.from_numpy(total).float(), acc)
        return acc

    return linear


def test_hopper_s_instruction_lies_in_its_class_and_a_shorter_one_does_not(monkeypatch):
    problem, contract = problem_of(seed=8, tokens=4), NOW
    golden = oracle.forward(problem, contract=contract)
    envelope = golden.envelopes["sm90-e4m3-k128"]
    for add in (eager_fp8_block.fma, lambda a, b, c: a * b + c):
        monkeypatch.setattr(eager_fp8_block, "linear", hopper(13, add))
        y = bits(EagerBackend(contract).forward(problem)["y"])
        assert inside(y, envelope).all()
        assert not inside(y, golden.envelopes["fp32-ordered"]).all()
    monkeypatch.setattr(eager_fp8_block, "linear", hopper(11, eager_fp8_block.fma))
    assert not inside(bits(EagerBackend(contract).forward(problem)["y"]), envelope).all()


def test_silu_of_a_gate_lies_in_the_hull_of_an_interval_around_it():
    rng = np.random.default_rng(7)
    gate = rng.normal(0, 4, 20000).astype(np.float32)
    gate[:8] = [0.0, -0.0, -1.2784645, -88.0, -103.0, 88.0, 1e-38, -1e-40]
    for fast, division in ((True, "g*(1/d)"), (False, "g*(1/d)"), (False, "g/d")):
        low, high = silu_hull(gate, gate, fast)[:2]
        value = silu(gate, division)
        assert ((low <= value) & (value <= high)).all()
        normal = np.abs(gate) > 1e-3
        assert (
            (high - low)[normal & (gate > -20)] <= 2.0**-16 * np.abs(value[normal & (gate > -20)])
        ).all()
        step = np.abs(rng.normal(0, 0.3, gate.shape)).astype(np.float32)
        wide = silu_hull(gate - step, gate + step, fast)
        assert ((wide.low <= low) & (high <= wide.high)).all()


@pytest.mark.parametrize("contract", BOTH.values(), ids=list(BOTH))
def test_codes_and_scales_of_an_interval_hold_those_of_each_value(contract):
    rng = np.random.default_rng(1)
    rule = Requantise(contract)
    acts = np.ldexp(rng.normal(0, 1, (6, 256)), rng.integers(-20, 4, (6, 1))).astype(np.float32)
    acts[5] *= np.float32(1e-12)
    width = np.abs(acts) * rng.choice([0, 1e-7, 1e-3, 0.3], acts.shape)
    low, high = (acts - width).astype(np.float32), (acts + width).astype(np.float32)
    between = rule.between(low, high)
    for _ in range(40):
        value = np.clip(low + (high - low) * rng.random(low.shape).astype(np.float32), low, high)
        codes, scale = rule.point(value)
        assert (
            (e4m3_key(between.low) <= e4m3_key(codes)) & (e4m3_key(codes) <= e4m3_key(between.high))
        ).all()
        assert ((between.scale_low <= scale) & (scale <= between.scale_high)).all()
    exact, point = rule.point(acts), rule.between(acts, acts)
    assert (e4m3_key(point.low) == e4m3_key(exact[0])).all() and (point.scale_low == exact[1]).all()


@cache
def store_of(contract):
    """Its manifest is read once: that takes longer than a case."""
    return Store(golden_root(), make, contract)


# --- clauses ------------------------------------------------------------------------------------

OTHER = {
    "staging_amax_floor": ("tiny-hidden-states-below-the-floor", 1e-4),
    "activation_scale": ("staged-by-a-quotient", "quotient"),
    "activation_group": ("bell-precise", 64),
    "gate_up": ("gate-and-up-rounded-to-bf16", "bf16"),
    "gate_up_order": ("bell-precise", "up-gate"),
    "gate_clamped_below": ("clamp-bound-rounded-to-bf16", True),
    "clamp_nan": ("nan-token-becomes-the-bound", "first"),
    "routing_weight": ("routing-weight-in-the-combine", "combine"),
    "bf16_before_requant": ("gate-and-up-rounded-to-bf16", True),
    "requant_group": ("one-scale-for-128-activations", 128),
    "requant_scale": ("bell-precise", None),
    "requant_amax_floor": ("routing-weight-after-the-floor", None),
    "combine_order": ("slots-of-one-expert-cancel", "descending-slot"),
}
UNSEEN = {
    "features": "it decides which cases a contract knows",
    "weights": "it decides which cases a contract knows",
    "cast_saturates": "the largest value of a group becomes 448, and no infinity reaches a cast",
    "precise_silu": "the bound of silu is one relative error, which holds both forms",
}


@pytest.mark.parametrize(
    ("contract", "clause"),
    [
        *((NOW, name) for name in OTHER),
        *((OLD, name) for name in OTHER if name in ("requant_scale", "requant_amax_floor")),
    ],
    ids=lambda v: getattr(v, "revision", v),
)
def test_a_clause_that_is_changed_alone_is_seen(contract, clause):
    name, value = OTHER[clause]
    value = getattr(OLD if contract is NOW else NOW, clause).value if value is None else value
    case = CASES[f"forward/fp8-block-{name}"]
    other = contract.variant("other", "a test", **{clause: value})
    inputs = regenerate(case)
    tables = [pack(make(case, inputs, ["exact"], contract=c))[1] for c in (contract, other)]
    assert tables[0] != tables[1]
    store = store_of(contract)
    for mine, right in ((other, False), (contract, True)):
        backend = EagerBackend(mine)
        backend.contracts = (contract.revision,)
        assert (Runner(Local(backend), store).run(case).status not in BAD) == right


def test_each_clause_has_another_value_or_a_reason():
    for contract in BOTH.values():
        assert {*OTHER, *UNSEEN} == {*contract.clauses}
        assert all(clause.evidence for clause in contract.clauses.values())
        assert {*contract.clauses} <= {*EFFECTS}


# --- selection and refusals -----------------------------------------------------------------------


def test_a_dialect_knows_the_cases_of_its_format_and_no_others():
    for case in load_cases():
        own = case.params.get("weight_format")
        of_format = {name for name, c in DIALECTS.items() if c.weights.value == own}
        assert {*case.revisions} == of_format or not ({*case.revisions} | of_format) & {*DIALECTS}
    assert {name for c in CASES.values() for name in c.revisions} == {*BOTH}
    assert not any("fp8-block" in c.features.value for c in REVISIONS.values())
    assert len(CASES) >= 15 and {c.kind for c in CASES.values()} == {"forward", "property"}
    assert all(OLD.differences(BASE)) and "sgl-sm90" not in REVISIONS


def test_a_golden_has_an_envelope_of_each_class_of_its_format():
    golden = oracle.forward(problem_of(tokens=2), contract=NOW)
    assert list(golden.envelopes) == list(OF_FORMAT["fp8-block"]) and golden.only_y
    with pytest.raises(ValueError, match="class fp32 is none of fp8-block; known: exact, fp32-o"):
        oracle.forward(problem_of(), ["fp32"], contract=NOW)
    with pytest.raises(ValueError, match="class sm90-e4m3-k128 is none of mxfp4"):
        oracle.forward(simulate.problem(1, **SMALL), ["sm90-e4m3-k128"], contract=BASE)


def test_what_the_format_does_not_allow_is_said():
    with pytest.raises(ValueError, match="contract 2026-06 has no rule for fp8-block"):
        oracle.forward(problem_of(), contract=BASE)
    for text, change in (
        ("w13_weight of expert . has a NaN code", {"w13_weight": 0x7F}),
        ("w2_weight_scale of expert . has a value below 0", {"w2_weight_scale": -1.0}),
        ("w13_weight_scale of expert . has a value below 0", {"w13_weight_scale": np.nan}),
        ("a sum leaves fp32", {"w13_weight_scale": 3e38}),
    ):
        problem = problem_of()
        for name, value in change.items():
            getattr(problem, name)[:, 0, 0] = value
        with pytest.raises(ValueError, match=text):
            oracle.forward(problem, contract=NOW)
    y = torch.zeros(1, 256, dtype=torch.bfloat16)
    codes = torch.zeros(1, 256, dtype=torch.uint8)
    with pytest.raises(BadOutput, match="returned x of an FP8-BLOCK problem"):
        forward_bits({"y": y, "x": codes}, problem_of())
    with pytest.raises(ValueError, match="unknown table of FP8 weights 'bel'"):
        block_weights(1, 0, 128, 128, {"w13": "bel"})


@pytest.mark.parametrize(
    ("kind", "change", "text"),
    [
        (KIND, {"activation_beta": 1.0}, "goes without swiglu-oai"),
        (KIND, {"intermediate": 192}, "takes multiples of 128"),
        (KIND, {"combine_dtype": "fp8"}, "goes without fp8-combine"),
        (PROPERTY, {"law": "engine-tensors"}, "is the module's, which has MXFP4 weights"),
    ],
)  # fmt: skip
def test_a_case_that_no_kernel_takes_is_refused(kind, change, text):
    params = {
        **SMALL,
        "weight_format": "fp8-block",
        "family": "envelope",
        "law": "repeat",
        **change,
    }
    with pytest.raises(ValueError, match=text):
        kind.complete("here", params)


def test_verbs_say_what_a_dialect_has_and_what_it_has_not(capsys):
    assert main(["contract", "show", "sgl-sm90"]) == 0
    output = capsys.readouterr().out
    assert "requant_group" in output and "replica_hash" not in output
    assert main(["coverage", "--contract", "sgl-sm90"]) == 2
    assert "which sgl-sm90 does not have; take one of 2026-06" in capsys.readouterr().err
    case = "forward/fp8-block-staged-ties-to-even"
    assert main(["explain", case, "--contract", "sgl-sm90"]) == 0
    assert "accumulator class fp32-ordered (assumed, " in capsys.readouterr().out


def test_a_backend_of_the_older_kernel_is_told_from_a_broken_one():
    backend = EagerBackend(OLD)
    backend.contracts = (NOW.revision,)
    runner = Runner(Local(backend), store_of(NOW))
    verdict = runner.run(CASES["forward/fp8-block-activation-scale-rounded-to-a-power-of-two"])
    assert verdict.status == "fail" and verdict.right_under == (OLD.revision,)
    assert "(requant_scale product, requant_amax_floor 0.0)" in verdict.reason


def test_eager_refuses_another_format():
    problem = replace(problem_of(), combine_dtype="fp8")
    with pytest.raises(ValueError, match="goes without fp8-combine"):
        EagerBackend(NOW).forward(problem)
    with pytest.raises(ValueError, match="no rule for fp8-block; take one of sgl-sm90-"):
        EagerBackend(BASE).forward(problem_of())
