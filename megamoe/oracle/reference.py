"""The oracle's forward: the exact point, and the envelope of every accumulator class around it.

Works expert by expert and in chunks of output channels, so that memory stays small at real model
shapes. The reference point is the infinitely precise sum rounded once at each rounding point of
the contract, with the correctly rounded silu.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from megamoe.oracle import swiglu
from megamoe.oracle.bounds import exact_interval, result_interval, within_fp32
from megamoe.oracle.combine import combine, combine_ends
from megamoe.oracle.envelope import Envelope, Tensors
from megamoe.oracle.groups import group_amax, scaled_codes
from megamoe.oracle.linear import Blocks, Columns, Rows, block_sums, exact_dot, float_to_odd
from megamoe.oracle.spread import SpreadRows, spread_block_sums
from megamoe.oracle.staging import quantize
from megamoe.oracle.stepwise import replay
from megamoe.spec.accumulators import ACCUMULATORS, Accumulator, accumulator
from megamoe.spec.contract import Contract
from megamoe.spec.formats import GROUP, U8, U16, bf16_key, bf16_round
from megamoe.spec.problem import Problem

F64 = npt.NDArray[np.float64]
Interval = tuple[F64, F64]

CHUNK = 1 << 20
"""Block sums held at once: groups x rows x channels."""
MAX_ROWS = 64


@dataclass(frozen=True)
class ForwardGolden:
    """Oracle result of one forward case: ``T`` tokens, ``K`` slots, ``H``, ``I``."""

    y: U16
    """(T, H) bfloat16 bits of the reference point."""
    codes: U8
    """(T, K, I) E4M3 codes of the requantised activations; zeros in slots with id -1."""
    sf: U8
    """(T, K, I/32) UE8M0 bytes."""
    envelopes: Mapping[str, Envelope] = field(default_factory=dict)
    """By accumulator class; empty for a zero-freedom golden read back from the store."""
    why: tuple[str, ...] = ()
    """Reasons why the case leaves freedom; empty if and only if it was proven to leave none."""

    @property
    def zero_freedom(self) -> bool:
        """Every class allows exactly one result: this one."""
        return not self.why

    def to_tensors(self) -> Tensors:
        """Flat tensors for the store; a zero-freedom golden needs no envelope."""
        out: Tensors = {"y": self.y, "l2_acts": self.codes, "l2_acts_sf": self.sf}
        if not self.zero_freedom:
            for name, envelope in self.envelopes.items():
                for part, tensor in envelope.to_tensors(self.codes, self.sf).items():
                    out[f"{name}.{part}"] = tensor
        return out

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, npt.NDArray[Any]], contract: Contract
    ) -> ForwardGolden:
        """The inverse of :meth:`to_tensors`."""
        y, codes, sf = tensors["y"], tensors["l2_acts"], tensors["l2_acts_sf"]
        parts: dict[str, Tensors] = {}
        for key, tensor in tensors.items():
            name, dot, part = key.rpartition(".")
            if dot:
                parts.setdefault(name, {})[part] = tensor
        envelopes = {
            name: Envelope.from_tensors(part, codes, sf, contract) for name, part in parts.items()
        }
        return cls(y, codes, sf, envelopes, ("stored with an envelope",) if envelopes else ())


def forward(
    problem: Problem, classes: Iterable[str] | None = None, *, contract: Contract,
    any_silu: bool = False, trace: Tensors | None = None,
) -> ForwardGolden:  # fmt: skip
    """Reference point and envelopes of ``problem`` (CPU tensors) under ``contract``.

    ``any_silu`` widens silu to the fast form's error even where ``fast_math`` is off: a
    zero-freedom proof must hold for both. ``trace`` receives what no golden keeps: ``gate_up``
    ``(T, K, 2I)``, linear 1's exact sums as float64, rounded to odd where that cannot hold them,
    and ``slot_rows`` ``(T, K, H)``, linear 2's bfloat16 bits; zeros in slots with id -1.
    ``ValueError`` for an unknown class.
    """
    names = list(ACCUMULATORS if classes is None else classes)
    chosen = [accumulator(name) for name in names]
    fast = problem.fast_math or any_silu
    view = _Arrays.of(problem)
    ids = view.topk_ids
    tokens, slots = ids.shape
    hidden_size, intermediate = view.w2.shape[1], view.w2.shape[2] * 2
    groups = intermediate // GROUP
    x, x_sf = quantize(view.hidden, contract)
    silu = swiglu.silu_table(swiglu.silu_form(problem.fast_math, contract))
    live = ids >= 0

    codes = np.zeros((tokens, slots, intermediate), np.uint8)
    sf = np.zeros((tokens, slots, groups), np.uint8)
    rows_out = np.zeros((tokens, slots, hidden_size), np.uint16)
    sums = np.zeros((tokens, slots, 2 * intermediate) if trace is not None else 0)
    parts = {a.name: _Collected.empty(tokens, slots, hidden_size, intermediate) for a in chosen}

    for expert in np.unique(ids[live]):
        token_at, slot_at = np.nonzero(ids == expert)
        for start in range(0, len(token_at), MAX_ROWS):
            at = (token_at[start : start + MAX_ROWS], slot_at[start : start + MAX_ROWS])
            weight = view.topk_weights[at][:, None]
            rows = Rows.of(x[at[0]], x_sf[at[0]])
            gate_up = _linear(rows, view.w13[expert], view.w13_sf[expert], chosen)
            if trace is not None:
                sums[at] = gate_up["reference"]
            gate, up = _bf16_halves(gate_up["reference"], contract)
            gate, up = swiglu.clamp_gate_up(gate, up, problem.activation_clamp, contract)
            value = swiglu.activation(silu[gate], up, weight, contract)
            sf[at] = swiglu.requant_exponent(group_amax(value, contract), contract)
            made = scaled_codes(value, sf[at], contract)
            codes[at] = np.where(made == 0x80, 0, made)  # no output shows the sign of a zero code
            spread: dict[str, SpreadRows | None] = {}
            for a in chosen:
                gate_lo, up_lo = _bf16_halves(gate_up[a.name][0], contract)
                gate_hi, up_hi = _bf16_halves(gate_up[a.name][1], contract)
                acts = swiglu.activation_interval(
                    gate_lo, gate_hi, up_lo, up_hi, weight, problem.activation_clamp, fast, contract
                )
                spread[a.name] = parts[a.name].take(at, acts, codes[at], sf[at])
            out = _linear(
                Rows.of(codes[at], sf[at]), view.w2[expert], view.w2_sf[expert], chosen, spread
            )
            rows_out[at] = bf16_round(out["reference"])
            for a in chosen:
                parts[a.name].rows_lo[at] = bf16_round(out[a.name][0])
                parts[a.name].rows_hi[at] = bf16_round(out[a.name][1])

    if trace is not None:
        trace |= {"gate_up": sums, "slot_rows": rows_out}
    y = combine(rows_out, live, view.topk_weights, contract)
    envelopes = {
        name: part.envelope(live, view.topk_weights, contract) for name, part in parts.items()
    }
    why = tuple(_freedom(name, env) for name, env in envelopes.items() if not env.is_point())
    if set(names) != set(ACCUMULATORS):
        why += ("not every accumulator class was examined",)
    return ForwardGolden(y, codes, sf, envelopes, why)


def combine_interval(
    problem: Problem, codes: U8, sf: U8, class_name: str, contract: Contract
) -> tuple[U16, U16]:
    """Staged judgement of ``y``: linear 2 and the combine from the codes a backend really had.

    ``codes`` ``(T, K, I)`` and ``sf`` ``(T, K, I/32)`` uint8. Returns lowest and highest ``y``
    ``(T, H)`` bfloat16 bits for the class.
    """
    chosen = accumulator(class_name)
    view = _Arrays.of(problem)
    ids = view.topk_ids
    shape = (*ids.shape, view.w2.shape[1])
    low, high = np.zeros(shape, np.uint16), np.zeros(shape, np.uint16)
    for expert in np.unique(ids[ids >= 0]):
        token_at, slot_at = np.nonzero(ids == expert)
        for start in range(0, len(token_at), MAX_ROWS):
            at = (token_at[start : start + MAX_ROWS], slot_at[start : start + MAX_ROWS])
            out = _linear(Rows.of(codes[at], sf[at]), view.w2[expert], view.w2_sf[expert], [chosen])
            low[at], high[at] = (bf16_round(end) for end in out[chosen.name])
    return combine_ends(low, high, ids >= 0, view.topk_weights, contract)


@dataclass(frozen=True)
class _Arrays:
    """A problem's tensors as NumPy arrays, without copies."""

    hidden: U16
    topk_ids: npt.NDArray[np.int64]
    topk_weights: npt.NDArray[np.float32]
    w13: U8
    w13_sf: U8
    w2: U8
    w2_sf: U8

    @classmethod
    def of(cls, problem: Problem) -> _Arrays:
        import torch

        return cls(
            problem.hidden_states.contiguous().view(torch.int16).numpy().view(np.uint16),
            problem.topk_ids.numpy(),
            problem.topk_weights.numpy(),
            problem.w13_weight.numpy(),
            problem.w13_weight_scale.numpy(),
            problem.w2_weight.numpy(),
            problem.w2_weight_scale.numpy(),
        )


