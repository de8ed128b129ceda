"""Cases whose data tell causes apart, and the case to try next.

Measured by planting eleven faults of whole stages in 22 small cases (``explain`` on each): a token
of bell-shaped data with at least two slots fits one or two deviations, one on a lattice of few
values up to five, and one of special values (zeros, chosen gates) up to eleven. Only a batch with
several tokens and experts tells a lost slot from a lost expert.

A fault of some rows of a tile, planted in four forms: where one or two tokens were wrong, or one
stretch, ``explain`` found the cause or the place in 1 of 4 cases; where three or more that are no
stretch were wrong, in 9 of 12.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final

from megamoe.cases import Case
from megamoe.cases import form_of as form
from megamoe.suite.routed import Routed, routed

SEVERAL: Final = 3
"""Wrong tokens that are a pattern."""
_TILE: Final = 16
"""Rows of a small tile of an expert."""
_PLAIN: Final = Routed({}, 0, 0, 0)
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
    """Multiplications of a case, about."""
    p = case.params
    made: int = p["tokens"] * p["hidden"] * p.get("top_k", 1) * p.get("intermediate", 1)
    return made


def smallest(
    cases: Iterable[Case], wrong: Mapping[str, Collection[int]] | None = None
) -> Case | None:
    """The smallest of the cases that tell causes apart best. Of cases with special values, those
    that were made for one cause stand first, and saturated ones last. ``wrong``: the wrong tokens
    of some cases, where they are red; those whose tokens show a pattern stand before others."""
    tokens = wrong or {}

    def key(case: Case) -> tuple[int, int, bool, int]:
        tells, worth, least = _rank(case)
        vague = case.id in tokens and not has_pattern(tokens[case.id], case.params["tokens"])
        return tells, worth, vague, least

    return min(cases, key=key, default=None)


def _rank(case: Case) -> tuple[int, int, int]:
    """Sorts the cases that tell causes apart best before others, of these the smallest first."""
    return -telling(case), _worth(case.params), size(case)


def has_pattern(wrong: Collection[int], tokens: int) -> bool:
    """Whether the wrong ones of so many tokens tell where in a batch a fault is: all, or at least
    :data:`SEVERAL` that are not one stretch. One or two fit many causes by chance, and of a stretch
    nobody knows whether the token, its expert's row or its place in a tile decides."""
    if len(wrong) == tokens:
        return True
    ordered = sorted(wrong)
    return len(ordered) >= SEVERAL and ordered[-1] - ordered[0] >= len(ordered)


def _worth(p: Mapping[str, Any]) -> int:
    """0: values that were chosen for one cause; 2: values beyond a format, where many causes give
    the same infinity, NaN or bound; 1: others."""
    hidden, routing = p.get("hidden_recipe", {}), p.get("routing_recipe", {})
    weights = [v for row in routing.get("weights", ()) for v in row]
    chosen = [place.get("bits", 0) for place in hidden.get("patch", ())]
    if (
        routing.get("scaling", 0) > _LARGE
        or not all(math.isfinite(float(v)) for v in weights)
        or any(bits & _NOT_FINITE == _NOT_FINITE for bits in chosen)
    ):
        return 2
    return 0 if p.get("weights_recipe", {}).get("kind") == "directed" else 1


def larger(case: Case, cases: Iterable[Case]) -> list[Case]:
    """Those of ``cases`` with the subject and the features of ``case`` that are larger, have no
    fewer tokens, and tell causes apart better or are more than twice as large; the best first. A
    case of another subject need not be red by the same fault."""
    own = telling(case)
    found = [
        other for other in cases
        if _is_alike(case, other)
        and (telling(other) > own
             or (telling(other) >= own and size(other) > 2 * size(case)))
    ]  # fmt: skip
    return sorted(found, key=_rank)


