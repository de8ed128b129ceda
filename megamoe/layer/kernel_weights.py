"""The kernel-side weight layout, into which ``finalize_weights`` turns the checkpoint's tensors.

Source: the numerics contract, "kernel-side weight layout" (DeepGEMM 54e2261, the weight
transform of the fused kernel). Nothing is computed; bytes move.

- Gate and up rows of w13 are interleaved 8 by 8: gate 0-7, up 0-7, gate 8-15, up 8-15, ...
- Scale factors become ``(E, rows, K/128)`` int32, four groups along K to a word, the first in the
  low byte. They are MN-major: strides ``(rows * K/128, 1, rows)``, so that one word of all rows
  is contiguous.
- Within each 128 rows of the scale factors, row ``32 * a + b`` moves to ``4 * b + a``: the four
  warps' rows of a tensor-memory copy come to lie side by side.
"""

from __future__ import annotations

from typing import Any, Final

import torch

from megamoe.layer.staging import pack_sf
from megamoe.spec.contract import NEWEST
from megamoe.spec.texts import text

INTERLEAVE: Final = 8
SF_ROWS: Final = 128


def transform_weights(
    w13_weight: torch.Tensor,
    w13_weight_scale: torch.Tensor,
    w2_weight: torch.Tensor,
    w2_weight_scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Checkpoint layout to kernel layout.

    ``w13_weight`` (E, 2I, H/2), ``w13_weight_scale`` (E, 2I, H/32), ``w2_weight`` (E, H, I/2),
    ``w2_weight_scale`` (E, H, I/32), all uint8. Gives ``w13`` (E, 2I, H/2) uint8, ``w13_sf``
    (E, 2I, H/128) int32 MN-major, ``w2`` uint8 (the same bytes, not copied), ``w2_sf``
    (E, H, I/128) int32 MN-major. Raises ``ValueError`` where H or I is not a multiple of 128.
    """
    check_sizes(w2_weight.shape[1], w2_weight.shape[2] * 2)
    return (
        interleave_gate_up(w13_weight),
        transform_sf(interleave_gate_up(w13_weight_scale)),
        w2_weight,
        transform_sf(w2_weight_scale),
    )


def packed_weights(backend: Any, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The four checkpoint tensors in the form for ``backend.run``.

    ``pack_weights`` gives a backend's own form; without it ``run`` gets the result of
    ``transform_weights``, the backend's or else the project's.
    """
    transform = getattr(backend, "transform_weights", transform_weights)
    return tuple(getattr(backend, "pack_weights", transform)(*weights))


def check_sizes(hidden_size: int, intermediate_size: int) -> None:
    """Raise the contract's ``ValueError`` unless both are multiples of 128."""
    if hidden_size % 128 or intermediate_size % 128:
        raise ValueError(text("sizes", NEWEST))  # the same words in every revision


def interleave_gate_up(rows: torch.Tensor) -> torch.Tensor:
    """``(E, 2I, n)`` with all gate rows first to the same rows, 8 gate and 8 up in turn."""
    halves = rows.unflatten(1, (2, -1, INTERLEAVE))  # (E, gate or up, I/8, 8, n)
    return halves.transpose(1, 2).flatten(1, 3).contiguous()


def transform_sf(scale: torch.Tensor) -> torch.Tensor:
    """``(E, rows, K/32)`` UE8M0 bytes to ``(E, rows, K/128)`` int32, MN-major, rows permuted."""
    packed = pack_sf(scale)
    words = packed.unflatten(1, (-1, 4, SF_ROWS // 4)).transpose(2, 3).flatten(1, 3)
    return words.transpose(1, 2).contiguous().transpose(1, 2)


def checkpoint_layout(
    w13: torch.Tensor, w13_sf: torch.Tensor, w2: torch.Tensor, w2_sf: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inverse of :func:`transform_weights`; all four uint8 and dense."""
    tensors = gate_then_up(w13), gate_then_up(plain_sf(w13_sf)), w2, plain_sf(w2_sf)
    one, two, three, four = (t.contiguous().view(torch.uint8) for t in tensors)
    return one, two, three, four


def gate_then_up(rows: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`interleave_gate_up`."""
    return rows.unflatten(1, (-1, 2, INTERLEAVE)).transpose(1, 2).flatten(1, 3)


def plain_sf(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`transform_sf`: ``(E, rows, K/128)`` int32 to K/32 bytes."""
    rows = packed.unflatten(1, (-1, SF_ROWS // 4, 4)).transpose(2, 3).flatten(1, 3)
    return rows.contiguous().view(torch.uint8)


def kernel_rows(count: int, half: int | None, scale: bool) -> torch.Tensor:
    """Rows of a kernel-side tensor where the ``count`` rows of one checkpoint tensor lie, int64.

    ``half``: 0 for w1 (gate) and 1 for w3 (up), which share w13; None for w2. ``scale``: of the
    scale factors, whose rows are permuted too.
    """
    row = torch.arange(count, device="cpu")
    if half is not None:
        row = row // INTERLEAVE * 2 * INTERLEAVE + half * INTERLEAVE + row % INTERLEAVE
    if scale:
        block, inside = row // SF_ROWS, row % SF_ROWS
        row = block * SF_ROWS + inside % (SF_ROWS // 4) * 4 + inside // (SF_ROWS // 4)
    return row


def per_expert(tensor: torch.Tensor) -> torch.Tensor:
    """``(E, rows, n)``, row-major or MN-major, to (E, rows * n) without a copy."""
    if not tensor.is_contiguous():
        tensor = tensor.transpose(1, 2)
    return tensor.view(tensor.shape[0], -1)
