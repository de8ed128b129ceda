"""Counter-based bits: integers in, integers out, the same on every platform and version.

``words(key, n)`` is a pure function of a key and an index, so any part of any tensor can be made
alone: an expert that no token visits costs nothing. The mixer is splitmix64's finaliser (Steele,
Lea and Flood, 2014) on a Weyl sequence; keys are chained through the same mixer.
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


def words(stream: int, count: int, start: int = 0) -> U64:
    """``(count,)`` words ``start, start + 1, ...`` of the stream with this key."""
    index = np.arange(start + 1, start + count + 1, dtype=np.uint64)
    value = index * np.uint64(_WEYL) + np.uint64(stream)
    value ^= value >> np.uint64(30)
    value *= np.uint64(0xBF58476D1CE4E5B9)
    value ^= value >> np.uint64(27)
    value *= np.uint64(0x94D049BB133111EB)
    value ^= value >> np.uint64(31)
    return value


def random_bytes(stream: int, count: int) -> npt.NDArray[np.uint8]:
    """``(count,)`` bytes, low byte of each word first."""
    raw = words(stream, -(-count // 8)).astype("<u8", copy=False)
    return raw.view(np.uint8)[:count]


def below(stream: int, count: int, bound: int, start: int = 0) -> npt.NDArray[np.int64]:
    """``(count,)`` integers in [0, bound), by multiplication of the high 32 bits."""
    high = words(stream, count, start) >> np.uint64(32)
    return ((high * np.uint64(bound)) >> np.uint64(32)).astype(np.int64)
