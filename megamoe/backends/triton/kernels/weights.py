"""How a block of :mod:`.few` gets its weights: straight to registers, or through shared memory.

By registers each warp is by itself: it loads its rows four steps of 128 ahead and meets no barrier.
By a ring, TMA brings chunks of four steps to shared memory, and the warps meet once a chunk. The
ring leaves registers free, and there are more bytes on the way: it is faster where a tile has 16
token rows, and slower where the contraction is short (``docs/performance.md``). A product is the
same either way, and so are its bits.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from megamoe.backends.triton import packing
from megamoe.backends.triton.kernels.decode import decoded
from megamoe.backends.triton.kernels.handover import barrier
from megamoe.backends.triton.kernels.layouts import (
    ROWS,
    few_layout,
    few_operand_layout,
    few_token_layout,
    few_words_layout,
    packed_layout,
)

CHUNK: gl.constexpr = gl.constexpr(packing.STEPS_A_COPY)
"""Steps of 128 that one copy brings."""


@gluon.jit
def _tokens(x, k, last):
    """Token rows of step ``k``, or of the last one again, in words."""
    return gl.load(x + gl.minimum(k, last) * 64)


@gluon.jit
def _halves(words, layout: gl.constexpr):
    """(rows, n) int32 to (rows, 2n) int16.

    Not sooner than needed: halves that are carried round a loop take a register each.
    """
    low = (words & 0xFFFF).to(gl.int16)
    high = (words >> 16).to(gl.int16)
    halves = gl.join(low, high).reshape([words.shape[0], 2 * words.shape[1]])
    return gl.convert_layout(halves, layout, assert_trivial=True)


@gluon.jit
def _step(acc, nibbles, words, x, N: gl.constexpr, WARPS: gl.constexpr, WIDE: gl.constexpr):
    """``acc`` and the products of one step of 128, in ascending blocks of 16."""
    layout: gl.constexpr = packed_layout(ROWS, WARPS)
    a = decoded(nibbles, words, layout, few_operand_layout(WARPS, 0), WIDE)
    halves = _halves(x, few_token_layout(N, WARPS)).to(gl.bfloat16, bitcast=True)
    split = halves.reshape([N, 4, 4, 2, 2, 2])  # row, group, t, b, a, h
    ordered = split.permute([0, 1, 3, 4, 2, 5]).reshape([N, 128]).permute([1, 0])
    b = gl.convert_layout(ordered, few_operand_layout(WARPS, 1), assert_trivial=True)
    return mma_v2(a, b, acc)


@gluon.jit
def _fetch(w, s, k, last):
    """Words of nibbles and of scale bytes of step ``k``, or of the last one again."""
    at = gl.minimum(k, last)
    # Read once, so the caches should keep the token rows instead.
    packed = gl.load(w + at * (ROWS * 16), eviction_policy="evict_first")
    return packed, gl.load(s + at * ROWS, eviction_policy="evict_first")


@gluon.jit
def rows_of(weight, scale, block, steps, WARPS: gl.constexpr):
    """Pointers to the weights and scales of 64 rows, and those of steps 0 to 3, asked for."""
    layout: gl.constexpr = few_words_layout(ROWS, WARPS)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    word = gl.arange(0, 16, layout=gl.SliceLayout(0, layout))
    start = block * steps * ROWS
    w = weight + start * 16 + row[:, None] * 16 + word[None, :]
    s = scale + start + row
    last = steps - 1
    w0, s0 = _fetch(w, s, 0, last)
    w1, s1 = _fetch(w, s, 1, last)
    w2, s2 = _fetch(w, s, 2, last)
    w3, s3 = _fetch(w, s, 3, last)
    return w, s, (w0, s0, w1, s1, w2, s2, w3, s3)


@gluon.jit
def _held(acc, packed, words, x, N: gl.constexpr, WARPS: gl.constexpr, WIDE: gl.constexpr):
    """:func:`_step` with weights in registers."""
    layout: gl.constexpr = packed_layout(ROWS, WARPS)
    words = gl.convert_layout(words, gl.SliceLayout(1, layout), assert_trivial=True)
    return _step(acc, _halves(packed, layout), words, x, N, WARPS, WIDE)


@gluon.jit
def product_by_registers(
    first, w, s, x, steps, N: gl.constexpr, WARPS: gl.constexpr, WIDE: gl.constexpr
):
    """(64, N) fp32 over ``steps`` steps; ``first``: :func:`rows_of`'s third."""
    w0, s0, w1, s1, w2, s2, w3, s3 = first
    last = steps - 1
    whole = steps // 4 * 4
    acc = gl.zeros([ROWS, N], gl.float32, few_layout(WARPS))
    xa = _tokens(x, 0, last)
    xb = _tokens(x, 1, last)
    for k in range(0, whole, 4):
        acc = _held(acc, w0, s0, xa, N, WARPS, WIDE)
        w0, s0 = _fetch(w, s, k + 4, last)
        xa = _tokens(x, k + 2, last)
        acc = _held(acc, w1, s1, xb, N, WARPS, WIDE)
        w1, s1 = _fetch(w, s, k + 5, last)
        xb = _tokens(x, k + 3, last)
        acc = _held(acc, w2, s2, xa, N, WARPS, WIDE)
        w2, s2 = _fetch(w, s, k + 6, last)
        xa = _tokens(x, k + 4, last)
        acc = _held(acc, w3, s3, xb, N, WARPS, WIDE)
        w3, s3 = _fetch(w, s, k + 7, last)
        xb = _tokens(x, k + 5, last)
    if steps - whole > 0:
        acc = _held(acc, w0, s0, xa, N, WARPS, WIDE)
    if steps - whole > 1:
        acc = _held(acc, w1, s1, xb, N, WARPS, WIDE)
    if steps - whole > 2:
        acc = _held(acc, w2, s2, _tokens(x, last, last), N, WARPS, WIDE)
    return acc


