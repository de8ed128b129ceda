"""Does ``mma.sync`` add as ``wgmma`` does? Every bit of many sums, on compute capability 9.

    PYTHONPATH=. python3 tools/probe_mma.py

Both multiply the same bf16 operands in ascending blocks of 16, one accumulator over all of the
contraction, as ``few.py`` and ``overlapped.py`` do. Magnitudes lie up to 120 octaves apart; in the
widest, a third of the rows of B are rows of A with the sign changed, and half of every seventh row
of A is zero. Exits 1 if a bit differs. (On one H100, 2026-11-25: none of 2,621,440.)
"""

from __future__ import annotations

import sys

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from megamoe.backends.triton.kernels.handover import barrier

PROGRAMS, ROWS, COLUMNS = 512, 64, 8


@gluon.jit
def _both(a_ptr, b_ptr, by_mma, by_wgmma, K: gl.constexpr):
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [4, 1], [16, 8])
    wgmma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    plain: gl.constexpr = gl.BlockedLayout([1, 2], [8, 4], [4, 1], [1, 0])
    shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    program = gl.program_id(0)
    i = program * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, plain))
    j = program * 8 + gl.arange(0, 8, layout=gl.SliceLayout(1, plain))
    k = gl.arange(0, 128, layout=gl.SliceLayout(0, plain))
    xs = gl.allocate_shared_memory(gl.bfloat16, [8, 128], shared)
    one = gl.zeros([64, 8], gl.float32, mma)
    two = gl.zeros([64, 8], gl.float32, wgmma)
    for start in range(0, K, 128):
        a = gl.load(a_ptr + i[:, None] * K + start + k[None, :])
        b = gl.load(b_ptr + j[:, None] * K + start + k[None, :])
        xs.store(b)
        fence_async_shared()
        barrier()
        operand = gl.convert_layout(a, gl.DotOperandLayout(0, wgmma, 2))
        token = warpgroup_mma(operand, xs.permute((1, 0)), two, is_async=True)
        two, operand = warpgroup_mma_wait(0, deps=[token, operand])
        left = gl.convert_layout(a, gl.DotOperandLayout(0, mma, 2))
        right = gl.convert_layout(b.permute([1, 0]), gl.DotOperandLayout(1, mma, 2))
        one = mma_v2(left, right, one)
        barrier()
    _store(by_mma, one, program)
    _store(by_wgmma, two, program)


@gluon.jit
def _store(to, sums, program):
    layout: gl.constexpr = sums.type.layout
    row = program * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    column = gl.arange(0, 8, layout=gl.SliceLayout(0, layout))
    gl.store(to + row[:, None] * 8 + column[None, :], sums)


def operands(octaves: int, depth: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """A (programs * 64, depth) and B (programs * 8, depth) bfloat16."""

    def draw(rows: int) -> torch.Tensor:
        shape = (rows, depth)
        size = torch.randn(shape, generator=generator, device="cuda")
        half = octaves // 2
        power = torch.randint(-half, half + 1, shape, generator=generator, device="cuda")
        return (size * torch.exp2(power.float())).bfloat16()

    a, b = draw(PROGRAMS * ROWS), draw(PROGRAMS * COLUMNS)
    if octaves == 120:
        b[::3] = -a.view(PROGRAMS, ROWS, depth)[:, :COLUMNS].reshape(-1, depth)[::3]
        a[::7, ::2] = 0
    return a, b


def main() -> int:
    """Print a line for each spread and depth; 1 if any bit differs."""
    generator = torch.Generator(device="cuda").manual_seed(7)
    differ = 0
    for octaves in (0, 4, 20, 60, 120):
        for depth in (128, 1024):
            a, b = operands(octaves, depth, generator)
            sums = [torch.full((len(a), COLUMNS), float("nan"), device="cuda") for _ in range(2)]
            _both[(PROGRAMS,)](a, b, *sums, depth, num_warps=4)
            one, two = sums
            same = (one.view(torch.int32) == two.view(torch.int32)) | (one.isnan() & two.isnan())
            print(
                f"{octaves:4} octaves, K {depth:5}: {int((~same).sum())} of {same.numel()} differ"
            )
            differ += int((~same).sum())
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())
