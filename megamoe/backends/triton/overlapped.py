"""The two grouped products for many tokens: one warp group decodes while the other multiplies.

A ``wgmma`` whose operand A lies in registers holds up the warps that issue it, so warps in step
leave the tensor cores idle while they decode. Here a block has two warp groups that multiply, each
with 128 of its 256 weight rows, and one warp that starts the copies. The two groups take turns: the
tensor cores work for one while the other decodes. What a product is, and the order of its sums, is
that of :mod:`.linear`: the bits are the same.

The copies are TMA boxes, so token rows must lie together by expert: ``x`` and ``acts`` are in the
order of :func:`.dispatch.rank`. A box that reaches beyond its expert's rows reads somebody else's,
whose sums nobody stores.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from megamoe.backends.triton.layouts import act_layout, mma_layout, operand_layout, packed_layout
from megamoe.backends.triton.linear import activate, barrier, decoded, store_rows

PARTS: gl.constexpr = gl.constexpr(4)
"""Boxes of weight rows a step: two for each of the two groups that multiply."""
ROWS: gl.constexpr = gl.constexpr(64)
"""Weight rows of a box: those of one ``wgmma``."""
PIECE: gl.constexpr = gl.constexpr(64)
"""Token rows that the epilogue of linear 1 takes at a time."""
WARPS: gl.constexpr = gl.constexpr(4)
"""Warps of a group that multiplies."""
CONSUMER_REGISTERS: gl.constexpr = gl.constexpr(240)
PRODUCER_REGISTERS: gl.constexpr = gl.constexpr(24)


@gluon.jit
def _produce(shared, x, weight, row, base, apart, N: gl.constexpr, STAGES: gl.constexpr):
    """Copy each step's token rows and weight rows as soon as a stage is free.

    Boxes 0 and 2 are the first 64 weight rows of the groups, 1 and 3 lie ``apart`` rows on.
    """
    xs, ws, full, empty, _turn, steps = shared
    for k in range(steps):
        slot = k % STAGES
        bar = full.index(slot)
        mbarrier.wait(empty.index(slot), ((k // STAGES) & 1) ^ 1)
        mbarrier.expect(bar, N * 256 + PARTS * ROWS * 64)
        tma.async_copy_global_to_shared(x, [row, k * 128], bar, xs.index(slot))
        for part in gl.static_range(PARTS):
            w_row = base + (part % 2) * apart + (part // 2) * ROWS
            at = ws.index(slot * PARTS + part)
            tma.async_copy_global_to_shared(weight, [w_row, k * 32], bar, at)


@gluon.jit
def _consume(
    shared, scale, base, apart,
    GROUP: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """Two (64, N) fp32: the weight rows of both boxes of a group times token rows, K ascending."""
    xs, ws, full, empty, turn, steps = shared
    mma: gl.constexpr = mma_layout(WARPS, N)
    operand: gl.constexpr = operand_layout(WARPS, N)
    packed_l: gl.constexpr = packed_layout(ROWS, WARPS)
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, packed_l)) + GROUP * ROWS
    s0 = scale + (rows + base).to(gl.int64) * steps
    s1 = s0 + apart.to(gl.int64) * steps
    words0 = gl.load(s0)
    words1 = gl.load(s1)
    acc0 = gl.zeros([ROWS, N], gl.float32, mma)
    acc1 = gl.zeros([ROWS, N], gl.float32, mma)
    for k in range(steps):
        slot = k % STAGES
        mbarrier.wait(full.index(slot), (k // STAGES) & 1)
        box = slot * PARTS + GROUP * 2
        a0 = decoded(ws.index(box).load(packed_l), words0, ROWS, packed_l, operand, WIDE)
        a1 = decoded(ws.index(box + 1).load(packed_l), words1, ROWS, packed_l, operand, WIDE)
        ahead = gl.minimum(k + 1, steps - 1)
        words0 = gl.load(s0 + ahead)
        words1 = gl.load(s1 + ahead)
        x = xs.index(slot).slice(0, N).permute((1, 0))
        mbarrier.wait(turn.index(GROUP), (k & 1) ^ (1 - GROUP))
        t0 = warpgroup_mma(a0, x, acc0, is_async=True)
        t1 = warpgroup_mma(a1, x, acc1, is_async=True)
        mbarrier.arrive(turn.index(1 - GROUP))
        acc0, acc1, a0, a1 = warpgroup_mma_wait(0, deps=[t0, t1, a0, a1])
        mbarrier.arrive(empty.index(slot))
    return acc0, acc1


@gluon.jit
def _shared(x, weight, steps, N: gl.constexpr, STAGES: gl.constexpr):
    """Shared memory of token and weight boxes, its barriers, and the number of steps."""
    xs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, N, 128], x.layout)
    ws = gl.allocate_shared_memory(gl.int16, [STAGES * PARTS, ROWS, 32], weight.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(turn.index(i), count=1)
    fence_async_shared()
    return xs, ws, full, empty, turn, steps


@gluon.jit
def _linear1_rows(
    shared, place, scale, base,
    GROUP: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, WIDE: gl.constexpr,
    HAS_CLAMP: gl.constexpr, FAST: gl.constexpr,
):  # fmt: skip
    first, end, channel0, order, topk_weights, acts, codes, sf, inter, clamp, halves = place
    gate, up = _consume(shared, scale, base, inter, GROUP, N, STAGES, WIDE)
    # Through shared memory and in a loop: written out for all rows at once the code is so long
    # that fetching it takes a third of the kernel's time.
    layout: gl.constexpr = act_layout(PIECE, ROWS, WARPS)
    for i in gl.static_range(2):
        half = (up if i else gate).to(gl.bfloat16).permute([1, 0])
        if N == PIECE:
            halves.index(2 * i).store(half)
        else:
            low, high = gl.split(half.reshape([2, PIECE, ROWS]).permute([1, 2, 0]))
            halves.index(2 * i).store(low)
            halves.index(2 * i + 1).store(high)
    barrier()
    for i in range(gl.minimum(N // PIECE, gl.cdiv(end - first, PIECE))):
        activate(
            halves.index(i).load(layout), halves.index(2 + i).load(layout), first + i * PIECE, end,
            channel0 + GROUP * ROWS, order, topk_weights, acts, codes, sf, inter, clamp,
            HAS_CLAMP, FAST, True,
        )  # fmt: skip


@gluon.jit
def _linear1_group(
    shared, place, scale, base,
    GROUP: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, WIDE: gl.constexpr,
    HAS_CLAMP: gl.constexpr, FAST: gl.constexpr,
):  # fmt: skip
    halves = gl.allocate_shared_memory(
        gl.bfloat16, [4, PIECE, ROWS], gl.SwizzledSharedLayout(8, 1, 8, order=[1, 0])
    )
    place = place + (halves,)  # noqa: RUF005 (a star cannot be compiled)
    if place[1] - place[0] > N // 2:
        _linear1_rows(shared, place, scale, base, GROUP, N, STAGES, WIDE, HAS_CLAMP, FAST)
    else:  # an expert's last rows: half a tile
        _linear1_rows(shared, place, scale, base, GROUP, N // 2, STAGES, WIDE, HAS_CLAMP, FAST)


@gluon.jit
def _linear2_rows(
    shared, place, scale, base, apart,
    GROUP: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    first, end, channel0, order, slots, hidden = place
    low, high = _consume(shared, scale, base, apart, GROUP, N, STAGES, WIDE)
    at = channel0 + GROUP * ROWS
    store_rows(low, first, end, at, order, slots, hidden, ROWS, N, WARPS)
    store_rows(high, first, end, at + apart, order, slots, hidden, ROWS, N, WARPS)


@gluon.jit
def _linear2_group(
    shared, place, scale, base, apart,
    GROUP: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    if place[1] - place[0] > N // 2:
        _linear2_rows(shared, place, scale, base, apart, GROUP, N, STAGES, WIDE)
    else:
        _linear2_rows(shared, place, scale, base, apart, GROUP, N // 2, STAGES, WIDE)


@gluon.jit
def linear1(
    x, w13, s13, topk_weights, order, tiles, acts, codes, sf, hidden, inter, clamp,
    HAS_CLAMP: gl.constexpr, FAST: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
    WIDE: gl.constexpr,
):  # fmt: skip
    """As :func:`.linear.linear1`, 128 channels a block; ``x`` and ``acts`` (rows by expert, ...).

    ``x`` and ``w13`` are TMA descriptors of (rows, H) bf16 and (E * 2I, H/4) int16.
    """
    blocks = inter // 128
    tile = gl.program_id(0) // blocks
    channel0 = (gl.program_id(0) % blocks) * 128
    expert = gl.load(tiles + tile * 3)
    if expert < 0:
        return
    first = gl.load(tiles + tile * 3 + 1)
    end = gl.load(tiles + tile * 3 + 2)
    base = expert * (2 * inter) + channel0
    shared = _shared(x, w13, hidden // 128, N, STAGES)
    place = (first, end, channel0, order, topk_weights, acts, codes, sf, inter, clamp)
    ZERO: gl.constexpr = gl.constexpr(0)
    ONE: gl.constexpr = gl.constexpr(1)
    gl.warp_specialize(
        [
            (_linear1_group,
             (shared, place, s13, base, ZERO, N, STAGES, WIDE, HAS_CLAMP, FAST)),
            (_linear1_group,
             (shared, place, s13, base, ONE, N, STAGES, WIDE, HAS_CLAMP, FAST)),
            (_produce, (shared, x, w13, first, base, inter, N, STAGES)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


@gluon.jit
def linear2(
    acts, w2, s2, order, tiles, slots, hidden, inter,
    N: gl.constexpr, STAGES: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """As :func:`.linear.linear2`, 256 channels a block; ``acts`` (rows by expert, I).

    ``acts`` and ``w2`` are TMA descriptors of (rows, I) bf16 and (E * H, I/4) int16.
    """
    blocks = hidden // 256
    tile = gl.program_id(0) // blocks
    channel0 = (gl.program_id(0) % blocks) * 256
    expert = gl.load(tiles + tile * 3)
    if expert < 0:
        return
    first = gl.load(tiles + tile * 3 + 1)
    end = gl.load(tiles + tile * 3 + 2)
    base = expert * hidden + channel0
    apart = gl.to_tensor(128)
    shared = _shared(acts, w2, inter // 128, N, STAGES)
    place = (first, end, channel0, order, slots, hidden)
    ZERO: gl.constexpr = gl.constexpr(0)
    ONE: gl.constexpr = gl.constexpr(1)
    gl.warp_specialize(
        [
            (_linear2_group, (shared, place, s2, base, apart, ZERO, N, STAGES, WIDE)),
            (_linear2_group, (shared, place, s2, base, apart, ONE, N, STAGES, WIDE)),
            (_produce, (shared, acts, w2, first, base, apart, N, STAGES)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
