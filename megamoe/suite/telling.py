"""Cases whose data tell causes apart, and the case to try next.

Measured by planting eleven faults of whole stages in 22 small cases (``explain`` on each): a token
of bell-shaped data with at least two slots fits one or two deviations, one on a lattice of few
values up to five, and one of special values (zeros, chosen gates) up to eleven. Only a batch with
several tokens and experts tells a lost slot from a lost expert.

A fault of some rows of a tile, planted in four forms: where one or two tokens were wrong, or one
stretch, ``explain`` found the cause or the place in 1 of 4 cases; where three or more that are no
stretch were wrong, in 9 of 12.

Linear 2 wrong in rows 8 to 15 or in row 15 of each tile of 16, planted in five forms: ``explain``
told one cause and one place on bell-shaped data of one expert each time, and on a skewed batch of
a lattice three times; twice it left two causes and two places.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final

from megamoe.cases import Case

SEVERAL: Final = 3
"""Wrong tokens that are a pattern."""
_ROWS: Final = 32
"""Tokens that fill more than two tiles of 16 rows, where each has one slot of one expert."""
_TELLS_ROWS: Final = 1.5
"""The place of a red of such rows, some of which are wrong, between the values of ``telling``."""
_LARGE: Final = 1e30
"""A factor of routing weights that makes activations infinite."""
_NOT_FINITE: Final = 0x7F80
"""The exponent of infinity and NaN in bfloat16."""


def telling(case: Case) -> int:
    """2: at least three tokens and experts and two slots, of bell-shaped data; 1: of other data;
    0: fewer, or special values. Of staging: at least two tokens and slots, and more than one word
    of scale bytes."""
    p = case.params
    if case.kind == "staging":
        several = p["tokens"] > 1 and p["hidden"] > 128 and p["top_k"] > 1
    else:
        several = p["tokens"] > 2 and p["top_k"] > 1 and p.get("experts", 0) > 2
    if not several or _is_special(p):
        return 0
    return 2 if _is_plain(p) else 1


def size(case: Case) -> int:
    """Multiplications of a case, about; sizes that its kind lacks count as 1."""
    p = case.params
    product: int = math.prod(
        p.get(name, 1) for name in ("tokens", "hidden", "top_k", "intermediate")
    )
    return product


def _of_rows(case: Case) -> bool:
    """Whether bell-shaped data of one slot a token fill several tiles of an expert."""
    p = case.params
    is_long = p["top_k"] == 1 and p["tokens"] > _ROWS if case.kind == "forward" else False
    return is_long and not _is_special(p) and _is_plain(p)


def smallest(
    cases: Iterable[Case], wrong: Mapping[str, Collection[int]] | None = None
) -> Case | None:
    """The smallest of the cases that tell causes apart best. Of cases with special values, those
    that were made for one cause stand first, and saturated ones last. ``wrong``: the wrong tokens
    of some cases, where they are red; those whose tokens show a pattern stand before others."""
    tokens = wrong or {}

    def key(case: Case) -> tuple[float, int, bool, int]:
        place, worth, least = rank(case)
        tells: float = place
        some = tokens.get(case.id)
        vague = some is not None and not has_pattern(some, case.params["tokens"])
        if some and not vague and len(some) < case.params["tokens"] and _of_rows(case):
            tells = -_TELLS_ROWS
        return tells, worth, vague, least

    return min(cases, key=key, default=None)


def rank(case: Case) -> tuple[int, int, int]:
    """Sorts the cases that tell causes apart best before others, of these the smallest first."""
    return -telling(case), _worth(case.params), size(case)


def has_pattern(wrong: Collection[int], tokens: int) -> bool:
    """Whether the wrong ones of so many tokens tell where in a batch a fault is: all, or at least
    :data:`SEVERAL` that are not one stretch. One or two fit many causes by chance, and of a stretch
    nobody knows whether the token, its expert's row or its place in a tile decides."""
    if len(wrong) == tokens:
        return True
    places = sorted(wrong)
    return len(places) >= SEVERAL and places[-1] - places[0] >= len(places)


def _worth(p: Mapping[str, Any]) -> int:
    """0: values that were chosen for one cause; 2: values beyond a format, where many causes give
    the same infinity, NaN or bound; 1: others."""
    hidden, routing = p.get("hidden_recipe", {}), p.get("routing_recipe", {})
    weights = [v for row in routing.get("weights", ()) for v in row]
    patches = [place.get("bits", 0) for place in hidden.get("patch", ())]
    if (
        routing.get("scaling", 0) > _LARGE
        or not all(math.isfinite(float(v)) for v in weights)
        or any(bits & _NOT_FINITE == _NOT_FINITE for bits in patches)
    ):
        return 2
    return 0 if p.get("weights_recipe", {}).get("kind") == "directed" else 1


def special_values(p: Mapping[str, Any]) -> set[str]:
    """What the recipes of a case's values have besides plain data."""
    hidden, routing = p.get("hidden_recipe", {}), p.get("routing_recipe", {})
    kind = hidden.get("kind", "bell")
    return (
        ({kind} - {"bell", "grid"})
        | ({"patch", "log2_scale", "log2_step"} & {*hidden})
        | ({"weights", "replace", "scaling"} & {*routing})
    )


def special_slots(p: Mapping[str, Any]) -> set[str]:
    """Slots without an expert."""
    masked = {"mask", "mask_every"} & {*p.get("routing_recipe", {})}
    return {"masked"} if masked else set()


def _is_special(p: Mapping[str, Any]) -> bool:
    """Values that were put there, other sizes of values, or slots without an expert."""
    return bool(special_values(p) or special_slots(p))


def _is_plain(p: Mapping[str, Any]) -> bool:
    """Bell-shaped hidden states and weights, and routing by nothing but its kind."""
    hidden, weights = p.get("hidden_recipe", {}), p.get("weights_recipe", {})
    bell = {"kind": ("table", "bell"), "w13": ("bell",), "w2": ("bell",)}
    shapes = all(
        recipe.get(name, kinds[0]) in kinds for recipe in (hidden, weights)
        for name, kinds in bell.items()
    )  # fmt: skip
    more = {*hidden, *weights} - {*bell, "w13_scale", "w2_scale", "spread"}
    return shapes and not more and not {*p.get("routing_recipe", {})} - {"kind"}
