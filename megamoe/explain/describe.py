"""A life as plain data: the facts on one output element for a person, JSON-able."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from megamoe.explain.instruction import model_sums, products, weight_values
from megamoe.explain.life import Life, Slot, combine_of
from megamoe.oracle.gates import form_of, gate_bounds, gate_table, up_table
from megamoe.oracle.groups import RECIP_448, group_amax
from megamoe.spec.formats import (
    E4M3_TABLE,
    GROUP,
    bf16_decode,
    bf16_key,
    bf16_round,
)
from megamoe.spec.forms import BF16, E4M3

TOP = 3
"""Largest contributions that are shown of a sum."""
Plain = dict[str, Any]


def describe(life: Life, at: int, top: int = TOP, wrong: Plain | None = None) -> Plain:
    """The life of ``life.channels[at]``. From the hidden state to a code it follows the code
    ``wrong`` (``stage``, ``slot`` and ``channel``), or the largest contribution. Of a wrong scale
    byte it follows the channel that sets amax."""
    token = life.token
    slots = [_slot(life, slot, at, top) for slot in life.slots]
    rows = {slot.slot: slot.down.row[at : at + 1] for slot in life.slots}
    return {
        "token": life.at,
        "channel": int(life.channels[at]),
        "accumulator": life.accumulator.name,
        "contract": life.contract.revision,
        "activation": token.act.name,
        "alpha": token.act.alpha,
        "beta": token.act.beta,
        "clamp": token.act.clamp,
        "fast_math": token.act.fast_math,
        "combine_dtype": token.dtype,
        "added_after": None if token.output is None else bf16(token.output[life.channels[at]]),
        "masked_slots": [k for k in range(len(token.ids)) if k not in rows],
        "slots": slots,
        "followed": _focus(life, slots, top, wrong),
        "combine": _combine(life, at),
        "y": bf16(life.y[at], life.y_low[at], life.y_high[at]),
        "why": _why(life, at, top),
    }


def _focus(life: Life, slots: list[Plain], top: int, wrong: Plain | None) -> Plain | None:
    """One activation, as ``largest`` of a slot, with the slot's numbers; None without slots."""
    if not slots:
        return None
    if wrong is None:
        which = max(slots, key=lambda s: abs(s["linear2"]["contributions"][0]["product"]))
        activation = which["largest"]
    else:
        which = next(s for s in slots if s["slot"] == wrong["slot"])
        slot = next(s for s in life.slots if s.slot == wrong["slot"])
        channel = int(wrong["channel"])
        activation = _activation(life, slot, channel, top)
        if wrong.get("stage") == "l2_acts_sf":  # a byte of a group: the channel that decides it
            activation = _activation(life, slot, activation["group"]["set_by"], top)
    names = ("slot", "expert", "routing_weight")
    return {
        **{name: which[name] for name in names}, "is_wrong": wrong is not None,
        "of_byte": wrong is not None and wrong.get("stage") == "l2_acts_sf",
        "activation": activation,
    }  # fmt: skip


