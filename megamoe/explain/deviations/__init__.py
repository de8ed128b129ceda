"""The catalogue: known ways to be wrong, by stage.

| module | from | to |
|---|---|---|
| ``staging`` | hidden states | ``x``, ``x_sf`` |
| ``copies`` | hidden states, ids, weights | the buffer of a staging case as a whole |
| ``operands`` | what a linear reads: codes, scale bytes, nibbles, rows, experts | its sums |
| ``other_rows`` | the row of another token, or the weights of another expert | its sums |
| ``indices`` | the same from a wrong place, and the ends of their range | its sums |
| ``used_experts`` | the weights of the expert beside, of those with rows | its sums |
| ``neighbours`` | the activations of another row of the expert | sums of linear 2 |
| ``pipeline`` | scale bytes of an earlier block of K | its sums |
| ``swaps`` | scale bytes of the groups beside | its sums |
| ``sums`` | sums of 32 products | sums, and gate and up of them |
| ``activation`` | gate and up | fp32 activations |
| ``requantise`` | fp32 activations | ``l2_acts``, ``l2_acts_sf`` |
| ``zeros`` | ``x`` | sums and activations of a row of zeros |
| ``features`` | the same of alpha and beta, swiglustep and SiTU | fp32 activations |
| ``combine``, ``orders`` | sums of linear 2 | ``y`` |

``exponential`` has the exponential in silu, ``weights`` the places where the routing weight can be
applied, ``combiner`` the combine in steps. ``casts`` has what both quantisations can do wrong,
``rows`` which rows a wrong index reads, ``by_expert`` the routing weights that a sort by expert
misplaces, ``shown`` the deviations whose number is read from the output, ``roundings`` what happens
on the way to bfloat16, ``fp8_rows`` the rows of an FP8 combine. Another revision of the contract is
a deviation too.

To add one, name it in its module. A deviation replaces steps of :class:`megamoe.explain.ways.Way`.
"""

from __future__ import annotations

from collections.abc import Iterator

from megamoe.explain.deviations import (
    activation,
    combine,
    indices,
    neighbours,
    operands,
    other_rows,
    pipeline,
    requantise,
    sums,
    swaps,
    used_experts,
    zeros,
)
from megamoe.explain.deviations.staging import catalogue as of_staging
from megamoe.explain.life import Life
from megamoe.explain.sources import Source
from megamoe.explain.ways import Reader, Way, right
from megamoe.spec.contract import REVISIONS


def of_codes(life: Life, source: Source) -> Iterator[Way]:
    """The deviations from ``x`` to the codes of linear 2."""
    own = right(life)
    yield from zeros.catalogue(life)
    yield from activation.catalogue(life, source)
    yield from requantise.catalogue(life)
    for name, total in sums.TOTALS_OFF.items():
        yield own.variant(name, "linear 1", total=total)
    yield from _contracts(life)
    readers = {**_readers(life, source, 1), **other_rows.token_readers(life, source)}
    for name, reader in readers.items():
        yield own.variant(name, "linear 1", reads13=reader)


def of_y(life: Life, source: Source) -> Iterator[Way]:
    """The deviations from the codes of linear 2 to ``y``."""
    own = right(life)
    yield from combine.catalogue(life, source)
    for name, total in sums.TOTALS_OFF.items():
        yield own.variant(name, "linear 2", total=total)
    yield from _contracts(life)
    for name, reader in _readers(life, source, 2).items():
        yield own.variant(name, "linear 2", reads2=reader)


def of_all(life: Life, source: Source) -> Iterator[Way]:
    """The deviations from ``x`` to ``y``, for outputs without a stage between them."""
    own = right(life)
    yield from activation.catalogue(life, source)
    yield from requantise.catalogue(life)
    yield from combine.catalogue(life, source)
    for name, total in sums.TOTALS_OFF.items():
        yield own.variant(name, "linear 1 and 2", total=total)
    yield from _contracts(life)
    second = _readers(life, source, 2)
    for name, reader in second.items():
        yield own.variant(name, "linear 2", reads2=reader)
    for name, reader in {
        **_readers(life, source, 1),
        **other_rows.token_readers(life, source),
    }.items():
        yield own.variant(name, "linear 1", reads13=reader)
        if name in second:
            yield own.variant(name, "linear 1 and 2", reads13=reader, reads2=second[name])


def _readers(life: Life, source: Source, linear: int) -> dict[str, Reader]:
    return {
        **(dict(neighbours.readers(life, source)) if linear == 2 else {}),
        **operands.readers(linear), **indices.expert_readers(life),
        **other_rows.expert_of_slot(life, source), **dict(pipeline.readers(life, linear)),
        **dict(used_experts.readers(source)), **dict(swaps.readers()),
    }  # fmt: skip


def _contracts(life: Life) -> Iterator[Way]:
    for other in REVISIONS.values():
        if other.differences(life.contract) and life.is_known_to(other):
            way = right(life, other)
            steps = {"exponent": way.exponent, "combine": way.combine, "clamp": way.clamp,
                     "silu": way.silu, "up": way.up, "product": way.product, "amax": way.amax,
                     "values": way.values, "codes": way.codes, "halves": way.halves}  # fmt: skip
            name = f"all is as contract {other.revision} says"
            yield right(life).variant(name, "contract", contract=other, **steps)


__all__ = ["of_all", "of_codes", "of_staging", "of_y"]
