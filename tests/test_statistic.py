"""The statistic: silent for correct kernels, loud for faults, and honest about what it misses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megamoe import oracle
from megamoe.backends import simulate
from megamoe.judge import statistic
from megamoe.judge.statistic import Energies, check, tail_level, threshold
from megamoe.spec.contract import BASE
from megamoe.spec.formats import bf16_decode, bf16_key, bf16_round, e4m3_key

INTER, TOP_K = 512, 4


@pytest.fixture(scope="module")
def layer():
    """Eight tokens of a shape that was not calibrated (H 1024), and their oracle y."""
    problem = simulate.problem(
        21, hidden=1024, intermediate=INTER, top_k=TOP_K, experts=6, tokens=8,
        hidden_recipe={"kind": "bell", "spread": 6},
        weights_recipe={"w13_scale": [114, 6], "w2_scale": [118, 4]},
    )  # fmt: skip
    return problem, oracle.forward(problem, [], contract=BASE).y


def findings(layer, y, name="fp32"):
    problem, reference = layer
    return check(y, reference, problem.topk_ids.numpy(), INTER, name)


def scaled(y, row, channels, factor):
    out = y.copy()
    out[row, channels] = bf16_round(bf16_decode(y[row, channels]) * np.float32(factor))
    return out


# --- silence ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kernel",
    [
        simulate.blas(),
        simulate.blockwise("mixed"),
        simulate.plain("splits", "zero"),
        simulate.hopper_bf16(),
        simulate.hopper_e4m3(),
        simulate.hopper_e4m3_outside(32, "nearest", "sm90-e4m3-k32"),
        simulate.blackwell_mxf8f6f4(),
    ],
    ids=lambda k: k.name,
)
def test_a_correct_kernel_on_a_shape_held_out_of_calibration_is_silent(layer, kernel):
    result = simulate.forward(simulate.head(layer[0], 2), kernel, 5)
    short = simulate.head(layer[0], 2), layer[1][:2]
    assert not findings(short, result.y, kernel.accumulator)


def test_the_oracle_itself_is_silent_even_for_class_exact(layer):
    assert not findings(layer, layer[1], "exact")


# --- faults -----------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.01, 0.99])
@pytest.mark.parametrize("start", [0, 448, 960])
def test_one_percent_in_one_stretch_of_64_channels_of_one_row(layer, factor, start):
    y = scaled(layer[1], 3, slice(start, start + 64), factor)
    outliers = findings(layer, y)
    assert ("tile", (3, start // 128), "bias") in {(f.unit, f.index, f.statistic) for f in outliers}


def test_a_lost_slot_shows_in_row_and_tile(layer):
    problem = layer[0]
    ids = problem.topk_ids.clone()
    ids[2, 1] = -1
    y = oracle.forward(replace(problem, topk_ids=ids), [], contract=BASE).y
    outliers = findings(layer, y)
    assert {f.index[0] for f in outliers if f.unit in ("row", "tile")} == {2}
    assert {"row", "tile"} <= {f.unit for f in outliers}
    assert [f for f in outliers if f.unit == "expert"]


def test_a_finding_is_one_line_and_the_worst_comes_first(layer):
    y = scaled(scaled(layer[1], 1, slice(0, 128), 1.02), 5, slice(128, 256), 2.0)
    outliers = findings(layer, y)
    assert outliers[0].index[0] == 5
    assert str(outliers[0]).startswith(outliers[0].unit)
    assert "\n" not in str(outliers[0])


def test_a_finding_names_the_token_and_not_its_place(layer):
    """Where a case judges some of its tokens; an expert keeps its number."""
    problem, reference = layer
    y, ids = scaled(reference, 3, slice(0, 1024), 1.02), problem.topk_ids.numpy()
    tokens = [0, 8, 63, 64, 65, 66, 67, 68]
    places = check(y, reference, ids, INTER, "fp32")
    outliers = check(y, reference, ids, INTER, "fp32", tokens=tokens)
    assert {f.index[0] for f in outliers if f.unit != "expert"} == {64}
    assert {f.index[0] for f in places if f.unit != "expert"} == {3}
    assert [f.index[1:] for f in outliers] == [f.index[1:] for f in places]
    experts = [[f.index for f in some if f.unit == "expert"] for some in (outliers, places)]
    assert experts[0] == experts[1]


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_one_value_that_is_not_finite_is_a_finding(layer, value):
    y = layer[1].copy()
    y[4, 7] = bf16_round(np.array([value], np.float32))[0]
    assert ("tile", (4, 0)) in {(f.unit, f.index) for f in findings(layer, y)}


def test_any_value_in_a_row_that_should_be_zero_is_a_finding(layer):
    problem, reference = layer
    ids = problem.topk_ids.numpy().copy()
    ids[6] = -1
    zero = reference.copy()
    zero[6] = 0
    y = zero.copy()
    y[6, 1000] = 1
    outliers = check(y, zero, ids, INTER, "fp32")
    assert ("tile", (6, 7)) in {(f.unit, f.index) for f in outliers}


# --- what it cannot see, and what sees it -----------------------------------------------------


def zero_freedom():
    problem = simulate.problem(
        5, hidden=512, intermediate=128, top_k=4, experts=4, tokens=4,
        hidden_recipe={"kind": "grid"}, weights_recipe={"kind": "carrier"},
        routing_recipe={"octaves": 30},
    )  # fmt: skip
    return problem, oracle.forward(problem, any_silu=True, contract=BASE)


def test_one_weight_group_off_by_a_ue8m0_step_is_caught_by_the_staged_judgement(layer):
    """On ordinary data: the code of that channel leaves its interval."""
    problem = simulate.head(layer[0], 1)
    golden = oracle.forward(problem, ["fp32-ordered"], contract=BASE)
    wrong = problem.w13_weight_scale.clone()
    expert = int(problem.topk_ids[0, 0])
    channel = int(np.argmax(golden.codes[0, 0] & 0x7F))
    wrong[expert, INTER + channel, :] += 0
    group = int(np.argmax(wrong[expert, INTER + channel].numpy()))
    wrong[expert, INTER + channel, group] += 1
    result = simulate.forward(
        replace(problem, w13_weight_scale=wrong), simulate.blockwise("nearest"), 1
    )
    low, high = golden.envelopes["fp32-ordered"].code_interval(result.sf)
    key = e4m3_key(result.codes)
    assert ((key < low) | (key > high))[0, 0, channel]


@pytest.mark.parametrize(("which", "least"), [("w13_weight_scale", 3), ("w2_weight_scale", 7)])
@pytest.mark.parametrize("step", [1, -1])
def test_one_weight_group_off_by_a_ue8m0_step_is_caught_by_a_zero_freedom_case(which, least, step):
    """Nine groups: most, but a w13 group behind a closed gate or a clamped up reaches no output."""
    problem, golden = zero_freedom()
    assert golden.zero_freedom
    scale = getattr(problem, which)
    expert = int(problem.topk_ids[0, 0])
    places = np.argwhere(scale[expert].numpy() > 0)
    caught = 0
    for at in places[:: len(places) // 8]:
        wrong = scale.clone()
        wrong[(expert, *(int(i) for i in at))] += step
        result = oracle.forward(replace(problem, **{which: wrong}), [], contract=BASE)
        caught += bool((result.y != golden.y).any() or (result.codes != golden.codes).any())
    assert caught >= least


def test_a_combine_in_the_wrong_order_is_caught_by_a_zero_freedom_case_only():
    problem, golden = zero_freedom()
    assert golden.zero_freedom
    slots = simulate.forward(problem, simulate.blockwise("nearest"), 1).slots
    live = problem.topk_ids.numpy() >= 0
    assert np.array_equal(bf16_key(simulate.combine(slots, live)), bf16_key(golden.y))
    reversed_y = simulate.combine(slots[:, ::-1].copy(), live[:, ::-1])
    assert (bf16_key(reversed_y) != bf16_key(golden.y)).any()
    assert not check(reversed_y, golden.y, problem.topk_ids.numpy(), 128, "fp32")


def test_without_a_calibration_for_so_few_terms_nothing_is_claimed(layer):
    y = scaled(layer[1], 0, slice(0, 64), 1.5)
    assert not check(y, layer[1], layer[0].topk_ids.numpy(), 16, "fp32")


# --- the numbers ------------------------------------------------------------------------------


def test_size_and_bias_by_hand():
    reference = bf16_round(np.tile([3.0, 4.0], 64).reshape(1, 128))
    actual = bf16_round(np.tile([3.0, 4.0], 64).reshape(1, 128) * 1.25)
    measured = Energies.of(actual, reference).statistics()
    assert measured["size"].tolist() == [[0.25]]
    assert measured["bias"].tolist() == [[0.25]]
    half = actual.copy()
    half[0, 0::2] = reference[0, 0::2]
    size = Energies.of(half, reference).statistics()["size"].item()
    assert size == pytest.approx(0.25 * 4 / 5)


def test_the_tail_is_exponential_in_the_square_and_never_below_what_was_seen():
    fit = {"largest": 0.5, "tail": [[1.0, 2.0, 0.1]]}
    assert tail_level(fit, 0.1 * np.exp(-4.0)) == pytest.approx(3.0)
    assert tail_level({**fit, "largest": 7.0}, 0.05) == 7.0
    assert tail_level(fit, 0.2) == 0.5


def test_exponential_tails_give_the_stated_rate():
    """A sample whose square is exponential: the level of 1e-4 is exceeded at most so often."""
    from importlib.util import module_from_spec, spec_from_file_location
    from pathlib import Path

    path = Path(__file__).parent.parent / "tools" / "calibrate.py"
    spec = spec_from_file_location("calibrate", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    rng = np.random.default_rng(1)
    fit = module.fit([np.sqrt(rng.exponential(size=4000))])
    level = tail_level(fit, 1e-4)
    assert (np.sqrt(rng.exponential(size=1_000_000)) > level).mean() <= 1e-4
    assert level < 2 * np.sqrt(np.log(1e4))


def test_thresholds_fall_with_terms_known_and_rise_with_rarity():
    strata = sorted(int(n) for n in statistic.calibration()["groups"]["fp32"])
    for unit in ("tile", "row"):
        one = threshold("fp32", strata[-1], unit, "size", 1e-12)
        assert 0 < one < threshold("fp32", strata[-1], unit, "size", 1e-14)
    between = threshold("fp32", strata[1] + 1, "tile", "bias", 1e-12)
    assert between == threshold("fp32", strata[1], "tile", "bias", 1e-12)


@pytest.mark.parametrize(
    ("group", "terms", "rows", "unit"),
    [
        ("fp32", 2048, 7, "row"),
        ("fp32", 2048, 8, "expert-8"),
        ("fp32", 2048, 400, "expert-32"),
        ("fp32", 8192, 400, "expert-8"),  # no draws of 32 rows there
        ("sm90-e4m3", 2048, 400, "expert-8"),
        ("sm90-e4m3-k32", 2048, 400, "expert-8"),
        ("fp32", 1, 400, "row"),  # fewer terms than were calibrated: no limit at all
        (None, 2048, 400, "row"),  # class exact
    ],
)
def test_an_expert_is_compared_with_the_most_rows_its_stratum_knows(group, terms, rows, unit):
    assert statistic.expert_unit(group, terms, rows) == unit


def test_many_rows_of_one_expert_are_judged_in_every_class(layer):
    reference = layer[1]
    ids = np.zeros((64, 1), np.int64)
    y = np.repeat(reference, 8, axis=0)
    for name in statistic.GROUPS:
        assert not check(y, y, ids, 8192, name)


def test_the_stored_calibration_says_how_it_was_made():
    calibration = statistic.calibration()
    assert (
        set(calibration["provenance"])
        == set(calibration["groups"])
        == set(statistic.GROUPS.values())
    )
    for provenance in calibration["provenance"].values():
        assert provenance["command"].startswith("tools/calibrate.py --rows")
        assert {"numpy", "torch", "mmasim"} <= set(provenance["versions"])
    for strata in calibration["groups"].values():
        for fits in strata.values():
            for unit in fits.values():
                for by_data in unit.values():
                    assert {f["data"] for f in by_data} <= set(calibration["data"])
                    assert all(f["sample"] > 0 for f in by_data)


def test_unknown_class_is_refused(layer):
    with pytest.raises(ValueError, match="no calibration for class 'fp31'"):
        findings(layer, layer[1], "fp31")
