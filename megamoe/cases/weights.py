"""Weights of a case, computed from its recipe by integers only: routed experts, and a shared
one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from megamoe.cases import directed, sweep
from megamoe.cases.counter import below, key, random_bytes, words
from megamoe.cases.streams import (
    NVFP4_FACTOR,
    NVFP4_W2_SF,
    NVFP4_W13_SF,
    SHARED_W2,
    SHARED_W2_SF,
    SHARED_W13,
    SHARED_W13_SF,
    W2,
    W2_SF,
    W13,
    W13_SF,
    Recipe,
    options,
)
from megamoe.spec.formats import (
    E2M1_TABLE,
    F32,
    GROUP,
    NVFP4_GROUP,
    U8,
    e2m1_pack,
    e2m1_unpack,
    e4m3_cast,
)

# --- weights ----------------------------------------------------------------------------------

_CODES = {0.0: 0, 0.5: 1, 1.0: 2, 1.5: 3, 2.0: 4, 3.0: 5, 4.0: 6, 6.0: 7}


def _lut(*counts: tuple[float, int]) -> U8:
    """256 nibbles: each magnitude ``count`` times with either sign; the rest zero."""
    nibbles: list[int] = []
    for magnitude, count in counts:
        nibbles += [_CODES[magnitude]] * count + [_CODES[magnitude] | 8] * count
    return np.array(nibbles + [0] * (256 - len(nibbles)), dtype=np.uint8)


LUTS: Mapping[str, U8] = {
    # Counts of a normal distribution of standard deviation 2.2, rounded to the E2M1 values.
    "bell": _lut(
        (0.5, 27), (1.0, 23), (1.5, 22), (2.0, 17), (3.0, 15), (4.0, 8), (6.0, 3)
    ),
    "uniform": (np.arange(256) & 15).astype(np.uint8),
    "grid": _lut((0.5, 24), (1.0, 24), (1.5, 16), (2.0, 8)),
    "sparse": _lut((0.5, 2), (1.0, 2), (1.5, 1), (2.0, 1), (3.0, 2)),
    "zero": np.zeros(256, np.uint8),
    "one": np.full(256, 2, np.uint8),
}  # fmt: skip


KINDS = ("table", "carrier", "directed", "sweep")
"""Kinds of a recipe of MXFP4 weights; the other formats have the first alone."""


def expert_weights(
    seed: int, expert: int, hidden: int, intermediate: int, recipe: Recipe
) -> tuple[U8, U8, U8, U8]:
    """One expert: ``(2I, H/2)``, ``(2I, H/32)``, ``(H, I/2)``, ``(H, I/32)`` uint8.

    Kind ``table`` (the default): ``w13`` and ``w2`` name an entry of :data:`LUTS`; ``w2`` may be
    ``probe``, one non-zero weight in each ``probe_every``. ``w13_scale`` and ``w2_scale`` are
    ``[lowest byte, number of octaves]``. ``same`` gives every expert the weights of expert 0.
    ``w13`` may be ``probe`` too, and either ``signed-probe``, whose zeros have either sign.

    Kind ``carrier`` (zero-freedom): the first ``carriers`` channels of each group, where ``grid``
    hidden states hold +1, decide each row: a gate is open (near +4) or, one in ``closed_every``,
    closed (near -24, so silu vanishes); an up row is near +8 or -8. The other channels move
    these values by less than the distance to anything that could round two ways. ``gate_levels``
    and ``up_levels`` replace the two levels by a random one of these E2M1 values a row (in units
    of 4), ``lower`` brings all of them down by that many octaves.

    Kind ``directed``: chosen activations and sums (:mod:`megamoe.cases.directed`). Kind ``sweep``:
    scale bytes that go from expert to expert (:mod:`megamoe.cases.sweep`).
    """
    if recipe.get("kind") == "directed":
        return directed.expert_weights(hidden, intermediate, recipe)
    if recipe.get("kind") == "sweep":
        base = expert_weights(seed, expert, hidden, intermediate, sweep.base(recipe))
        return sweep.scaled(base, expert, recipe)
    if (kind := recipe.get("kind", "table")) not in KINDS:
        raise ValueError(f"unknown weights recipe {kind!r}; known: {', '.join(KINDS)}")
    if kind == "carrier":
        carriers = 16 if hidden <= 512 else 8 if hidden <= 2048 else 4
        # The scale that puts open gates between 3 and 6: 2**133 over the number of carriers in a
        # row, rounded down to a power of two, or up from 1.7 of one on.
        near_four = 134 - (hidden * carriers * 20 // 17).bit_length()
        o = options(
            recipe, "weights", w13="grid", w2="sparse", lower=0,
            w13_scale=(near_four - recipe.get("lower", 0), 2), w2_scale=(118, 2), carriers=carriers,
            closed_every=4, gate_open=1.0, up_open=2.0, probe_every=128, same=False,
            gate_levels=(), up_levels=(),
        )  # fmt: skip
    else:
        o = options(
            recipe, "weights", w13="bell", w2="bell", w13_scale=(118, 2), w2_scale=(119, 2),
            carriers=0, closed_every=4, gate_open=1.5, up_open=3.0, probe_every=128, same=False,
            gate_levels=(), up_levels=(),
        )  # fmt: skip
    owner = 0 if o["same"] else expert
    every = o["probe_every"]
    w13 = _matrix(key(seed, W13, owner), 2 * intermediate, hidden, o["w13"], every)
    w2 = _matrix(key(seed, W2, owner), hidden, intermediate, o["w2"], every)
    if o["carriers"]:
        carry(w13, key(seed, W13, owner, 1), o)
    return (
        w13,
        _scales(key(seed, W13_SF, owner), 2 * intermediate, hidden // GROUP, o["w13_scale"]),
        w2,
        _scales(key(seed, W2_SF, owner), hidden, intermediate // GROUP, o["w2_scale"]),
    )


_AT_ONCE = 1 << 15
"""Packed bytes per chunk, a multiple of 4: the parts stay in cache. Decides no bit."""


def _nibbles(stream: int, rows: int, columns: int, name: str) -> U8:
    if name not in LUTS:
        names = ", ".join(LUTS)
        raise ValueError(f"unknown weight table {name!r}; known: {names}, probe, signed-probe")
    if name == "uniform":
        return random_bytes(stream, rows * columns // 2).reshape(rows, columns // 2)
    table, out = LUTS[name].tobytes(), np.empty(rows * columns // 2, np.uint8)
    for first in range(0, len(out), _AT_ONCE):
        part = out[first : first + _AT_ONCE]
        raw = words(stream, -(-len(part) // 4), first // 4).astype("<u8", copy=False).tobytes()
        # bytes.translate is several times as fast as an index, which NumPy widens to eight bytes.
        nibbles = np.frombuffer(raw.translate(table), "<u2")[: len(part)]
        np.bitwise_or(nibbles, nibbles >> 4, out=part, casting="unsafe")
    return out.reshape(rows, columns // 2)


def _matrix(stream: int, rows: int, columns: int, name: str, every: int) -> U8:
    """``(rows, columns/2)``: probes, or nibbles of a table."""
    if name not in ("probe", "signed-probe"):
        return _nibbles(stream, rows, columns, name)
    probes = _probe(stream, rows, columns, every)
    if name == "probe":
        return probes
    signs = random_bytes(key(stream, 1), probes.size).reshape(probes.shape) & 0x88
    low, high = (np.where(probes & part, 0, signs & part) for part in (0x0F, 0xF0))
    return probes | low | high


def _probe(stream: int, rows: int, columns: int, every: int) -> U8:
    """One non-zero weight in each run of ``every``: the sum can hardly round."""
    runs = columns // every
    choice = below(stream, rows * runs, every * 14)
    position = choice // 14 + np.tile(np.arange(runs) * every, rows)
    code = choice % 14
    nibble = (code % 7 + 1) | ((code >= 7) << 3)
    out = np.zeros((rows, columns), np.uint8)
    out[np.arange(rows).repeat(runs), position] = nibble
    return e2m1_pack(out)


def carry(w13: U8, stream: int, o: dict[str, Any]) -> None:
    """Write the carriers of kind ``carrier`` into ``w13``."""
    rows = w13.shape[0]
    half = rows // 2
    choice = below(stream, rows, o["closed_every"])
    code = np.full(rows, _CODES[o["gate_open"]], np.uint8)
    code[:half][choice[:half] == 0] = _CODES[6.0] | 8
    up = _CODES[o["up_open"]]
    code[half:] = np.where(words(stream, rows, rows)[half:] >> np.uint64(63), up | 8, up)
    for label, part, name in ((1, code[:half], "gate_levels"), (2, code[half:], "up_levels")):
        if o[name]:
            levels = np.array([_level(v) for v in o[name]], np.uint8)
            part[:] = levels[below(key(stream, label), half, len(levels))]
    groups = w13.reshape(rows, -1, GROUP // 2)
    groups[:, :, : o["carriers"] // 2] = (code | (code << 4))[:, None, None]
    if o["carriers"] % 2:
        at = o["carriers"] // 2
        groups[:, :, at] = (groups[:, :, at] & 0xF0) | code[:, None]


def _level(value: float) -> int:
    """The E2M1 code of ``value``; an error of one line if there is none."""
    if abs(value) not in _CODES:
        raise ValueError(f"level {value} is not an E2M1 value; known: {list(_CODES)}, with a sign")
    return _CODES[abs(value)] | (8 if value < 0 else 0)


def _scales(stream: int, rows: int, columns: int, low_octaves: tuple[int, int]) -> U8:
    low, octaves = low_octaves
    if not (low >= 0 and low + octaves - 1 <= 255 and octaves >= 1):
        raise ValueError(f"scale range {list(low_octaves)} leaves the UE8M0 bytes 0 to 255")
    return (below(stream, rows * columns, octaves) + low).astype(np.uint8).reshape(rows, columns)


# --- NVFP4 ------------------------------------------------------------------------------------


def nvfp4_weights(
    seed: int, expert: int, hidden: int, intermediate: int, recipe: Recipe
) -> tuple[U8, U8, U8, U8, F32]:
    """One expert: ``(2I, H/2)``, ``(2I, H/16)``, ``(H, I/2)``, ``(H, I/16)`` uint8, (2,) float32.

    ``w13`` and ``w2`` name an entry of :data:`LUTS`. ``w13_scale`` and ``w2_scale`` are ``[lowest
    E4M3 byte, number of bytes]``. ``factors`` are the two ``scale_2`` of expert 0; another expert
    has them times 24-bit fractions in [1/2, 1). ``same`` gives every expert those of expert 0.
    ``unread`` n, an even number, puts zeros in the first n channels of w13, so that what lies there
    decides a scale and no sum.
    """
    if (kind := recipe.get("kind", "table")) != "table":
        raise ValueError(f"nvfp4 weights have no recipe {kind!r}; leave kind out")
    o = options(
        recipe, "nvfp4 weights", w13="bell", w2="bell", w13_scale=(0x48, 32), w2_scale=(0x48, 32),
        factors=(2.0**-8, 2.0**-9), same=False, unread=0,
    )  # fmt: skip
    for low, count in (o["w13_scale"], o["w2_scale"]):
        if not 0 <= low < low + count <= 0x7F:
            raise ValueError(f"scale range {[low, count]} leaves the E4M3 bytes 0 to 0x7E")
    owner = 0 if o["same"] else expert
    fraction = below(key(seed, NVFP4_FACTOR, owner), 2, 1 << 23) + (1 << 23)
    factor = np.ldexp(fraction.astype(np.float32), -24) if owner else np.ones(2, np.float32)
    w13 = _nibbles(key(seed, W13, owner), 2 * intermediate, hidden, o["w13"])
    w13[:, : o["unread"] // 2] = 0
    return (
        w13,
        _scales(
            key(seed, NVFP4_W13_SF, owner), 2 * intermediate, hidden // NVFP4_GROUP, o["w13_scale"]
        ),
        _nibbles(key(seed, W2, owner), hidden, intermediate, o["w2"]),
        _scales(key(seed, NVFP4_W2_SF, owner), hidden, intermediate // NVFP4_GROUP, o["w2_scale"]),
        (np.asarray(o["factors"], np.float32) * factor).astype(np.float32),
    )


# --- shared expert ----------------------------------------------------------------------------

_SHARED_EXPERT = 1 << 20
"""Index of the expert that kind ``expert`` of a shared recipe takes: none that is routed to."""


def shared_expert(seed: int, hidden: int, recipe: Recipe, weights: Recipe) -> tuple[U8, U8, U8, U8]:
    """E4M3 weights of a shared expert: ``(2S, H)``, ``(2S, H/32)``, ``(H, S)``, ``(H, S/32)``.

    ``size`` is S. Kind ``bell`` (the default): bell-shaped codes of standard deviation 105, up to
    448; ``w13_scale`` and ``w2_scale`` are ``[lowest byte, number of octaves]``. Kind ``expert``:
    one more of the routed experts, by their recipe ``weights``, its values as E4M3.
    """
    kind = recipe.get("kind", "bell")
    if kind == "expert":
        o = options(recipe, "shared", size=128)
        w13, w13_sf, w2, w2_sf = expert_weights(seed, _SHARED_EXPERT, hidden, o["size"], weights)
        codes = (e4m3_cast(E2M1_TABLE)[e2m1_unpack(packed)] for packed in (w13, w2))
        return next(codes), w13_sf, next(codes), w2_sf
    if kind != "bell":
        raise ValueError(f"unknown shared recipe {kind!r}; known: bell, expert")
    o = options(recipe, "shared", size=128, w13_scale=(112, 2), w2_scale=(113, 2))
    size = o["size"]
    return (
        _bell_codes(key(seed, SHARED_W13), 2 * size, hidden),
        _scales(key(seed, SHARED_W13_SF), 2 * size, hidden // GROUP, o["w13_scale"]),
        _bell_codes(key(seed, SHARED_W2), hidden, size),
        _scales(key(seed, SHARED_W2_SF), hidden, size // GROUP, o["w2_scale"]),
    )


def _bell_codes(stream: int, rows: int, columns: int) -> U8:
    raw = random_bytes(stream, rows * columns * 8).reshape(rows, columns, 8)
    value = 2 * raw.sum(axis=2, dtype=np.int64) - 8 * 255
    return e4m3_cast(value * 0.25)
