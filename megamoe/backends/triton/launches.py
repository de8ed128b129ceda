"""Which kernels serve a call, in which tiles, and their launches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

WIDEST_NARROW = 128
"""Largest weight scale byte of the narrow kernels: 2^126 times its value is still a bf16."""
BLOCK = 1024
"""Channels that a program of dispatch or combine takes."""
CHUNK = 1024
"""Slots that a program of count or rank takes."""
Stage = tuple[str, Callable[[], None]]


@dataclass(frozen=True)
class Tile:
    """A block's share: BN weight rows, N tokens; STAGES of copies; by two steps if PAIRED."""

    BN: int
    N: int
    STAGES: int
    WARPS: int
    PAIRED: bool = False


OVERLAPPED = Tile(256, 128, 3, 4), Tile(256, 128, 4, 4)
"""The tiles of :mod:`.overlapped`, linear 1 and 2; their blocks have five warps more."""


def tile_for(rows: int, experts: int) -> Tile:
    """The tile for ``rows`` (token, slot) pairs over ``experts``; its bits do not depend on it."""
    each = rows / max(1, min(rows, experts))
    if each <= 4:
        return Tile(64, 8, 8, 4, PAIRED=True)
    if each <= 16:
        return Tile(64, 16, 8, 4, PAIRED=True)
    if each <= 72:
        return Tile(128, 64, 4, 8)
    return Tile(128, 128, 4, 8)


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

    def max_tiles(self, tile: Tile) -> int:
        """Most tiles that any routing needs."""
        return min(self.experts, self.rows) + self.rows // tile.N

    def wide(self) -> bool:
        """Whether the weights need the wide kernels."""
        return _wide(self.weights[1]) or _wide(self.weights[3])

    def activation(self) -> dict[str, Any]:
        """The switches of linear 1."""
        return {"HAS_CLAMP": self.clamp is not None, "FAST": self.fast_math}

    def clamp_value(self) -> float:
        """The clamp as bfloat16 has it; 0 for none."""
        if self.clamp is None:
            return 0.0
        return float(torch.tensor(self.clamp, dtype=torch.bfloat16).item())

    def suits_overlapped(self) -> bool:
        """Enough rows an expert to fill the large tiles, and channels in whole tiles."""
        return self.rows > 72 * min(self.rows, self.experts) and self.hidden % 256 == 0

    def in_step(self) -> list[Stage]:
        """Dispatch and products by :mod:`.linear`."""
        from megamoe.backends.triton import dispatch as d
        from megamoe.backends.triton import linear as li

        w13, s13, w2, s2 = self.weights
        buffer, tile = self.buffer, tile_for(self.rows, self.experts)
        options = {
            "BN": tile.BN, "N": tile.N, "STAGES": tile.STAGES, "WARPS": tile.WARPS,
            "PAIRED": tile.PAIRED and self.hidden % 256 == 0 and self.inter % 256 == 0,
            "WIDE": self.wide(), "num_warps": tile.WARPS, "launch_pdl": True,
        }  # fmt: skip
        tiles = self.max_tiles(tile)
        return [
            ("dispatch", later(
                d.dispatch, (self.tokens + 1, -(-self.hidden // BLOCK)),
                buffer.x.view(torch.uint8), buffer.x_sf, buffer.topk_idx, buffer.operand,
                buffer.order, buffer.counts, buffer.tiles, self.tokens, self.hidden, self.top_k,
                self.experts, tiles, ROWS=tile.N, BLOCK=BLOCK,
                EXPERTS=power_of_two(self.experts), CHUNK=min(power_of_two(self.rows), 8192),
                EARLY=True, num_warps=8,
            )),
            ("linear1", later(
                li.linear1, (tiles * (2 * self.inter // tile.BN),),
                buffer.operand, w13.view(torch.int16), s13.view(torch.int32),
                buffer.topk_weights, buffer.order, buffer.tiles, buffer.acts,
                buffer.l2_acts.view(torch.uint8), buffer.l2_acts_sf, self.hidden, self.inter,
                self.top_k, self.clamp_value(), **self.activation(), **options,
            )),
            ("linear2", later(
                li.linear2, (tiles * (self.hidden // tile.BN),),
                buffer.acts, w2.view(torch.int16), s2.view(torch.int32), buffer.order,
                buffer.tiles, buffer.slots, self.hidden, self.inter, **options,
            )),
        ]  # fmt: skip

    def overlapped(self) -> list[Stage]:
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
            flat = packed.view(torch.int16).flatten(0, 1)
            return TensorDescriptor.from_tensor(flat, [64, 32], WEIGHT_BOX)

        slots, acts = (t.view(-1, t.shape[-1]) for t in (buffer.slots, buffer.acts))
        options = {"N": tile.N, "WIDE": self.wide(), "num_warps": tile.WARPS}
        tiles, chunks = self.max_tiles(tile), -(-self.rows // CHUNK)
        sort = (buffer.topk_idx, buffer.counts[0])
        return [
            ("dispatch", in_turn(
                buffer.counts.zero_,
                later(d.count, (chunks,), *sort, self.rows, self.experts, CHUNK=CHUNK),
                later(
                    d.rank, (chunks,), *sort, buffer.counts[1], buffer.order, buffer.places,
                    buffer.tiles, self.rows, self.experts, tiles, ROWS=tile.N,
                    EXPERTS=power_of_two(self.experts), CHUNK=CHUNK,
                ),
                later(
                    d.spread, (self.tokens, -(-self.hidden // BLOCK)),
                    buffer.x.view(torch.uint8), buffer.x_sf, buffer.places, buffer.slots,
                    self.hidden, TOP_K=self.top_k, BLOCK=BLOCK,
                ),
            )),
            ("linear1", later(
                ov.linear1, (tiles * (2 * self.inter // tile.BN),),
                tokens_box(slots), weights_box(w13), s13.view(torch.int32), buffer.topk_weights,
                buffer.order, buffer.tiles, buffer.acts, buffer.l2_acts.view(torch.uint8),
                buffer.l2_acts_sf, self.hidden, self.inter, self.clamp_value(),
                **self.activation(), STAGES=tile.STAGES, **options,
            )),
            ("linear2", later(
                ov.linear2, (tiles * (self.hidden // tile2.BN),),
                tokens_box(acts), weights_box(w2), s2.view(torch.int32), buffer.order,
                buffer.tiles, buffer.slots, self.hidden, self.inter, STAGES=tile2.STAGES,
                **options,
            )),
        ]  # fmt: skip


def later(*arguments: Any, **options: Any) -> Callable[[], None]:
    """The launch of a kernel, to be made when it is called."""
    from megamoe.backends.triton.binaries import launch

    return partial(launch, *arguments, **options)


def in_turn(*steps: Callable[[], Any]) -> Callable[[], None]:
    """All of ``steps`` as one."""

    def run() -> None:
        for step in steps:
            step()

    return run


def _wide(scale: torch.Tensor) -> bool:
    """Whether a scale byte is too large for the narrow kernels.

    Looks once at each version of a tensor, which waits for the device; later calls, and the
    capture of a graph after a first call, do not.
    """
    seen: tuple[int, bool] | None = getattr(scale, "_megamoe_wide", None)
    if seen is None or seen[0] != scale._version:
        wide = scale.numel() > 0 and int(scale.max()) > WIDEST_NARROW
        seen = (scale._version, wide)
        scale._megamoe_wide = seen  # type: ignore[attr-defined]
    return seen[1]


def power_of_two(n: int) -> int:
    """The smallest that is not below ``n``."""
    return 1 << max(0, n - 1).bit_length()
