"""Recipes: rows and experts stand alone, digests stay, and each recipe does what it says."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.cases import Case, kind_of, recipes
from megamoe.golden import digest_of
from megamoe.spec.formats import bf16_decode, e2m1_decode, e2m1_unpack

SEEDS = st.integers(0, 2**64 - 1)


def forward(**changes: Any) -> Case:
    params = {
        "hidden": 128, "intermediate": 128, "experts": 6, "top_k": 2, "tokens": 9, "clamp": 10.0,
        "fast_math": True, "capacity": 384, **changes,
    }  # fmt: skip
    return Case("forward/x", "forward", "quick", "X.", 7, params, Path("x.toml"))


def digest(case: Case) -> str:
    return digest_of(kind_of(case.kind).inputs(case))


def rows(count: int, size: int = 128, seed: int = 7, **recipe: Any) -> np.ndarray:
    return recipes.hidden_states(seed, np.arange(count), size, recipe)


def route(count: int, experts: int = 8, top_k: int = 3, **recipe: Any) -> tuple[Any, Any]:
    return recipes.routing(7, np.arange(count), experts, top_k, recipe)


def sha(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()[:16]


# --- the bits stay --------------------------------------------------------------------------------


def test_known_digests() -> None:
    """Any change here changes inputs under every golden: then all of them must be blessed anew."""
    ids, weights = route(5, mask_every=3, octaves=4)
    assert {
        "bell": sha(rows(3, kind="bell", outlier_every=16)),
        "grid": sha(rows(3, kind="grid")),
        "table": sha(*recipes.expert_weights(7, 2, 128, 128, {})),
        "carrier": sha(*recipes.expert_weights(7, 2, 128, 128, {"kind": "carrier"})),
        "probe": sha(*recipes.expert_weights(7, 2, 128, 256, {"w2": "probe"})),
        "routing": sha(ids, weights),
        "case": digest(forward())[:16],
    } == DIGESTS


DIGESTS = {
    "bell": "510a00fe4f1a76d8",
    "grid": "edb989a3d0033a01",
    "table": "755fe68c216c9025",
    "carrier": "c19a9ac919a0bb39",
    "probe": "185901f5e5bb2c8a",
    "routing": "0133285bede88697",
    "case": "93f9371669d0d9ba",
}


def test_the_digest_sees_every_input() -> None:
    base = digest(forward())
    assert base == digest(forward())
    for change in (
        {"clamp": 7.0}, {"fast_math": False}, {"capacity": 768}, {"tokens": 8},
        {"routing_recipe": {"octaves": 1}}, {"weights_recipe": {"w2": "grid"}},
        {"hidden_recipe": {"patch": [{"token": 0, "bits": 0}]}},
    ):  # fmt: skip
        assert digest(forward(**change)) != base, change


def test_the_digest_leaves_out_experts_that_nobody_visits() -> None:
    """So a digest costs what the case touches; shapes are still part of it."""
    case = forward(routing_recipe={"kind": "same"})
    assert recipes.forward_problem(case).w13_weight[2:].count_nonzero() == 0
    assert digest(case) != digest(forward(routing_recipe={"kind": "same"}, experts=7))


# --- independence ---------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.sets(st.integers(0, 30), min_size=1), st.sampled_from(["bell", "grid"]))
def test_a_row_does_not_depend_on_the_others(seed: int, tokens: set[int], kind: str) -> None:
    at = np.array(sorted(tokens))
    recipe = {"kind": kind}
    whole = recipes.hidden_states(seed, np.arange(31), 128, recipe)
    assert (recipes.hidden_states(seed, at, 128, recipe) == whole[at]).all()
    routed = {"mask_every": 4, "octaves": 3}
    ids, weights = recipes.routing(seed, np.arange(31), 8, 3, routed)
    part_ids, part_weights = recipes.routing(seed, at, 8, 3, routed)
    assert (part_ids == ids[at]).all() and (part_weights == weights[at]).all()


def test_rows_of_a_problem_are_the_rows_of_the_whole() -> None:
    whole, part = recipes.forward_problem(forward()), recipes.forward_problem(forward(), [2, 7])
    assert torch.equal(part.hidden_states, whole.hidden_states[[2, 7]])
    assert torch.equal(part.topk_ids, whole.topk_ids[[2, 7]])
    experts = part.topk_ids.unique()
    assert torch.equal(part.w2_weight[experts], whole.w2_weight[experts])


def test_an_expert_does_not_depend_on_how_many_there_are() -> None:
    few = recipes.forward_problem(forward(routing_recipe={"kind": "same"}))
    many = recipes.forward_problem(forward(experts=60, routing_recipe={"kind": "same"}))
    assert torch.equal(few.w13_weight[:2], many.w13_weight[:2])
    assert not torch.equal(few.w13_weight[0], few.w13_weight[1])


def test_same_gives_every_expert_the_weights_of_the_first() -> None:
    first, other = (recipes.expert_weights(7, e, 128, 128, {"same": True}) for e in (0, 5))
    assert all((a == b).all() for a, b in zip(first, other, strict=True))


# --- hidden states --------------------------------------------------------------------------------


def test_bell_has_outliers_and_the_scale_asked_for() -> None:
    plain = bf16_decode(rows(8, 1024, kind="bell", spread=0))
    assert 0.7 < plain.std() < 0.95 and abs(plain.mean()) < 0.05
    assert (
        bf16_decode(rows(8, 1024, kind="bell", spread=0, log2_scale=-20)) * 2**20 == plain
    ).all()
    large = bf16_decode(rows(8, 1024, kind="bell", spread=0, outlier_every=64))
    outliers = large != plain
    assert 0.005 < outliers.mean() < 0.03 and (large[outliers] == 32 * plain[outliers]).all()


def test_grid_has_few_bits_and_its_carriers() -> None:
    grouped = bf16_decode(rows(6, 256, kind="grid", carriers=8, octaves=2)).reshape(-1, 32)
    scale = grouped[:, :1]
    assert (grouped[:, :8] == scale).all() and set(scale.ravel()) == {1.0, 2.0}
    assert set(np.abs(grouped / scale).ravel()) == {0.5, 1.0, 1.5}


def test_a_patch_lies_over_one_token() -> None:
    patch = [{"token": 1, "channel": 30, "count": 4, "bits": 0x7FC0}]
    plain, patched = rows(3), rows(3, patch=patch)
    places = np.argwhere(plain != patched)
    assert places.tolist() == [[1, 30], [1, 31], [1, 32], [1, 33]]
    assert set(patched[1, 30:34]) == {0x7FC0}


# --- weights --------------------------------------------------------------------------------------


def test_a_probe_looks_at_one_channel_of_each_run() -> None:
    w2 = recipes.expert_weights(7, 0, 128, 256, {"w2": "probe", "probe_every": 64})[2]
    runs = (e2m1_unpack(w2).reshape(128, 4, 64) & 7) != 0
    assert (runs.sum(axis=2) == 1).all()
    assert len(np.unique(runs.argmax(axis=2))) > 50, "the channel varies"


def test_uniform_has_all_sixteen_codes() -> None:
    w13 = recipes.expert_weights(7, 0, 128, 128, {"w13": "uniform"})[0]
    count = np.bincount(e2m1_unpack(w13).ravel(), minlength=16)
    assert count.min() > 0.9 * count.mean()


@pytest.mark.parametrize("hidden", [128, 384, 640, 1152, 4096, 7168])
def test_carriers_decide_every_gate(hidden: int) -> None:
    """At any size: open gates in reach of the clamp, closed ones where silu has vanished."""
    w13, sf, _, _ = recipes.expert_weights(7, 0, hidden, 128, {"kind": "carrier"})
    x = bf16_decode(rows(2, hidden, kind="grid")).astype(np.float64)
    w = e2m1_decode(w13) * np.exp2(np.repeat(sf.astype(float) - 127, 32, axis=1))
    gate, up = np.split(x @ w.T, 2, axis=1)
    opened = gate > 0
    assert 0.6 < opened.mean() < 0.9
    assert 3 < np.median(gate[opened]) < 9
    assert np.median(gate[~opened]) < -15 and np.abs(up).min() > 1.5


def test_levels_replace_the_two_gates() -> None:
    recipe = {"kind": "carrier", "gate_levels": [-1.5, 2.0], "up_levels": [-0.5], "carriers": 4}
    nibbles = e2m1_unpack(recipes.expert_weights(7, 0, 128, 128, recipe)[0]).reshape(256, 4, 32)
    first = nibbles[:, :, :4]
    assert (first == first[:, :1, :1]).all(), "one level a row"
    assert set(first[:128].ravel()) == {3 | 8, 4} and set(first[128:].ravel()) == {1 | 8}


def test_lower_moves_the_scales_only() -> None:
    base = recipes.expert_weights(7, 0, 128, 128, {"kind": "carrier"})
    low = recipes.expert_weights(7, 0, 128, 128, {"kind": "carrier", "lower": 2})
    assert (base[0] == low[0]).all() and (base[1] - low[1] == 2).all()


# --- routing --------------------------------------------------------------------------------------


def test_random_slots_are_distinct_and_of_the_pool() -> None:
    ids, weights = route(200, pool=5)
    assert all(len(set(row)) == 3 for row in ids.tolist()) and set(ids.ravel()) == set(range(5))
    assert weights.min() >= 0.25 and weights.max() < 1


def test_kinds_of_routing() -> None:
    assert route(2, kind="same", first=6)[0].tolist() == [[6, 7, 0]] * 2
    assert route(3, kind="rotate", pool=4)[0].tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 0]]
    assert all(len(set(row)) == 1 for row in route(9, kind="duplicate")[0].tolist())
    assert set(route(20, kind="skewed", first=5)[0][:, 0]) == {5}
    assert route(3, kind="explicit", ids=[[1, 2, 3], [4, -1, 4]])[0].tolist() == [
        [1, 2, 3], [4, -1, 4], [1, 2, 3],
    ]  # fmt: skip


def test_masks_replacements_and_weights() -> None:
    plain, _ = route(60)
    masked, _ = route(60, mask_every=3)
    assert 0.25 < (masked < 0).mean() < 0.42 and (masked[masked >= 0] == plain[masked >= 0]).all()
    ids, weights = route(
        2, mask=[[0, 1]], replace=[[1, 2, 99]], weights=[[1.0, -0.0, 0.5]]
    )  # fmt: skip
    assert ids[0, 1] == -1 and ids[1, 2] == 99
    assert weights.tolist() == [[1.0, 0.0, 0.5]] * 2 and np.signbit(weights[0, 1])
    assert (route(4, scaling=2.0)[1] == 2 * route(4)[1]).all()


# --- one line for a wrong recipe ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rows(1, kind="bel"), "unknown hidden recipe 'bel'; known: bell, grid, constant"),
        (lambda: rows(1, kind="grid", spread=1), r"hidden recipe 'grid': unknown \['spread'\]"),
        (lambda: route(1, kind="rand"), "unknown routing recipe 'rand'; known: random, same"),
        (lambda: route(1, experts=2), "top_k 3 needs as many experts, and there are 2"),
        (
            lambda: recipes.expert_weights(7, 0, 128, 128, {"w13": "bel"}),
            "unknown weight table 'bel'; known: bell",
        ),
        (
            lambda: recipes.expert_weights(7, 0, 128, 128, {"w2_scale": [250, 9]}),
            r"scale range \[250, 9\] leaves the UE8M0 bytes 0 to 255",
        ),
        (
            lambda: recipes.expert_weights(
                7, 0, 128, 128, {"kind": "carrier", "gate_levels": [2.5]}
            ),
            "level 2.5 is not an E2M1 value",
        ),
    ],
)
def test_a_wrong_recipe_gets_one_line(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
