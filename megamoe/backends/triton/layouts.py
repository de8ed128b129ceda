"""Which thread holds which element: the register layouts of :mod:`.linear`."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def mma_layout(warps: int, n: int) -> gl.NVMMADistributedLayout:
    """Accumulator of ``wgmma``: 16 rows a warp, all columns."""
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[warps, 1], instr_shape=[16, n, 16]
    )


@gluon.constexpr_function
def operand_layout(warps: int, n: int) -> gl.DotOperandLayout:
    """Operand A in registers: pairs of bf16."""
    return gl.DotOperandLayout(operand_index=0, parent=mma_layout(warps, n), k_width=2)


@gluon.constexpr_function
def packed_layout(rows: int, warps: int) -> gl.DistributedLinearLayout:
    """(rows, 32) int16 of packed nibbles, each quad of lanes holding the 16 bytes of 32 values."""
    registers = [[0, 1], [8, 0], [0, 8], [0, 16]]
    wide = [16 * 2**i for i in range(10) if 16 * 2**i < rows]
    count = {4: 2, 8: 3, 16: 4}[warps]
    return gl.DistributedLinearLayout(
        reg_bases=registers + [[w, 0] for w in wide[count:]],
        lane_bases=[[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[w, 0] for w in wide[:count]],
        block_bases=[],
        shape=[rows, 32],
    )


TOKEN_BOX = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
WEIGHT_BOX = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)
"""Shared memory of TMA boxes: (tokens, 128) bf16 and (rows, 32) int16."""


@gluon.constexpr_function
def row_layout(warps: int) -> gl.BlockedLayout:
    """Copies of (rows, 128) bf16: 16 bytes a thread, 256 bytes a half warp."""
    return gl.BlockedLayout([1, 8], [2, 16], [warps, 1], [1, 0])


@gluon.constexpr_function
def weight_copy_layout(warps: int) -> gl.BlockedLayout:
    """Copies of (rows, 32) int16: 16 bytes a thread, a row by four lanes."""
    return gl.BlockedLayout([1, 8], [8, 4], [warps, 1], [1, 0])


@gluon.constexpr_function
def scale_copy_layout(warps: int) -> gl.BlockedLayout:
    """Copies of (rows,) int32: four bytes a thread."""
    return gl.BlockedLayout([1], [32], [warps], [0])


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
