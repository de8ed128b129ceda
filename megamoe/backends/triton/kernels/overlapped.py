"""The two grouped products for many tokens: while one warp group decodes, the other multiplies.

A ``wgmma`` whose operand A lies in registers holds up the warps that issue it, so warps in step
leave the tensor cores idle while they decode. Here a block has four roles. Two groups of four warps
multiply, each with its own weight rows of a share, and take turns: the tensor cores work for one
while the other decodes. One warp starts the copies. Two warps write: they take the sums of a share
from shared memory (:mod:`.handover`), so SwiGLU, requantisation and stores are hidden behind the
products of the next share. What a product is, and the order of its sums, is that of :mod:`.few`:
the bits are the same.

A block stays and takes one share of the work after the other. A share is 128 * BOXES weight rows of
a tile of token rows; each role goes through the same shares by itself and counts their steps. A
step is 128 of the contraction. Its token rows come in two halves, each with barriers of its own:
the first half's memory is free again while the second is multiplied.

The copies are TMA boxes, so token rows must lie together by expert: ``x`` and ``acts`` are in the
order of :func:`.dispatch.rank`. A box that reaches beyond its expert's rows reads rows of another
one; nobody stores their sums.
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

from megamoe.backends.triton.kernels.chain import wait_for_previous
from megamoe.backends.triton.kernels.decode import decoded
from megamoe.backends.triton.kernels.handover import (
    WRITERS,
    hand_over,
    room_for_sums,
    write_activations,
    write_rows,
)
from megamoe.backends.triton.kernels.layouts import (
    ROWS,
    mma_layout,
    operand_layout,
    packed_layout,
)

WARPS: gl.constexpr = gl.constexpr(4)
"""Warps of a group that multiplies."""


@gluon.constexpr_function
def registers(boxes: int) -> list[int]:
    """Of a thread of the second group, of the writers and of the one that copies.

    The first group has what is left, as many as the second. Two boxes' decoded weights are 64
    registers, beside 128 of sums.
    """
    multiply, write = {1: (208, 88), 2: (224, 56)}[boxes]
    return [multiply, write, write]


@gluon.jit
def _share(work, number, BOXES: gl.constexpr):
    """Expert (-1 for none), first and end row, and the first box of share ``number``."""
    tiles, shares, _total, _start = work
    tile = tiles + number // shares * 3
    expert = gl.load(tile)
    box = (expert * shares + number % shares) * (2 * BOXES)
    return expert, gl.load(tile + 1), gl.load(tile + 2), box


@gluon.jit
def _produce(shared, work, x, weight, N: gl.constexpr, BOXES: gl.constexpr, STAGES: gl.constexpr):
    """Copy each step's token rows and weight rows as soon as a stage is free."""
    xs, ws, full, empty, _turn, steps = shared
    offset = gl.to_tensor(0)
    for number in range(work[3], work[2], gl.num_programs(0)):
        expert, first, _end, box = _share(work, number, BOXES)
        if expert >= 0:
            for k in range(steps):
                slot = (offset + k) % STAGES
                free = (((offset + k) // STAGES) & 1) ^ 1
                low = full.index(2 * slot)
                mbarrier.wait(empty.index(2 * slot), free)
                mbarrier.expect(low, N * 128 + 2 * BOXES * ROWS * 64)
                for part in gl.static_range(2 * BOXES):
                    w_row = ((box + part) * steps + k) * ROWS
                    at = ws.index(slot * (2 * BOXES) + part)
                    tma.async_copy_global_to_shared(weight, [w_row, 0], low, at)
                tma.async_copy_global_to_shared(x, [first, k * 128], low, xs.index(2 * slot))
                high = full.index(2 * slot + 1)
                mbarrier.wait(empty.index(2 * slot + 1), free)
                mbarrier.expect(high, N * 128)
                tma.async_copy_global_to_shared(
                    x, [first, k * 128 + 64], high, xs.index(2 * slot + 1)
                )
            offset += steps


@gluon.jit
def _halves(a, operand: gl.constexpr):
    """(64, 128) operand A to its two halves of the contraction."""
    low, high = gl.split(a.reshape([ROWS, 2, 64]).permute([0, 2, 1]))
    return (
        gl.convert_layout(low, operand, assert_trivial=True),
        gl.convert_layout(high, operand, assert_trivial=True),
    )


@gluon.jit
def _product(
    shared, scale, box, offset,
    GROUP: gl.constexpr, N: gl.constexpr, BOXES: gl.constexpr, STAGES: gl.constexpr,
    WIDE: gl.constexpr,
):  # fmt: skip
    """(64, N) fp32 of each of a group's boxes: its weight rows times token rows, K ascending.

    Always two; of one box they are the same. ``offset``: steps that this block has behind it.
    """
    xs, ws, full, empty, turn, steps = shared
    mma: gl.constexpr = mma_layout(WARPS, N)
    operand: gl.constexpr = operand_layout(WARPS, N)
    packed_l: gl.constexpr = packed_layout(ROWS, WARPS)
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, packed_l))
    s0 = scale + (box + GROUP * BOXES).to(gl.int64) * (steps * ROWS) + rows
    s1 = s0 + steps * ROWS
    words0 = gl.load(s0)
    acc0 = gl.zeros([ROWS, N], gl.float32, mma)
    if BOXES == 2:
        words1 = gl.load(s1)
        acc1 = gl.zeros([ROWS, N], gl.float32, mma)
    for k in range(steps):
        slot = (offset + k) % STAGES
        there = ((offset + k) // STAGES) & 1
        mbarrier.wait(full.index(2 * slot), there)
        part = slot * (2 * BOXES) + GROUP * BOXES
        ahead = gl.minimum(k + 1, steps - 1) * ROWS
        a0 = decoded(ws.index(part).load(packed_l), words0, packed_l, operand, WIDE)
        low0, high0 = _halves(a0, operand)
        words0 = gl.load(s0 + ahead)
        if BOXES == 2:
            a1 = decoded(ws.index(part + 1).load(packed_l), words1, packed_l, operand, WIDE)
            low1, high1 = _halves(a1, operand)
            words1 = gl.load(s1 + ahead)
        x_low = xs.index(2 * slot).slice(0, N).permute((1, 0))
        x_high = xs.index(2 * slot + 1).slice(0, N).permute((1, 0))
        mbarrier.wait(full.index(2 * slot + 1), there)
        mbarrier.wait(turn.index(GROUP), ((offset + k) & 1) ^ (1 - GROUP))
        t0 = warpgroup_mma(low0, x_low, acc0, is_async=True)
        if BOXES == 2:
            t1 = warpgroup_mma(low1, x_low, acc1, is_async=True)
            t0 = warpgroup_mma(high0, x_high, t0, is_async=True)
            t1 = warpgroup_mma(high1, x_high, t1, is_async=True)
            mbarrier.arrive(turn.index(1 - GROUP))
            t0, t1, low0, high0, low1, high1 = warpgroup_mma_wait(
                2, deps=[t0, t1, low0, high0, low1, high1]
            )
            mbarrier.arrive(empty.index(2 * slot))
            acc0, acc1, low0, high0, low1, high1 = warpgroup_mma_wait(
                0, deps=[t0, t1, low0, high0, low1, high1]
            )
        else:
            t0 = warpgroup_mma(high0, x_high, t0, is_async=True)
            mbarrier.arrive(turn.index(1 - GROUP))
            t0, low0, high0 = warpgroup_mma_wait(1, deps=[t0, low0, high0])
            mbarrier.arrive(empty.index(2 * slot))
            acc0, low0, high0 = warpgroup_mma_wait(0, deps=[t0, low0, high0])
        mbarrier.arrive(empty.index(2 * slot + 1))
    if BOXES == 2:
        return acc0, acc1
    else:
        return acc0, acc0


@gluon.jit
def _shared(x, weight, steps, N: gl.constexpr, BOXES: gl.constexpr, STAGES: gl.constexpr):
    """Shared memory of token and weight boxes, its barriers, and the number of steps."""
    xs = gl.allocate_shared_memory(gl.bfloat16, [2 * STAGES, N, 64], x.layout)
    ws = gl.allocate_shared_memory(gl.int16, [STAGES * 2 * BOXES, ROWS, 32], weight.layout)
    full = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2 * STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(turn.index(i), count=1)
    fence_async_shared()
    return xs, ws, full, empty, turn, steps


@gluon.jit
def _rows(
    shared, handover, scale, box, offset, shares,
    GROUP: gl.constexpr, N: gl.constexpr, BOXES: gl.constexpr, STAGES: gl.constexpr,
    WIDE: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    acc0, acc1 = _product(shared, scale, box, offset, GROUP, N, BOXES, STAGES, WIDE)
    hand_over(acc0, handover, GROUP * BOXES, shares, N, GATED)
    if BOXES == 2:
        hand_over(acc1, handover, GROUP * BOXES + 1, shares, N, GATED)


@gluon.jit
def _multiply(
    shared, handover, work, scale,
    GROUP: gl.constexpr, N: gl.constexpr, BOXES: gl.constexpr, STAGES: gl.constexpr,
    WIDE: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """The role of a group: the products of its boxes of every share."""
    offset = gl.to_tensor(0)
    shares = gl.to_tensor(0)
    for number in range(work[3], work[2], gl.num_programs(0)):
        expert, first, end, box = _share(work, number, BOXES)
        if expert >= 0:
            rows = end - first
            if rows > N // 2:
                _rows(shared, handover, scale, box, offset, shares,
                      GROUP, N, BOXES, STAGES, WIDE, GATED)  # fmt: skip
            elif rows > N // 4:  # an expert's last rows: half a tile, or a quarter
                _rows(shared, handover, scale, box, offset, shares,
                      GROUP, N // 2, BOXES, STAGES, WIDE, GATED)  # fmt: skip
            else:
                _rows(shared, handover, scale, box, offset, shares,
                      GROUP, N // 4, BOXES, STAGES, WIDE, GATED)  # fmt: skip
            offset += shared[5]
            shares += 1


@gluon.jit
def _write_activations(
    handover, work, place,
    N: gl.constexpr, BOXES: gl.constexpr, HAS_CLAMP: gl.constexpr, FAST: gl.constexpr,
):  # fmt: skip
    """The role of the writers in linear 1."""
    shares = gl.to_tensor(0)
    for number in range(work[3], work[2], gl.num_programs(0)):
        expert, first, end, _box = _share(work, number, BOXES)
        channel0 = number % work[1] * (BOXES * ROWS)
        if expert >= 0:
            for box in range(2 * BOXES):
                write_activations(handover, box, shares, first, end, channel0 + box * (ROWS // 2),
                                  place, N, BOXES, HAS_CLAMP, FAST)  # fmt: skip
            shares += 1


@gluon.jit
def _write_rows(handover, work, place, N: gl.constexpr, BOXES: gl.constexpr):
    """The role of the writers in linear 2."""
    shares = gl.to_tensor(0)
    for number in range(work[3], work[2], gl.num_programs(0)):
        expert, first, end, _box = _share(work, number, BOXES)
        channel0 = number % work[1] * (2 * BOXES * ROWS)
        if expert >= 0:
            for box in range(2 * BOXES):
                write_rows(
                    handover, box, shares, first, end, channel0 + box * ROWS, place, N, BOXES
                )
            shares += 1


@gluon.jit
def linear1(
    x, w13, s13, topk_weights, order, tiles, acts, codes, sf, hidden, inter, clamp, tile_count,
    HAS_CLAMP: gl.constexpr, FAST: gl.constexpr, N: gl.constexpr, BOXES: gl.constexpr,
    STAGES: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """As :func:`.few.linear1`, 64 * BOXES channels a share; rows of ``x`` and ``acts`` by expert.

    ``x`` and ``w13`` are TMA descriptors of (rows, H) bf16 and of (boxes * steps * 64, 32) int16.
    """
    shares = inter // (BOXES * ROWS)
    work = (tiles, shares, tile_count * shares, wait_for_previous(gl.program_id(0)))
    handover = room_for_sums(True, N, BOXES)
    shared = _shared(x, w13, hidden // 128, N, BOXES, STAGES)
    place = (order, topk_weights, acts, codes, sf, inter, clamp)
    ZERO: gl.constexpr = gl.constexpr(0)
    ONE: gl.constexpr = gl.constexpr(1)
    GATED: gl.constexpr = gl.constexpr(True)
    gl.warp_specialize(
        [
            (_multiply, (shared, handover, work, s13, ZERO, N, BOXES, STAGES, WIDE, GATED)),
            (_multiply, (shared, handover, work, s13, ONE, N, BOXES, STAGES, WIDE, GATED)),
            (_write_activations, (handover, work, place, N, BOXES, HAS_CLAMP, FAST)),
            (_produce, (shared, work, x, w13, N, BOXES, STAGES)),
        ],
        [WARPS, WRITERS, 1],
        registers(BOXES),
    )


@gluon.jit
def linear2(
    acts, w2, s2, order, tiles, slots, hidden, inter, tile_count,
    N: gl.constexpr, BOXES: gl.constexpr, STAGES: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """As :func:`.few.linear2`, 128 * BOXES channels a share; ``acts`` (rows by expert, I).

    ``acts`` and ``w2`` are TMA descriptors of (rows, I) bf16 and of (boxes * steps * 64, 32) int16.
    """
    shares = hidden // (2 * BOXES * ROWS)
    work = (tiles, shares, tile_count * shares, wait_for_previous(gl.program_id(0)))
    handover = room_for_sums(False, N, BOXES)
    shared = _shared(acts, w2, inter // 128, N, BOXES, STAGES)
    place = (order, slots, hidden)
    ZERO: gl.constexpr = gl.constexpr(0)
    ONE: gl.constexpr = gl.constexpr(1)
    GATED: gl.constexpr = gl.constexpr(False)
    gl.warp_specialize(
        [
            (_multiply, (shared, handover, work, s2, ZERO, N, BOXES, STAGES, WIDE, GATED)),
            (_multiply, (shared, handover, work, s2, ONE, N, BOXES, STAGES, WIDE, GATED)),
            (_write_rows, (handover, work, place, N, BOXES)),
            (_produce, (shared, work, acts, w2, N, BOXES, STAGES)),
        ],
        [WARPS, WRITERS, 1],
        registers(BOXES),
    )