def _slot(life: Life, slot: Slot, at: int, top: int) -> Plain:
    """One slot: its largest contribution from the hidden state on, then linear 2."""
    down = slot.down
    parts = products(slot.codes, slot.exponent, down.packed[at : at + 1], down.sf[at : at + 1])[0]
    order = _largest(parts, top)
    model = model_sums(
        life.accumulator, slot.codes, slot.exponent, down.packed[at : at + 1], down.sf[at : at + 1]
    )
    size = np.abs(parts).sum()
    nibbles, values = (v[0] for v in weight_values(down.packed[at : at + 1], down.sf[at : at + 1]))
    return {
        "slot": slot.slot,
        "expert": slot.expert,
        "routing_weight": float(slot.weight),
        "undecided_codes": int(slot.open_codes.sum()),
        "largest": _activation(life, slot, int(order[0]), top),
        "linear2": {
            "exact": float(down.exact[at]),
            "model": None if model is None else float(model[0]),
            "interval": _ends(down.low[at], down.high[at]),
            "contributions": [
                {
                    "i": int(i),
                    "code": E4M3.hex(slot.codes[i]),
                    "value": float(E4M3_TABLE[slot.codes[i]]),
                    "sf": int(slot.exponent[i // GROUP]),
                    "weight": float(values[i]),
                    "weight_code": int(nibbles[i]),
                    "weight_sf": int(down.sf[at, i // GROUP]),
                    "product": float(parts[i]),
                    "share": float(abs(parts[i]) / size) if size else 0.0,
                }
                for i in order
            ],
            "row": bf16(down.row[at], down.row_low[at], down.row_high[at]),
        },
    }


def _activation(life: Life, slot: Slot, i: int, top: int) -> Plain:
    """Intermediate channel ``i``: both sums of linear 1 up to its E4M3 code."""
    inter = len(slot.codes)
    group, part = i // GROUP, slice(i // GROUP * GROUP, i // GROUP * GROUP + GROUP)
    amax = group_amax(slot.value[None, part], life.contract)[0, 0]
    size = np.abs(slot.value[part])
    who = 0 if np.isnan(amax) else int(np.where(np.isnan(size), -1, size).argmax())
    form = form_of(life.token.act, life.contract)
    one = slot.gate[i : i + 1]
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        scaled = np.float32(amax * RECIP_448)
    return {
        "i": i,
        "gate": _sum(life, slot, i, top),
        "up": _sum(life, slot, inter + i, top),
        "gate_clamped": bf16(slot.gate[i]),
        "up_clamped": bf16(slot.up[i]),
        "silu": float(gate_table(form)[slot.gate[i]]),
        "silu_allowed": _ends(*(end[0] for end in gate_bounds(form).over(one, one)[:2])),
        "up_value": float(up_table(form)[slot.up[i]]),
        "a": float(slot.value[i]),
        "a_interval": _ends(slot.acts.low[0, i], slot.acts.high[0, i]),
        "group": {
            "first": int(part.start),
            "amax": float(amax),
            "set_by": int(part.start) + who,
            "amax_over_448": float(scaled),
            "exponent": int(slot.exponent[group]),
            "exponent_allowed": [int(slot.exponent_low[group]), int(slot.exponent_high[group])],
        },
        "code": E4M3.hex(slot.codes[i]),
        "value": float(E4M3_TABLE[slot.codes[i]]),
        "codes_allowed": [_code(slot.key_low[i]), _code(slot.key_high[i])],
    }


def _sum(life: Life, slot: Slot, row: int, top: int) -> Plain:
    """One sum of linear 1, from hidden states and weights to its bfloat16."""
    packed, sf = slot.packed[row : row + 1], slot.sf13[row : row + 1]
    parts = products(life.x, life.x_sf, packed, sf)[0]
    nibbles, values = (v[0] for v in weight_values(packed, sf))
    blocks = slot.blocks[:, row]
    model = model_sums(life.accumulator, life.x, life.x_sf, packed, sf)
    ends = bf16_round(np.array([slot.exact[row], slot.low[row], slot.high[row]]))
    hidden = life.token.hidden
    return {
        "row": row,
        "exact": float(slot.exact[row]),
        "model": None if model is None else float(model[0]),
        "interval": _ends(slot.low[row], slot.high[row]),
        "bf16": bf16(*ends),
        "blocks": [{"group": int(g), "sum": float(blocks[g])} for g in _largest(blocks, top)],
        "block_count": len(blocks),
        "products": [
            {
                "k": int(k),
                "hidden": BF16.hex(hidden[k]),
                "hidden_value": float(bf16_decode(hidden[k : k + 1])[0]),
                "x": E4M3.hex(life.x[k]),
                "x_value": float(E4M3_TABLE[life.x[k]]),
                "x_sf": int(life.x_sf[k // GROUP]),
                "weight": float(values[k]),
                "weight_code": int(nibbles[k]),
                "weight_sf": int(sf[0, k // GROUP]),
                "product": float(parts[k]),
            }
            for k in _largest(parts, top)
        ],
    }


def _combine(life: Life, at: int) -> list[Plain]:
    """The fp32 sum after each slot, from zero."""
    combine, slots = combine_of(life.token, life.channels, life.contract), len(life.token.ids)
    rows = {slot.slot: slot.down.row[None] for slot in life.slots}
    total, out = np.zeros((1, len(life.channels)), np.float32), []
    with np.errstate(over="ignore", invalid="ignore"):
        for which in combine.order(slots, slots in rows):
            slot = slots if which is None else which
            if slot in rows:
                read = combine.read(rows[slot], rows[slot])
                total = combine.accumulate(which, total, read)
                out.append({"slot": slot, "row": float(read[0][0, at]), "sum": float(total[0, at])})
    return out


def _why(life: Life, at: int, top: int) -> Plain:
    """The causes of the width of the interval of ``y``."""
    ulps = int(bf16_key(life.y_high[at : at + 1])[0]) - int(bf16_key(life.y_low[at : at + 1])[0])
    parts: list[Plain] = []
    for slot in life.slots:
        down = slot.down
        with np.errstate(invalid="ignore"):  # both ends may be infinite
            whole = down.high[at] - down.low[at]
            accumulation = min(down.fixed_high[at] - down.fixed_low[at], whole)
            from_codes = whole - accumulation
        rows = bf16_key(np.array([down.row_low[at], down.row_high[at]], np.uint16))
        parts.append(
            {
                "slot": slot.slot,
                "width": float(whole),
                "from_accumulation": float(accumulation),
                "from_codes": float(from_codes),
                "row_ulps": int(rows[1] - rows[0]),
                "undecided_codes": int(slot.open_codes.sum()),
                "open_exponents": int((slot.exponent_low != slot.exponent_high).sum()),
                "largest_swings": _swings(life, slot, at, top),
            }
        )
    parts.sort(key=lambda p: -float(np.nan_to_num(p["width"])))
    return {"ulps": ulps, "slots": parts}


def _swings(life: Life, slot: Slot, at: int, top: int) -> list[Plain]:
    """Undecided codes by how far each can move linear 2, and why it is undecided."""
    if not slot.open_codes.any():
        return []
    low, high = slot.acts.dequantized(slot.exponent_low[None])
    low, high = low[0], high[0]
    part = slice(at, at + 1)
    weight = weight_values(slot.down.packed[part], slot.down.sf[part])[1][0]
    scale = np.exp2(np.repeat(slot.down.sf[at].astype(np.int32) - 127, GROUP))
    swing = np.abs(weight * scale) * (high - low)
    inter = len(slot.codes)
    out = []
    for i in _largest(np.where(slot.open_codes, swing, 0.0), top):
        if not swing[i]:
            continue
        causes = [
            f"{name} may round to {_range(slot.low[row], slot.high[row])}"
            for name, row in (("gate", int(i)), ("up", inter + int(i)))
            if _key(slot.low[row]) != _key(slot.high[row])
        ]
        if slot.exponent_low[i // GROUP] != slot.exponent_high[i // GROUP]:
            causes.append("the exponent of its group is open")
        out.append(
            {
                "i": int(i),
                "swing": float(swing[i]),
                "codes": [_code(slot.key_low[i]), _code(slot.key_high[i])],
                "cause": "; ".join(causes) or "silu's allowed error crosses a code boundary",
            }
        )
    return out


def _range(low: float, high: float) -> str:
    ends = bf16_round(np.array([low, high]))
    count = int(bf16_key(ends)[1] - bf16_key(ends)[0]) + 1
    return f"{count} bfloat16 values, {BF16.text(ends[0])} to {BF16.text(ends[1])}"


def _key(value: float) -> int:
    return int(bf16_key(bf16_round(np.array([value])))[0])


def _largest(values: npt.NDArray[np.float64], top: int) -> npt.NDArray[np.int64]:
    """Positions of the largest magnitudes, NaN first, in descending order."""
    size = np.where(np.isnan(values), np.inf, np.abs(values))
    return np.argsort(-size, kind="stable")[:top]


def _code(key: int) -> str:
    return E4M3.hex(abs(int(key)) | (0x80 if key < 0 else 0))


def bf16(bits: Any, low: Any = None, high: Any = None) -> Plain:
    """Bits of a bfloat16 number, its value, and the ends that are allowed."""
    out: Plain = {"bits": BF16.hex(bits), "value": float(bf16_decode(np.array([bits]))[0])}
    if low is not None:
        out["allowed"] = [BF16.hex(low), BF16.hex(high)]
        out["allowed_values"] = _ends(*bf16_decode(np.array([low, high], np.uint16)))
    return out


def _ends(low: Any, high: Any) -> list[float]:
    return [float(low), float(high)]
