"""Kernels that follow each other closely: a launch may start before the one before has ended.

A kernel launched with ``launch_pdl`` (programmatic dependent launch) starts when every block of the
kernel before has ended or called :func:`next_may_start`, and must not read what that kernel writes
before its own :func:`wait_for_previous` has returned. Then everything before it is there to be
read too, provided that each kernel of the chain waits in every block.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def wait_for_previous(number):
    """``number``, once all that the kernels before have written is there to be read.

    Whatever is read of the kernel before must hang on what this returns.
    """
    return gl.inline_asm_elementwise(
        "griddepcontrol.wait; mov.b32 $0, $1;", "=r,r", [number],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def next_may_start(number):
    """Let the next kernel's blocks start, up to :func:`wait_for_previous`; returns ``number``.

    Late in a kernel that fills the GPU: blocks that start early settle wherever there is room, and
    not evenly.
    """
    return gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; mov.b32 $0, $1;", "=r,r", [number],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def wait_for_previous_tl(number):
    """:func:`wait_for_previous` for kernels in Triton's own language."""
    return tl.inline_asm_elementwise(
        "griddepcontrol.wait; mov.b32 $0, $1;", "=r,r", [number],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def next_may_start_tl(number):
    """:func:`next_may_start` for kernels in Triton's own language."""
    return tl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; mov.b32 $0, $1;", "=r,r", [number],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
