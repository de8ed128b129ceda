"""Classes of problems that seldom occur, and the conditions for them: one table.

The inputs or the oracle's stages decide whether a problem belongs to a class, never the way in
which it was drawn. So the counts at the end of a run describe the judged problems.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from megamoe.cases.stored import used_experts
from megamoe.oracle import ForwardGolden
from megamoe.spec.features import DIALECT_FORMATS, FEATURES
from megamoe.spec.formats import GROUP, bf16_decode, e4m3_decode
from megamoe.spec.forms import bits
from megamoe.spec.problem import Problem

Array = npt.NDArray[Any]
ROWS: Final = (1, 15, 16, 17, 127, 128, 129)
"""Rows of one expert, at and beside the edges of tiles."""
_STAGING_FLOOR: Final = 1e-4


@dataclass
class Instance:
    """A problem, with the oracle's stages for it."""

    problem: Problem
    golden: ForwardGolden
    sums: Array
    """(T, K, 2I) float64: linear 1, exact; empty for NVFP4."""
    _experts: Array = field(init=False)

    def __post_init__(self) -> None:
        self._experts = used_experts(self.problem).numpy()

    @cached_property
    def ids(self) -> Array:
        return self.problem.topk_ids.numpy()

    @cached_property
    def live(self) -> Array:
        return self.ids >= 0

    @cached_property
    def weights(self) -> Array:
        """(T, K) routing weights."""
        return self.problem.topk_weights.numpy()

    @cached_property
    def hidden(self) -> Array:
        """(T, H) bfloat16 bits."""
        return bits(self.problem.hidden_states)

    @cached_property
    def amax(self) -> Array:
        """(T, H/32) of the hidden states, without NaN."""
        values = np.abs(bf16_decode(self.hidden)).reshape(
            len(self.hidden), self.hidden.shape[1] // GROUP, GROUP
        )
        return np.fmax.reduce(values, axis=-1, initial=0.0)

    @cached_property
    def rows(self) -> Array:
        """Rows of each expert that is used."""
        return np.unique(self.ids[self.live], return_counts=True)[1]

    @cached_property
    def y(self) -> Array:
        """(T, H) float32."""
        return bf16_decode(self.golden.y)

    @cached_property
    def codes(self) -> Array:
        """E4M3 codes of the slots that take part, without signs."""
        return self.golden.codes[self.live] & 0x7F

    @cached_property
    def sf(self) -> Array:
        """UE8M0 bytes of the slots that take part."""
        return self.golden.sf[self.live]

    @cached_property
    def acts(self) -> Array:
        """(n, I) activations of the slots that take part, by float64: near, and exact where fp32
        has the gate itself as its silu. Empty but for plain SwiGLU of MXFP4 weights."""
        act = self.problem.act
        if self.problem.only_y or (act.name, act.alpha, act.beta) != ("swiglu", 1.0, 0.0):
            return np.zeros((0, GROUP))
        clamp = np.inf if act.clamp is None else act.clamp
        with np.errstate(all="ignore"):
            gate, up = np.split(self.sums[self.live], 2, axis=-1)
            gate, up = np.minimum(gate, clamp), np.clip(up, -clamp, clamp)
            denominator = (1 + np.exp(-gate)).astype(np.float32)  # 1 from a gate of 18 on
            products: Array = gate / denominator * up * self.weights[self.live][:, None]
        return products

    def has_scale(self, name: str, low: int, high: int) -> bool:
        """Whether a used expert has a scale byte from ``low`` to ``high``."""
        if self.problem.only_y:
            return False
        scales = getattr(self.problem, name).numpy()[self._experts]
        return bool(((scales >= low) & (scales <= high)).any())

    def ties(self) -> bool:
        """Whether an activation lies on the midpoint of two E4M3 values."""
        acts = self.acts
        if not len(acts):
            return False
        with np.errstate(all="ignore"):
            scaled = np.abs(np.ldexp(acts, 127 - np.repeat(self.sf.astype(np.int32), GROUP, -1)))
            ends = e4m3_decode(np.arange(0x7F, dtype=np.uint8))
        return bool(np.isin(scaled, (ends[1:] + ends[:-1]) / 2).any())


class Rare(NamedTuple):
    """A class, and whether a problem is of it."""

    dimension: str
    name: str
    condition: Callable[[Instance], bool]


def _scale(name: str, low: int, high: int) -> Callable[[Instance], bool]:
    return lambda s: s.has_scale(name, low, high)


def _rows(count: int) -> Callable[[Instance], bool]:
    return lambda s: bool((s.rows == count).any())


def _feature(name: str) -> Callable[[Instance], bool]:
    return lambda s: name in s.problem.features


