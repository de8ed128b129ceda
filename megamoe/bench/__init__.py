"""Times of the whole forward and of each stage, beside the floor and beside peers, in one run.

``scale`` times nothing: it counts the bytes and the operations of many ranks.
"""

from megamoe.bench.figure import check_drawable, plot
from megamoe.bench.floor import FLOOR_BANDWIDTH, FLOOR_FLOPS, SHARES, Share, floor
from megamoe.bench.measure import measure
from megamoe.bench.rows import Row, load, provenance, save, table

__all__ = [
    "FLOOR_BANDWIDTH",
    "FLOOR_FLOPS",
    "SHARES",
    "Row",
    "Share",
    "check_drawable",
    "floor",
    "load",
    "measure",
    "plot",
    "provenance",
    "save",
    "table",
]
