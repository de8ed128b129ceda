"""The two grouped products for few tokens: every warp by itself, weights straight to registers.

With few tokens the weights are all there is to move, and a block that meets at a barrier for every
step of the contraction cannot keep memory busy. Here a warp has 16 weight rows to itself, loads
them AHEAD steps of 128 before it needs them, and multiplies by ``mma.sync``; nothing goes through
shared memory until the sums are complete. ``mma.sync`` adds as ``wgmma`` does, bit for bit: one
product does not differ from one of :mod:`.overlapped`.

The first weights of linear 2 are asked for as soon as there is room beside the blocks of linear 1.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from megamoe.backends.triton.kernels.chain import next_may_start, wait_for_previous
from megamoe.backends.triton.kernels.decode import decoded
from megamoe.backends.triton.kernels.epilogue import activate, store_rows
from megamoe.backends.triton.kernels.layouts import (
    ROWS,
    act_layout,
    few_layout,
    few_operand_layout,
    few_pairs_layout,
    few_token_layout,
    few_words_layout,
    packed_layout,
)


@gluon.jit
def _fetch(w, s, k, last):
    """Words of nibbles and of scale bytes of step ``k``, or of the last one again."""
    at = gl.minimum(k, last)
    # Read once, so the caches should keep the token rows instead.
    packed = gl.load(w + at * (ROWS * 16), eviction_policy="evict_first")
    return packed, gl.load(s + at * ROWS, eviction_policy="evict_first")


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
def _step(acc, packed, words, x, N: gl.constexpr, WARPS: gl.constexpr, WIDE: gl.constexpr):
    """``acc`` and the products of one step of 128, in ascending blocks of 16."""
    layout: gl.constexpr = packed_layout(ROWS, WARPS)
    words = gl.convert_layout(words, gl.SliceLayout(1, layout), assert_trivial=True)
    nibbles = _halves(packed, layout)
    a = decoded(nibbles, words, layout, few_operand_layout(WARPS, 0), WIDE)
    halves = _halves(x, few_token_layout(N, WARPS)).to(gl.bfloat16, bitcast=True)
    split = halves.reshape([N, 4, 4, 2, 2, 2])  # row, group, t, b, a, h
    tile = split.permute([0, 1, 3, 4, 2, 5]).reshape([N, 128]).permute([1, 0])
    b = gl.convert_layout(tile, few_operand_layout(WARPS, 1), assert_trivial=True)
    return mma_v2(a, b, acc)


@gluon.jit
def _apart(k):
    """``k``, once the loads before are issued.

    ptxas would move the loads of several steps to the end of a loop, where they come late.
    """
    return gl.inline_asm_elementwise(
        "bar.warp.sync 0xffffffff; mov.b32 $0, $1;", "=r,r", [k],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _product(prefetch, w, s, x, steps, N: gl.constexpr, WARPS: gl.constexpr, WIDE: gl.constexpr):
    """(64, N) fp32 over ``steps`` steps; ``prefetch``: :func:`_fetch` of the first AHEAD."""
    AHEAD: gl.constexpr = len(prefetch) // 2
    last = steps - 1
    whole = last // AHEAD * AHEAD
    acc = gl.zeros([ROWS, N], gl.float32, few_layout(WARPS))
    xa = _tokens(x, 0, last)
    xb = _tokens(x, 1, last)
    for k in range(0, whole, AHEAD):
        later = ()
        for i in gl.static_range(AHEAD):
            acc = _step(acc, prefetch[2 * i], prefetch[2 * i + 1], xa, N, WARPS, WIDE)
            later = later + _fetch(w, s, k + (AHEAD + i), last)
            xa = xb
            xb = _tokens(x, k + (i + 2), last)
            k = _apart(k)
        prefetch = later
    # From 1 to AHEAD steps are left, and all their weights are on the way.
    for i in gl.static_range(AHEAD):
        if steps - whole > i:
            acc = _step(acc, prefetch[2 * i], prefetch[2 * i + 1], xa, N, WARPS, WIDE)
            xa = xb
            xb = _tokens(x, whole + (i + 2), last)
    return acc


@gluon.jit
def _weights(weight, scale, block, steps, WARPS: gl.constexpr, AHEAD: gl.constexpr):
    """Pointers to the weights and scales of 64 rows, and those of the first AHEAD steps."""
    layout: gl.constexpr = few_words_layout(ROWS, WARPS)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    word = gl.arange(0, 16, layout=gl.SliceLayout(0, layout))
    start = block * steps * ROWS
    w = weight + start * 16 + row[:, None] * 16 + word[None, :]
    s = scale + start + row
    prefetch = ()
    for i in gl.static_range(AHEAD):
        prefetch = prefetch + _fetch(w, s, i, steps - 1)
    return w, s, prefetch


@gluon.jit
def _token_rows(x, rows, steps, N: gl.constexpr, WARPS: gl.constexpr):
    """Pointers to the words of step 0 of each of ``rows``."""
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, few_pairs_layout(N, WARPS)))
    return x + rows.to(gl.int64)[:, None] * (steps * 64) + column[None, :]


@gluon.jit
def linear1(
    x, w13, s13, topk_weights, order, tiles, acts, codes, sf, hidden, inter, top_k, clamp,
    HAS_CLAMP: gl.constexpr, FAST: gl.constexpr, N: gl.constexpr, WARPS: gl.constexpr,
    AHEAD: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """Gate and up of 32 channels for one tile, SwiGLU, requantisation.

    ``x`` (T, H) bf16, ``acts`` (T*K, I) bf16 out, both in the order of :func:`.dispatch.dispatch`;
    ``codes`` (T*K, I) and ``sf`` (T*K, I/32) uint8 out; ``tiles`` (n, 3) int32: expert (-1 for
    none), first, end of the rows in ``order``.
    """
    BI: gl.constexpr = ROWS // 2
    blocks = inter // BI
    # Where these blocks leave room, those of linear 2 start now, and ask for their weights.
    program = next_may_start(wait_for_previous(gl.program_id(0)))
    tile = program // blocks
    block = program % blocks
    expert = gl.load(tiles + tile * 3)
    if expert < 0:
        return
    steps = hidden // 128
    w, s, prefetch = _weights(w13, s13, expert.to(gl.int64) * blocks + block, steps, WARPS, AHEAD)
    first = gl.load(tiles + tile * 3 + 1)
    end = gl.load(tiles + tile * 3 + 2)
    r = first + gl.arange(0, N, layout=gl.SliceLayout(1, few_pairs_layout(N, WARPS)))
    tokens = gl.load(order + gl.minimum(r, end - 1)) // top_k
    rows = _token_rows(x, tokens, steps, N, WARPS)
    acc = _product(prefetch, w, s, rows, steps, N, WARPS, WIDE)
    both = acc.to(gl.bfloat16).reshape([ROWS // 16, 2, 8, N]).permute([0, 2, 3, 1])
    gate, up = gl.split(both)
    act_l: gl.constexpr = act_layout(N, BI, WARPS)
    gate = gl.convert_layout(gate.reshape([BI, N]).permute([1, 0]), act_l)
    up = gl.convert_layout(up.reshape([BI, N]).permute([1, 0]), act_l)
    activate(
        gate, up, first, end, block * BI, order, topk_weights, acts, codes, sf, inter, clamp,
        HAS_CLAMP, FAST, False,
    )  # fmt: skip


@gluon.jit
def linear2(
    acts, w2, s2, order, tiles, slots, hidden, inter,
    N: gl.constexpr, WARPS: gl.constexpr, AHEAD: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """64 channels of the second product for one tile, rounded to bf16: ``slots`` (T*K, H).

    Dispatch has ended before the first block of this starts: only ``acts`` is waited for.
    """
    blocks = hidden // ROWS
    tile = gl.program_id(0) // blocks
    block = gl.program_id(0) % blocks
    expert = gl.load(tiles + tile * 3)
    if expert < 0:
        wait_for_previous(tile)  # the next kernel relies on every block's having waited
        return
    steps = inter // 128
    w, s, prefetch = _weights(w2, s2, expert.to(gl.int64) * blocks + block, steps, WARPS, AHEAD)
    first = gl.load(tiles + tile * 3 + 1)
    end = gl.load(tiles + tile * 3 + 2)
    r = first + gl.arange(0, N, layout=gl.SliceLayout(1, few_pairs_layout(N, WARPS)))
    pairs = gl.load(order + gl.minimum(r, end - 1))
    # Zero, but known only then: no row may be read before.
    pairs = pairs + (wait_for_previous(tile) - tile)
    rows = _token_rows(acts, pairs, steps, N, WARPS)
    acc = _product(prefetch, w, s, rows, steps, N, WARPS, WIDE)
    next_may_start(tile)
    store_rows(acc, first, end, block * ROWS, order, slots, hidden, N, WARPS)