def _subnormal(values: Array, least: float) -> bool:
    return bool(((values != 0) & (np.abs(values) < least)).any())


def _clamp(low: float, high: float) -> Callable[[Instance], bool]:
    def is_within(s: Instance) -> bool:
        clamp = s.problem.activation_clamp
        return clamp is not None and low <= clamp <= high

    return is_within


RARE: Final[tuple[Rare, ...]] = (
    *(Rare("scale byte of w13", str(b), _scale("w13_weight_scale", b, b)) for b in (0, 1, 254)),
    Rare("scale byte of w13", "255, NaN", _scale("w13_weight_scale", 255, 255)),
    *(Rare("scale byte of w2", str(b), _scale("w2_weight_scale", b, b)) for b in (0, 1, 254)),
    Rare("scale byte of w2", "255, NaN", _scale("w2_weight_scale", 255, 255)),
    Rare("hidden states", "NaN", lambda s: bool((s.hidden & 0x7FFF > 0x7F80).any())),
    Rare("hidden states", "infinity", lambda s: bool((s.hidden & 0x7FFF == 0x7F80).any())),
    Rare("hidden states", "subnormal", lambda s: _subnormal(bf16_decode(s.hidden), 2.0**-126)),
    Rare("hidden states", "-0", lambda s: bool((s.hidden == 0x8000).any())),
    Rare("hidden states", "a group below the staging floor",
         lambda s: bool(((s.amax > 0) & (s.amax < _STAGING_FLOOR)).any())),
    Rare("hidden states", "a group of zeros", lambda s: bool((s.amax == 0).any())),
    Rare("activations", "subnormal", lambda s: _subnormal(s.acts, 2.0**-126)),
    Rare("activations", "not finite", lambda s: not np.isfinite(s.acts).all()),
    Rare("requantised codes", "a tie", Instance.ties),
    Rare("requantised codes", "subnormal", lambda s: bool(((s.codes > 0) & (s.codes < 8)).any())),
    Rare("requantised codes", "448", lambda s: bool((s.codes == 0x7E).any())),
    Rare("requantised codes", "NaN", lambda s: bool((s.codes == 0x7F).any())),
    Rare("requantised scale", "up to 105", lambda s: bool((s.sf <= 105).any())),
    Rare("requantised scale", "above 200", lambda s: bool((s.sf > 200).any())),
    Rare("routing", "a masked slot", lambda s: not s.live.all()),
    Rare("routing", "a token without a slot", lambda s: bool((~s.live).all(axis=1).any())),
    Rare("routing", "one expert twice in a token", lambda s: any(
        len(np.unique(row[row >= 0])) < (row >= 0).sum() for row in s.ids)),
    Rare("routing", "all tokens to one expert",
         lambda s: len(s.ids) > 1 and len(s.rows) == 1 and bool(s.live.all())),
    Rare("routing weight", "not finite, masked",
         lambda s: not np.isfinite(s.weights[~s.live]).all()),
    Rare("routing weight", "not finite", lambda s: not np.isfinite(s.weights[s.live]).all()),
    Rare("routing weight", "0", lambda s: bool((s.weights[s.live] == 0).any())),
    Rare("routing weight", "negative", lambda s: bool((s.weights[s.live] < 0).any())),
    Rare("routing weight", "subnormal", lambda s: _subnormal(s.weights[s.live], 2.0**-126)),
    *(Rare("top-k", str(k), lambda s, k=k: s.problem.top_k == k)  # type: ignore[misc]
      for k in range(1, 17)),
    *(Rare("rows of an expert", str(n), _rows(n)) for n in ROWS),
    Rare("tokens", "0", lambda s: not s.problem.num_tokens),
    Rare("clamp", "none", lambda s: s.problem.activation_clamp is None),
    Rare("clamp", "0", _clamp(0.0, 0.0)),
    Rare("clamp", "small, to 1/2", _clamp(2.0**-126, 0.5)),
    Rare("fast_math", "off", lambda s: not s.problem.fast_math),
    Rare("output", "infinity", lambda s: bool(np.isinf(s.y).any())),
    Rare("output", "NaN", lambda s: bool(np.isnan(s.y).any())),
    Rare("output", "subnormal", lambda s: _subnormal(s.y, 2.0**-126)),
    *(Rare("feature", name, _feature(name)) for name in FEATURES if name not in DIALECT_FORMATS),
)  # fmt: skip
"""Each class, by dimension."""


def classes_of(instance: Instance) -> tuple[int, ...]:
    """Indices into :data:`RARE` of the classes that a problem is of."""
    return tuple(i for i, rare in enumerate(RARE) if rare.condition(instance))
