"""Staging alone: which staged tensor of a batch is wrong, where, and by which known mistake."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megamoe.explain import deviations
from megamoe.explain.deviations import copies
from megamoe.explain.life import Life
from megamoe.explain.match import Evidence, Fit, report
from megamoe.explain.places import phrase
from megamoe.explain.sources import Token, Tokens
from megamoe.judge import Finding, bitwise, place_of
from megamoe.oracle.staging import quantize
from megamoe.spec.accumulators import accumulator
from megamoe.spec.contract import Contract
from megamoe.spec.features import Activation
from megamoe.spec.formats import F32, GROUP, U16, bf16_decode, unpack_sf
from megamoe.spec.forms import E4M3
from megamoe.spec.tensors import OPERATIONS, TENSORS

Array = npt.NDArray[Any]
Bools = npt.NDArray[np.bool_]
Plain = dict[str, Any]
NAMES: Final = OPERATIONS["prepare"].returns
VALUES: Final = ("x", "x_sf")
"""What is computed; ids and weights are copied."""
_TRIED: Final = 16
"""Tokens on which each deviation is tried: computed one by one."""
_EVIDENCE: Final = 8
"""Bytes that a deviation must explain where it holds for some tokens only."""


@dataclass(frozen=True)
class Batch:
    """The inputs of one staging call; a source of tokens for the catalogue."""

    hidden: U16
    """(T, H) bfloat16 bits."""
    ids: Array
    """(T, K) int32 or int64."""
    weights: F32
    """(T, K)."""
    experts: int
    padding: Bools | None = None
    """(T,)."""

    @property
    def tokens(self) -> int:
        return len(self.hidden)

    @property
    def hidden_size(self) -> int:
        return self.hidden.shape[1]

    def token(self, at: int) -> Token:
        """Its row; the sizes of the layer behind it play no part."""
        act = Activation("swiglu", None, 1.0, 0.0, True)
        return Token(self.hidden[at], self.ids[at], self.weights[at], 0, self.experts, act)


@dataclass(frozen=True)
class Shown:
    """What a backend staged."""

    tensors: Mapping[str, Array]
    """By name of ``NAMES``, as bits: the rows of the batch."""
    beyond: Mapping[str, Array]
    """The rows of the buffer after them; none where they are not known."""
    blank: int
    """The byte that stood everywhere before the call."""


def explain_staging(
    batch: Batch, right: Mapping[str, Array], shown: Shown, contract: Contract
) -> Plain:
    """What is wrong of the staged tensors, as plain data: the findings of each, the causes, and
    the group of the worst value of ``x`` or ``x_sf``. ``right``: bits by name of ``NAMES``."""
    findings = [_finding(name, shown.tensors[name], right[name], batch) for name in NAMES]
    wrong = {f.stage: f for f in findings if f.outside}
    causes: list[Plain] = []
    if any(name in wrong for name in VALUES):
        causes.append(_values(batch, shown, right, contract))
    masked = batch.ids < 0
    if "topk_idx" in wrong:
        ways = copies.ids(batch.ids, batch.experts)
        causes.append(_copied("topk_idx", ways, batch, shown, right))
    if "topk_weights" in wrong:
        ways = ((name, made.astype(np.float32).view(np.uint32))
                for name, made in copies.weights(batch.weights, masked))  # fmt: skip
        causes.append(_copied("topk_weights", ways, batch, shown, right))
    first = next((wrong[name] for name in (*VALUES, *NAMES) if name in wrong), None)
    worst = None if first is None else first.worst
    return {
        "contract": contract.revision,
        "tokens": batch.tokens,
        "stages": [
            {"stage": f.stage, "outside": f.outside, "of": f.total,
             "worst": None if f.worst is None else f.worst.line()} for f in findings
        ],
        "explanations": causes,
        "beyond": [line for name in NAMES for line in _beyond(name, batch, shown)],
        "worst": None if worst is None else worst.line(),
        "group": (
            group(batch, right, worst.token, worst.channel, shown)
            if worst is not None and worst.stage in VALUES and worst.token is not None
            and worst.channel is not None else None
        ),
    }  # fmt: skip


def group(
    batch: Batch, right: Mapping[str, Array], token: int, channel: int, shown: Shown | None
) -> Plain:
    """The values of a channel's group: hidden states, amax, scale byte and codes, right and
    shown."""
    first = channel // GROUP * GROUP
    part = slice(first, first + GROUP)
    hidden = bf16_decode(batch.hidden[token, part])
    finite = np.where(np.isnan(hidden), 0, np.abs(hidden))
    at = int(np.argmax(finite))

    def byte(words: Array) -> int:
        return int(unpack_sf(words[token])[first // GROUP])

    return {
        "token": token, "channel": channel, "group": first // GROUP, "first": first,
        "amax": float(finite[at]), "set_by": first + at,
        "amax_over_448": float(np.float32(finite[at]) / np.float32(448)),
        "byte": byte(right["x_sf"]),
        "shown_byte": None if shown is None else byte(shown.tensors["x_sf"]),
        "hidden": [f"0x{b:04x}" for b in batch.hidden[token, part]],
        "hidden_values": [float(v) for v in hidden],
        "codes": [E4M3.hex(c) for c in right["x"][token, part]],
        "shown_codes": (
            None if shown is None else [E4M3.hex(c) for c in shown.tensors["x"][token, part]]
        ),
    }  # fmt: skip


# --- the comparison -----------------------------------------------------------------------------


def _finding(name: str, got: Array, right: Array, batch: Batch) -> Finding:
    tensor, ids = TENSORS[name], batch.ids
    pair = tensor.elements(got), tensor.elements(right)
    return bitwise(name, tensor.form_of(got), *pair, place_of(name, ids=ids))


def _differs(name: str, got: Array, want: Array) -> Bools:
    """``(T, n)``: elements of other bits; NaN equals NaN."""
    tensor = TENSORS[name]
    form = tensor.form_of(got)
    got, want = tensor.elements(got), tensor.elements(want)
    return (got != want) & ~(form.is_nan(got) & form.is_nan(want))


def _beyond(name: str, batch: Batch, shown: Shown) -> Iterator[str]:
    """What stands in rows of the buffer after the batch, if anything was written there."""
    rest = shown.beyond.get(name)
    if rest is None or not rest.size:
        return
    bytes_ = np.ascontiguousarray(rest).view(np.uint8).reshape(len(rest), -1)
    written = bytes_ != shown.blank
    if not written.any():
        return
    rows = np.flatnonzero(written.any(axis=1))
    whole = np.ascontiguousarray(shown.tensors[name]).view(np.uint8)
    whole = whole.reshape(batch.tokens, -1)
    content = bytes_[rows]
    what = "other bytes"
    if not content.any():
        what = "zeros"
    elif (content == 0xFF).all():
        what = "-1 in every element"
    elif batch.tokens and (content == whole[-1]).all():
        what = "the row of the last token"
    first, last = batch.tokens + int(rows[0]), batch.tokens + int(rows[-1])
    yield (
        f"{name}: rows beyond the {batch.tokens} tokens are written: {int(written.sum())} bytes in "
        f"rows {first} to {last} of {batch.tokens + len(rest)}, with {what}"
    )


# --- the causes ---------------------------------------------------------------------------------


def _values(
    batch: Batch, shown: Shown, right: Mapping[str, Array], contract: Contract
) -> Plain:  # fmt: skip
    """The causes of wrong ``x`` and ``x_sf``, which one deviation explains together, by all values
    of some tokens."""
    got = shown.tensors
    whole = np.concatenate([_differs(name, got[name], right[name]) for name in VALUES], axis=1)
    where = f"at {phrase(np.asarray(whole.any(axis=1)))}"
    some = _some(whole)

    def masks(x: Array, sf: Array) -> Bools:
        """Of ``some``; ``sf`` in words."""
        pair = _differs("x", got["x"][some], x), _differs("x_sf", got["x_sf"][some], sf)
        return np.concatenate(pair, axis=1)

    x, sf, wrong = right["x"], right["x_sf"], whole[some]
    rows = batch.tokens + max((len(rest) for rest in shown.beyond.values()), default=0)
    word = np.frombuffer(bytes([shown.blank]) * 4, np.int32)[0]
    fits = [
        _fit(name, wrong, masks(x[some], made[some]), 1)
        for name, made in copies.words(sf, rows, word) if (made != sf).any()
    ]  # fmt: skip
    no_x, no_sf = np.full_like(x, shown.blank)[some], np.full_like(sf, word)[some]
    ways = {
        "scale words are not written": (x[some], no_sf),
        "x is not written": (no_x, sf[some]),
        "neither x nor x_sf is written": (no_x, no_sf),
        **dict(_one_by_one(batch, some, contract)),
    }
    fits += [_fit(name, wrong, masks(*made), 1, where) for name, made in ways.items()]
    what = "codes and scale bytes of x"
    if len(some) < batch.tokens:
        what += f" (of {len(some)} tokens of {batch.tokens})"
    codes = x.shape[1]
    by_group = np.concatenate([wrong[:, codes:], wrong[:, :codes]], axis=1)
    evidence = Evidence.of_groups("staging", by_group)
    return report(fits, evidence, wrong.size, what, len(fits))


def _some(wrong: Bools) -> Array:
    """Tokens to look at: those with most wrong values, and some that are right."""
    count = wrong.sum(axis=1)
    order = np.argsort(-count, kind="stable")
    bad = order[: int((count > 0).sum())]
    good = order[len(bad) :]
    few = min(len(good), _TRIED // 4)
    last = np.flatnonzero(count > 0)[-1:]
    return np.unique(np.concatenate([bad[: _TRIED - 1 - few], last, good[:few]]))


def _one_by_one(
    batch: Batch, some: Array, contract: Contract
) -> Iterator[tuple[str, tuple[Array, Array]]]:
    """Each deviation of the catalogue that applies to all of these tokens, with ``x`` and the
    words of ``x_sf`` of them."""
    found: dict[str, list[tuple[Array, Array]]] = {}
    own: dict[int, tuple[Array, Array]] = {}
    for place, at in enumerate(some.tolist()):
        life = _staged_token(batch, at, contract)
        own[place] = life.x, life.x_sf
        for way in deviations.of_staging(life, batch):
            with np.errstate(all="ignore"):
                made = way.staged()
            if made is not None:
                several = found.setdefault(way.name, [])
                # A token to which it does not apply is staged as it should be.
                several += [own[k] for k in range(len(several), place)]
                several.append(made)
    for name, rows in found.items():
        rows += [own[k] for k in range(len(rows), len(some))]
        x, sf = (np.stack([row[k] for row in rows]) for k in (0, 1))
        yield name, (x, np.ascontiguousarray(sf.astype(np.uint8)).view(np.int32))


def _staged_token(source: Tokens, at: int, contract: Contract) -> Life:
    """Token ``at`` up to ``x`` alone: no slot and no channel of ``y``."""
    token = source.token(at)
    x, x_sf = (made[0] for made in quantize(token.hidden[None], contract))
    none, y = np.zeros(0, np.int64), np.zeros(0, np.uint16)
    return Life(at, token, none, accumulator("exact"), x, x_sf, [], y, y, y, contract)


def _copied(
    name: str, ways: Iterable[tuple[str, Array]], batch: Batch, shown: Shown,
    right: Mapping[str, Array],
) -> Plain:  # fmt: skip
    """The causes of wrong ids or weights."""
    want, got = right[name], shown.tensors[name]
    size = want.dtype.itemsize
    blank = np.full(want.size * size, shown.blank, np.uint8).view(want.dtype).reshape(want.shape)
    every = [(f"{name} is not written", blank), (f"{name} is zero", np.zeros_like(want))]
    if batch.padding is not None:
        given: Array = batch.weights if name == "topk_weights" else batch.ids.astype(np.int64)
        every.append((f"padding rows of {name} are those of tokens", given.view(want.dtype)))
    with np.errstate(all="ignore"):
        every += [way for way in ways if way[1].shape == want.shape]
    wrong = _differs(name, got, want)
    where = f"at {phrase(np.asarray(wrong.any(axis=1)))}"
    fits = [_fit(what, wrong, _differs(name, got, made), size, where)
            for what, made in every if _differs(name, made, want).any()]  # fmt: skip
    # Ids and weights are copied, so each byte of them is evidence.
    several = Evidence.of_elements("staging", wrong)
    evidence = replace(several, decisions=several.values * size)
    return report(fits, evidence, wrong.size, f"elements of {name}", len(fits))


def _fit(name: str, wrong: Bools, way: Bools, size: int, where: str = "") -> Fit:
    """The fit to ``(T, n)`` values of ``size`` bytes: for all tokens, or, if ``where`` names the
    wrong tokens, for these alone."""
    differing, explained = int(wrong.sum()), int((wrong & ~way).sum())
    contradicts = int((~wrong & way).sum())
    if where and contradicts and not way[wrong.any(axis=1)].any() and explained * size >= _EVIDENCE:
        return Fit(name, "staging", where, explained, differing, 0)
    return Fit(name, "staging", "", explained, differing, contradicts)


__all__ = ["NAMES", "Batch", "Shown", "explain_staging", "group"]
