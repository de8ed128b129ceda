"""The model of scale: its counts against a plain count over ids, its floors against arithmetic."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from megamoe.bench.floor import FLOOR_BANDWIDTH, FLOOR_FLOPS
from megamoe.bench.scale import (
    EP_SIZES,
    MACHINES,
    Estimate,
    Machine,
    estimate,
    link_bound_from,
    link_bytes,
    row_bytes,
    table,
    traffic,
)
from megamoe.commands.main import main
from megamoe.layer.rebalance import rebalance_experts
from megamoe.oracle.eplb import eplb
from megamoe.spec.contract import NEWEST
from megamoe.spec.models import MODELS, Model

PERFORMANCE = Path(__file__).parents[1] / "docs" / "performance.md"
TINY = Model("tiny", 128, 256, 8, 2, 1.0, None, "made up")
THERE, BACK = 128 + 4 + 8, 2 * 128


def test_a_row_of_each_way_by_hand():
    """Pro: 7168 codes, 224 scale bytes, an index and a weight; 7168 bf16 values back."""
    assert row_bytes(7168) == (7400, 14336)
    assert row_bytes(128) == (THERE, BACK)


# --- bytes ------------------------------------------------------------------------------------


def plainly(owners):
    """The bytes of each rank, one slot at a time; ``owners`` is a list for each rank."""
    out = [{"dispatch": 0, "return": 0} for _ in owners]
    for rank, own in enumerate(owners):
        for owner in own:
            if owner is not None and owner != rank:
                out[rank]["dispatch"] += THERE
                out[owner]["return"] += BACK
    return out


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_physical_ids_are_counted_exactly(dtype):
    """Ragged ranks, one without tokens, and ids of no expert."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(-2, 11, (t, 2), generator=generator, dtype=dtype) for t in (9, 0, 4, 17)]
    owners = [[i // 2 if 0 <= i < 8 else None for i in own.flatten().tolist()] for own in ids]
    ranks = traffic(TINY, ids, 4)
    assert ranks == plainly(owners)
    assert ranks[1]["dispatch"] == 0 < ranks[1]["return"]


def test_logical_ids_are_counted_where_the_placement_sends_them():
    """The oracle's remap says to which replica: by the row of the token on its own rank."""
    placement = rebalance_experts(torch.tensor([[9, 1, 1, 1, 5, 1, 1, 1]]), 12, 1, 1, 4)
    maps = placement.logical_to_physical[0].numpy(), placement.replica_count[0].numpy()
    ids = [torch.tensor([[0, t % 9], [4, 0]] * 3) for t in range(4)]
    load = torch.zeros(12, dtype=torch.int32).numpy()
    owners = [
        [p // 3 if p >= 0 else None
         for p in eplb(own.numpy(), load, *maps, False, NEWEST)[0].flatten().tolist()]
        for own in ids
    ]  # fmt: skip
    assert traffic(TINY, ids, 4, placement) == plainly(owners)


def test_all_tokens_to_one_rank():
    ids = [torch.zeros(5, 2, dtype=torch.int64)] * 4
    assert traffic(TINY, ids, 4) == [
        {"dispatch": 0, "return": 3 * 10 * BACK}, *[{"dispatch": 10 * THERE, "return": 0}] * 3,
    ]  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_the_expected_bytes_are_the_mean_over_all_ids(ranks):
    """Each expert stands once in each column of the ids, so the count is the mean."""
    first = torch.arange(8)
    ids = [torch.stack([first, (first + 3) % 8], 1)] * ranks
    assert traffic(TINY, 8, ranks) == traffic(TINY, ids, ranks)


def test_ranks_that_do_not_divide_the_experts_get_replicas():
    """Four ranks, three experts: expert 0 has a replica, and each of the two gets half of it."""
    model = Model("tiny", 128, 256, 3, 1, 1.0, None, "made up")
    ranks = traffic(model, 12, 4)
    # A rank gets 2 rows from each rank, or 4 where it holds the only replica.
    assert [s["return"] for s in ranks] == pytest.approx([BACK * 6, BACK * 12, BACK * 12, BACK * 6])
    assert [s["dispatch"] for s in ranks] == pytest.approx([THERE * n for n in (10, 8, 8, 10)])


@pytest.mark.parametrize(
    ("ids", "ranks", "message"),
    [(3, 4, "there are ids of 3 ranks, expected 4"), (3, 3, "8 physical experts do not divide")],
)
def test_ids_that_fit_no_rank_are_refused(ids, ranks, message):
    with pytest.raises(ValueError, match=message):
        traffic(TINY, [torch.zeros(1, 2, dtype=torch.int64)] * ids, ranks)


def test_a_placement_of_several_layers_is_refused():
    ids = [torch.zeros(1, 2, dtype=torch.int64)] * 2
    with pytest.raises(ValueError, match="the placement is of 3 layers, expected one"):
        traffic(TINY, ids, 2, rebalance_experts(torch.ones(3, 8), 8, 1, 1, 2))


# --- floors -----------------------------------------------------------------------------------

UNIT = Machine("unit", 1e6, 1e6, 1e6, 1e30, "a byte in a microsecond, and no time to multiply")
FAST = Machine("fast", 1e30, 1e30, 1e30, 1e6, "an operation in a microsecond, and all else is free")


def test_links_by_hand():
    """16 ranks, 16 experts, 5 tokens of 2 slots: 10/16 of a row to each rank, 7 near and 8 far."""
    model = Model("tiny", 128, 256, 16, 2, 1.0, None, "made up")
    times = estimate(model, 5, 16, UNIT)
    both = THERE + BACK
    assert times.nvlink == pytest.approx(7 * 10 / 16 * both)
    assert times.network == pytest.approx(8 * 10 / 16 * both)
    assert times.dispatch == pytest.approx(15 * 10 / 16 * THERE)
    assert times.back == pytest.approx(15 * 10 / 16 * BACK)
    assert estimate(model, 5, 8, UNIT).network == 0


def test_the_busiest_link_counts_in_the_direction_that_has_more():
    """Rank 0 sends 20 rows and gets 20 back, which are wider; then it owns 20."""
    rows = np.array([[0, 10, 10], [0, 0, 0], [0, 0, 0]])
    assert link_bytes(rows, 128) == 20 * BACK
    assert link_bytes(rows.T, 128) == 20 * BACK
    rows = np.array([[0, 3, 0], [7, 0, 0], [0, 0, 0]])
    assert link_bytes(rows, 128) == 3 * THERE + 7 * BACK


def test_weights_are_read_where_a_token_needs_them():
    """One token touches two of eight experts; many tokens touch all. FP4: half a byte a value."""
    expert = 3 * 128 * 256 / 2
    assert estimate(TINY, 1, 1, UNIT).compute == pytest.approx(2 * expert)
    assert estimate(TINY, 2, 1, UNIT).compute == pytest.approx((1 - 0.75**2) * 8 * expert)
    assert estimate(TINY, 1, 2, UNIT).compute == pytest.approx((1 - 0.75**2) * 4 * expert)
    assert estimate(TINY, 1000, 4, UNIT).compute == pytest.approx(2 * expert)


def test_operations_stay_the_same_whatever_the_number_of_ranks():
    """Until a rank with the only replica of an expert has more than its part."""
    work = 10 * 2 * 3 * 2 * 128 * 256
    for ranks in (1, 2, 4, 8):
        assert estimate(TINY, 10, ranks, FAST).compute == pytest.approx(work)
    # 12 places for 8 experts on 12 ranks: the busiest has an expert of its own.
    assert estimate(TINY, 10, 12, FAST).compute == pytest.approx(work * 12 / 8)


def test_the_speeds_are_half_of_what_is_published_for_both_directions():
    """The page names the sources. The floor of an H100 is the measured one."""
    h100, b200 = MACHINES
    assert (h100.bandwidth, h100.flops) == (FLOOR_BANDWIDTH, FLOOR_FLOPS)
    assert (b200.bandwidth, b200.flops) == (64e12 / 8, 72e15 / 8 / 2)
    assert (h100.nvlink, b200.nvlink) == (900e9 / 2, 18 * 100e9 / 2)
    assert h100.network == b200.network == 400e9 / 8


def test_what_takes_longest_is_named():
    def of(ranks, *times):
        return Estimate("m", 1, ranks, 1, 0.0, 0.0, *times)

    estimates = [of(64, 2, 1, 3), of(32, 2, 2.5, 1), of(8, 2, 1, 0)]
    assert [(p.bound, p.floor) for p in estimates] == [
        ("network", 3),
        ("NVLink", 2.5),
        ("compute", 2),
    ]
    assert link_bound_from(estimates) == 32
    assert link_bound_from(estimates[2:]) is None


# --- what is printed --------------------------------------------------------------------------


def test_the_page_has_what_the_model_gives():
    """Every cell of the tables of docs/performance.md."""
    text = PERFORMANCE.read_text().partition("## A model of scale")[2].partition("\n## ")[0]
    rows = [re.split(r" *\| *", line)[1:-1] for line in text.splitlines() if "| deepseek" in line]
    machines = {m.name: m for m in MACHINES}
    details = [row for row in rows if len(row) == 11]
    assert len(details) == 2 * 2 * len(EP_SIZES)
    for row in details:
        model = MODELS[row[1]]
        view = table(machines[row[0]], [estimate(model, *map(int, row[2:4]), machines[row[0]])])
        cells = [next(iter(column.cells)) for column in view.columns]
        assert row == [row[0], *cells[:4], *cells[4:9], cells[10]]
    limits = [row for row in rows if len(row) == 7]
    assert len(limits) == 4
    heads = next(line for line in text.splitlines() if line.startswith("| GPU | model | T = "))
    tokens = [int(t) for t in re.findall(r"(\d+) \|", heads)]
    assert all(a < b for a, b in pairwise(tokens))
    for name, model, *bounds in limits:
        estimates = [
            [estimate(MODELS[model.lower()], t, r, machines[name]) for r in EP_SIZES]
            for t in tokens
        ]
        assert bounds == [str(link_bound_from(p) or "none") for p in estimates]


def test_the_verb_prints_a_table_for_each_machine_without_a_gpu(capsys):
    assert main(["bench", "--scale", "--share", "flash", "--tokens", "64"]) == 0
    out = capsys.readouterr().out
    assert out.count("arithmetic, not measured") == len(MACHINES)
    for machine in MACHINES:
        assert machine.source[:40] in out
    assert len([line for line in out.splitlines() if "deepseek-v4-flash" in line]) == 14


@pytest.mark.parametrize(
    "option", [["--json", "x"], ["--plot", "x"], ["--from", "x"], ["--dry-run"]]
)
def test_options_of_a_timing_are_refused_with_it(option, capsys, tmp_path, monkeypatch):
    (tmp_path / "x").write_text("a file of a timing")
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--scale", *option]) == 2
    assert f"nothing for {option[0]} to do" in capsys.readouterr().err
