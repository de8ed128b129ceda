"""Which kernels serve a call, in which tiles, and their launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from megamoe.backends.triton.binaries import launch
from megamoe.backends.triton.packing import ROWS

WIDEST_NARROW = 128
"""Largest weight scale byte of the narrow kernels: 2^126 times its value is still a bf16."""
WIDEST = 252
"""Largest weight scale byte at all, but for NaN's, 255: 6 times its value is still a bf16."""
BLOCK = 1024
"""Channels that a program of dispatch or combine takes."""
CHUNK = 1024
"""Slots that a program of count or rank takes."""
SHARE = 4 * ROWS
"""Weight rows that a block of :mod:`.overlapped` takes at a time; one of :mod:`.few` takes ROWS."""
Stage = tuple[str, Callable[[], None]]


CROWDED = 15
"""Rows an expert, on average, above which :mod:`.overlapped` is faster than :mod:`.few`."""
SPARSE = 6
"""Rows an expert up to which tiles of eight tokens are."""
RESIDENT = 4
"""Blocks of the first of :data:`FEW` that a multiprocessor holds at a time, by their registers."""


@dataclass(frozen=True)
class Tile:
    """N token rows; a block's WARPS that multiply; STAGES of copies."""

    N: int
    WARPS: int
    STAGES: int = 0


OVERLAPPED = Tile(128, 4, 3), Tile(128, 4, 4)
"""The tiles of :mod:`.overlapped`, linear 1 and 2; their blocks have five warps more."""
FEW = Tile(8, 4), Tile(8, 2), Tile(16, 2)
"""The tiles of :mod:`.few`. A warp of four reads all tokens for 16 weight rows, of two for 32."""


