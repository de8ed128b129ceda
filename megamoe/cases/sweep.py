"""Weights whose scale bytes go from expert to expert: recipe kind ``sweep``.

Token ``t`` goes to expert ``t`` (routing ``rotate``, top-k 1). The hidden states of the token or
its routing weight compensate the byte (``log2_step`` of their recipes). So a case reaches a range
of bytes, each in sums of ordinary size, where an error of one byte shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from megamoe.spec.formats import U8

_OF: Final[Mapping[str, Mapping[str, Any]]] = {
    "carrier": {"kind": "carrier", "w2": "signed-probe"},
    "probe": {"w13": "signed-probe", "w2": "signed-probe"},
}
_BYTES: Final = ("gate_scale", "up_scale", "w2_scale")


def base(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of :func:`megamoe.cases.weights.expert_weights` without its scale bytes.

    ``of`` is ``carrier`` (the default) or ``probe``. In ``probe`` linear 1, and in both linear 2,
    has one weight in ``probe_every`` that is not zero, so that a sum is one product.
    ``gate_scale``, ``up_scale`` and ``w2_scale`` are ``[byte of expert 0, step from one expert to
    the next]``. ``ValueError`` for another key.
    """
    unknown = sorted(set(recipe) - {"kind", "of", "probe_every", *_BYTES})
    if unknown or recipe.get("of", "carrier") not in _OF or not set(_BYTES) <= set(recipe):
        raise ValueError(
            f"weights recipe 'sweep': has {sorted(recipe)}; it needs {', '.join(_BYTES)} and may "
            f"have of ({' or '.join(_OF)}) and probe_every"
        )
    every = {"probe_every": recipe["probe_every"]} if "probe_every" in recipe else {}
    return {**_OF[recipe.get("of", "carrier")], **every}


def scaled(
    weights: tuple[U8, U8, U8, U8], expert: int, recipe: Mapping[str, Any]
) -> tuple[U8, U8, U8, U8]:
    """``weights`` with the scale bytes of ``expert``; ``ValueError`` beyond 0 to 255."""
    w13, w13_sf, w2, w2_sf = weights
    half = len(w13_sf) // 2
    for name, part in zip(_BYTES, (w13_sf[:half], w13_sf[half:], w2_sf), strict=True):
        first, step = recipe[name]
        byte = first + step * expert
        if not 0 <= byte <= 255:
            raise ValueError(f"weights recipe 'sweep': {name} of expert {expert} is {byte}")
        part[:] = byte
    return w13, w13_sf, w2, w2_sf
