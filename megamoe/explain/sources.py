"""The source of one token's operands: a problem in memory, or a case, row by row.

A token of DeepSeek-V4-Pro needs all of w13 of its six experts, but only one row of each w2. The
streams of :mod:`megamoe.cases.counter` are addressable, so only these rows are computed. The bits
are those of :func:`megamoe.cases.recipes.forward_problem`, which a test checks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from megamoe.cases import Case
from megamoe.cases.counter import below, key, words
from megamoe.cases.forms import act_of
from megamoe.cases.recipes import hidden_states, routing, twins
from megamoe.cases.streams import W2, W2_SF, W13, W13_SF
from megamoe.cases.weights import LUTS, carry
from megamoe.spec.features import Activation
from megamoe.spec.formats import GROUP, U8, U16
from megamoe.spec.forms import bits
from megamoe.spec.problem import Problem

_WORDS_AT_ONCE: Final = 1 << 15
"""Words of 8 bytes: a part of the stream that fits in a second-level cache."""

_CACHE_SIZE: Final = 1024
"""Tokens of a case that are kept: many deviations read the weights of a whole batch."""


@dataclass(frozen=True)
class Token:
    """One token's own operands, and the data that all tokens of the call share."""

    hidden: U16
    """(H,) bfloat16 bits."""
    ids: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]
    """(K,)."""
    intermediate: int
    experts: int
    act: Activation
    dtype: str = "bf16"
    """The format of slot rows in the combine."""
    output: U16 | None = None
    """(H,) bfloat16 bits that are added in the end."""


