"""The tiles of the kernels, and the choice of one from shapes alone; no bit depends on it."""

from __future__ import annotations

from dataclasses import dataclass

from megamoe.backends.triton.packing import ROWS

CROWD = 12
"""With more rows per expert than this, on average, :mod:`.kernels.overlapped` is faster than
:mod:`.kernels.few`."""
MANY = 480
"""With more rows per expert than this, on average, tiles of 256 rows are faster than of 128."""
SPARSE = 6
"""At most this many rows per expert: use 8-token tiles."""
NEARLY = 7
"""Up to this many blocks per multiprocessor: nearly all fit at once in the tile of six."""
ROUNDS = 15
"""Up to this many blocks per multiprocessor: three rounds of the tile of five. With more: six."""
REGISTERS = 65536
"""Registers of a multiprocessor, on SM90 and newer."""


@dataclass(frozen=True)
class Tile:
    """N token rows; WARPS that multiply together.

    Of :mod:`.kernels.few` also AHEAD, the steps whose weights are on the way, and BLOCKS, which a
    multiprocessor holds at a time. Of :mod:`.kernels.overlapped` STAGES of copies, and BOXES of 64
    weight rows that each of its two groups takes.
    """

    N: int
    WARPS: int
    AHEAD: int = 0
    BLOCKS: int = 0
    STAGES: int = 0
    BOXES: int = 0

    @property
    def share(self) -> int:
        """Weight rows that a block takes at a time."""
        return 2 * self.BOXES * ROWS if self.BOXES else ROWS

    @property
    def registers(self) -> int:
        """The most registers per thread with which BLOCKS fit; a multiple of eight."""
        return REGISTERS // (32 * self.WARPS * self.BLOCKS) // 8 * 8


OVERLAPPED = Tile(128, 4, STAGES=3, BOXES=2), Tile(256, 4, STAGES=2, BOXES=1)
"""The tiles of :mod:`.kernels.overlapped`. The second decodes each weight for twice as many rows,
but an expert's last rows fill less of it."""
FEW = (
    Tile(8, 4, AHEAD=7, BLOCKS=3),
    Tile(8, 4, AHEAD=3, BLOCKS=5),
    Tile(8, 4, AHEAD=2, BLOCKS=6),
    Tile(16, 4, AHEAD=3, BLOCKS=4),
)
"""The tiles of :mod:`.kernels.few`. Registers go to weights on the way, or to more blocks."""


def few_tile(rows: int, experts: int, inter: int, processors: int) -> Tile:
    """The tile of :mod:`.kernels.few` for ``rows`` (token, slot) pairs; no bit depends on it.

    What counts is how many blocks of linear 1 a multiprocessor gets. If they all fit at once, each
    should have as many weights on the way as it can. If not, the last round should be nearly full.
    """
    deep, five, six, wide = FEW
    expert_count = min(rows, experts)
    if rows > SPARSE * expert_count:
        return wide
    blocks = expert_count * (2 * inter // ROWS) / processors
    if blocks <= deep.BLOCKS:
        return deep
    return five if blocks <= five.BLOCKS or NEARLY < blocks <= ROUNDS else six


def overlapped_tile(rows: int, experts: int, hidden: int) -> Tile | None:
    """The tile of :mod:`.kernels.overlapped` for ``rows`` pairs; None if they are too few.

    Also if the channels do not come in whole shares. ``tools/tiles.py`` measures what the two
    thresholds say.
    """
    narrow, broad = OVERLAPPED
    each = rows / min(rows, experts)
    if each > MANY:
        return broad
    return narrow if each > CROWD and hidden % narrow.share == 0 else None


def most_tiles(rows: int, experts: int, tile: Tile) -> int:
    """Most tiles that any routing of ``rows`` pairs needs."""
    return min(experts, rows) + rows // tile.N
