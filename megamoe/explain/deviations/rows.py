"""Deviations by a wrong index: the row of another token, or another weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from megamoe.explain.deviations.by_expert import sorted_weights
from megamoe.explain.life import Life, Slot
from megamoe.explain.sources import Tokens
from megamoe.oracle.staging import quantize
from megamoe.spec.formats import U8


def other_tokens(life: Life, source: Tokens) -> Iterator[tuple[str, int]]:
    """Rows that an index of the token alone can hit by mistake, without those out of range."""
    at, slots, tokens = life.at, len(life.token.ids), source.tokens
    candidates = {
        "the row of the token before": at - 1,
        "the row of the token after": at + 1,
        "the row of token 0": 0,
        f"the row of token i * {slots}, i the token": at * slots,
        f"the row of token i / {slots}, i the token": at // slots,
        "the row of the same place in the first 128 tokens": at % 128,
        "the row of the same place in the first 256 tokens": at % 256,
        "the row of the same place from the end": tokens - 1 - at,
    }
    yield from _once(candidates, at, tokens)


_TOKENS_AT_MOST: Final = 1024
"""Tokens whose ids are read to number the rows of experts."""


@dataclass(frozen=True)
class ExpertRows:
    """The rows of each expert, in the order of tokens and slots."""

    tokens: dict[int, list[int]]
    """Expert to the token of each of its rows."""
    at: dict[tuple[int, int], int]
    """Token and slot to the row within the expert."""

    @classmethod
    def of(cls, source: Tokens) -> ExpertRows:
        """None of a batch that is too long to be read."""
        index = cls({}, {})
        for token in range(source.tokens if source.tokens <= _TOKENS_AT_MOST else 0):
            for slot, expert in enumerate(source.token(token).ids.tolist()):
                if expert >= 0:
                    rows = index.tokens.setdefault(expert, [])
                    index.at[token, slot] = len(rows)
                    rows.append(token)
        return index

    def others(self, token: int, slot: Slot) -> dict[str, int]:
        """The tokens of rows that an index within experts can hit by mistake."""
        row = self.at.get((token, slot.slot))
        if row is None:
            return {}
        own = self.tokens[slot.expert]
        candidates = {"the first row of its expert": own[0]}
        for by, side in ((-1, "before"), (1, "after")):
            if 0 <= row + by < len(own):
                candidates[f"the row {side} within its expert"] = own[row + by]
            other = self.tokens.get(slot.expert + by, [])
            if row < len(other):
                candidates[f"the row of the same place in the expert {side}"] = other[row]
        return candidates


def other_tokens_of(life: Life, slot: Slot, source: Tokens, experts: ExpertRows) -> dict[str, int]:
    """The same, and rows that an index of the token and its slot can hit."""
    at, k, slots, tokens = life.at, slot.slot, len(life.token.ids), source.tokens
    return dict(other_tokens(life, source)) | dict(
        _once(
            {
                "the row of the slot's index, i * K + k": at * slots + k,
                "the row of slot order, k": k,
                "the row of the slot's index modulo T": (at * slots + k) % tokens,
                "the row of the transposed index, (k * T + i) / K": (k * tokens + at) // slots,
                **experts.others(at, slot),
            },
            at,
            tokens,
        )
    )


def staged_row(life: Life, source: Tokens, token: int) -> tuple[U8, U8]:
    """Codes and scale bytes of a token, staged as they should be."""
    codes, sf = quantize(source.token(token).hidden[None], life.contract)
    return codes[0], sf[0]


def _once(candidates: dict[str, int], at: int, tokens: int) -> Iterator[tuple[str, int]]:
    for name, token in candidates.items():
        if token != at and 0 <= token < tokens:
            yield name, token


def other_weights(life: Life, source: Tokens) -> dict[str, dict[int, np.float32]]:
    """The routing weight of each slot under a wrong index, by name."""
    at, weights, tokens = life.at, life.token.weights, source.tokens
    slots = len(weights)
    live = [slot.slot for slot in life.slots if slot.slot < slots]
    candidates = {
        "the routing weight is that of slot 0": dict.fromkeys(live, weights[0]),
        "the routing weight is that of the slot before": {k: weights[k - 1] for k in live},
        "the routing weight is that of the slot after": {k: weights[(k + 1) % slots] for k in live},
        "routing weights are in reverse order": {k: weights[slots - 1 - k] for k in live},
        "routing weights are in the order of their experts": _by_expert(life, live),
    }
    for name, token in (("before", at - 1), ("after", at + 1)):
        if 0 <= token < tokens:
            other = source.token(token).weights
            candidates[f"the routing weight is that of the token {name}"] = {
                k: other[k] for k in live
            }
    places = {k: divmod(k * tokens + at, slots) for k in live}
    candidates["the routing weight is read from the transposed index"] = {
        k: source.token(token).weights[slot] for k, (token, slot) in places.items()
    }
    candidates["routing weights are transposed"] = {
        k: source.token(flat % tokens).weights[flat // tokens]
        for k, flat in ((k, at * slots + k) for k in live)
    }
    for stride in (8, 16):
        if slots < stride:
            read = {k: divmod((at * stride + k) % (tokens * slots), slots) for k in live}
            candidates[f"routing weights are read with a stride of {stride}"] = {
                k: source.token(token).weights[slot] for k, (token, slot) in read.items()
            }
    candidates |= sorted_weights(source, at)
    order = [*live, *(k for k in range(slots) if k not in live)]
    if order != sorted(order):
        candidates["routing weights skip slots without an expert"] = {
            k: weights[order[k]] for k in live
        }
    candidates["NaN among routing weights is read as zero"] = {
        k: np.float32(0) if np.isnan(weights[k]) else weights[k] for k in live
    }
    most = np.finfo(np.float32).max
    candidates["infinite routing weights are held to the largest number"] = {
        k: np.clip(weights[k], -most, most) for k in live
    }
    with np.errstate(over="ignore", invalid="ignore"):
        candidates["routing weights are truncated to bfloat16"] = {
            k: _truncated(weights[k]) for k in live
        }
        candidates["subnormal routing weights are flushed to zero"] = {
            k: np.float32(0) if abs(weights[k]) < 2.0**-126 else weights[k] for k in live
        }
    total = np.float32(sum(weights[k] for k in live))
    if total and np.isfinite(total):
        candidates["routing weights are normalised to a sum of 1"] = {
            k: np.float32(weights[k] / total) for k in live
        }
    return candidates


def _truncated(weight: np.float32) -> np.float32:
    bits = np.array([weight], np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32)[0]


def _by_expert(life: Life, live: list[int]) -> dict[int, np.float32]:
    order = sorted(live, key=lambda k: life.token.ids[k])
    return {k: life.token.weights[order[place]] for place, k in enumerate(live)}
