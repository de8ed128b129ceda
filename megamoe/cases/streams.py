"""Streams of random bits, one a tensor, and how a recipe is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HIDDEN, W13, W13_SF, W2, W2_SF, ROUTE, ROUTE_WEIGHT, MAP, IDS = range(1, 10)
SHARED_W13, SHARED_W13_SF, SHARED_W2, SHARED_W2_SF, SHARED_OUTPUT = range(10, 15)
NVFP4_W13_SF, NVFP4_W2_SF, NVFP4_FACTOR, TWIN = range(15, 19)
BLOCK_W13, BLOCK_W13_SF, BLOCK_W2, BLOCK_W2_SF = range(19, 23)
"""Streams. Their numbers are part of every golden: never renumber."""

Recipe = Mapping[str, Any]


def options(recipe: Recipe, what: str, **defaults: Any) -> dict[str, Any]:
    """``recipe`` over ``defaults``; one line naming an unknown key."""
    unknown = sorted(set(recipe) - set(defaults) - {"kind"})
    if unknown:
        keys = ", ".join(sorted(defaults))
        raise ValueError(f"{what} recipe {recipe.get('kind')!r}: unknown {unknown}; known: {keys}")
    return {**defaults, **recipe}
