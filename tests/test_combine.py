"""The combine: the place of a shared expert's row, E4M3 rows, and what is added in the end."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from megamoe.backends import eager_combine, simulate
from megamoe.backends.eager import EagerBackend
from megamoe.cases import load_cases
from megamoe.golden import regenerate
from megamoe.oracle.combine import Combine, fp8_rows
from megamoe.spec.contract import BASE, MEGAMOE_2026_11, MEGAMOE_SGL
from megamoe.spec.formats import bf16_decode, bf16_key, bf16_round, e4m3_encode, e4m3_value
from megamoe.spec.problem import Problem
from megamoe.suite.at_hand import judge
from tests.helpers.local import Local


def bf16(*values: float) -> np.ndarray:
    return bf16_round(np.array([values]))


def combine(slots: int, contract=BASE, **more) -> Combine:
    live = np.ones((1, slots), bool)
    return Combine(live, np.ones((1, slots), np.float32), contract, **more)


@pytest.mark.parametrize(("contract", "expected"), [(BASE, 0.0), (MEGAMOE_2026_11, 2.0**-30)])
def test_a_shared_row_is_added_last_or_first(contract, expected):
    """(-1 + 2^-30) + 1 loses the small row, (1 - 1) + 2^-30 does not."""
    rows = np.stack([bf16(-1.0), bf16(2.0**-30)], 1)
    y = combine(2, contract).point(rows, bf16(1.0))
    assert bf16_decode(y).tolist() == [[expected]]


def test_a_shared_row_comes_to_a_token_without_slots():
    call = replace(combine(1), live=np.zeros((1, 1), bool))
    assert bf16_decode(call.point(bf16(5.0)[:, None], bf16(3.0))).tolist() == [[3.0]]


def test_what_is_added_in_the_end_meets_a_rounded_result():
    """256 + 1 is no bfloat16 (256 or 258): rounding first loses the 1, adding in fp32 keeps it."""
    rows = np.stack([bf16(256.0), bf16(1.0)], 1)
    y = combine(2, output=bf16(1.0)).point(rows)
    assert bf16_decode(y).tolist() == [[256.0]]


def row_of_e4m3(values: list[Fraction]) -> list[Fraction]:
    amax = np.float32(max(map(abs, values)))
    scaled = Fraction(float(amax * (np.float32(1) / np.float32(448))))
    e = next(e for e in range(-126, 128) if Fraction(2) ** e >= scaled)
    codes = [e4m3_encode(v / Fraction(2) ** e) for v in values]
    return [Fraction(e4m3_value(c)) * Fraction(2) ** e for c in codes]


def test_rows_as_e4m3_have_a_scale_for_128_channels():
    rng = np.random.default_rng(0)
    rows = bf16_round(np.ldexp(rng.normal(size=(3, 256)), rng.integers(-20, 20, (3, 256))))
    low, high = fp8_rows(rows, rows)
    assert (low == high).all()
    for row, actual in zip(bf16_decode(rows), low, strict=True):
        exact = [Fraction(float(v)) for v in row]
        expected = row_of_e4m3(exact[:128]) + row_of_e4m3(exact[128:])
        assert [Fraction(float(v)) for v in actual] == expected


def test_rows_of_zero_infinity_and_nan():
    """An amax of 0 reads as 0; an infinite one as -inf of each, NaN of a zero; NaN counts not."""
    zero, infinite, nan = np.zeros((1, 128)), np.ones((1, 128)), np.ones((1, 128))
    infinite[0, :2] = np.inf, 0
    nan[0, 5] = np.nan
    assert (fp8_rows(bf16_round(zero), bf16_round(zero))[0] == 0).all()
    bits = bf16_round(infinite)
    read = fp8_rows(bits, bits)[0][0]
    assert np.isnan(read[1]) and np.isneginf(np.delete(read, 1)).all()
    bits = bf16_round(nan)
    read = fp8_rows(bits, bits)[0][0]
    assert np.isnan(read[5]) and (np.delete(read, 5) == 1).all()


def test_rows_that_are_known_as_intervals_enclose_every_row_between():
    """Also where the largest member decides between two scales."""
    rng = np.random.default_rng(1)
    centre = bf16_key(bf16_round(rng.normal(size=(4, 128))))
    centre[:, 7] = bf16_key(bf16_round(np.array([448.0 * 2.0**-8])))
    wide = rng.integers(0, 9, centre.shape)

    def bits(key: np.ndarray) -> np.ndarray:
        return np.where(key < 0, 0x8000 | -key, key).astype(np.uint16)

    low, high = fp8_rows(bits(centre - wide), bits(centre + wide))
    for _ in range(200):
        row = bits(centre + rng.integers(-wide, wide + 1))
        actual = fp8_rows(row, row)[0]
        assert (low <= actual).all() and (actual <= high).all()


def test_a_member_that_may_be_infinite_leaves_its_whole_group_open():
    """Byte 255 makes NaN of a zero and infinity of any other: the neighbours may be anything."""
    low, high = (bf16_round(np.zeros((1, 256))) for _ in range(2))
    low[0, 3], high[0, 3] = 0xFF80, 0x7F80
    call = combine(1, dtype="fp8")
    first, last = (bf16_decode(end)[0] for end in call.ends(low[:, None], high[:, None]))
    assert np.isneginf(first[:128]).all() and np.isposinf(last[:128]).all()
    assert (first[128:] == 0).all() and (last[128:] == 0).all()


def test_the_reference_of_rows_that_may_leave_fp32_is_in_every_envelope():
    p = simulate.problem(1, hidden=128, experts=1, top_k=1, tokens=1, clamp="none")
    w2 = torch.zeros_like(p.w2_weight)
    w2[0, 0] = 0xF7  # +6 and -6 in turn
    p = replace(
        p, hidden_states=torch.full_like(p.hidden_states, 0.1), combine_dtype="fp8",
        topk_ids=torch.zeros((1, 1), dtype=torch.int64), topk_weights=torch.full((1, 1), 50.0),
        w13_weight=torch.full_like(p.w13_weight, 0x22), w2_weight=w2,
        w13_weight_scale=torch.full_like(p.w13_weight_scale, 120),
        w2_weight_scale=torch.full_like(p.w2_weight_scale, 254),
    )  # fmt: skip
    verdict, _ = judge(p, Local(EagerBackend(MEGAMOE_SGL)))
    assert verdict.status == "pass", verdict.reason


class OnlyY(EagerBackend):
    """``y`` alone: the codes of linear 2 say nothing of the combine."""

    def forward(self, problem):
        return {"y": super().forward(problem)["y"]}


def off(by: int):
    right = eager_combine.ue8m0_ceil
    return lambda scale: (right(scale) + by).clamp(0, 255)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("FP8_COMBINE_GROUP", group) for group in (32, 64, 512)),
        *(("ue8m0_ceil", by) for by in (1, -1)),
    ],
)
def test_a_wrong_scale_of_an_e4m3_row_is_seen(monkeypatch, name, value):
    (case,) = (c for c in load_cases() if c.name == "fp8-combine-scale-of-another-group")
    problem = Problem(**regenerate(case))
    assert judge(problem, Local(OnlyY(MEGAMOE_SGL)))[0].status == "pass"
    monkeypatch.setattr(eager_combine, name, value if name == "FP8_COMBINE_GROUP" else off(value))
    assert judge(problem, Local(OnlyY(MEGAMOE_SGL)))[0].status == "fail"
