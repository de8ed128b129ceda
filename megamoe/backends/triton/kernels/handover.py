"""The sums of a share, from the groups that multiply to the warps that write (Gluon).

A group leaves the (64, N) sums of each of its boxes of weight rows in shared memory, rounded to
bfloat16, and multiplies on. For each box there are two barriers: ``ready``, when the sums are there
to be read, and ``free``, when there is room for those of the next share.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from megamoe.backends.triton.kernels.epilogue import activate
from megamoe.backends.triton.kernels.layouts import ROWS, act_layout, store_layout

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.7, 3.6

WRITERS: gl.constexpr = gl.constexpr(2)
"""Warps that write."""
PIECE: gl.constexpr = gl.constexpr(32)
"""Token rows that they take at a time; SwiGLU without fast math half of them, for its registers."""
PAIRS: gl.constexpr = gl.constexpr(gl.SwizzledSharedLayout(8, 2, 4, order=[1, 0]))
"""Shared memory of (tokens, 32) int32, gate and up of a channel in the halves of a word."""
CHANNELS: gl.constexpr = gl.constexpr(
    gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
)
"""Shared memory of (tokens, 64) bfloat16."""


@gluon.jit
def room_for_sums(GATED: gl.constexpr, N: gl.constexpr, BOXES: gl.constexpr):
    """Shared memory of a share's sums, and its barriers ``ready`` and ``free``.

    GATED: weight rows are gate and up rows, 8 and 8 in turn.
    """
    if GATED:
        sums = gl.allocate_shared_memory(gl.int32, [2 * BOXES, N, ROWS // 2], PAIRS)
    else:
        sums = gl.allocate_shared_memory(gl.bfloat16, [2 * BOXES, N, ROWS], CHANNELS)
    ready = gl.allocate_shared_memory(gl.int64, [2 * BOXES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [2 * BOXES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2 * BOXES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    return sums, ready, free


@gluon.jit
def hand_over(acc, handover, box: gl.constexpr, shares, N: gl.constexpr, GATED: gl.constexpr):
    """``acc`` (64, N) fp32 of ``box``, rounded to bfloat16, after ``shares`` shares before it."""
    sums, ready, free = handover
    if GATED:
        gate, up = gl.split(acc.reshape([ROWS // 16, 2, 8, N]).permute([0, 2, 3, 1]))
        rounded = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [gate, up],
            dtype=gl.int32, is_pure=True, pack=1,
        ).reshape([ROWS // 2, N])  # fmt: skip
    else:
        rounded = acc.to(gl.bfloat16)
    mbarrier.wait(free.index(box), (shares & 1) ^ 1)
    sums.index(box).slice(0, N).store(rounded.permute([1, 0]))
    barrier()  # every warp of the group has stored its part
    mbarrier.arrive(ready.index(box))


@gluon.jit
def write_activations(
    handover, box, shares, first, end, channel0, place,
    N: gl.constexpr, BOXES: gl.constexpr, HAS_CLAMP: gl.constexpr, FAST: gl.constexpr,
):  # fmt: skip
    """SwiGLU and requantisation of the 32 channels of ``box``, which begin at ``channel0``."""
    sums, ready, free = handover
    order, topk_weights, acts, codes, sf, inter, clamp = place
    ROWS_NOW: gl.constexpr = PIECE if FAST else PIECE // 2
    layout: gl.constexpr = act_layout(ROWS_NOW, ROWS // 2, WRITERS)
    pieces = sums._reinterpret(gl.int32, [2 * BOXES * N // ROWS_NOW, ROWS_NOW, ROWS // 2], PAIRS)
    mbarrier.wait(ready.index(box), shares & 1)
    for i in range(gl.cdiv(gl.minimum(end - first, N), ROWS_NOW)):
        word = pieces.index(box * (N // ROWS_NOW) + i).load(layout)
        gate = (word << 16).to(gl.float32, bitcast=True)
        up = (word & -65536).to(gl.float32, bitcast=True)
        activate(
            gate, up, first + i * ROWS_NOW, end, channel0, order, topk_weights, acts, codes, sf,
            inter, clamp, HAS_CLAMP, FAST, True,
        )  # fmt: skip
    mbarrier.arrive(free.index(box))


@gluon.jit
def write_rows(
    handover, box, shares, first, end, channel0, place, N: gl.constexpr, BOXES: gl.constexpr
):
    """The 64 channels of ``box``, which begin at ``channel0``, to the rows of their slots."""
    sums, ready, free = handover
    order, slots, hidden = place
    layout: gl.constexpr = store_layout(ROWS, WRITERS)
    pieces = sums._reinterpret(gl.bfloat16, [2 * BOXES * N // PIECE, PIECE, ROWS], CHANNELS)
    column = channel0 + gl.arange(0, ROWS, layout=gl.SliceLayout(0, layout))
    mbarrier.wait(ready.index(box), shares & 1)
    for i in range(gl.cdiv(gl.minimum(end - first, N), PIECE)):
        row = first + i * PIECE + gl.arange(0, PIECE, layout=gl.SliceLayout(1, layout))
        pair = gl.load(order + gl.minimum(row, end - 1))
        at = pair.to(gl.int64)[:, None] * hidden + column[None, :]
        value = pieces.index(box * (N // PIECE) + i).load(layout)
        gl.store(slots + at, value, mask=(row < end)[:, None])
    mbarrier.arrive(free.index(box))
