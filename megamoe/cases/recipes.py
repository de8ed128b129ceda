"""Tensors of a case, made from its recipe by integers only.

Recipes are small tables in the case file. Each tensor has a stream of its own, each expert and
each token a key of its own, so rows and experts are independent of how many others there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from megamoe.cases import directed
from megamoe.cases.counter import below, key, random_bytes, words
from megamoe.spec.formats import GROUP, U8, U16, bf16_round
from megamoe.spec.problem import Problem

if TYPE_CHECKING:
    from megamoe.cases import Case

HIDDEN, W13, W13_SF, W2, W2_SF, ROUTE, ROUTE_WEIGHT, MAP, IDS = range(1, 10)
"""Streams. Their numbers are part of every golden: never renumber."""

Recipe = Mapping[str, Any]


def options(recipe: Recipe, what: str, **defaults: Any) -> dict[str, Any]:
    """``recipe`` over ``defaults``; one line naming an unknown key."""
    unknown = sorted(set(recipe) - set(defaults) - {"kind"})
    if unknown:
        known = ", ".join(sorted(defaults))
        raise ValueError(f"{what} recipe {recipe.get('kind')!r}: unknown {unknown}; known: {known}")
    return {**defaults, **recipe}


# --- hidden states ----------------------------------------------------------------------------


def hidden_states(seed: int, tokens: npt.NDArray[np.int64], size: int, recipe: Recipe) -> U16:
    """``(len(tokens), size)`` bfloat16 bits of the named token rows.

    Kinds: ``bell`` (bell-shaped, ``log2_scale``, ``spread`` octaves between groups, one in
    ``outlier_every`` channels 32 times larger), ``grid`` (the zero-freedom lattice), ``constant``
    (``bits``). ``patch`` is a list of ``{token, channel, count, bits}`` laid over any kind.
    """
    kind = recipe.get("kind", "bell")
    base = {"patch": ()}
    if kind == "bell":
        o = options(recipe, "hidden", **base, log2_scale=0, spread=2, outlier_every=0)
        rows = [_bell(seed, int(t), size, o) for t in tokens]
    elif kind == "grid":
        o = options(recipe, "hidden", **base, carriers=16, octaves=2, log2_scale=0)
        rows = [_grid(seed, int(t), size, o) for t in tokens]
    elif kind == "constant":
        o = options(recipe, "hidden", **base, bits=0)
        rows = [np.full(size, o["bits"], np.uint16) for _ in tokens]
    else:
        raise ValueError(f"unknown hidden recipe {kind!r}; known: bell, grid, constant")
    out = np.stack(rows) if rows else np.zeros((0, size), np.uint16)
    for patch in o["patch"]:
        at = np.flatnonzero(tokens == patch["token"])
        first = patch.get("channel", 0)
        out[at, first : first + patch.get("count", 1)] = patch["bits"]
    return out


def _bell(seed: int, token: int, size: int, o: dict[str, Any]) -> U16:
    """Sum of eight uniform 16-bit integers, centred: standard deviation 2**18 / 4.9.

    Sixteen bits, so that small values keep all the significand that bfloat16 has; on a coarse
    lattice every sum would be exact and the case would say nothing about accumulation.
    """
    stream = key(seed, HIDDEN, token)
    raw = random_bytes(stream, size * 16).view("<u2").reshape(size, 8)
    value = 2 * raw.sum(axis=1, dtype=np.int64) - 8 * 65535
    exponent = below(key(stream, 1), size // GROUP, o["spread"] + 1).repeat(GROUP)
    if o["outlier_every"]:
        exponent = exponent + 5 * (below(key(stream, 2), size, o["outlier_every"]) == 0)
    return bf16_round(np.ldexp(value.astype(np.float64), exponent - 17 + o["log2_scale"]))


GRID = np.array([0.5, 1.0, 1.5, 1.0, -0.5, -1.0, -1.5, -1.0])


def _grid(seed: int, token: int, size: int, o: dict[str, Any]) -> U16:
    """Few significant bits, one power of two a group; the first channels of a group carry +1."""
    stream = key(seed, HIDDEN, token)
    value = GRID[random_bytes(stream, size) & 7].reshape(-1, GROUP)
    value[:, : o["carriers"]] = 1.0
    exponent = below(key(stream, 1), size // GROUP, o["octaves"]) + o["log2_scale"]
    return bf16_round(np.ldexp(value, exponent[:, None]).reshape(size))


# --- weights ----------------------------------------------------------------------------------

_SIGNED = {0.0: 0, 0.5: 1, 1.0: 2, 1.5: 3, 2.0: 4, 3.0: 5, 4.0: 6, 6.0: 7}


def _lut(*counts: tuple[float, int]) -> U8:
    """256 nibbles: each magnitude ``count`` times with either sign; the rest zero."""
    nibbles: list[int] = []
    for magnitude, count in counts:
        nibbles += [_SIGNED[magnitude]] * count + [_SIGNED[magnitude] | 8] * count
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
}  # fmt: skip


def expert_weights(
    seed: int, expert: int, hidden: int, intermediate: int, recipe: Recipe
) -> tuple[U8, U8, U8, U8]:
    """One expert: ``(2I, H/2)``, ``(2I, H/32)``, ``(H, I/2)``, ``(H, I/32)`` uint8.

    Kind ``table`` (the default): ``w13`` and ``w2`` name an entry of :data:`LUTS`; ``w2`` may be
    ``probe``, one non-zero weight in each ``probe_every``. ``w13_scale`` and ``w2_scale`` are
    ``[lowest byte, number of octaves]``. ``same`` gives every expert the weights of expert 0.

    Kind ``carrier`` (zero-freedom): the first ``carriers`` channels of each group, where ``grid``
    hidden states hold +1, decide each row: a gate is open (near +4) or, one in ``closed_every``,
    closed (near -24, so silu vanishes); an up row is near +8 or -8. The other channels move
    these values by less than the distance to anything that could round two ways. ``gate_levels``
    and ``up_levels`` replace the two levels by a random one of these E2M1 values a row (in units
    of 4), ``lower`` brings all of them down by that many octaves.

    Kind ``directed``: chosen activations and sums (:mod:`megamoe.cases.directed`).
    """
    if recipe.get("kind") == "directed":
        return directed.expert_weights(hidden, intermediate, recipe)
    if recipe.get("kind", "table") == "carrier":
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
    w13 = _nibbles(key(seed, W13, owner), 2 * intermediate, hidden, o["w13"])
    w2_stream = key(seed, W2, owner)
    if o["w2"] == "probe":
        w2 = _probe(w2_stream, hidden, intermediate, o["probe_every"])
    else:
        w2 = _nibbles(w2_stream, hidden, intermediate, o["w2"])
    if o["carriers"]:
        _carry(w13, key(seed, W13, owner, 1), o)
    return (
        w13,
        _scales(key(seed, W13_SF, owner), 2 * intermediate, hidden // GROUP, o["w13_scale"]),
        w2,
        _scales(key(seed, W2_SF, owner), hidden, intermediate // GROUP, o["w2_scale"]),
    )


def _nibbles(stream: int, rows: int, columns: int, name: str) -> U8:
    if name not in LUTS:
        raise ValueError(f"unknown weight table {name!r}; known: {', '.join(LUTS)}, probe")
    raw = random_bytes(stream, rows * columns)
    if name == "uniform":
        return raw[: rows * columns // 2].reshape(rows, columns // 2).copy()
    nibbles = LUTS[name][raw]
    packed = (nibbles[0::2] | (nibbles[1::2] << 4)).astype(np.uint8)
    return packed.reshape(rows, columns // 2)


def _probe(stream: int, rows: int, columns: int, every: int) -> U8:
    """One non-zero weight in each run of ``every``: the sum can hardly round."""
    runs = columns // every
    choice = below(stream, rows * runs, every * 14)
    position = choice // 14 + np.tile(np.arange(runs) * every, rows)
    code = choice % 14
    nibble = (code % 7 + 1) | ((code >= 7) << 3)
    out = np.zeros((rows, columns), np.uint8)
    out[np.arange(rows).repeat(runs), position] = nibble
    return (out[:, 0::2] | (out[:, 1::2] << 4)).astype(np.uint8)


def _carry(w13: U8, stream: int, o: dict[str, Any]) -> None:
    rows = w13.shape[0]
    half = rows // 2
    choice = below(stream, rows, o["closed_every"])
    code = np.full(rows, _SIGNED[o["gate_open"]], np.uint8)
    code[:half][choice[:half] == 0] = _SIGNED[6.0] | 8
    up = _SIGNED[o["up_open"]]
    code[half:] = np.where(words(stream, rows, rows)[half:] >> np.uint64(63), up | 8, up)
    for label, part, name in ((1, code[:half], "gate_levels"), (2, code[half:], "up_levels")):
        if o[name]:
            levels = np.array([_level(v) for v in o[name]], np.uint8)
            part[:] = levels[below(key(stream, label), half, len(levels))]
    grouped = w13.reshape(rows, -1, GROUP // 2)
    grouped[:, :, : o["carriers"] // 2] = (code | (code << 4))[:, None, None]
    if o["carriers"] % 2:
        at = o["carriers"] // 2
        grouped[:, :, at] = (grouped[:, :, at] & 0xF0) | code[:, None]


def _level(value: float) -> int:
    """E2M1 code of ``value``; one line if there is none."""
    if abs(value) not in _SIGNED:
        raise ValueError(f"level {value} is not an E2M1 value; known: {list(_SIGNED)}, with a sign")
    return _SIGNED[abs(value)] | (8 if value < 0 else 0)


def _scales(stream: int, rows: int, columns: int, low_octaves: tuple[int, int]) -> U8:
    low, octaves = low_octaves
    if not (low >= 0 and low + octaves - 1 <= 255 and octaves >= 1):
        raise ValueError(f"scale range {list(low_octaves)} leaves the UE8M0 bytes 0 to 255")
    return (below(stream, rows * columns, octaves) + low).astype(np.uint8).reshape(rows, columns)


# --- routing ----------------------------------------------------------------------------------


def routing(
    seed: int, tokens: npt.NDArray[np.int64], experts: int, top_k: int, recipe: Recipe
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """``(n, K)`` ids int64 and weights float32 of the named token rows.

    Kinds: ``random`` (distinct experts of the first ``pool``; 0: all), ``same`` (slot k goes to
    expert ``(first + k) % experts`` for every token), ``duplicate`` (all slots to one expert a
    token, of the first ``pool``), ``rotate`` (expert ``(t + k) % pool``), ``skewed`` (slot 0
    always expert ``first``), ``explicit`` (``ids``, a list of rows, repeated). ``mask_every`` n
    masks one slot in n at random; ``mask`` lists ``[token, slot]``; ``replace`` lists
    ``[token, slot, id]``. Weights are
    ``scaling`` times 24-bit fractions in [1/4, 1); ``weights`` gives explicit rows, repeated;
    ``octaves`` divides each slot's weight by 2 to the power of up to that many octaves.
    """
    o = options(
        recipe, "routing", pool=0, first=0, ids=(), mask_every=0, mask=(), replace=(),
        scaling=1.0, weights=(), octaves=0,
    )  # fmt: skip
    kind = recipe.get("kind", "random")
    pool = o["pool"] or experts
    ids = np.zeros((len(tokens), top_k), np.int64)
    weights = np.zeros((len(tokens), top_k), np.float32)
    slot = np.arange(top_k)
    for row, token in enumerate(int(t) for t in tokens):
        stream = key(seed, ROUTE, token)
        if kind == "random" or kind == "skewed":
            if top_k > pool:
                raise ValueError(f"top_k {top_k} needs as many experts, the pool has {pool}")
            order = np.argsort(words(stream, pool), kind="stable")
            if kind == "skewed":
                order = np.concatenate([[o["first"]], order[order != o["first"]]])
            ids[row] = order[:top_k]
        elif kind == "same":
            ids[row] = (o["first"] + slot) % experts
        elif kind == "rotate":
            ids[row] = (token + slot) % pool
        elif kind == "duplicate":
            ids[row] = below(stream, 1, pool)[0]
        elif kind == "explicit":
            ids[row] = o["ids"][token % len(o["ids"])]
        else:
            known = "random, same, duplicate, rotate, skewed, explicit"
            raise ValueError(f"unknown routing recipe {kind!r}; known: {known}")
        stream = key(seed, ROUTE_WEIGHT, token)
        fraction = below(stream, top_k, 3 << 22) + (1 << 22)
        weight = np.ldexp(fraction.astype(np.float32), -24) * np.float32(o["scaling"])
        if o["octaves"]:
            shift = below(key(stream, 1), top_k, o["octaves"] + 1)
            weight = np.ldexp(weight, -shift).astype(np.float32)
        if o["weights"]:
            weight = np.asarray(o["weights"][token % len(o["weights"])], np.float32)
        weights[row] = weight
        if o["mask_every"]:
            ids[row][below(key(stream, 2), top_k, o["mask_every"]) == 0] = -1
        for at, masked in o["mask"]:
            if at == token:
                ids[row, masked] = -1
        for at, changed, value in o["replace"]:
            if at == token:
                ids[row, changed] = value
    return ids, weights


# --- whole problems ---------------------------------------------------------------------------


def bf16_tensor(bits: U16) -> torch.Tensor:
    """Bits to a bfloat16 tensor."""
    return torch.from_numpy(np.ascontiguousarray(bits).view(np.int16)).view(torch.bfloat16)


def forward_problem(case: Case, rows: list[int] | None = None) -> Problem:
    """The forward problem of a case, on the CPU; with ``rows`` only those tokens.

    Weights have the full ``(E, ...)`` shapes; experts without a token stay untouched zero pages.
    """
    p = case.params
    hidden, inter, experts = p["hidden"], p["intermediate"], p["experts"]
    tokens = np.arange(p["tokens"]) if rows is None else np.asarray(rows, dtype=np.int64)
    ids, weights = routing(case.seed, tokens, experts, p["top_k"], p.get("routing_recipe", {}))
    touched = np.unique(ids[ids >= 0])
    w13 = np.zeros((experts, 2 * inter, hidden // 2), np.uint8)
    w13_sf = np.zeros((experts, 2 * inter, hidden // GROUP), np.uint8)
    w2 = np.zeros((experts, hidden, inter // 2), np.uint8)
    w2_sf = np.zeros((experts, hidden, inter // GROUP), np.uint8)
    recipe = p.get("weights_recipe", {})
    for expert in touched[touched < experts]:
        made = expert_weights(case.seed, int(expert), hidden, inter, recipe)
        w13[expert], w13_sf[expert], w2[expert], w2_sf[expert] = made
    clamp = p["clamp"]
    return Problem(
        hidden_states=bf16_tensor(
            hidden_states(case.seed, tokens, hidden, p.get("hidden_recipe", {}))
        ),
        topk_ids=torch.from_numpy(ids),
        topk_weights=torch.from_numpy(weights),
        w13_weight=torch.from_numpy(w13),
        w13_weight_scale=torch.from_numpy(w13_sf),
        w2_weight=torch.from_numpy(w2),
        w2_weight_scale=torch.from_numpy(w2_sf),
        activation_clamp=None if clamp == "none" else float(clamp),
        fast_math=bool(p["fast_math"]),
        max_num_tokens=int(p["capacity"]),
    )
