"""The known mistakes that explain wrong staged values, ids or weights of a batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megamoe.explain import deviations
from megamoe.explain.deviations import copies
from megamoe.explain.deviations.shown import zeros
from megamoe.explain.life import Life
from megamoe.explain.match import Evidence, Fit, report
from megamoe.explain.overflow import overflow
from megamoe.explain.rules import phrase
from megamoe.explain.sources import Tokens
from megamoe.explain.staged_batch import VALUES, Batch, StagedOutput, differs
from megamoe.oracle.staging import quantize
from megamoe.spec.accumulators import accumulator
from megamoe.spec.contract import Contract
from megamoe.spec.formats import bf16_decode
from megamoe.spec.tensors import TENSORS

Array = npt.NDArray[Any]
Bools = npt.NDArray[np.bool_]
Plain = dict[str, Any]
_SAMPLE: Final = 16
"""Tokens on which each deviation is tried: computed one by one."""
_EVIDENCE: Final = 8
"""Bytes that a deviation must explain where it holds for some tokens only."""


def of_values(
    batch: Batch, output: StagedOutput, right: Mapping[str, Array], contract: Contract
) -> Plain:  # fmt: skip
    """The causes of wrong ``x`` and ``x_sf``, which one deviation explains together, by all values
    of some tokens."""
    actual = output.tensors
    whole = np.concatenate([differs(name, actual[name], right[name]) for name in VALUES], axis=1)
    where = f"at {phrase(np.asarray(whole.any(axis=1)))}"
    some = _some(whole)

    def masks(x: Array, sf: Array) -> Bools:
        """Of ``some``; ``sf`` in words."""
        pair = differs("x", actual["x"][some], x), differs("x_sf", actual["x_sf"][some], sf)
        return np.concatenate(pair, axis=1)

    x, sf, wrong = right["x"], right["x_sf"], whole[some]
    rows = batch.tokens + max((len(rest) for rest in output.beyond.values()), default=0)
    word = np.frombuffer(bytes([output.blank]) * 4, np.int32)[0]
    fits = [
        _fit(name, wrong, masks(x[some], array[some]), 1)
        for name, array in copies.words(sf, rows, word) if (array != sf).any()
    ]  # fmt: skip
    no_x, no_sf = np.full_like(x, output.blank)[some], np.full_like(sf, word)[some]
    ways = {
        "scale words are not written": (x[some], no_sf),
        "x is not written": (no_x, sf[some]),
        "neither x nor x_sf is written": (no_x, no_sf),
        **dict(_one_by_one(batch, some, contract)),
    }
    values = bf16_decode(batch.hidden[some])
    for name, change in zeros(values, x[some], actual["x"][some]):
        ways[name] = change(values, x[some]), sf[some]
    fits += [_fit(name, wrong, masks(*way), 1, where) for name, way in ways.items()]
    what = "codes and scale bytes of x"
    if len(some) < batch.tokens:
        what += f" (of {len(some)} tokens of {batch.tokens})"
    codes = x.shape[1]
    by_group = np.concatenate([wrong[:, codes:], wrong[:, :codes]], axis=1)
    evidence = Evidence.of_groups("staging", by_group)
    parts = {"x": wrong[:, :codes], "x_sf": wrong[:, codes:]}
    counts = []
    for name, mask in parts.items():
        have, want = (TENSORS[name].elements(bits[name])[some] for bits in (actual, right))
        counts.append(overflow(name, have, want, want, mask))
    return {**report(fits, evidence, wrong.size, what, len(fits)), "overflow": counts}


def _some(wrong: Bools) -> Array:
    """Tokens to look at: those with most wrong values, and some that are right."""
    count = wrong.sum(axis=1)
    order = np.argsort(-count, kind="stable")
    bad = order[: int((count > 0).sum())]
    good = order[len(bad) :]
    few = min(len(good), _SAMPLE // 4)
    last = np.flatnonzero(count > 0)[-1:]
    return np.unique(np.concatenate([bad[: _SAMPLE - 1 - few], last, good[:few]]))


def _one_by_one(
    batch: Batch, some: Array, contract: Contract
) -> Iterator[tuple[str, tuple[Array, Array]]]:
    """Each deviation of the catalogue that applies to all of these tokens, with ``x`` and the
    words of ``x_sf`` of them."""
    by_name: dict[str, list[tuple[Array, Array]]] = {}
    own: dict[int, tuple[Array, Array]] = {}
    for place, at in enumerate(some.tolist()):
        life = _staged_token(batch, at, contract)
        own[place] = life.x, life.x_sf
        for way in deviations.of_staging(life, batch):
            with np.errstate(all="ignore"):
                pair = way.row()
            if pair is not None:
                several = by_name.setdefault(way.name, [])
                # A token to which it does not apply is staged as it should be.
                several += [own[k] for k in range(len(several), place)]
                several.append(pair)
    for name, rows in by_name.items():
        rows += [own[k] for k in range(len(rows), len(some))]
        x, sf = (np.stack([row[k] for row in rows]) for k in (0, 1))
        yield name, (x, np.ascontiguousarray(sf.astype(np.uint8)).view(np.int32))


def _staged_token(source: Tokens, at: int, contract: Contract) -> Life:
    """Token ``at`` up to ``x`` alone: no slot and no channel of ``y``."""
    token = source.token(at)
    x, x_sf = (rows[0] for rows in quantize(token.hidden[None], contract))
    none, y = np.zeros(0, np.int64), np.zeros(0, np.uint16)
    return Life(at, token, none, accumulator("exact"), x, x_sf, [], y, y, y, contract)


def of_copies(
    name: str, ways: Iterable[tuple[str, Array]], batch: Batch, output: StagedOutput,
    right: Mapping[str, Array],
) -> Plain:  # fmt: skip
    """The causes of wrong ids or weights."""
    expected, actual = right[name], output.tensors[name]
    size = expected.dtype.itemsize
    blank = (
        np.full(expected.size * size, output.blank, np.uint8)
        .view(expected.dtype)
        .reshape(expected.shape)
    )
    every = [(f"{name} is not written", blank), (f"{name} is zero", np.zeros_like(expected))]
    if batch.padding is not None:
        source: Array = batch.weights if name == "topk_weights" else batch.ids.astype(np.int64)
        every.append((f"padding rows of {name} are those of tokens", source.view(expected.dtype)))
    with np.errstate(all="ignore"):
        every += [way for way in ways if way[1].shape == expected.shape]
    wrong = differs(name, actual, expected)
    where = f"at {phrase(np.asarray(wrong.any(axis=1)))}"
    fits = [_fit(what, wrong, differs(name, actual, copy), size, where)
            for what, copy in every if differs(name, copy, expected).any()]  # fmt: skip
    # Ids and weights are copied, so each byte of them is evidence.
    several = Evidence.of_elements("staging", wrong)
    evidence = replace(several, decisions=several.values * size)
    return report(fits, evidence, wrong.size, f"elements of {name}", len(fits))


def _fit(name: str, wrong: Bools, way: Bools, size: int, where: str = "") -> Fit:
    """The fit to ``(T, n)`` values of ``size`` bytes: for all tokens, or, if ``where`` names the
    wrong tokens, for these alone."""
    differing, hits = int(wrong.sum()), int((wrong & ~way).sum())
    contradicts = int((~wrong & way).sum())
    if where and contradicts and not way[wrong.any(axis=1)].any() and hits * size >= _EVIDENCE:
        return Fit(name, "staging", where, hits, differing, 0)
    return Fit(name, "staging", "", hits, differing, contradicts)


__all__ = ["of_copies", "of_values"]
