"""Tensors of a case, computed from its recipe by integers only.

Recipes are small tables in the case file. Each tensor has a stream of its own, each expert and each
token a key of its own, so rows and experts do not depend on the number of the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from megamoe.cases.block_weights import block_weights
from megamoe.cases.counter import below, key, random_bytes, words
from megamoe.cases.streams import (
    HIDDEN,
    ROUTE,
    ROUTE_WEIGHT,
    SHARED_OUTPUT,
    TWIN,
    Recipe,
    options,
)  # fmt: skip
from megamoe.cases.weights import expert_weights, nvfp4_weights, shared_expert
from megamoe.spec.formats import E4M3_TABLE, GROUP, U16, bf16_round
from megamoe.spec.problem import Problem
from megamoe.spec.tensors import NVFP4_FACTORS, SHARED_WEIGHTS
from megamoe.spec.weights import layout_of

if TYPE_CHECKING:
    from megamoe.cases import Case

# --- tokens -----------------------------------------------------------------------------------


def twins(seed: int, distinct: int, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """``(n,)`` int64: for each of ``tokens`` the one below ``distinct`` whose inputs it has.

    The first ``distinct`` tokens are their own; of the others each has a random one of them, so
    that no shift and no stride leads from a token to one with the same inputs.
    """
    if not tokens.size:
        return tokens
    draws = below(key(seed, TWIN), int(tokens.max()) + 1, distinct)[tokens]
    return np.where(tokens < distinct, tokens, draws)


def own_tokens(
    seed: int, params: Mapping[str, Any], tokens: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], Any]:
    """The tokens with inputs of their own, and the index that spreads their rows over
    ``tokens``."""
    if "distinct" not in params:
        return tokens, slice(None)
    own, at = np.unique(twins(seed, params["distinct"], tokens), return_inverse=True)
    return own, at


# --- hidden states ----------------------------------------------------------------------------


def hidden_states(seed: int, tokens: npt.NDArray[np.int64], size: int, recipe: Recipe) -> U16:
    """``(len(tokens), size)`` bfloat16 bits of the named token rows.

    Kinds: ``bell`` (bell-shaped, ``log2_scale``, ``spread`` octaves between groups, one in
    ``outlier_every`` channels 32 times larger), ``grid`` (the zero-freedom lattice), ``constant``
    (``bits``), ``codes`` (values of the E4M3 codes from ``lowest + step * token`` on, ``count`` of
    them at random with either sign, times 2 to the power of ``log2_scale``; with ``top`` the first
    channel of each group has the largest). ``log2_step`` is added to ``log2_scale`` for each token
    before. ``patch`` is a list of ``{token, channel, count, bits}`` laid over any kind.
    """
    kind = recipe.get("kind", "bell")
    base = {"patch": ()}
    size_of = {"log2_scale": 0, "log2_step": 0}
    if kind == "bell":
        o = options(recipe, "hidden", **base, **size_of, spread=2, outlier_every=0)
        rows = [_bell(seed, int(t), size, o) for t in tokens]
    elif kind == "grid":
        o = options(recipe, "hidden", **base, **size_of, carriers=16, octaves=2)
        rows = [_grid(seed, int(t), size, o) for t in tokens]
    elif kind == "codes":
        o = options(recipe, "hidden", **base, **size_of, lowest=0, step=0, count=8, top=False)
        rows = [_codes(seed, int(t), size, o) for t in tokens]
    elif kind == "constant":
        o = options(recipe, "hidden", **base, bits=0)
        rows = [np.full(size, o["bits"], np.uint16) for _ in tokens]
    else:
        raise ValueError(f"unknown hidden recipe {kind!r}; known: bell, grid, constant, codes")
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
    exponent = exponent - 17 + _log2_scale(token, o)
    return bf16_round(np.ldexp(value.astype(np.float64), exponent))


GRID = np.array([0.5, 1.0, 1.5, 1.0, -0.5, -1.0, -1.5, -1.0])


def _grid(seed: int, token: int, size: int, o: dict[str, Any]) -> U16:
    """Few significant bits, one power of two a group; the first channels of a group carry +1."""
    stream = key(seed, HIDDEN, token)
    value = GRID[random_bytes(stream, size) & 7].reshape(-1, GROUP)
    value[:, : o["carriers"]] = 1.0
    exponent = below(key(stream, 1), size // GROUP, o["octaves"]) + _log2_scale(token, o)
    return bf16_round(np.ldexp(value, exponent[:, None]).reshape(size))


def _codes(seed: int, token: int, size: int, o: dict[str, Any]) -> U16:
    """Every value is an E4M3 one times a power of two, which bfloat16 holds exactly."""
    stream = key(seed, HIDDEN, token)
    low, high = o["lowest"] + o["step"] * token, _E4M3_TOP + 1
    if not 0 <= low < high:
        raise ValueError(f"hidden recipe 'codes': token {token} starts at code {low}, of {high}")
    code = below(stream, size, min(o["count"], high - low)) + low
    value = E4M3_TABLE[code].astype(np.float64) * (1 - 2 * below(key(stream, 1), size, 2))
    if o["top"]:
        value[::GROUP] = E4M3_TABLE[_E4M3_TOP]
    return bf16_round(np.ldexp(value, _log2_scale(token, o)))


_E4M3_TOP = 0x7E
"""Code of 448, the largest."""


def _log2_scale(token: int, o: dict[str, Any]) -> int:
    return int(o["log2_scale"] + o["log2_step"] * token)


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
    ``octaves`` divides each slot's weight by 2 to the power of up to that many octaves;
    ``log2_scale`` and ``log2_step`` multiply it by 2 to the power of ``log2_scale + token *
    log2_step``. ``live_every`` n leaves every n-th token as it is and masks all slots of the
    others, ``live_slots`` n masks all slots of a token but the first n; 0: none.
    """
    o = options(
        recipe, "routing", pool=0, first=0, ids=(), mask_every=0, mask=(), replace=(),
        scaling=1.0, weights=(), octaves=0, log2_scale=0, log2_step=0, live_every=1,
        live_slots=0,
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
                raise ValueError(f"top_k {top_k} needs as many experts, and there are {pool}")
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
            kinds = "random, same, duplicate, rotate, skewed, explicit"
            raise ValueError(f"unknown routing recipe {kind!r}; known: {kinds}")
        stream = key(seed, ROUTE_WEIGHT, token)
        fraction = below(stream, top_k, 3 << 22) + (1 << 22)
        weight = np.ldexp(fraction.astype(np.float32), -24) * np.float32(o["scaling"])
        if o["octaves"]:
            shift = below(key(stream, 1), top_k, o["octaves"] + 1)
            weight = np.ldexp(weight, -shift).astype(np.float32)
        if o["log2_scale"] or o["log2_step"]:
            weight = np.ldexp(weight, _log2_scale(token, o)).astype(np.float32)
        if o["weights"]:
            weight = np.asarray(o["weights"][token % len(o["weights"])], np.float32)
        weights[row] = weight
        if o["mask_every"]:
            ids[row][below(key(stream, 2), top_k, o["mask_every"]) == 0] = -1
        if token % o["live_every"]:
            ids[row] = -1
        if o["live_slots"]:
            ids[row, o["live_slots"] :] = -1
        for at, masked in o["mask"]:
            if at == token:
                ids[row, masked] = -1
        for at, column, value in o["replace"]:
            if at == token:
                ids[row, column] = value
    return ids, weights


# --- whole problems ---------------------------------------------------------------------------


def bf16_tensor(bits: U16) -> torch.Tensor:
    """Bits to a bfloat16 tensor."""
    return torch.from_numpy(np.ascontiguousarray(bits).view(np.int16)).view(torch.bfloat16)


EXTRAS = ("activation", "activation_alpha", "activation_beta", "combine_dtype")
"""Parameters of a case that are fields of the problem, and have a default there."""


def _blank(
    format_: str, experts: int, hidden: int, inter: int
) -> tuple[npt.NDArray[Any], ...]:  # fmt: skip
    """Zeros for w13, its scales, w2 and its scales, of all experts."""
    layout = layout_of(format_)
    shapes = layout.shapes(hidden, inter)
    types = {torch.uint8: np.uint8, torch.float32: np.float32}
    return tuple(
        np.zeros((experts, *shape), types[layout.dtype(name)]) for name, shape in shapes.items()
    )


def forward_problem(case: Case, rows: list[int] | None = None) -> Problem:
    """The forward problem of a case, on the CPU; with ``rows`` only those tokens.

    Weights have the full ``(E, ...)`` shapes; experts without a token stay untouched zero pages.
    """
    p = case.params
    hidden, inter, experts = p["hidden"], p["intermediate"], p["experts"]
    tokens = np.arange(p["tokens"]) if rows is None else np.asarray(rows, dtype=np.int64)
    own, at_token = own_tokens(case.seed, p, tokens)
    ids, weights = routing(case.seed, own, experts, p["top_k"], p.get("routing_recipe", {}))
    used_experts = np.unique(ids[ids >= 0])
    format_ = p.get("weight_format", "mxfp4")
    is_nvfp4 = format_ == "nvfp4"
    w13, w13_sf, w2, w2_sf = _blank(format_, experts, hidden, inter)
    factors = np.zeros((2, experts), np.float32)
    recipe = p.get("weights_recipe", {})
    tensors: list[npt.NDArray[Any]]
    for expert in used_experts[used_experts < experts].tolist():
        at = case.seed, expert, hidden, inter, recipe
        if is_nvfp4:
            *tensors, factors[:, expert] = nvfp4_weights(*at)
        else:
            tensors = list(block_weights(*at) if format_ == "fp8-block" else expert_weights(*at))
        w13[expert], w13_sf[expert], w2[expert], w2_sf[expert] = tensors
    clamp = p["clamp"]
    more: dict[str, Any] = {n: p[n] for n in EXTRAS if n in p}
    if is_nvfp4:
        more |= dict(zip(NVFP4_FACTORS, map(torch.from_numpy, factors), strict=True))
        more["l2_activation_scale"] = p["l2_activation_scale"]
    if format_ != "mxfp4":
        more["weight_format"] = format_
    if "shared_recipe" in p:
        shared = shared_expert(case.seed, hidden, p["shared_recipe"], recipe)
        more |= dict(zip(SHARED_WEIGHTS, map(torch.from_numpy, shared), strict=True))
    if "shared_output_recipe" in p:
        stream = key(case.seed, SHARED_OUTPUT)
        output_rows = hidden_states(stream, own, hidden, p["shared_output_recipe"])
        more["shared_output"] = bf16_tensor(output_rows[at_token])
    return Problem(
        hidden_states=bf16_tensor(
            hidden_states(case.seed, own, hidden, p.get("hidden_recipe", {}))[at_token]
        ),
        topk_ids=torch.from_numpy(ids[at_token]),
        topk_weights=torch.from_numpy(weights[at_token]),
        w13_weight=torch.from_numpy(w13),
        w13_weight_scale=torch.from_numpy(w13_sf),
        w2_weight=torch.from_numpy(w2),
        w2_weight_scale=torch.from_numpy(w2_sf),
        activation_clamp=None if clamp == "none" else float(clamp),
        fast_math=bool(p["fast_math"]),
        max_num_tokens=int(p["capacity"]),
        **more,
    )