def plain(case: Case, cases: Iterable[Case]) -> list[Case]:
    """Those of ``cases`` of the quick tier with plain data that tell causes apart best, and with
    the features of ``case``; those with its clamp before others, then the smallest first."""
    found = [
        other for other in cases
        if other.kind == "forward" and other.tier == "quick" and other.id != case.id
        and telling(other) == 2 and _has_features_of(case, other)
    ]  # fmt: skip
    clamp = case.params.get("clamp")
    return sorted(found, key=lambda other: (other.params.get("clamp") != clamp, size(other)))


def of_tiles(case: Case, cases: Iterable[Case]) -> list[Case]:
    """Those of ``cases`` with the subject and the features of ``case`` that tell in which rows of
    an expert a fault is: each expert with rows has more than two tiles of :data:`_TILE`. Those
    whose routing has most that a fault may need stand first. None where ``case`` is of this sort.
    """
    if _has_tiles(routed(case)):
        return []
    found = []
    for other in cases:
        if _is_alike(case, other) and telling(other) and other.rows is None:
            its = routed(other)
            if its is not None and _has_tiles(its):
                found.append((-len(its.beyond(_PLAIN)), size(other), other))
    return [other for *_, other in sorted(found, key=lambda one: one[:2])]


def _has_tiles(own: Routed | None) -> bool:
    """Whether each of several experts with rows has more than two tiles."""
    return own is not None and len(own.rows) > 1 and min(own.rows.values()) > 2 * _TILE


def _has_features_of(case: Case, other: Case) -> bool:
    return (
        form(other.kind).features(other) == form(case.kind).features(case)
        and other.params.get("fast_math") == case.params.get("fast_math")
        and _has_clamp(other) == _has_clamp(case)
    )


def _is_alike(case: Case, other: Case) -> bool:
    """Whether ``other`` is a case of the subject and the features of ``case``, and not smaller."""
    return (
        other.kind == case.kind
        and _has_features_of(case, other)
        and other.params["tokens"] >= case.params["tokens"]
        and size(other) >= size(case)
        and _has_subject_of(case, other)
    )


def _has_subject_of(case: Case, other: Case) -> bool:
    """Whether ``other`` has all that is special in ``case``. Chosen values are those of one
    subject only, whose cases have names that begin alike."""
    values, slots = _special_values(case.params), _special_slots(case.params)
    if not slots <= _special_slots(other.params):
        return False
    return not values or (
        values <= _special_values(other.params)
        and case.name.split("-")[:2] == other.name.split("-")[:2]
    )


def _special_values(p: Mapping[str, Any]) -> set[str]:
    hidden, routing = p.get("hidden_recipe", {}), p.get("routing_recipe", {})
    kind = hidden.get("kind", "bell")
    return (
        ({kind} - {"bell", "grid"})
        | ({"patch", "log2_scale", "log2_step"} & {*hidden})
        | ({"weights", "replace", "scaling"} & {*routing})
    )


def _special_slots(p: Mapping[str, Any]) -> set[str]:
    """Slots without an expert."""
    masked = {"mask", "mask_every"} & {*p.get("routing_recipe", {})}
    return {"masked"} if masked else set()


def _has_clamp(case: Case) -> bool:
    return case.params.get("clamp", "none") not in (None, "none")


def _is_special(p: Mapping[str, Any]) -> bool:
    """Values that were put there, other sizes of values, or slots without an expert."""
    return bool(_special_values(p) or _special_slots(p))


def _is_plain(p: Mapping[str, Any]) -> bool:
    """Bell-shaped hidden states and weights, and routing by nothing but its kind."""
    hidden, weights = p.get("hidden_recipe", {}), p.get("weights_recipe", {})
    bell = {"kind": ("table", "bell"), "w13": ("bell",), "w2": ("bell",)}
    shapes = all(
        recipe.get(name, known[0]) in known for recipe in (hidden, weights)
        for name, known in bell.items()
    )  # fmt: skip
    more = {*hidden, *weights} - {*bell, "w13_scale", "w2_scale", "spread"}
    return shapes and not more and not {*p.get("routing_recipe", {})} - {"kind"}
