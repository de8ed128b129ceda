"""Weights in FP8 blocks, computed from a recipe by integers only."""

from __future__ import annotations

import numpy as np

from megamoe.cases.counter import below, key, random_bytes
from megamoe.cases.streams import BLOCK_W2, BLOCK_W2_SF, BLOCK_W13, BLOCK_W13_SF, Recipe, options
from megamoe.spec.formats import BLOCK, F32, GROUP, U8, e4m3_cast

TABLES = ("bell", "coarse", "every", "one", "probe", "probe-second", "zero")


def block_weights(
    seed: int, expert: int, hidden: int, intermediate: int, recipe: Recipe
) -> tuple[U8, F32, U8, F32]:
    """One expert: ``(2I, H)`` uint8, ``(2I/128, H/128)`` float32, and the same of w2.

    ``w13`` and ``w2`` name the codes: ``bell`` (standard deviation 105), ``coarse`` (0, 0.5 and 1
    with either sign, whose sums a truncating unit holds), ``every`` (each code but NaN), ``probe``
    (one code other than zero in each run of 64), ``probe-second`` (in every second run alone),
    ``one`` (1 everywhere) or ``zero``. ``quiet`` n divides the ``coarse`` codes in the second half
    of each 128 rows of w13 by 2 to the power of n, at most 8. ``unread`` n puts zeros in the first
    n of each 32 channels of w13, so that what lies there decides a scale and no sum. ``w13_scale``
    and ``w2_scale`` are ``[log2 of the lowest, number of octaves]``; a scale has a random fraction
    of 24 bits, or none with ``powers``. ``same`` gives every expert those of expert 0.
    """
    if (kind := recipe.get("kind", "table")) != "table":
        raise ValueError(f"fp8-block weights have no recipe {kind!r}; leave kind out")
    o = options(
        recipe, "fp8-block weights", w13="bell", w2="bell", w13_scale=(-13, 2), w2_scale=(-12, 2),
        powers=False, same=False, quiet=0, unread=0,
    )  # fmt: skip
    owner = 0 if o["same"] else expert
    w13, w2, powers = (2 * intermediate, hidden), (hidden, intermediate), o["powers"]
    w13_codes = _codes(key(seed, BLOCK_W13, owner), *w13, o["w13"], o["quiet"])
    w13_codes.reshape(2 * intermediate, -1, GROUP)[:, :, : o["unread"]] = 0
    return (
        w13_codes,
        _scales(key(seed, BLOCK_W13_SF, owner), *w13, o["w13_scale"], powers),
        _codes(key(seed, BLOCK_W2, owner), *w2, o["w2"]),
        _scales(key(seed, BLOCK_W2_SF, owner), *w2, o["w2_scale"], powers),
    )


def _codes(stream: int, rows: int, columns: int, table: str, quiet: int = 0) -> U8:
    if table == "bell":
        many = random_bytes(stream, rows * columns * 8).reshape(rows, columns, 8)
        return e4m3_cast((2 * many.sum(axis=2, dtype=np.int64) - 8 * 255) * 0.25)
    raw = random_bytes(stream, rows * columns).reshape(rows, columns)
    if table == "coarse":
        value = np.array([0.0, 0.5, 1.0, 0.0, -0.5, -1.0, 0.0, 0.0])[raw & 7]
        second = (np.arange(rows) // 64 % 2)[:, None]
        return e4m3_cast(np.ldexp(value, -quiet * second))
    if table == "every":
        return np.where((raw & 0x7F) == 0x7F, 0, raw).astype(np.uint8)
    if table == "one":
        return np.full((rows, columns), 0x38, np.uint8)
    if table == "zero":
        return np.zeros((rows, columns), np.uint8)
    if table not in ("probe", "probe-second"):
        raise ValueError(f"unknown table of FP8 weights {table!r}; known: {', '.join(TABLES)}")
    out = np.zeros((rows, columns // 64, 64), np.uint8)
    at = below(key(stream, 1), rows * columns // 64, 64).reshape(rows, -1, 1)
    code = raw[:, : columns // 64, None]
    np.put_along_axis(out, at, np.where((code & 0x7F) == 0x7F, 0x38, code), axis=2)
    if table == "probe-second":
        out[:, ::2] = 0
    return out.reshape(rows, columns)


def _scales(
    stream: int, rows: int, columns: int, low_octaves: tuple[int, int], powers: bool
) -> F32:
    shape = rows // BLOCK, columns // BLOCK
    low, octaves = low_octaves
    exponent = low + below(stream, shape[0] * shape[1], octaves)
    fraction = below(key(stream, 1), shape[0] * shape[1], 1 << 23) + (1 << 23)
    if powers:
        fraction = np.full_like(fraction, 1 << 23)
    return np.ldexp(fraction.astype(np.float32), exponent - 23).reshape(shape)


__all__ = ["block_weights"]
