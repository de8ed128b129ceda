"""The order of bits in which the kernels read packed weights: the same bytes, decoded in less.

A checkpoint's 32-bit word has eight nibbles ``s e e m``. The kernels want them as four pairs of
bf16: nibbles i and i + 4 in the halves of one register, sign at bit 15, ``e e m`` at bits 8 to 6.
Here each of a half's bits lies where one shift and one mask (two masks for the last pair) put it:

    bit    15 14 13 12 11 10  9  8  7  6  5  4  3  2  1  0
    holds  s3 m3 s1 e2 e2 m2 s0 e3 e3 e1 e1 m1 s2 e0 e0 m0

with ``s2`` that of the other half, since its pair comes by rotation.
"""

from __future__ import annotations

import torch

_SIGNS = -0x7FFF8000  # 0x80008000 as int32


def reorder(packed: torch.Tensor) -> torch.Tensor:
    """``(..., n)`` uint8 of a checkpoint, ``n`` a multiple of 4, to the kernels' order; a copy.

    Works matrix by matrix, so that it takes little more than the copy.
    """
    made = torch.empty_like(packed, memory_format=torch.contiguous_format)
    matrices = packed.reshape(-1, *packed.shape[-2:]) if packed.dim() > 2 else packed[None]
    for source, target in zip(matrices, made.view_as(matrices), strict=True):
        target.copy_(_words(source.contiguous().view(torch.int32)).view(torch.uint8))
    return made


def _words(w: torch.Tensor) -> torch.Tensor:
    out = w & 0x00770077  # e e m of pairs 0 and 1
    out |= (w & 0x00880088) << 6  # their signs
    out |= (w & 0x07000700) << 2  # e e m of pair 2
    out |= ((w & 0x0800) << 8) | ((w >> 24) & 0x8)  # its signs, halves exchanged
    out |= (w & _SIGNS) | ((w >> 6) & 0x01800180) | ((w & 0x10001000) << 2)  # pair 3
    return out
