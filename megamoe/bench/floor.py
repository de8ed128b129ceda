"""The floor: what no version can beat, from bytes and operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

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
    top_k: int = 6


SHARES: Final = {
    "flash": Share("DeepSeek-V4-Flash", 4096, 2048, 32),
    "pro": Share("DeepSeek-V4-Pro", 7168, 3072, 48),
    "v3": Share("DeepSeek-V3", 7168, 2048, 32, 8),
    "kimi-k3": Share("Kimi-K3", 3584, 3072, 112, 16),
    "v4.1-flash": Share("DeepSeek-V4.1-Flash", 5120, 2304, 32),
}
"""The models of the shape table. V4.1-Flash's H and I are published; its 32 experts and top-6 are
assumed, V4-Flash's. All are timed with a clamp of 10, also V3, which has none."""

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