class Tokens(Protocol):
    """The inputs of staging: all that a call has besides weights."""

    @property
    def tokens(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    def token(self, at: int) -> Token: ...


class Source(Tokens, Protocol):
    """The operands of a forward call. ``ValueError`` for a token that is not there."""

    def w13(self, expert: int) -> tuple[U8, U8]:
        """``(2I, H/2)`` and ``(2I, H/32)``."""

    def w2(self, expert: int, channels: npt.NDArray[np.int64]) -> tuple[U8, U8]:
        """Rows ``channels``: ``(n, I/2)`` and ``(n, I/32)``."""

    def shared_w13(self) -> tuple[U8, U8] | None:
        """``(2S, H)`` and ``(2S, H/32)``; None where there is no fused shared expert."""

    def shared_w2(self, channels: npt.NDArray[np.int64]) -> tuple[U8, U8]:
        """Rows ``channels``: ``(n, S)`` and ``(n, S/32)``."""


class FromProblem:
    """Slices of a problem's tensors."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.tokens, self.hidden_size = problem.hidden_states.shape

    def token(self, at: int) -> Token:
        p = self.problem
        return Token(
            bits(p.hidden_states[at]), p.topk_ids[at].numpy(), p.topk_weights[at].numpy(),
            p.intermediate_size, p.num_experts, p.act, p.combine_dtype,
            None if p.shared_output is None else bits(p.shared_output[at]),
        )  # fmt: skip

    def w13(self, expert: int) -> tuple[U8, U8]:
        p = self.problem
        return p.w13_weight[expert].numpy(), p.w13_weight_scale[expert].numpy()

    def w2(self, expert: int, channels: npt.NDArray[np.int64]) -> tuple[U8, U8]:
        p = self.problem
        return p.w2_weight[expert].numpy()[channels], p.w2_weight_scale[expert].numpy()[channels]

    def shared_w13(self) -> tuple[U8, U8] | None:
        weights = self.problem.shared_weights
        return (weights[0].numpy(), weights[1].numpy()) if weights else None

    def shared_w2(self, channels: npt.NDArray[np.int64]) -> tuple[U8, U8]:
        _, _, w2, w2_sf = self.problem.shared_weights
        return w2.numpy()[channels], w2_sf.numpy()[channels]


class FromCase:
    """Operands from a case's recipe, computed on demand. For plain SwiGLU of routed experts."""

    @staticmethod
    def can_make(case: Case) -> bool:
        """Whether the case's weights are of a recipe whose rows can be computed alone."""
        recipe = case.params.get("weights_recipe", {})
        return recipe.get("kind", "table") in ("table", "carrier") and (
            recipe.get("w13", "bell") in LUTS and recipe.get("w2", "bell") in (*LUTS, "probe")
        )

    def __init__(self, case: Case) -> None:
        p = case.params
        self.case = case
        self.tokens, self.hidden_size = p["tokens"], p["hidden"]
        self.intermediate = p["intermediate"]
        self.recipe = _recipe(self.hidden_size, p.get("weights_recipe", {}))
        self.token = lru_cache(_CACHE_SIZE)(self._token)

    def _token(self, at: int) -> Token:
        p, seed = self.case.params, self.case.seed
        one = np.array([at])
        if "distinct" in p:
            one = twins(seed, p["distinct"], one)
        ids, weights = routing(seed, one, p["experts"], p["top_k"], p.get("routing_recipe", {}))
        hidden = hidden_states(seed, one, self.hidden_size, p.get("hidden_recipe", {}))
        act = act_of(p)
        return Token(hidden[0], ids[0], weights[0], self.intermediate, p["experts"], act)

    def shared_w13(self) -> None:
        return None

    def shared_w2(self, channels: npt.NDArray[np.int64]) -> tuple[U8, U8]:
        raise NotImplementedError("a case with a shared expert is read from its problem")

    def w13(self, expert: int) -> tuple[U8, U8]:
        seed, o, hidden = self.case.seed, self.recipe, self.hidden_size
        owner, rows = 0 if o["same"] else expert, 2 * self.intermediate
        packed = _packed(key(seed, W13, owner), rows * hidden, o["w13"]).reshape(rows, -1)
        if o["carriers"]:
            carry(packed, key(seed, W13, owner, 1), o)
        low, octaves = o["w13_scale"]
        count = rows * hidden // GROUP
        sf = (below(key(seed, W13_SF, owner), count, octaves) + low).astype(np.uint8)
        return packed, sf.reshape(rows, -1)

    def w2(self, expert: int, channels: npt.NDArray[np.int64]) -> tuple[U8, U8]:
        seed, o, inter = self.case.seed, self.recipe, self.intermediate
        owner, groups = 0 if o["same"] else expert, inter // GROUP
        low, octaves = o["w2_scale"]
        packed = np.empty((len(channels), inter // 2), np.uint8)
        sf = np.empty((len(channels), groups), np.uint8)
        for row, channel in enumerate(channels.tolist()):
            scales = below(key(seed, W2_SF, owner), groups, octaves, channel * groups)
            sf[row] = (scales + low).astype(np.uint8)
            packed[row] = self._w2_row(key(seed, W2, owner), channel, o)
        return packed, sf

    def _w2_row(self, stream: int, channel: int, o: dict[str, Any]) -> U8:
        inter = self.intermediate
        if o["w2"] == "probe":
            every = o["probe_every"]
            runs = inter // every
            choice = below(stream, runs, every * 14, channel * runs)
            nibbles = np.zeros(inter, np.uint8)
            code = choice % 14
            at = choice // 14 + np.arange(runs) * every
            nibbles[at] = (code % 7 + 1) | ((code >= 7) << 3)
            return (nibbles[0::2] | (nibbles[1::2] << 4)).astype(np.uint8)
        return _packed(stream, inter, o["w2"], channel * inter)


def _packed(stream: int, nibbles: int, name: str, start: int = 0) -> U8:
    """``nibbles`` packed nibbles of a table from the ``start``-th on (multiples of 16)."""
    if name == "uniform":
        first = start // 16
        return words(stream, nibbles // 16, first).astype("<u8", copy=False).view(np.uint8)
    table, out = _pairs(name), np.empty(nibbles // 2, np.uint8)
    total = nibbles // 8
    for at in range(0, total, _WORDS_AT_ONCE):
        count = min(_WORDS_AT_ONCE, total - at)
        raw = words(stream, count, start // 8 + at).astype("<u8", copy=False).view("<u2")
        out[at * 4 : (at + count) * 4] = table[raw]
    return out


@cache
def _pairs(name: str) -> U8:
    """Two random bytes to one packed byte, ``(65536,)``."""
    both = np.arange(65536)
    low, high = LUTS[name][both & 255], LUTS[name][both >> 8]
    return (low | (high << 4)).astype(np.uint8)


def _recipe(hidden: int, recipe: Any) -> dict[str, Any]:
    """The options of :func:`megamoe.cases.weights.expert_weights` with its defaults."""
    base: dict[str, Any] = {
        "w13": "bell", "w2": "bell", "w13_scale": (118, 2), "w2_scale": (119, 2), "carriers": 0,
        "closed_every": 4, "gate_open": 1.5, "up_open": 3.0, "probe_every": 128, "same": False,
        "gate_levels": (), "up_levels": (), "lower": 0,
    }  # fmt: skip
    if recipe.get("kind", "table") == "carrier":
        carriers = 16 if hidden <= 512 else 8 if hidden <= 2048 else 4
        near_four = 134 - (hidden * carriers * 20 // 17).bit_length()
        base |= {
            "w13": "grid", "w2": "sparse", "w2_scale": (118, 2), "carriers": carriers,
            "w13_scale": (near_four - recipe.get("lower", 0), 2), "gate_open": 1.0, "up_open": 2.0,
        }  # fmt: skip
    return {**base, **recipe}


__all__ = ["FromCase", "FromProblem", "Source", "Token", "Tokens"]
