"""The routing weight at other places than before requantisation.

The contract multiplies the activation by the routing weight, and the codes hold the product. A
kernel that applies the weight elsewhere has the codes of activations without it: they are the same
for each later place, and only ``y`` tells these places apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from megamoe.explain.deviations import orders
from megamoe.explain.deviations.combiner import Combiner
from megamoe.explain.life import Life
from megamoe.explain.ways import clamped, halves, in_bf16
from megamoe.oracle.fused import fma
from megamoe.spec.formats import F32, F64

Steps = dict[str, Any]


def elsewhere(life: Life) -> Iterator[tuple[str, Steps]]:
    """The weight at one other place, or at none."""
    yield "the routing weight is dropped", {"product": unweighted}
    for place, steps in _before(life):
        yield f"the routing weight is applied {place}", {"product": unweighted, **steps}
    for place, steps in _after(life):
        yield f"the routing weight is applied {place}", {"product": unweighted, **steps}


def again(life: Life) -> Iterator[tuple[str, Steps]]:
    """The weight at a place after the codes, which hold it already."""
    for place, steps in _after(life):
        yield f"the routing weight is applied again {place}", steps


def unweighted(silu: F32, up: F32, weight: F32) -> F32:
    """The activation without the weight."""
    return silu * up


def _before(life: Life) -> Iterator[tuple[str, Steps]]:
    """Places before silu: the sums of linear 1, or gate and up, which are these as bfloat16 and
    clamped. One on both sums stands for a weight on the layer's input."""
    contract = life.contract

    def weighted(sums: F64, weight: F32) -> F64:
        return _times(sums, weight).astype(np.float64)

    def both(sums: F64, weight: F32) -> Any:
        return halves(weighted(sums, weight), contract)

    def gate(sums: F64, weight: F32) -> Any:
        return halves(weighted(sums, weight), contract)[0], halves(sums, contract)[1]

    def up(sums: F64, weight: F32) -> Any:
        return halves(sums, contract)[0], halves(weighted(sums, weight), contract)[1]

    def rounded(of_gate: bool, of_up: bool, sums: F64, weight: F32) -> Any:
        pair = clamped(*halves(sums, contract), life.token.act, contract)
        pairs = zip(pair, (of_gate, of_up), strict=True)
        return tuple(_times(values, weight) if of else values for values, of in pairs)

    for name, weigh, of in (
        ("gate and up", both, (True, True)), ("the gate", gate, (True, False)),
        ("up", up, (False, True)),
    ):  # fmt: skip
        yield f"before silu to {name}", {"weigh": weigh}
        if of[0]:  # of up alone it is the product of another order
            steps = {"weigh": partial(rounded, *of), "clamp": lambda g, u: (g, u)}
            yield f"before silu to {name} as bfloat16", steps


def _after(life: Life) -> Iterator[tuple[str, Steps]]:
    """Places after the codes, in the order of computation."""
    yield "after linear 2 to its fp32 sums", {"row": _of_sums}
    if not life.is_special:  # else the rows go through another format
        yield "after linear 2 to its fp32 sums, which stay fp32", {"row": _times}
    own = Combiner.of(life)
    weights = np.append(life.token.weights, np.float32(1))  # the last is the shared expert's

    def rounded_twice(rows: orders.Terms) -> F32:
        return orders.plain_sum({k: in_bf16(_times(row, weights[k])) for k, row in rows.items()})

    def in_fp32(rows: orders.Terms) -> F32:
        return orders.plain_sum({k: _times(row, weights[k]) for k, row in rows.items()})

    def fused(rows: orders.Terms) -> F32:
        total = np.zeros_like(next(iter(rows.values())))
        for k, row in rows.items():
            total = fma(row, np.full(1, weights[k], np.float32), total)
        return total

    def of_slot_0(rows: orders.Terms) -> F32:
        return _times(orders.plain_sum(rows), weights[0])

    for name, sums in (
        ("at combine to the slot rows, by fp32 products", in_fp32),
        ("at combine to the slot rows, by fused multiply-adds", fused),
        ("at combine to the slot rows, which are rounded to bfloat16 again", rounded_twice),
        ("after the sum of the slots, as the weight of slot 0", of_slot_0),
    ):
        yield name, {"combine": partial(own, sums)}


def _times(values: F32 | F64, weight: Any) -> F32:
    """Rounded to fp32 before and after the product."""
    product: F32 = (values.astype(np.float32) * weight).astype(np.float32)
    return product


def _of_sums(sums: F64, weight: np.float32) -> F32:
    """A slot row that is multiplied by the routing weight, then rounded."""
    return in_bf16(_times(sums, weight))
