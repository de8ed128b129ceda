"""One expert: both linears and the step between them, as an exact point and as class envelopes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megamoe.oracle import swiglu
from megamoe.oracle.bounds import exact_interval, result_interval, within_fp32
from megamoe.oracle.groups import group_amax, scaled_codes
from megamoe.oracle.linear import Blocks, Columns, Rows, block_sums, sum_to_odd
from megamoe.oracle.spread import SpreadRows, spread_block_sums
from megamoe.oracle.stepwise import replay
from megamoe.spec.accumulators import Accumulator
from megamoe.spec.contract import Contract
from megamoe.spec.features import Activation
from megamoe.spec.formats import U8, U16, bf16_round

F64 = npt.NDArray[np.float64]
Interval = tuple[F64, F64]

CHUNK = 1 << 20
"""Block sums held at once: groups x rows x channels."""

Weights = tuple[U8, U8, U8, U8]
"""The weights of one expert: w13, its scales, w2, its scales."""


@dataclass(frozen=True)
class ExpertResult:
    """The results of one expert for some rows ``R``."""

    sums: F64
    """(R, 2I) exact sums of linear 1."""
    codes: U8
    sf: U8
    row: U16
    """(R, H) bfloat16 bits."""
    acts: Mapping[str, swiglu.Activations]
    ends: Mapping[str, tuple[U16, U16]]
    """The envelope of the activations and of the row, by accumulator class."""
    leaves_fp32: Mapping[str, bool]
    """Whether a finite sum has an infinite end, by accumulator class."""


@dataclass(frozen=True)
class Layer:
    """The data that all rows of a call share."""

    act: Activation
    classes: list[Accumulator]
    contract: Contract
    any_silu: bool = False
    traced: bool = False

    def mlp(
        self, x: U8, x_sf: U8, weight: npt.NDArray[np.float32], weights: Weights
    ) -> ExpertResult:
        """Both linears of one expert and the step between them, for staged rows ``(R, H)``."""
        act, contract = self.act, self.contract
        w13, w13_sf, w2, w2_sf = weights
        gate_up = linear(Rows.of(x, x_sf), w13, w13_sf, self.classes)
        gate, up = bf16_halves(gate_up["reference"], contract)
        gate, up = swiglu.clamp_gate_up(gate, up, act, contract)
        value = swiglu.activation(gate, up, weight, act, contract)
        sf = swiglu.requant_exponent(group_amax(value, contract), contract)
        codes = scaled_codes(value, sf, contract)
        codes = np.where(codes == 0x80, 0, codes)  # no output shows the sign of a zero code
        acts, spread = {}, dict[str, SpreadRows | None]()
        for a in self.classes:
            low, high = (bf16_halves(end, contract) for end in gate_up[a.name])
            acts[a.name] = swiglu.activation_interval(
                (low[0], high[0]), (low[1], high[1]), weight, act, contract,
                any_form=self.any_silu,
            )  # fmt: skip
            spread[a.name] = SpreadRows.unless_decided(acts[a.name])
        out = linear(Rows.of(codes, sf), w2, w2_sf, self.classes, spread)
        ends = {
            a.name: (bf16_round(out[a.name][0]), bf16_round(out[a.name][1])) for a in self.classes
        }
        sums = gate_up["reference"] if self.traced else np.empty(0)
        leaves = {
            a.name: any(
                _leaves_fp32(product["reference"], product[a.name]) for product in (gate_up, out)
            )
            for a in self.classes
        }
        return ExpertResult(sums, codes, sf, bf16_round(out["reference"]), acts, ends, leaves)


def _leaves_fp32(exact: F64, ends: Interval) -> bool:
    infinite = np.isinf(ends[0]) | np.isinf(ends[1])
    return bool((infinite & (np.abs(exact) < 2.0**128)).any())


def linear(
    rows: Rows,
    packed: U8,
    sf: U8,
    classes: list[Accumulator],
    spread: Mapping[str, SpreadRows | None] | None = None,
) -> dict[str, Any]:
    """``(R, C)`` rows times ``N`` outputs' weights: the exact sum, and each class's interval.

    ``spread`` gives, for a class, rows known only as intervals (None: they are ``rows``).
    """
    count, channels = rows.codes.shape[0], packed.shape[0]
    out: dict[str, Any] = {"reference": np.empty((count, channels))}
    for a in classes:
        out[a.name] = (np.empty((count, channels)), np.empty((count, channels)))
    size = max(32, CHUNK // max(1, count * rows.exponent.shape[1]))
    with np.errstate(invalid="ignore", over="ignore"):
        for part, columns in Columns.chunks(packed, sf, size):
            blocks = block_sums(rows, columns)
            exact = exact_total(blocks)
            out["reference"][:, part] = exact
            for a in classes:
                interval = class_interval(a, blocks, exact, rows, columns, spread)
                out[a.name][0][:, part], out[a.name][1][:, part] = interval
    return out


def class_interval(
    a: Accumulator,
    blocks: Blocks,
    exact: F64,
    rows: Rows,
    columns: Columns,
    spread: Mapping[str, SpreadRows | None] | None,
) -> Interval:
    """``(R, N)`` ends of the class's interval for one linear."""
    uncertain = spread.get(a.name) if spread else None
    if uncertain is None:
        return _ends(a, blocks, (exact, exact), rows, columns, None)
    blocks = spread_block_sums(uncertain, columns)
    low, high = _ends(a, blocks, exact_interval(blocks), rows, columns, uncertain)
    # NaN among the activations is NaN in every output: both ends infinite say that it may be.
    maybe_nan = uncertain.may_be_nan()[:, None] & ~np.isnan(low)
    return np.where(maybe_nan, -np.inf, low), np.where(maybe_nan, np.inf, high)


def _ends(
    a: Accumulator, blocks: Blocks, inside: Interval, rows: Rows, columns: Columns,
    uncertain: SpreadRows | None,
) -> Interval:  # fmt: skip
    if a.align_bits is None:
        return inside
    if not a.replayed:
        low, high = result_interval(blocks, a)
    elif uncertain is None:
        low, high = within_fp32(blocks, *replay(rows, columns, a), a)
    else:
        low, high = result_interval(blocks, a)
        points = uncertain.is_decided()
        if points.any():
            ends = within_fp32(blocks.only(points), *replay(rows.only(points), columns, a), a)
            low[points], high[points] = ends
    # A class that truncates need not reach the exact sum; the reference point belongs to every
    # envelope all the same, so that an envelope of one point can only be the reference.
    return np.minimum(low, inside[0]), np.maximum(high, inside[1])


def exact_total(blocks: Blocks) -> F64:
    """``(R, N)`` exact sums of known operands, rounded to odd where float64 cannot hold them.

    A block sum is a float64 in any case, so only their sum needs more than float64 arithmetic.
    """
    total, _ = blocks.total()
    doubtful = ~blocks.exact_in_float64() & ~np.isnan(total)
    for row, column in np.argwhere(doubtful):
        total[row, column] = sum_to_odd(blocks.low[:, row, column])
    return total


def bf16_halves(gate_up: F64, contract: Contract) -> tuple[U16, U16]:
    """``(R, 2I)`` sums to bf16 gate and up, ``(R, I)`` each."""
    rounded = bf16_round(gate_up)
    half = rounded.shape[1] // 2
    first, second = rounded[:, :half], rounded[:, half:]
    return (first, second) if contract.gate_up_order.value == "gate-up" else (second, first)
