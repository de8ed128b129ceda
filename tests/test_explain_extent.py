"""``megamoe explain`` says in which channels a cause holds: a range, or a part of each tile."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megamoe.backends import eager
from megamoe.commands import main as cli
from megamoe.explain.extent import Extent, join
from megamoe.explain.words import causes, is_certain
from megamoe.suite.at_hand import run
from tests.helpers.diagnosis import of_case, report_of
from tests.helpers.local import Local

CASE = "bell-h512-i256-drifts"
N = np.arange(768)
EVERY = np.ones(len(N), np.bool_)


def extent(has, lacks=None, compared=EVERY):
    return Extent(has, ~has if lacks is None else lacks, compared)


@pytest.mark.parametrize(
    ("has", "text"),
    [
        ((N >= 576) & (N < 640), "in channels 576 to 639 only"),
        (N >= 640, "in channels 640 to 767 only"),
        (N % 2 == 1, "in channels n with n modulo 2 = 1 only"),
        (N % 128 >= 96, "in channels n with n modulo 128 from 96 to 127 only"),
        (np.isin(N // 32, [3, 8, 11]), ""),
        (EVERY, ""),
    ],
)
def test_a_range_and_a_part_of_each_tile_have_words(has, text):
    assert extent(has).text == text
    assert Extent.read(extent(has).plain()).text == text


def test_where_the_cause_changes_nothing_the_roundest_range_stands():
    one = extent((N >= 70) & (N < 100), (N < 60) | (N > 200))
    assert one.text == "in channels 64 to 127 only"
    few = extent(one.has, one.lacks, N < 120)
    assert few.text == "in channels 64 to 111 only", "channels that nobody compared say nothing"


def test_tokens_that_contradict_each_other_have_no_channels_together():
    def way(has):
        return {"extent": extent(has).plain(), "channels": ""}

    first = way((N >= 64) & (N < 128))
    assert not join(first, way((N >= 64) & (N < 192)))
    further = extent((N >= 256) & (N < 288), (N >= 128) & (N < 256))
    open_there = extent((N >= 64) & (N < 128), N < 64)
    no_words = {"extent": open_there.plain(), "channels": ""}
    assert not join(no_words, {"extent": further.plain(), "channels": ""}), "two ranges have none"
    assert join(first, way((N >= 64) & (N < 128)))
    assert first["channels"] == "in channels 64 to 127 only"


# --- a kernel that has a fault in some channels ---------------------------------------------------


def gate_and_up_swapped(monkeypatch, at):
    """In the channels ``at`` of I."""
    right = eager.activate

    def activate(gate_up, *others):
        gate, up = gate_up.chunk(2, dim=-1)
        here = at(torch.arange(gate.shape[1]))
        both = torch.where(here, up, gate), torch.where(here, gate, up)
        return right(torch.cat(both, 1), *others)

    monkeypatch.setattr(eager, "activate", activate)


def columns(monkeypatch, hidden, change, at):
    """``change`` of the channels ``at`` of the sums of linear 2."""
    right = eager.linear

    def linear(*operands):
        sums = right(*operands)
        is_second = sums.shape[1] == hidden and operands[0].shape[1] != hidden
        here = at(torch.arange(sums.shape[1]))
        return torch.where(here, change(sums), sums) if is_second else sums

    monkeypatch.setattr(eager, "linear", linear)


def truncated(sums):
    return (sums.view(torch.int32) & -65536).view(torch.float32)


@pytest.mark.parametrize(
    ("at", "where"),
    [
        (lambda n: (n >= 64) & (n < 128), "in channels 64 to 127 only"),
        (lambda n: n % 128 >= 96, "in channels n with n modulo 128 from 96 to 127 only"),
        (lambda n: n % 2 == 1, "in channels n with n modulo 2 = 1 only"),
    ],
)
def test_a_cause_of_codes_is_said_with_its_channels(monkeypatch, at, where):
    gate_and_up_swapped(monkeypatch, at)
    lines = causes(report_of(of_case(CASE)))
    assert f"  gate and up: gate and up are swapped, {where}" in lines
    assert "and of 3 more wrong tokens that were tried" in lines[-1]


@pytest.mark.parametrize("shows", [("l2_acts", "l2_acts_sf", "y"), ("y",)])
def test_a_cause_of_y_is_said_with_its_channels_across_tiles(monkeypatch, shows):
    columns(monkeypatch, 512, truncated, lambda n: (n >= 64) & (n < 192))
    assert causes(report_of(of_case(CASE), shows=shows))[0] == (
        "cause: linear 2: slot rows are truncated to bfloat16, in channels 64 to 191 only"
    )


def test_zeros_in_some_channels_lose_no_slot(monkeypatch):
    columns(monkeypatch, 512, torch.zeros_like, lambda n: n >= 384)
    assert causes(report_of(of_case(CASE)))[0] == (
        "cause: combine: y is zero, in channels 384 to 511 only"
    )


def test_a_slot_that_is_lost_in_some_channels_is_not_dropped(monkeypatch):
    right = eager.EagerBackend.forward

    def forward(self, problem):
        out, ids = right(self, problem), problem.topk_ids.clone()
        ids[:, 1] = -1
        out["y"][:, 384:] = right(self, replace(problem, topk_ids=ids))["y"][:, 384:]
        return out

    monkeypatch.setattr(eager.EagerBackend, "forward", forward)
    lines = causes(report_of(of_case(CASE)))
    assert lines[0].startswith("cause: combine: slot 1 (expert ")
    assert lines[0].endswith(") is lost, in channels 384 to 511 only")


def test_token_with_channel_says_what_token_alone_says(monkeypatch, tmp_path, capsys):
    columns(monkeypatch, 512, truncated, lambda n: (n >= 64) & (n < 192))
    y = run(of_case(CASE), Local(eager.EagerBackend()))["y"]
    save_file({"y": torch.from_numpy(y).view(torch.bfloat16)}, tmp_path / "y.safetensors")

    def causes_of(*choice):
        command = ["explain", CASE, "--actual", f"{tmp_path}/y.safetensors", "--token", "2"]
        assert cli.main([*command, *choice]) == 0
        lines = capsys.readouterr().out.splitlines()
        return [line for line in lines if line.startswith(("cause", "  explains"))]

    cause, explains = causes_of("--channel", "70")
    assert cause == causes_of()[0] and cause.startswith("cause: linear 2: slot rows are truncated")
    assert explains.endswith("and of 3 more wrong tokens that were tried")


def test_the_last_tile_of_rows_of_linear_1_is_no_choice_of_channels(monkeypatch):
    right = eager.activate

    def activate(gate_up, *others):
        sums = gate_up.clone()
        sums[:, -128:] = 0
        return right(sums, *others)

    monkeypatch.setattr(eager, "activate", activate)
    assert causes(report_of(of_case(CASE)))[0] == (
        "cause: linear 1: the last 128 of the 2I rows are left out: their sums are zero"
    )


def test_a_change_that_no_deviation_makes_has_no_cause_in_some_channels(monkeypatch):
    right = eager.activate

    def activate(gate_up, *others):
        factors = torch.ones(gate_up.shape[1])
        factors[64:128] = 1.37
        return right(gate_up * factors, *others)

    monkeypatch.setattr(eager, "activate", activate)
    (line,) = causes(report_of(of_case(CASE)))
    assert line.startswith("cause: unknown")


def test_a_choice_of_channels_needs_more_decisions():
    way = {"channels": "in channels 64 to 127 only"}
    assert is_certain({"decisions": 3, "exact": [{}]})
    assert not is_certain({"decisions": 7, "exact": [way]})
    assert is_certain({"decisions": 8, "exact": [way]})
