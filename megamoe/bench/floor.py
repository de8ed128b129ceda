"""The floor: a time that no implementation can beat, from bytes and operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from megamoe.spec.models import MODELS

FLOOR_BANDWIDTH: Final = 3.07e12
"""Bytes a second that one H100 80GB HBM3 read from device memory, measured."""

FLOOR_FLOPS: Final = 1400e12
"""FP8 operations a second of that card: the middle of 1244 to 1482 measured."""


@dataclass(frozen=True)
class Share:
    """One rank's share of a model's routed experts at EP8."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int


RANKS: Final = 8


def _share(name: str) -> Share:
    model = MODELS[name.lower()]
    experts = model.local_experts(RANKS)
    return Share(name, model.hidden_size, model.intermediate_size, experts, model.top_k)


SHARES: Final = {
    "flash": _share("DeepSeek-V4-Flash"),
    "pro": _share("DeepSeek-V4-Pro"),
    "v3": _share("DeepSeek-V3"),
    "kimi-k3": _share("Kimi-K3"),
    "v4.1-flash": _share("DeepSeek-V4.1-Flash"),
}
"""The models of the contract's table. All are timed with a clamp of 10, also V3, which has none."""

DEFAULT_SHARES: Final = ("flash", "pro")


def weight_bytes(share: Share, experts: int) -> float:
    """FP4 bytes of ``experts`` experts, both products, without scale factors."""
    return experts * 3 * share.hidden * share.intermediate / 2


def operations(share: Share, tokens: int) -> float:
    """Multiplications and additions of both products for ``tokens`` tokens."""
    return tokens * share.top_k * 3 * 2.0 * share.hidden * share.intermediate


def floor(share: Share, tokens: int, experts: int) -> float:
    """Microseconds: weight bytes of the ``experts`` touched, or FP8 operations, the larger."""
    return 1e6 * max(
        weight_bytes(share, experts) / FLOOR_BANDWIDTH, operations(share, tokens) / FLOOR_FLOPS
    )


def stage_floor(stage: str, share: Share, tokens: int, experts: int) -> float | None:
    """The same for one stage alone; None for a stage that another implementation need not have.

    A product has its part of the weights and operations. Staging reads bfloat16 and writes codes
    and scale bytes; combine reads a row of bfloat16 for each slot and writes one.
    """
    h, k = share.hidden, share.top_k
    parts = {"linear1": 2 / 3, "linear2": 1 / 3}
    row_bytes = {"staging": 2 * h + h + h // 32, "combine": 2 * h * k + 2 * h}
    if stage in parts:
        return parts[stage] * floor(share, tokens, experts)
    if stage in row_bytes:
        return 1e6 * tokens * row_bytes[stage] / FLOOR_BANDWIDTH
    return None
