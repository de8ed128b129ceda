"""Counter-based bits: integers in, integers out, the same on every platform and version.

``words(key, n)`` is a pure function of a key and an index, so any part of any tensor can be
computed alone: an expert that no token visits costs nothing. The mixer is splitmix64's finaliser
(Steele, Lea and Flood, 2014) on a Weyl sequence; keys are chained through the same mixer.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_WEYL = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1
U64 = npt.NDArray[np.uint64]


def mix(value: int) -> int:
    """splitmix64's finaliser on one Python integer: the scalar specification."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def key(*labels: int) -> int:
    """A 64-bit key from integers (seed, stream, expert, ...), order matters."""
    state = 0
    for label in labels:
        state = mix(state + _WEYL + mix((label & _MASK) + _WEYL))
    return state


_AT_ONCE = 1 << 13
"""Words per chunk: both arrays stay in a first- or second-level cache. Decides no bit."""


def words(stream: int, count: int, start: int = 0) -> U64:
    """``(count,)`` words ``start, start + 1, ...`` of the stream with this key."""
    out = np.empty(count, np.uint64)
    weyl = np.arange(1, min(count, _AT_ONCE) + 1, dtype=np.uint64) * np.uint64(_WEYL)
    shifts = np.empty_like(weyl)
    for first in range(0, count, _AT_ONCE):
        value = out[first : first + _AT_ONCE]
        other = shifts[: len(value)]
        offset = np.uint64((stream + (start + first) * _WEYL) & _MASK)
        np.add(weyl[: len(value)], offset, out=value)
        value ^= np.right_shift(value, np.uint64(30), out=other)
        value *= np.uint64(0xBF58476D1CE4E5B9)
        value ^= np.right_shift(value, np.uint64(27), out=other)
        value *= np.uint64(0x94D049BB133111EB)
        value ^= np.right_shift(value, np.uint64(31), out=other)
    return out


def random_bytes(stream: int, count: int) -> npt.NDArray[np.uint8]:
    """``(count,)`` bytes, low byte of each word first."""
    raw = words(stream, -(-count // 8)).astype("<u8", copy=False)
    return raw.view(np.uint8)[:count]


def below(stream: int, count: int, bound: int, start: int = 0) -> npt.NDArray[np.int64]:
    """``(count,)`` integers in [0, bound), by multiplication of the high 32 bits."""
    high = words(stream, count, start) >> np.uint64(32)
    return ((high * np.uint64(bound)) >> np.uint64(32)).astype(np.int64)
