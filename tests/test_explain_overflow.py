"""``explain`` says of each stage that its wrong values look like an overflow."""

from __future__ import annotations

import numpy as np
import pytest

from megamoe.explain.words import explanation
from tests.test_explain_names import explain_token, right_rows


def _nan_codes(rows):
    rows["l2_acts"][:] = NAN


def _codes_at_448(rows):
    rows["l2_acts"][:] = np.where(rows["l2_acts"] & 0x80, 0xFE, 0x7E)


def _no_scale(rows):
    rows["l2_acts_sf"][::2] = 0xFF


def _largest_scale(rows):
    rows["l2_acts_sf"][::2] = 0xFE


def _nan_x(rows):
    rows["x"][:] = NAN


def _x_at_448(rows):
    rows["x"][::2] = 0x7E


def _y_at_the_largest(rows):
    rows["y"][::2] = 0x7F7F


NAN, OR_ZERO = 0x7F, "finite ones are right: may be an overflow or 0 * infinity ("
CUT_OFF = "where smaller ones are right: may be an overflow that was cut off, or "
OVERFLOWS = {
    _nan_codes: ("codes of l2_acts are NaN where", OR_ZERO),
    _codes_at_448: ("codes of l2_acts are 448, the largest finite value (0x7e)",
                    f"{CUT_OFF}a scale factor that is too small"),
    _no_scale: ("scale bytes of l2_acts_sf are NaN where", OR_ZERO),
    _largest_scale: ("scale bytes of l2_acts_sf are 2^127, the largest finite value (0xfe)",
                     f"{CUT_OFF}an infinite amax"),
    _nan_x: ("codes of x are NaN where", OR_ZERO),
    _x_at_448: ("codes of x are 448, the largest", f"{CUT_OFF}a scale factor that is too small"),
    _y_at_the_largest: ("elements of y are 3.38953e+38, the largest", f"{CUT_OFF}an infinite sum"),
}  # fmt: skip


@pytest.mark.parametrize("plant", OVERFLOWS, ids=lambda f: f.__name__[1:])
def test_an_overflow_is_said_of_each_stage(plant):
    rows = right_rows()
    plant(rows)
    lines = [line for step in explain_token(rows)["explanations"] for line in explanation(step)]
    (line,) = [line for line in lines if "may be an overflow" in line]
    assert all(part in line for part in OVERFLOWS[plant])


def test_few_values_at_the_end_of_a_format_are_no_overflow():
    rows = right_rows()
    rows["l2_acts"][:, ::2] ^= 0x11
    rows["l2_acts"][:, 2] = NAN
    (step, *_) = explain_token(rows)["explanations"]
    assert step["overflow"][1]["not_finite"] and "overflow" not in "".join(explanation(step))
