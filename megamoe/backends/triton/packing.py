"""The order of bits in which the kernels read packed weights: no more bytes, but sooner decoded.

A checkpoint's 32-bit word has eight nibbles ``s e e m``. The kernels want them as four pairs of
bf16: nibbles i and i + 4 in the halves of one register, sign at bit 15, ``e e m`` at bits 8 to 6.
Here each of a half's bits lies where one shift and one mask (two masks for the last pair) put it:

    bit    15 14 13 12 11 10  9  8  7  6  5  4  3  2  1  0
    holds  s3 m3 s1 e2 e2 m2 s0 e3 e3 e1 e1 m1 s2 e0 e0 m0

with ``s2`` that of the other half, since its pair comes by rotation.

Of every 128 values, which are 16 words, a thread decodes words t, t + 4, t + 8 and t + 12, one of
each group of 32. Here they are adjacent: one load of 16 bytes.

And what a block reads at a time is in one piece. A step of 128 values takes 64 bytes of a row; of
64 rows (:data:`ROWS`) they are 4096 bytes that follow each other, then come those of the next
step. Reading 64 bytes here and there instead cost a third of the memory's speed. The scale bytes
of a step, a word a row, lie the same way. Gate and up rows alternate 8 by 8 within the 64, so that
both of a channel come to one thread.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

ROWS = 64
"""Weight rows whose bytes of one step lie together; those of one ``wgmma``."""
_INTERLEAVE = 8
_SIGNS = -0x7FFF8000  # 0x80008000 as int32


def power_of_two(n: int) -> int:
    """The smallest that is not below ``n``."""
    return 1 << max(0, n - 1).bit_length()


def pack(
    weight: torch.Tensor, scale: torch.Tensor, *, gate_and_up: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """A checkpoint's ``(E, rows, K/2)`` and ``(E, rows, K/32)`` uint8 in the kernels' order.

    Copies of the same shapes, made expert by expert: an expert's bytes stay together.
    ``gate_and_up``: the rows are those of w1, then those of w3.
    """

    def words(w: torch.Tensor) -> torch.Tensor:
        codes = _mixed(w).unflatten(-1, (-1, 4, 4)).transpose(-1, -2)  # row, step, t, group
        return _tiled(codes.flatten(-2), gate_and_up)

    def scales(s: torch.Tensor) -> torch.Tensor:
        return _tiled(s[..., None], gate_and_up)

    return _by_expert(weight, words), _by_expert(scale, scales)


def unpack(
    weight: torch.Tensor, scale: torch.Tensor, *, gate_and_up: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of :func:`pack`; copies."""

    def words(w: torch.Tensor) -> torch.Tensor:
        codes = _untiled(w, gate_and_up, 16).unflatten(-1, (4, 4)).transpose(-1, -2)
        return _unmixed(codes.flatten(-3))

    def scales(s: torch.Tensor) -> torch.Tensor:
        return _untiled(s, gate_and_up, 1).flatten(-2)

    return _by_expert(weight, words), _by_expert(scale, scales)


def _by_expert(
    tensor: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    out = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    for source, target in zip(tensor, out, strict=True):
        block = change(source.contiguous().view(torch.int32))
        target.copy_(block.contiguous().view(torch.uint8).view_as(target))
    return out


def _tiled(words: torch.Tensor, gate_and_up: bool) -> torch.Tensor:
    """(rows, steps, n) to (rows / 64, steps, 64, n)."""
    if gate_and_up:
        halves = words.unflatten(0, (2, -1, _INTERLEAVE))
        words = halves.transpose(0, 1).flatten(0, 2)
    return words.unflatten(0, (-1, ROWS)).transpose(1, 2)


def _untiled(words: torch.Tensor, gate_and_up: bool, n: int) -> torch.Tensor:
    """The inverse of :func:`_tiled`, of the words in a matrix of any shape with as many rows."""
    rows = words.shape[0]
    out = words.reshape(rows // ROWS, -1, ROWS, n).transpose(1, 2).flatten(0, 1)
    if gate_and_up:
        halves = out.unflatten(0, (-1, 2, _INTERLEAVE))
        out = halves.transpose(0, 1).flatten(0, 2)
    return out


def _mixed(w: torch.Tensor) -> torch.Tensor:
    out = w & 0x00770077  # e e m of pairs 0 and 1
    out |= (w & 0x00880088) << 6  # their signs
    out |= (w & 0x07000700) << 2  # e e m of pair 2
    out |= ((w & 0x0800) << 8) | ((w >> 24) & 0x8)  # its signs, halves exchanged
    out |= (w & _SIGNS) | ((w >> 6) & 0x01800180) | ((w & 0x10001000) << 2)  # pair 3
    return out


def _unmixed(w: torch.Tensor) -> torch.Tensor:
    out = w & 0x00770077
    out |= (w >> 6) & 0x00880088
    out |= (w >> 2) & 0x07000700
    out |= ((w >> 8) & 0x0800) | ((w & 0x8) << 24)
    out |= (w & _SIGNS) | ((w & 0x01800180) << 6) | ((w >> 2) & 0x10001000)
    return out
