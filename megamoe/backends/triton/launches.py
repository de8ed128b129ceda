"""Which kernels serve a call, and their launches; :mod:`.tiles` has their tiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from operator import attrgetter
from typing import Any, NamedTuple

import torch

from megamoe.backends.triton.binaries import Kind, Launch
from megamoe.backends.triton.packing import ROWS, power_of_two
from megamoe.backends.triton.tiles import Tile, few_tile, most_tiles, overlapped_tile

WIDEST_NARROW = 128
"""Largest weight scale byte of the narrow kernels: 2^126 times its value is still a bf16."""
WIDEST = 252
"""Largest weight scale byte at all, but for NaN's, 255: 6 times its value is still a bf16."""
BYTES, WORDS = torch.uint8, torch.int32
BLOCK = 1024
"""Channels that a program of dispatch or combine takes."""
LONG = 4096
"""With this many tokens or more, a program of combine takes four blocks: 3% less on an H200."""
CHUNK = 1024
"""Slots that a program of count or rank takes."""
TALLIES = 8
"""Counters for each expert: each one takes the rows of one in eight programs of count or rank."""


class Memory(NamedTuple):
    """The tensors of one forward, by the names that :func:`step` is given."""

    buffer: Any
    w13: torch.Tensor
    s13: torch.Tensor
    w2: torch.Tensor
    s2: torch.Tensor
    y: torch.Tensor


Step = Callable[[Memory, int], None]
"""A launch on a stream."""
Stage = tuple[str, tuple[Step, ...]]


