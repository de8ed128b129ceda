"""The pattern of wrong channels: what a person would see in the map of them."""

from __future__ import annotations

import numpy as np
import pytest

from megamoe.explain.channels import pattern

N = np.arange(768)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ((N >= 512) & (N < 768), "tile 2 of 256 channels"),
        ((N >= 384) & (N < 640), "tiles 3 and 4 of 128 channels"),
        ((N >= 640) & (N < 704), "tile 10 of 64 channels"),
        ((N >= 640) & (N < 704) & (N % 3 != 0), "tile 10 of 64 channels"),
        (N % 2 == 1, "channels n with n modulo 2 = 1"),
        ((N % 8 == 3) | (N % 8 == 4), "channels n with n modulo 8 = 3 or 4"),
        (N >= 0, ""),  # all
        (N < 7, ""),  # too few to tell
        (N % 7 == 0, ""),  # no width of a tile or a vector
    ],
)
def test_tiles_and_steps_are_told_from_chance(wrong, text):
    assert pattern(wrong) == text


def test_channels_count_from_the_first_that_was_compared():
    wrong = np.zeros(128, np.bool_)
    wrong[64:96] = True
    assert pattern(wrong, 256) == "tile 10 of 32 channels"