@gluon.jit
def _ask(ring, chunk, STAGES: gl.constexpr):
    """Start the copy of ``chunk``, if there is one, to its stage, which must be free.

    The last copy may reach beyond the block's rows: nobody reads that.
    """
    boxes, full, weight, row, chunks = ring
    stage = chunk % STAGES
    there = chunk < chunks
    mbarrier.expect(full.index(stage), CHUNK * ROWS * 64, pred=there)
    tma.async_copy_global_to_shared(
        weight, [row + chunk * (CHUNK * ROWS), 0], full.index(stage), boxes.index(stage), pred=there
    )


@gluon.jit
def ring_of(weight, scale, block, steps, WARPS: gl.constexpr, STAGES: gl.constexpr):
    """A ring of STAGES chunks of 64 weight rows, asked for, and pointers to their scales.

    ``weight`` is a TMA descriptor of (blocks * steps * 64, 32) int16 in boxes of a chunk.
    """
    boxes = gl.allocate_shared_memory(gl.int16, [STAGES, CHUNK * ROWS, 32], weight.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    start = block * steps * ROWS
    ring = boxes, full, weight, start.to(gl.int32), (steps + CHUNK - 1) // CHUNK
    for i in gl.static_range(STAGES):
        _ask(ring, gl.to_tensor(i), STAGES)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, packed_layout(ROWS, WARPS)))
    return ring, scale + start + row


@gluon.jit
def product_by_ring(
    ring, s, x, steps, N: gl.constexpr, WARPS: gl.constexpr, STAGES: gl.constexpr,
    WIDE: gl.constexpr,
):  # fmt: skip
    """(64, N) fp32 over ``steps`` steps of what :func:`ring_of` has asked for."""
    boxes, full, _weight, _row, _chunks = ring
    last = steps - 1
    whole = steps // CHUNK * CHUNK
    acc = gl.zeros([ROWS, N], gl.float32, few_layout(WARPS))
    s0, s1, s2, s3 = _scale(s, 0, last), _scale(s, 1, last), _scale(s, 2, last), _scale(s, 3, last)
    xa = _tokens(x, 0, last)
    xb = _tokens(x, 1, last)
    for k in range(0, whole, CHUNK):
        chunk = k // CHUNK
        mbarrier.wait(full.index(chunk % STAGES), (chunk // STAGES) & 1)
        box = boxes.index(chunk % STAGES)
        acc = _boxed(acc, box, 0, s0, xa, N, WARPS, WIDE)
        s0 = _scale(s, k + 4, last)
        xa = _tokens(x, k + 2, last)
        acc = _boxed(acc, box, 1, s1, xb, N, WARPS, WIDE)
        s1 = _scale(s, k + 5, last)
        xb = _tokens(x, k + 3, last)
        acc = _boxed(acc, box, 2, s2, xa, N, WARPS, WIDE)
        s2 = _scale(s, k + 6, last)
        xa = _tokens(x, k + 4, last)
        acc = _boxed(acc, box, 3, s3, xb, N, WARPS, WIDE)
        s3 = _scale(s, k + 7, last)
        xb = _tokens(x, k + 5, last)
        barrier()  # every warp has read the stage
        _ask(ring, chunk + STAGES, STAGES)
    if steps - whole > 0:
        chunk = whole // CHUNK
        mbarrier.wait(full.index(chunk % STAGES), (chunk // STAGES) & 1)
        box = boxes.index(chunk % STAGES)
        acc = _boxed(acc, box, 0, s0, xa, N, WARPS, WIDE)
        if steps - whole > 1:
            acc = _boxed(acc, box, 1, s1, xb, N, WARPS, WIDE)
        if steps - whole > 2:
            acc = _boxed(acc, box, 2, s2, _tokens(x, last, last), N, WARPS, WIDE)
    return acc


@gluon.jit
def _scale(s, k, last):
    """Words of scale bytes of step ``k``, or of the last one again."""
    return gl.load(s + gl.minimum(k, last) * ROWS)


@gluon.jit
def _boxed(
    acc, box, STEP: gl.constexpr, words, x, N: gl.constexpr, WARPS: gl.constexpr,
    WIDE: gl.constexpr,
):  # fmt: skip
    """:func:`_step` with the weights of step STEP of a chunk."""
    nibbles = box.slice(STEP * ROWS, ROWS).load(packed_layout(ROWS, WARPS))
    return _step(acc, nibbles, words, x, N, WARPS, WIDE)