@dataclass(frozen=True)
class Call:
    """All of a forward that decides its launches, but for its tensors."""

    tokens: int
    capacity: int
    experts: int
    hidden: int
    inter: int
    top_k: int
    clamp: float | None
    fast_math: bool
    wide: bool
    """Whether the weights need the wide kernels."""
    device: torch.device

    @property
    def rows(self) -> int:
        """(token, slot) pairs."""
        return self.tokens * self.top_k

    @property
    def gpu(self) -> Any:
        """What CUDA says of the GPU."""
        return properties(self.device)

    def activation(self) -> dict[str, Any]:
        """The switches of linear 1."""
        return {"HAS_CLAMP": self.clamp is not None, "FAST": self.fast_math}

    def clamp_value(self) -> float:
        """The clamp as bfloat16 has it; 0 for none."""
        return 0.0 if self.clamp is None else as_bfloat16(self.clamp)

    def tile(self) -> Tile:
        """The fastest one for as many rows per expert; ``wgmma`` needs compute capability 9."""
        large = overlapped_tile(self.rows, self.experts, self.hidden)
        if large and self.gpu.major == 9:
            return large
        return few_tile(self.rows, self.experts, self.inter, self.gpu.multi_processor_count)

    def few(self, tile: Tile) -> tuple[Stage, ...]:
        """Dispatch and products by :mod:`.kernels.few`."""
        from megamoe.backends.triton.kernels import dispatch as d
        from megamoe.backends.triton.kernels import few

        tiles = most_tiles(self.rows, self.experts, tile)
        options = {
            "N": tile.N, "WARPS": tile.WARPS, "AHEAD": tile.AHEAD, "WIDE": self.wide,
            "num_warps": tile.WARPS, "maxnreg": tile.registers, "launch_pdl": True,
        }  # fmt: skip
        dispatch = step(
            d.dispatch, (self.tokens + 1, -(-self.hidden // BLOCK)),
            {"buffer.x": BYTES, "buffer.x_sf": None, "buffer.topk_idx": None,
             "buffer.operand": None, "buffer.order": None, "buffer.counts": None,
             "buffer.tiles": None},
            self.tokens, self.hidden, self.top_k, self.experts, tiles,
            ROWS=tile.N, BLOCK=BLOCK, EXPERTS=power_of_two(self.experts),
            CHUNK=min(power_of_two(self.rows), 8192), EARLY=True, launch_pdl=True, num_warps=8,
        )  # fmt: skip
        linear1 = step(
            few.linear1, (tiles * (2 * self.inter // ROWS),),
            {"buffer.operand": WORDS, "w13": WORDS, "s13": WORDS, "buffer.topk_weights": None,
             "buffer.order": None, "buffer.tiles": None, "buffer.acts": None,
             "buffer.l2_acts": BYTES, "buffer.l2_acts_sf": None},
            self.hidden, self.inter, self.top_k, self.clamp_value(),
            **self.activation(), **options,
        )  # fmt: skip
        linear2 = step(
            few.linear2, (tiles * (self.hidden // ROWS),),
            {"buffer.acts": WORDS, "w2": WORDS, "s2": WORDS, "buffer.order": None,
             "buffer.tiles": None, "buffer.slots": None},
            self.hidden, self.inter, **options,
        )  # fmt: skip
        return ("dispatch", (dispatch,)), ("linear1", (linear1,)), ("linear2", (linear2,))

    def overlapped(self, tile: Tile) -> tuple[Stage, ...]:
        """Dispatch and products by :mod:`.kernels.overlapped`.

        Until linear 2 writes them, the slots' rows hold the operands of linear 1.
        """
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        from megamoe.backends.triton.kernels import dispatch as d
        from megamoe.backends.triton.kernels import overlapped as ov
        from megamoe.backends.triton.kernels.layouts import TOKEN_BOX, WEIGHT_BOX

        def tokens_box(rows: torch.Tensor) -> Any:
            flat = rows.view(-1, rows.shape[-1])
            return TensorDescriptor.from_tensor(flat, [tile.N, 64], TOKEN_BOX)

        def weights_box(packed: torch.Tensor) -> Any:
            flat = packed.view(torch.int16).view(-1, 32)
            return TensorDescriptor.from_tensor(flat, [ROWS, 32], WEIGHT_BOX)

        options = {
            "N": tile.N, "BOXES": tile.BOXES, "STAGES": tile.STAGES, "WIDE": self.wide,
            "num_warps": tile.WARPS, "launch_pdl": True,
        }  # fmt: skip
        tiles, chunks = most_tiles(self.rows, self.experts, tile), -(-self.rows // CHUNK)
        blocks = self.gpu.multi_processor_count
        count = step(
            d.count, (chunks,), {"buffer.topk_idx": None, "buffer.counts": None},
            self.rows, self.experts, EXPERTS=power_of_two(self.experts), CHUNK=CHUNK,
            TALLIES=TALLIES,
        )  # fmt: skip
        rank = step(
            d.rank, (chunks,),
            {"buffer.topk_idx": None, "buffer.counts": None, "buffer.cursors": None,
             "buffer.order": None, "buffer.places": None, "buffer.tiles": None},
            self.rows, self.experts, tiles, ROWS=tile.N, EXPERTS=power_of_two(self.experts),
            CHUNK=CHUNK, TALLIES=TALLIES, EARLY=True, launch_pdl=True,
        )  # fmt: skip
        spread = step(
            d.spread, (self.tokens, -(-self.hidden // BLOCK)),
            {"buffer.x": BYTES, "buffer.x_sf": None, "buffer.places": None, "buffer.slots": None},
            self.hidden, TOP_K=self.top_k, BLOCK=BLOCK, EARLY=True, launch_pdl=True,
        )  # fmt: skip
        linear1 = step(
            ov.linear1, (min(blocks, tiles * (2 * self.inter // tile.share)),),
            {"buffer.slots": tokens_box, "w13": weights_box, "s13": WORDS,
             "buffer.topk_weights": None, "buffer.order": None, "buffer.tiles": None,
             "buffer.acts": None, "buffer.l2_acts": BYTES, "buffer.l2_acts_sf": None},
            self.hidden, self.inter, self.clamp_value(), tiles,
            **self.activation(), **options,
        )  # fmt: skip
        linear2 = step(
            ov.linear2, (min(blocks, tiles * (self.hidden // tile.share)),),
            {"buffer.acts": tokens_box, "w2": weights_box, "s2": WORDS, "buffer.order": None,
             "buffer.tiles": None, "buffer.slots": None},
            self.hidden, self.inter, tiles, **options,
        )  # fmt: skip
        dispatch = forget_counts, count, rank, spread
        return ("dispatch", dispatch), ("linear1", (linear1,)), ("linear2", (linear2,))

    def combine(self) -> Stage:
        """The sum over a token's slots."""
        from megamoe.backends.triton.kernels import dispatch as d

        block = 4 * BLOCK if self.tokens >= LONG else BLOCK
        combine = step(
            d.combine, (self.tokens, -(-self.hidden // block)),
            {"buffer.slots": None, "buffer.topk_idx": None, "y": None}, self.hidden, self.experts,
            TOP_K=self.top_k, BLOCK=block, EARLY=True, launch_pdl=True, num_warps=4,
        )  # fmt: skip
        return "combine", (combine,)


@lru_cache(maxsize=256)
def stages_of(call: Call, tile: Tile | None = None) -> tuple[Stage, ...]:
    """Every launch of ``call``, in order; the same objects again, since they remember.

    In its own tile, or in ``tile``: no bit depends on it.
    """
    tile = tile or call.tile()
    products = call.overlapped(tile) if tile.BOXES else call.few(tile)
    return *products, call.combine()


def step(
    kernel: Any, grid: tuple[int, ...], tensors: dict[str, Kind], *numbers: Any, **options: Any
) -> Step:
    """A launch that finds its ``tensors`` in :class:`Memory`; options as for ``kernel[grid]``."""
    launch = Launch(kernel, grid, tuple(tensors.values()), *numbers, **options)
    return LaunchStep(launch, attrgetter(*tensors))


@dataclass(frozen=True)
class LaunchStep:
    """A step that is a launch."""

    launch: Launch
    arguments: Callable[[Memory], tuple[torch.Tensor, ...]]

    def __call__(self, memory: Memory, stream: int) -> None:
        self.launch(self.arguments(memory), stream)


def forget_counts(memory: Memory, stream: int) -> None:
    """Zero what :func:`.kernels.dispatch.count` and :func:`.kernels.dispatch.rank` add to."""
    del stream  # the current one, which torch takes
    memory.buffer.counts.zero_()


def is_wide(scale: torch.Tensor) -> bool:
    """Whether a scale byte is too large for the narrow kernels.

    Looks once at each version of a tensor, which waits for the device; later calls, and the
    capture of a graph, do not. A tensor made in inference mode has no versions: it is looked at in
    every call but those that are captured. ``NotImplementedError`` for a byte that is too large for
    every kernel here.
    """
    entry: tuple[int, bool] | None = getattr(scale, "_megamoe_wide", None)
    if scale.is_inference():
        is_capturing = scale.is_cuda and torch.cuda.is_current_stream_capturing()
        version, is_current = 0, is_capturing
    else:
        version = scale._version
        is_current = entry is not None and entry[0] == version
    if entry is None or not is_current:
        largest = int(scale.max()) if scale.numel() else 0
        if largest > WIDEST and bool(((scale > WIDEST) & (scale < 255)).any()):
            raise NotImplementedError(
                f"a weight scale byte is above {WIDEST} and not 255: backend triton multiplies in "
                "bfloat16, which has no such weights; judge this layer with another backend"
            )
        entry = (version, largest > WIDEST_NARROW)
        scale._megamoe_wide = entry  # type: ignore[attr-defined]
    return entry[1]


@cache
def properties(device: torch.device) -> Any:
    """What CUDA says of ``device``; asked once, since every call wants to know."""
    return torch.cuda.get_device_properties(device)


@cache
def as_bfloat16(value: float) -> float:
    """``value`` rounded to bfloat16."""
    return float(torch.tensor(value, dtype=torch.bfloat16, device="cpu").item())
