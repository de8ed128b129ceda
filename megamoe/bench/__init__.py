"""How fast: the whole forward and each stage, beside the floor and beside peers, in one run."""

from megamoe.bench.floor import FLOOR_BANDWIDTH, FLOOR_FLOPS, SHARES, Share, floor
from megamoe.bench.run import Row, measure, plot, save, table

__all__ = [
    "FLOOR_BANDWIDTH",
    "FLOOR_FLOPS",
    "SHARES",
    "Row",
    "Share",
    "floor",
    "measure",
    "plot",
    "save",
    "table",
]
