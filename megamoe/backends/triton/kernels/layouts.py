"""Which thread holds which element, and how many rows lie together."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megamoe.backends.triton import packing

ROWS: gl.constexpr = gl.constexpr(packing.ROWS)
"""Weight rows of a box, and of a block of :mod:`.few`."""


@gluon.constexpr_function
def mma_layout(warps: int, n: int) -> gl.NVMMADistributedLayout:
    """Accumulator of ``wgmma``: 16 rows a warp, ``n`` columns an instruction."""
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[warps, 1], instr_shape=[16, n, 16]
    )


@gluon.constexpr_function
def operand_layout(warps: int, n: int) -> gl.DotOperandLayout:
    """Operand A in registers: pairs of bf16."""
    return gl.DotOperandLayout(operand_index=0, parent=mma_layout(warps, n), k_width=2)


@gluon.constexpr_function
def packed_layout(rows: int, warps: int) -> gl.DistributedLinearLayout:
    """(rows, 32) int16 of packed nibbles: 16 adjacent bytes of a row to each of four lanes.

    Of two rows, eight apart, as operand A has them; rows that the warps leave over come last.
    """
    registers = [[0, 1], [0, 2], [0, 4], [8, 0]]
    wide = [16 * 2**i for i in range(10) if 16 * 2**i < rows]
    count = {2: 1, 4: 2}[warps]
    return gl.DistributedLinearLayout(
        reg_bases=registers + [[w, 0] for w in wide[count:]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[w, 0] for w in wide[:count]],
        block_bases=[],
        shape=[rows, 32],
    )


@gluon.constexpr_function
def words_of(halves: gl.DistributedLinearLayout) -> gl.DistributedLinearLayout:
    """The layout of 32-bit words whose halves lie as ``halves``, the lower one first."""
    return gl.DistributedLinearLayout(
        reg_bases=[[row, column // 2] for row, column in halves.reg_bases[1:]],
        lane_bases=[[row, column // 2] for row, column in halves.lane_bases],
        warp_bases=[[row, column // 2] for row, column in halves.warp_bases],
        block_bases=[],
        shape=[halves.shape[0], halves.shape[1] // 2],
    )


@gluon.constexpr_function
def few_layout(warps: int) -> gl.NVMMADistributedLayout:
    """Accumulator of ``mma.sync``: 16 rows a warp, all columns."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[warps, 1], instr_shape=[16, 8])


@gluon.constexpr_function
def few_operand_layout(warps: int, index: int) -> gl.DotOperandLayout:
    """Operand A (0) or B (1) of ``mma.sync``: pairs of bf16."""
    return gl.DotOperandLayout(operand_index=index, parent=few_layout(warps), k_width=2)


@gluon.constexpr_function
def few_token_layout(rows: int, warps: int) -> gl.DistributedLinearLayout:
    """(rows, 128) bf16, 8 or 16 rows: 16 adjacent bytes of each group to each of four lanes.

    Every warp has all of it.
    """
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 32], [0, 64]] + ([[8, 0]] if rows == 16 else []),
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[0, 0]] * {2: 1, 4: 2}[warps],
        block_bases=[],
        shape=[rows, 128],
    )


@gluon.constexpr_function
def few_pairs_layout(rows: int, warps: int) -> gl.DistributedLinearLayout:
    """The same as (rows, 64) int32."""
    return words_of(few_token_layout(rows, warps))


@gluon.constexpr_function
def few_words_layout(rows: int, warps: int) -> gl.DistributedLinearLayout:
    """:func:`packed_layout` as (rows, 16) int32."""
    return words_of(packed_layout(rows, warps))


TOKEN_BOX = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
WEIGHT_BOX = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)
"""Shared memory of TMA boxes: (tokens, 128) bf16 and (rows, 32) int16."""


@gluon.constexpr_function
def store_layout(columns: int, warps: int) -> gl.BlockedLayout:
    """Stores of (rows, columns): a row's adjacent channels in adjacent lanes, eight a thread."""
    lanes = min(32, columns // 8)
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [warps, 1], [1, 0])


@gluon.constexpr_function
def act_layout(rows: int, channels: int, warps: int) -> gl.BlockedLayout:
    """Activations (rows, channels): a thread has adjacent channels of one row, 32 if it can."""
    each = max(1, min(32, rows * channels // (32 * warps)))
    lanes = min(32, channels // each)
    return gl.BlockedLayout([1, each], [32 // lanes, lanes], [warps, 1], [1, 0])


@gluon.constexpr_function
def boxed_layout(rows: int, acts: gl.BlockedLayout) -> gl.DistributedLinearLayout:
    """Activations (rows, 32) in the order of :func:`.dispatch._operand` with HAS_BOXES.

    Each thread has the elements that it has of :func:`act_layout`: nothing changes threads.
    """
    bits = acts.size_per_thread[1].bit_length() - 1  # bits of the channel within a thread
    to = [[0, 8], [0, 16], [0, 1], [0, 2], [0, 4]]  # where the bits a, b, h and t (two) go
    lanes = to[bits:] + [[2**i, 0] for i in range(rows.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=sorted(to[:bits]),
        lane_bases=lanes[:5],
        warp_bases=lanes[5:],
        block_bases=[],
        shape=[rows, 32],
    )
