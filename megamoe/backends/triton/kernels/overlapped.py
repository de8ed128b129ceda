"""The two grouped products for many tokens: one warp group decodes while the other multiplies.

A ``wgmma`` whose operand A lies in registers holds up the warps that issue it, so warps in step
leave the tensor cores idle while they decode. Here a block has two warp groups that multiply, each
with 128 of its 256 weight rows, and one warp that starts the copies. The two groups take turns: the
tensor cores work for one while the other decodes. What a product is, and the order of its sums, is
that of :mod:`.few`: the bits are the same.

A block stays and takes one share of the work after the other, so that the copies for the next are
on their way while the groups write out the last. A share is 256 weight rows of a tile; each role
goes through the same shares by itself and counts their steps.

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

from megamoe.backends.triton.kernels.chain import started
from megamoe.backends.triton.kernels.decode import decoded
from megamoe.backends.triton.kernels.epilogue import activate, store_rows
from megamoe.backends.triton.kernels.layouts import (
    ROWS,
    act_layout,
    mma_layout,
    operand_layout,
    packed_layout,
)
from megamoe.backends.triton.packing import SHARE

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.7, 3.6

PARTS: gl.constexpr = gl.constexpr(SHARE // ROWS.value)
"""Boxes of weight rows a share: two for each of the two groups that multiply."""
PIECE: gl.constexpr = gl.constexpr(64)
"""Token rows that the epilogue of linear 1 takes at a time."""
WARPS: gl.constexpr = gl.constexpr(4)
"""Warps of a group that multiplies."""
CONSUMER_REGISTERS: gl.constexpr = gl.constexpr(240)
PRODUCER_REGISTERS: gl.constexpr = gl.constexpr(24)


@gluon.jit
def _share(work, number):
    """Expert (-1 for none), first and end row, and the first box of share ``number``."""
    tiles, shares, _total, _start = work
    tile = tiles + number // shares * 3
    expert = gl.load(tile)
    box = (expert * shares + number % shares) * PARTS
    return expert, gl.load(tile + 1), gl.load(tile + 2), box


@gluon.jit
def _produce(shared, work, x, weight, N: gl.constexpr, STAGES: gl.constexpr):
    """Copy each step's token rows and weight rows as soon as a stage is free."""
    xs, ws, full, empty, _turn, steps = shared
    done = gl.to_tensor(0)
    for number in range(work[3], work[2], gl.num_programs(0)):
        expert, first, _end, box = _share(work, number)
        if expert >= 0:
            for k in range(steps):
                slot = (done + k) % STAGES
                bar = full.index(slot)
                mbarrier.wait(empty.index(slot), (((done + k) // STAGES) & 1) ^ 1)
                mbarrier.expect(bar, N * 256 + PARTS * ROWS * 64)
                tma.async_copy_global_to_shared(x, [first, k * 128], bar, xs.index(slot))
                for part in gl.static_range(PARTS):
                    w_row = ((box + part) * steps + k) * ROWS
                    at = ws.index(slot * PARTS + part)
                    tma.async_copy_global_to_shared(weight, [w_row, 0], bar, at)
            done += steps


@gluon.jit
def _consume(
    shared, scale, box, done,
    GROUP: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """Two (64, N) fp32: the weight rows of both boxes of a group times token rows, K ascending.

    ``done``: steps that this block has behind it.
    """
    xs, ws, full, empty, turn, steps = shared
    mma: gl.constexpr = mma_layout(WARPS, N)
    operand: gl.constexpr = operand_layout(WARPS, N)
    packed_l: gl.constexpr = packed_layout(ROWS, WARPS)
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, packed_l))
    s0 = scale + (box + GROUP * 2).to(gl.int64) * (steps * ROWS) + rows
    s1 = s0 + steps * ROWS
    words0 = gl.load(s0)
    words1 = gl.load(s1)
    acc0 = gl.zeros([ROWS, N], gl.float32, mma)
    acc1 = gl.zeros([ROWS, N], gl.float32, mma)
    for k in range(steps):
        slot = (done + k) % STAGES
        mbarrier.wait(full.index(slot), ((done + k) // STAGES) & 1)
        part = slot * PARTS + GROUP * 2
        a0 = decoded(ws.index(part).load(packed_l), words0, packed_l, operand, WIDE)
        a1 = decoded(ws.index(part + 1).load(packed_l), words1, packed_l, operand, WIDE)
        ahead = gl.minimum(k + 1, steps - 1) * ROWS
        words0 = gl.load(s0 + ahead)
        words1 = gl.load(s1 + ahead)
        x = xs.index(slot).slice(0, N).permute((1, 0))
        mbarrier.wait(turn.index(GROUP), ((done + k) & 1) ^ (1 - GROUP))
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
def _gate_and_up(acc, N: gl.constexpr):
    """(64, N) fp32 of 8 gate and 8 up rows in turn to two (32, N) bf16."""
    both = acc.to(gl.bfloat16).reshape([ROWS // 16, 2, 8, N]).permute([0, 2, 3, 1])
    gate, up = gl.split(both)
    return gate.reshape([ROWS // 2, N]), up.reshape([ROWS // 2, N])


@gluon.jit
def _one_by_the_other(low, high, N: gl.constexpr):
    """Two (32, N) to (N, 64), the channels of ``low`` first."""
    return gl.join(low, high).permute([1, 2, 0]).reshape([N, ROWS])


@gluon.jit
def _linear1_rows(
    shared, place, halves, scale, first, end, box, channel0, done,
    GROUP: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, WIDE: gl.constexpr,
    HAS_CLAMP: gl.constexpr, FAST: gl.constexpr,
):  # fmt: skip
    order, topk_weights, acts, codes, sf, inter, clamp = place
    acc0, acc1 = _consume(shared, scale, box, done, GROUP, N, STAGES, WIDE)
    gate0, up0 = _gate_and_up(acc0, N)
    gate1, up1 = _gate_and_up(acc1, N)
    # Through shared memory and in a loop: written out for all rows at once the code is so long
    # that fetching it takes a third of the kernel's time.
    layout: gl.constexpr = act_layout(PIECE, ROWS, WARPS)
    barrier()  # of the share before, every thread has read what it takes from there
    for i in gl.static_range(2):
        if i == 0:
            half = _one_by_the_other(gate0, gate1, N)
        else:
            half = _one_by_the_other(up0, up1, N)
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
    shared, work, place, scale,
    GROUP: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, WIDE: gl.constexpr,
    HAS_CLAMP: gl.constexpr, FAST: gl.constexpr,
):  # fmt: skip
    halves = gl.allocate_shared_memory(
        gl.bfloat16, [4, PIECE, ROWS], gl.SwizzledSharedLayout(8, 1, 8, order=[1, 0])
    )
    done = gl.to_tensor(0)
    for number in range(work[3], work[2], gl.num_programs(0)):
        expert, first, end, box = _share(work, number)
        channel0 = number % work[1] * (PARTS * ROWS // 2)
        if expert >= 0:
            if end - first > N // 2:
                _linear1_rows(shared, place, halves, scale, first, end, box, channel0, done,
                              GROUP, N, STAGES, WIDE, HAS_CLAMP, FAST)  # fmt: skip
            else:  # an expert's last rows: half a tile
                _linear1_rows(shared, place, halves, scale, first, end, box, channel0, done,
                              GROUP, N // 2, STAGES, WIDE, HAS_CLAMP, FAST)  # fmt: skip
            done += shared[5]


@gluon.jit
def _linear2_rows(
    shared, place, scale, first, end, box, channel0, done,
    GROUP: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    order, slots, hidden = place
    low, high = _consume(shared, scale, box, done, GROUP, N, STAGES, WIDE)
    at = channel0 + GROUP * (2 * ROWS)
    store_rows(low, first, end, at, order, slots, hidden, N, WARPS)
    store_rows(high, first, end, at + ROWS, order, slots, hidden, N, WARPS)


@gluon.jit
def _linear2_group(
    shared, work, place, scale,
    GROUP: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    done = gl.to_tensor(0)
    for number in range(work[3], work[2], gl.num_programs(0)):
        expert, first, end, box = _share(work, number)
        channel0 = number % work[1] * (PARTS * ROWS)
        if expert >= 0:
            if end - first > N // 2:
                _linear2_rows(shared, place, scale, first, end, box, channel0, done,
                              GROUP, N, STAGES, WIDE)  # fmt: skip
            else:
                _linear2_rows(shared, place, scale, first, end, box, channel0, done,
                              GROUP, N // 2, STAGES, WIDE)  # fmt: skip
            done += shared[5]


@gluon.jit
def linear1(
    x, w13, s13, topk_weights, order, tiles, acts, codes, sf, hidden, inter, clamp, tile_count,
    HAS_CLAMP: gl.constexpr, FAST: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
    WIDE: gl.constexpr,
):  # fmt: skip
    """As :func:`.few.linear1`, 128 channels a share; ``x`` and ``acts`` (rows by expert, ...).

    ``x`` and ``w13`` are TMA descriptors of (rows, H) bf16 and of (boxes * steps * 64, 32) int16.
    """
    shares = inter // (PARTS * ROWS // 2)
    work = (tiles, shares, tile_count * shares, started(gl.program_id(0)))
    shared = _shared(x, w13, hidden // 128, N, STAGES)
    place = (order, topk_weights, acts, codes, sf, inter, clamp)
    ZERO: gl.constexpr = gl.constexpr(0)
    ONE: gl.constexpr = gl.constexpr(1)
    gl.warp_specialize(
        [
            (_linear1_group, (shared, work, place, s13, ZERO, N, STAGES, WIDE, HAS_CLAMP, FAST)),
            (_linear1_group, (shared, work, place, s13, ONE, N, STAGES, WIDE, HAS_CLAMP, FAST)),
            (_produce, (shared, work, x, w13, N, STAGES)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@gluon.jit
def linear2(
    acts, w2, s2, order, tiles, slots, hidden, inter, tile_count,
    N: gl.constexpr, STAGES: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """As :func:`.few.linear2`, 256 channels a share; ``acts`` (rows by expert, I).

    ``acts`` and ``w2`` are TMA descriptors of (rows, I) bf16 and of (boxes * steps * 64, 32) int16.
    """
    shares = hidden // (PARTS * ROWS)
    work = (tiles, shares, tile_count * shares, started(gl.program_id(0)))
    shared = _shared(acts, w2, inter // 128, N, STAGES)
    place = (order, slots, hidden)
    ZERO: gl.constexpr = gl.constexpr(0)
    ONE: gl.constexpr = gl.constexpr(1)
    gl.warp_specialize(
        [
            (_linear2_group, (shared, work, place, s2, ZERO, N, STAGES, WIDE)),
            (_linear2_group, (shared, work, place, s2, ONE, N, STAGES, WIDE)),
            (_produce, (shared, work, acts, w2, N, STAGES)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