@dataclass(frozen=True)
class _Collected:
    """What one class allows, filled in expert by expert."""

    rows_lo: U16
    rows_hi: U16
    sf_lo: U8
    sf_hi: U8
    key_lo: npt.NDArray[np.int16]
    key_hi: npt.NDArray[np.int16]
    open_groups: list[tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]]

    @classmethod
    def empty(cls, tokens: int, slots: int, hidden: int, intermediate: int) -> _Collected:
        rows = (tokens, slots, hidden)
        acts = (tokens, slots, intermediate)
        groups = (tokens, slots, intermediate // GROUP)
        return cls(
            np.zeros(rows, np.uint16),
            np.zeros(rows, np.uint16),
            np.zeros(groups, np.uint8),
            np.zeros(groups, np.uint8),
            np.zeros(acts, np.int16),
            np.zeros(acts, np.int16),
            [],
        )

    def take(
        self, at: tuple[Any, Any], acts: swiglu.Activations, codes: U8, sf: U8
    ) -> SpreadRows | None:
        """Record codes and exponents of some slots; None if they are the reference point."""
        first, last = acts.exponents()
        key_lo, key_hi = acts.code_keys(first)
        self.sf_lo[at], self.sf_hi[at] = first, last
        self.key_lo[at], self.key_hi[at] = key_lo, key_hi
        row, group = np.nonzero(first != last)
        if row.size:
            shape = (*self.sf_lo.shape,)
            flat = np.ravel_multi_index((at[0][row], at[1][row], group), shape)
            low = acts.low.reshape(len(codes), -1, GROUP)[row, group]
            high = acts.high.reshape(len(codes), -1, GROUP)[row, group]
            self.open_groups.append((flat, low, high))
        if not row.size and (key_lo == key_hi).all():
            return None
        return SpreadRows.of(acts, first, last)

    def envelope(
        self, live: npt.NDArray[np.bool_], weights: npt.NDArray[np.float32], contract: Contract
    ) -> Envelope:
        flat, low, high = (
            (np.concatenate(part) for part in zip(*self.open_groups, strict=True))
            if self.open_groups
            else (np.zeros(0), np.zeros((0, GROUP)), np.zeros((0, GROUP)))
        )
        order = np.argsort(flat, kind="stable")
        return Envelope(
            *combine_ends(self.rows_lo, self.rows_hi, live, weights, contract),
            self.sf_lo,
            self.sf_hi,
            self.key_lo,
            self.key_hi,
            flat[order].astype(np.uint32),
            low[order].astype(np.float32),
            high[order].astype(np.float32),
            contract,
        )


def _linear(
    rows: Rows,
    packed: U8,
    sf: U8,
    classes: list[Accumulator],
    spread: Mapping[str, SpreadRows | None] | None = None,
) -> dict[str, Any]:
    """``(R, C)`` rows times ``(N, C/2)`` weights: the exact sum, and each class's interval.

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
            exact = _exact_total(rows, packed[part], sf[part], blocks)
            out["reference"][:, part] = exact
            for a in classes:
                interval = _class_interval(a, blocks, exact, rows, columns, spread)
                out[a.name][0][:, part], out[a.name][1][:, part] = interval
    return out


def _class_interval(
    a: Accumulator,
    blocks: Blocks,
    exact: F64,
    rows: Rows,
    columns: Columns,
    spread: Mapping[str, SpreadRows | None] | None,
) -> Interval:
    uncertain = spread.get(a.name) if spread else None
    if uncertain is not None:
        blocks = spread_block_sums(uncertain, columns)
        inside = exact_interval(blocks)
    else:
        inside = (exact, exact)
    if a.align_bits is None:
        return inside
    if not a.replayed:
        low, high = result_interval(blocks, a)
    elif uncertain is None:
        low, high = within_fp32(blocks, *replay(rows, columns, a), a)
    else:
        low, high = result_interval(blocks, a)
        known = uncertain.decided()
        if known.any():
            ends = within_fp32(blocks.only(known), *replay(rows.only(known), columns, a), a)
            low[known], high[known] = ends
    # A class that truncates need not reach the exact sum; the reference point belongs to every
    # envelope all the same, so that an envelope of one point can only be the reference.
    return np.minimum(low, inside[0]), np.maximum(high, inside[1])


def _exact_total(rows: Rows, packed: U8, sf: U8, blocks: Blocks) -> F64:
    """Exact sums; where float64 cannot hold them, rational arithmetic, rounded to odd."""
    total, _ = blocks.total()
    doubtful = ~blocks.exact_in_float64() & ~np.isnan(total)
    if doubtful.any():
        sf_bytes = np.nan_to_num(rows.exponent + 127).astype(np.uint8)
        for row, column in np.argwhere(doubtful):
            value = exact_dot(rows.codes[row], sf_bytes[row], packed[column], sf[column])
            total[row, column] = float_to_odd(value)
    return total


def _bf16_halves(gate_up: F64, contract: Contract) -> tuple[U16, U16]:
    """``(R, 2I)`` sums to bf16 gate and up, ``(R, I)`` each."""
    rounded = bf16_round(gate_up)
    half = rounded.shape[1] // 2
    first, second = rounded[:, :half], rounded[:, half:]
    return (first, second) if contract.gate_up_order.value == "gate-up" else (second, first)


def _freedom(name: str, envelope: Envelope) -> str:
    """One line: how much freedom a class leaves."""
    codes = int((envelope.key_lo != envelope.key_hi).sum())
    rows = int((bf16_key(envelope.y_lo) != bf16_key(envelope.y_hi)).sum())
    return (
        f"{name}: {len(envelope.open_groups)} exponents, {codes} codes and {rows} of "
        f"{envelope.y_lo.size} outputs undecided"
    )
