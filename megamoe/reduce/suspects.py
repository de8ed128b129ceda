"""The cases to try before a case, for ``reduce --after``: the likely ones first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from megamoe.cases import SIZES, Case, form_of, shards
from megamoe.cases.needs import lacking
from megamoe.printable import quantity
from megamoe.worker.session import Identity

SHAPE: Final = ("hidden", "intermediate", "top_k")
"""Sizes by which a kernel chooses its buffers; the number of tokens and experts varies more."""
LIKELY: Final = 24
"""Earlier cases like it that are tried singly before groups of them."""
NEAREST: Final = 6
"""Cases before it in the order of a run that are tried singly before those: in a run, one of them
had made the call just before, in the same process or in another one."""


def eligible(
    case: Case, cases: Sequence[Case], identity: Identity, seconds: Mapping[str, float]
) -> list[Case]:
    """The cases that may stand before ``case``, in the order of a run: small ones, other than
    itself, that call the same method and that the backend provides."""
    needs = form_of(case.kind).needs
    return [
        one for one in shards.small_first(cases, seconds)
        if form_of(one.kind).needs == needs and identity.contract in one.revisions
        and seconds.get(one.id, 0.0) <= shards.SMALL_SECONDS
        and one.id != case.id and not lacking(one, identity)
    ]  # fmt: skip


def nearest(case: Case, others: Sequence[Case], seconds: Mapping[str, float]) -> list[Case]:
    """The last of ``others`` that stand before ``case`` in the order of a run of all of them, at
    most :data:`NEAREST`; the very last first."""
    order = shards.small_first([*others, case], seconds)
    return order[: order.index(case)][: -NEAREST - 1 : -1]


def likely(case: Case, others: Sequence[Case], seconds: Mapping[str, float]) -> list[Case]:
    """The first to try singly, at most :data:`LIKELY`. A buffer that is kept is as large as the
    largest call so far, and is often chosen by H, I and top-k: so those with as many values that
    share these sizes stand first."""
    least = _values(case)

    def key(one: Case) -> tuple[int, float]:
        unlike = sum(one.params.get(name) != case.params.get(name) for name in SHAPE)
        return unlike + 2 * (_values(one) < least), seconds.get(one.id, 0.0)

    return sorted(others, key=key)[:LIKELY]


def _values(case: Case) -> int:
    """Values of all slots in the largest call of the case. Law ``padding-rows`` fills the buffer
    with rows."""
    p = case.params
    tokens = p.get("capacity" if p.get("law") == "padding-rows" else "tokens", 1)
    count: int = tokens * p.get("top_k", 1) * p.get("hidden", 1)
    return count


def groups(case: Case, others: Sequence[Case]) -> Iterator[tuple[str, list[Case]]]:
    """Earlier cases to try together, in words and in the order of ``others``: those that share most
    with ``case`` first, each once."""
    rest = list(others)
    for what, names in (("of all its sizes", SIZES), ("of its H, I and top-k", SHAPE), ("", ())):
        group = [one for one in rest if _sizes(one, names) == _sizes(case, names)]
        rest = [one for one in rest if one not in group]
        if group:
            yield f"{quantity(len(group), 'case')} {what or 'of other sizes'}", group


def _sizes(case: Case, names: Sequence[str]) -> list[int | None]:
    return [case.params.get(name) for name in names]
