"""The counter: known words, scalar against vector, and that any part can be made alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamoe.cases.counter import below, key, mix, random_bytes, words

WEYL = 0x9E3779B97F4A7C15
KEYS = st.integers(0, 2**64 - 1)


def test_known_words_of_splitmix64() -> None:
    """The published first outputs of splitmix64 seeded with 1234567."""
    expected = [
        6457827717110365317, 3203168211198807973, 9817491932198370423,
        4593380528125082431, 16408922859458223821,
    ]  # fmt: skip
    assert words(1234567, 5).tolist() == expected


def test_known_words_of_ours() -> None:
    """Every golden hangs on the generator: a change of it must not pass unseen."""
    assert mix(0) == 0
    assert [mix(1), mix(2**64 - 1)] == KNOWN_MIX
    assert [key(), key(0), key(1), key(1, 2), key(2, 1), key(-1)] == KNOWN_KEYS
    assert words(key(7, 1), 3).tolist() == KNOWN_WORDS
    assert random_bytes(key(7, 1), 11).tolist() == KNOWN_BYTES
    assert below(key(7, 1), 8, 10).tolist() == KNOWN_BELOW


KNOWN_MIX = [6238072747940578789, 13029008266876403067]
KNOWN_KEYS = [
    0,
    12035550249420947055,
    6791897765849424158,
    3080718623640203302,
    15668115326600172676,
    6755974106381971767,
]
KNOWN_WORDS = [7681809312293326612, 6621069942296661907, 5168607599861481277]
KNOWN_BYTES = [20, 15, 136, 155, 222, 68, 155, 106, 147, 207, 155]
KNOWN_BELOW = [4, 3, 2, 4, 5, 8, 3, 3]


@given(KEYS, st.integers(0, 40), st.integers(0, 2**40))
def test_vector_words_are_the_scalar_ones(stream: int, count: int, start: int) -> None:
    expected = [mix(stream + (start + 1 + i) * WEYL) for i in range(count)]
    assert words(stream, count, start).tolist() == expected


@given(KEYS, st.integers(1, 60), st.integers(0, 59))
def test_any_part_can_be_made_alone(stream: int, count: int, start: int) -> None:
    whole = words(stream, count + start)
    assert (words(stream, count, start) == whole[start:]).all()
    assert (below(stream, count, 17, start) == below(stream, count + start, 17)[start:]).all()


@given(KEYS, st.integers(0, 70))
def test_bytes_are_the_words_low_byte_first(stream: int, count: int) -> None:
    raw = b"".join(int(w).to_bytes(8, "little") for w in words(stream, count // 8 + 1))
    assert random_bytes(stream, count).tobytes() == raw[:count]


@given(KEYS, st.integers(1, 2**31))
def test_below_stays_below_and_takes_the_high_bits(stream: int, bound: int) -> None:
    draws = below(stream, 16, bound)
    assert draws.min() >= 0 and draws.max() < bound
    assert draws.tolist() == [(int(w) >> 32) * bound >> 32 for w in words(stream, 16)]


@given(st.lists(KEYS, min_size=1, max_size=4), st.integers(0, 3))
def test_every_label_of_a_key_counts(labels: list[int], at: int) -> None:
    variant = list(labels)
    variant[at % len(labels)] ^= 1
    assert key(*variant) != key(*labels)
    assert key(*labels, 0) != key(*labels)


@pytest.mark.parametrize("bound", [3, 10])
def test_bytes_and_draws_are_even(bound: int) -> None:
    """Coarse: no value is twice as common as another over 30,000 draws."""
    count = np.bincount(below(key(3), 30_000, bound), minlength=bound)
    assert count.min() * 1.2 > count.max()
    ones = np.unpackbits(random_bytes(key(4), 30_000)).mean()
    assert abs(ones - 0.5) < 0.005