@dataclass(frozen=True)
class Call:
    """One forward of ``tokens`` staged tokens: sizes, tensors and switches."""

    weights: tuple[torch.Tensor, ...]
    buffer: Any
    tokens: int
    experts: int
    hidden: int
    inter: int
    top_k: int
    clamp: float | None
    fast_math: bool

    @property
    def rows(self) -> int:
        """(token, slot) pairs."""
        return self.tokens * self.top_k

    @property
    def device(self) -> Any:
        """What CUDA says of the GPU."""
        return properties(self.buffer.x.device)

    def wide(self) -> bool:
        """Whether the weights need the wide kernels."""
        return is_wide(self.weights[1]) or is_wide(self.weights[3])

    def activation(self) -> dict[str, Any]:
        """The switches of linear 1."""
        return {"HAS_CLAMP": self.clamp is not None, "FAST": self.fast_math}

    def clamp_value(self) -> float:
        """The clamp as bfloat16 has it; 0 for none."""
        return 0.0 if self.clamp is None else as_bfloat16(self.clamp)

    def suits_overlapped(self) -> bool:
        """Whether :mod:`.overlapped` serves this call: there is ``wgmma``, and enough to do."""
        fits = fills_shares(self.rows, self.experts, self.hidden)
        return fits and self.device.major == 9

    def few(self) -> Iterator[Stage]:
        """Dispatch and products by :mod:`.few`."""
        from megamoe.backends.triton import dispatch as d
        from megamoe.backends.triton import few

        w13, s13, w2, s2 = (w.view(torch.int32) for w in self.weights)
        buffer = self.buffer
        tile = few_tile(self.rows, self.experts, self.inter, self.device.multi_processor_count)
        tiles, words = most_tiles(self.rows, self.experts, tile), torch.int32
        slots = power_of_two(self.rows)
        options = {
            "N": tile.N, "WARPS": tile.WARPS, "WIDE": self.wide(), "num_warps": tile.WARPS,
            "launch_pdl": True,
        }  # fmt: skip
        yield "dispatch", later(
            d.dispatch, (self.tokens + 1, -(-self.hidden // BLOCK)),
            buffer.x.view(torch.uint8), buffer.x_sf, buffer.topk_idx, buffer.operand,
            buffer.order, buffer.counts, buffer.tiles, self.tokens, self.hidden, self.top_k,
            self.experts, tiles, ROWS=tile.N, BLOCK=BLOCK,
            EXPERTS=power_of_two(self.experts), CHUNK=min(slots, 8192), EARLY=True,
            launch_pdl=True, num_warps=8,
        )  # fmt: skip
        yield "linear1", later(
            few.linear1, (tiles * (2 * self.inter // ROWS),),
            buffer.operand.view(words), w13, s13, buffer.topk_weights,
            buffer.order, buffer.tiles, buffer.acts, buffer.l2_acts.view(torch.uint8),
            buffer.l2_acts_sf, self.hidden, self.inter, self.top_k,
            self.clamp_value(), **self.activation(), **options,
        )  # fmt: skip
        yield "linear2", later(
            few.linear2, (tiles * (self.hidden // ROWS),),
            buffer.acts.view(words), w2, s2, buffer.order, buffer.tiles, buffer.slots,
            self.hidden, self.inter, **options,
        )  # fmt: skip

    def overlapped(self) -> Iterator[Stage]:
        """Dispatch and products by :mod:`.overlapped`.

        Until linear 2 writes them, the slots' rows hold the operands of linear 1.
        """
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        from megamoe.backends.triton import dispatch as d
        from megamoe.backends.triton import overlapped as ov
        from megamoe.backends.triton.layouts import TOKEN_BOX, WEIGHT_BOX

        w13, s13, w2, s2 = self.weights
        buffer, (tile, tile2) = self.buffer, OVERLAPPED

        def tokens_box(rows: torch.Tensor) -> Any:
            return TensorDescriptor.from_tensor(rows, [tile.N, 128], TOKEN_BOX)

        def weights_box(packed: torch.Tensor) -> Any:
            flat = packed.view(torch.int16).view(-1, 32)
            return TensorDescriptor.from_tensor(flat, [ROWS, 32], WEIGHT_BOX)

        slots, acts = (t.view(-1, t.shape[-1]) for t in (buffer.slots, buffer.acts))
        options = {
            "N": tile.N, "WIDE": self.wide(), "num_warps": tile.WARPS, "launch_pdl": True,
        }  # fmt: skip
        tiles, chunks = most_tiles(self.rows, self.experts, tile), -(-self.rows // CHUNK)
        blocks = self.device.multi_processor_count
        sort = (buffer.topk_idx, buffer.counts[0])
        yield "dispatch", in_turn(
            buffer.counts.zero_,
            later(d.count, (chunks,), *sort, self.rows, self.experts, CHUNK=CHUNK),
            later(
                d.rank, (chunks,), *sort, buffer.counts[1], buffer.order, buffer.places,
                buffer.tiles, self.rows, self.experts, tiles, ROWS=tile.N,
                EXPERTS=power_of_two(self.experts), CHUNK=CHUNK, EARLY=True, launch_pdl=True,
            ),
            later(
                d.spread, (self.tokens, -(-self.hidden // BLOCK)),
                buffer.x.view(torch.uint8), buffer.x_sf, buffer.places, buffer.slots,
                self.hidden, TOP_K=self.top_k, BLOCK=BLOCK, EARLY=True, launch_pdl=True,
            ),
        )  # fmt: skip
        yield "linear1", later(
            ov.linear1, (min(blocks, tiles * (2 * self.inter // SHARE)),),
            tokens_box(slots), weights_box(w13), s13.view(torch.int32), buffer.topk_weights,
            buffer.order, buffer.tiles, buffer.acts, buffer.l2_acts.view(torch.uint8),
            buffer.l2_acts_sf, self.hidden, self.inter, self.clamp_value(), tiles,
            **self.activation(), STAGES=tile.STAGES, **options,
        )  # fmt: skip
        yield "linear2", later(
            ov.linear2, (min(blocks, tiles * (self.hidden // SHARE)),),
            tokens_box(acts), weights_box(w2), s2.view(torch.int32), buffer.order,
            buffer.tiles, buffer.slots, self.hidden, self.inter, tiles,
            STAGES=tile2.STAGES, **options,
        )  # fmt: skip


def few_tile(rows: int, experts: int, inter: int, processors: int) -> Tile:
    """The tile of :mod:`.few` for ``rows`` (token, slot) pairs; no bit depends on it.

    A second round of blocks that is only half full keeps memory half busy; blocks of two warps
    are more, and then all of them fit at once.
    """
    four, two, wide = FEW
    if rows > SPARSE * min(rows, experts):
        return wide
    rounds = most_tiles(rows, experts, four) * (2 * inter // ROWS) / (RESIDENT * processors)
    return two if 1 < rounds <= 1.75 else four


def fills_shares(rows: int, experts: int, hidden: int) -> bool:
    """Whether ``rows`` pairs fill the large tiles, and the channels come in whole shares."""
    return rows > CROWDED * min(rows, experts) and hidden % SHARE == 0


def most_tiles(rows: int, experts: int, tile: Tile) -> int:
    """Most tiles that any routing of ``rows`` pairs needs."""
    return min(experts, rows) + rows // tile.N


def later(*arguments: Any, **options: Any) -> Callable[[], None]:
    """The launch of a kernel, to be made when it is called."""
    return partial(launch, *arguments, **options)


def in_turn(*steps: Callable[[], Any]) -> Callable[[], None]:
    """All of ``steps`` as one."""

    def run() -> None:
        for step in steps:
            step()

    return run


def is_wide(scale: torch.Tensor) -> bool:
    """Whether a scale byte is too large for the narrow kernels.

    Looks once at each version of a tensor, which waits for the device; later calls, and the
    capture of a graph, do not. A tensor made in inference mode has no versions: it is looked at in
    every call but those that are captured. ``ValueError`` for a byte that no kernel here takes.
    """
    seen: tuple[int, bool] | None = getattr(scale, "_megamoe_wide", None)
    if scale.is_inference():
        captured = scale.is_cuda and torch.cuda.is_current_stream_capturing()
        version, known = 0, captured
    else:
        version = scale._version
        known = seen is not None and seen[0] == version
    if seen is None or not known:
        largest = int(scale.max()) if scale.numel() else 0
        if largest > WIDEST and bool(((scale > WIDEST) & (scale < 255)).any()):
            raise ValueError(
                f"a weight scale byte is above {WIDEST} and not 255: backend triton multiplies in "
                "bfloat16, which has no such weights; judge this layer with another backend"
            )
        seen = (version, largest > WIDEST_NARROW)
        scale._megamoe_wide = seen  # type: ignore[attr-defined]
    return seen[1]


@cache
def properties(device: torch.device) -> Any:
    """What CUDA says of ``device``; asked once, since every call wants to know."""
    return torch.cuda.get_device_properties(device)


@cache
def as_bfloat16(value: float) -> float:
    """``value`` rounded to bfloat16."""
    return float(torch.tensor(value, dtype=torch.bfloat16).item())


def power_of_two(n: int) -> int:
    """The smallest that is not below ``n``."""
    return 1 << max(0, n - 1).bit_length()
