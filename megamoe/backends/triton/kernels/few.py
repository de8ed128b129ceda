"""The two grouped products for few tokens.

With few tokens the weights are all there is to move, and a block that meets at a barrier for every
step of the contraction cannot keep memory busy. Here a warp has 16 or 32 weight rows to itself and
multiplies by ``mma.sync``; :mod:`.weights` brings its rows. ``mma.sync`` adds as ``wgmma`` does,
bit for bit: one product does not differ from one of :mod:`.overlapped`.

The first weights of linear 2 are asked for as soon as there is room beside the blocks of linear 1.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megamoe.backends.triton.kernels.chain import next_may_start, started
from megamoe.backends.triton.kernels.epilogue import activate, store_rows
from megamoe.backends.triton.kernels.layouts import ROWS, act_layout, few_pairs_layout
from megamoe.backends.triton.kernels.weights import (
    product_by_registers,
    product_by_ring,
    ring_of,
    rows_of,
)


@gluon.jit
def _asked(weight, scale, block, steps, WARPS: gl.constexpr, STAGES: gl.constexpr):
    """The first weights of 64 rows, on their way; STAGES of a ring, or 0: to registers."""
    if STAGES:
        return ring_of(weight, scale, block, steps, WARPS, STAGES)
    else:
        return rows_of(weight, scale, block, steps, WARPS)


@gluon.jit
def _product(
    asked, x, steps, N: gl.constexpr, WARPS: gl.constexpr, STAGES: gl.constexpr,
    WIDE: gl.constexpr,
):  # fmt: skip
    """(64, N) fp32 of the rows that were asked for, times token rows."""
    if STAGES:
        return product_by_ring(asked[0], asked[1], x, steps, N, WARPS, STAGES, WIDE)
    else:
        return product_by_registers(asked[2], asked[0], asked[1], x, steps, N, WARPS, WIDE)


@gluon.jit
def _token_rows(x, rows, steps, N: gl.constexpr, WARPS: gl.constexpr):
    """Pointers to the words of step 0 of each of ``rows``."""
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, few_pairs_layout(N, WARPS)))
    return x + rows.to(gl.int64)[:, None] * (steps * 64) + column[None, :]


@gluon.jit
def linear1(
    x, w13, s13, topk_weights, order, tiles, acts, codes, sf, hidden, inter, top_k, clamp,
    HAS_CLAMP: gl.constexpr, FAST: gl.constexpr, N: gl.constexpr, WARPS: gl.constexpr,
    STAGES: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """Gate and up of 32 channels for one tile, SwiGLU, requantisation.

    ``x`` (T, H) bf16, ``acts`` (T*K, I) bf16 out, both in the order of :func:`.dispatch.dispatch`;
    ``codes`` (T*K, I) and ``sf`` (T*K, I/32) uint8 out; ``tiles`` (n, 3) int32: expert (-1 for
    none), first, end of the rows in ``order``.
    """
    BI: gl.constexpr = ROWS // 2
    blocks = inter // BI
    # Few of these blocks fill the GPU: those of linear 2 that fit beside them ask for weights.
    program = next_may_start(started(gl.program_id(0)))
    tile = program // blocks
    block = program % blocks
    expert = gl.load(tiles + tile * 3)
    if expert < 0:
        return
    steps = hidden // 128
    asked = _asked(w13, s13, expert.to(gl.int64) * blocks + block, steps, WARPS, STAGES)
    first = gl.load(tiles + tile * 3 + 1)
    end = gl.load(tiles + tile * 3 + 2)
    r = first + gl.arange(0, N, layout=gl.SliceLayout(1, few_pairs_layout(N, WARPS)))
    tokens = gl.load(order + gl.minimum(r, end - 1)) // top_k
    rows = _token_rows(x, tokens, steps, N, WARPS)
    acc = _product(asked, rows, steps, N, WARPS, STAGES, WIDE)
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
    N: gl.constexpr, WARPS: gl.constexpr, STAGES: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """64 channels of the second product for one tile, rounded to bf16: ``slots`` (T*K, H).

    Dispatch has ended before the first block of this starts: only ``acts`` is waited for.
    """
    blocks = hidden // ROWS
    tile = gl.program_id(0) // blocks
    block = gl.program_id(0) % blocks
    expert = gl.load(tiles + tile * 3)
    if expert < 0:
        started(tile)  # the next kernel relies on every block's having waited
        return
    steps = inter // 128
    asked = _asked(w2, s2, expert.to(gl.int64) * blocks + block, steps, WARPS, STAGES)
    first = gl.load(tiles + tile * 3 + 1)
    end = gl.load(tiles + tile * 3 + 2)
    r = first + gl.arange(0, N, layout=gl.SliceLayout(1, few_pairs_layout(N, WARPS)))
    pairs = gl.load(order + gl.minimum(r, end - 1))
    # Zero, but known only then: no row may be read before.
    pairs = pairs + (started(tile) - tile)
    rows = _token_rows(acts, pairs, steps, N, WARPS)
    acc = _product(asked, rows, steps, N, WARPS, STAGES, WIDE)
    next_may_start(tile)
    store_rows(acc, first, end, block * ROWS, order, slots, hidden, N, WARPS)
