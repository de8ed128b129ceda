"""The formula of an activation with a deviation, beside names that words alone do not tell apart.

``w`` is the routing weight. ``gate sum`` and ``up sum`` are sums of linear 1 in fp32; ``gate`` and
``up`` are these sums as bfloat16, after the clamp. Each product is rounded to fp32 on
its own. The contract computes ``(silu(gate) * up) * w``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from megamoe.explain.life import Life

_PLACE: Final = "the routing weight is applied before silu to"
FORMULAS: Final[Mapping[str, str]] = {
    f"{_PLACE} gate and up": "silu(bf16(gate sum * w)) * bf16(up sum * w)",
    f"{_PLACE} the gate": "silu(bf16(gate sum * w)) * up",
    f"{_PLACE} gate and up as bfloat16": "silu(gate * w) * (up * w)",
    f"{_PLACE} the gate as bfloat16": "silu(gate * w) * up",
    f"{_PLACE} up": "silu(gate) * bf16(up sum * w)",
    "up is multiplied by the weight first": "silu(gate) * (up * w)",
    "the routing weight is dropped": "silu(gate) * up",
    "the routing weight is applied twice": "((silu(gate) * up) * w) * w",
    "the routing weight is rounded to bfloat16": "(silu(gate) * up) * bf16(w)",
    "the routing weight is rounded to fp16": "(silu(gate) * up) * fp16(w)",
    "the products with up and with the weight are rounded once": "fp32(silu(gate) * up * w)",
    "the product is rounded to bfloat16": "bf16(silu(gate) * up) * w",
    "up is left out": "silu(gate) * w",
    "the gate is left out": "up * w",
}
"""By the name of the deviation."""


def add_formulas(explanation: dict[str, Any], life: Life) -> None:
    """Give each deviation of a report its ``formula``; of plain SwiGLU alone, with the weight in
    the activation."""
    act = life.token.act
    is_plain = act.name == "swiglu" and act.alpha == 1 and act.beta == 0
    if is_plain and life.contract.routing_weight.value == "activation":
        for way in (*explanation["exact"], *explanation["partial"]):
            way["formula"] = FORMULAS.get(way["what"], "")
