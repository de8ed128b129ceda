"""What surrounds the two products: rows by expert, operands in bf16, and the combine."""

from __future__ import annotations

import triton
import triton.language as tl

from megamoe.backends.triton.kernels.chain import next_may_start_tl, wait_for_previous_tl
from megamoe.backends.triton.kernels.staging import power_of_two


@triton.jit
def e4m3_value(code):
    """E4M3 bytes (int32) to fp32, exact; 0x7F and 0xFF are NaN."""
    size = code & 0x7F
    normal = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)
    value = tl.where(size == 0x7F, float("nan"), value)
    return tl.where((code & 0x80) != 0, -value, value)


@triton.jit
def dispatch(
    x, x_sf, ids, operand, order, counts, tiles, tokens, hidden, top_k, experts, max_tiles,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, EXPERTS: tl.constexpr, CHUNK: tl.constexpr,
    EARLY: tl.constexpr = False,
):  # fmt: skip
    """Program 0 sorts the slots by expert; every other one makes BLOCK operands of a token.

    ``operand`` (T, H) bf16 is code times scale, exact, permuted within 32 (:func:`_operand`).
    ``order`` (T*K,) int32 holds slots ``token * K + slot`` by expert. Within an expert their order
    varies, which no output depends on. ``tiles`` (n, 3) int32: expert or -1, first, end.
    EARLY: see :mod:`.chain`.
    """
    program = tl.program_id(0)
    if EARLY:
        program = next_may_start_tl(wait_for_previous_tl(program))
    if program == 0:
        if tl.program_id(1) == 0:
            _sort(ids, order, counts, tiles, tokens * top_k, experts, max_tiles,
                  ROWS, EXPERTS, CHUNK)  # fmt: skip
    else:
        token = (program - 1).to(tl.int64)
        to = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        value = _operand(x, x_sf, token, to, hidden, False)
        tl.store(operand + token * hidden + to, value, mask=to < hidden)


@triton.jit
def _operand(x, x_sf, token, to, hidden, HAS_BOXES: tl.constexpr):
    """Positions ``to`` of a token's operand: code times scale, permuted within 32.

    Element 8 t + 4 h + 2 b + a goes to position 8 t + 4 b + 2 a + h, where :mod:`.few` takes eight
    at a time to registers. HAS_BOXES: to 16 b + 8 a + 2 t + h, where ``wgmma`` looks for it.
    """
    p = to % 32
    if HAS_BOXES:
        source = to - p + ((p >> 1) & 3) * 8 + (p & 1) * 4 + (p >> 4) * 2 + ((p >> 3) & 1)
    else:
        source = to - (p & 7) + (p & 1) * 4 + ((p >> 2) & 1) * 2 + ((p >> 1) & 1)
    live = to < hidden
    code = tl.load(x + token * hidden + source, mask=live, other=0).to(tl.int32)
    word = tl.load(x_sf + token * (hidden // 128) + to // 128, mask=live, other=0)
    exponent = (word >> ((to // 32) % 4 * 8)) & 0xFF
    return (e4m3_value(code) * power_of_two(exponent - 127)).to(tl.bfloat16)


@triton.jit
def _sort(
    ids, order, counts, tiles, total, experts, max_tiles,
    ROWS: tl.constexpr, EXPERTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    e = tl.arange(0, EXPERTS)
    lane = tl.arange(0, CHUNK)
    tl.store(counts + e, tl.zeros([EXPERTS], tl.int32))
    tl.debug_barrier()
    for start in range(0, total, CHUNK):
        at = start + lane
        expert = tl.load(ids + at, mask=at < total, other=-1)
        live = (expert >= 0) & (expert < experts)
        tl.atomic_add(counts + tl.where(live, expert, 0), 1, mask=live, sem="relaxed")
    tl.debug_barrier()
    # Read through an atomic: the counts are in the second-level cache, not in this block's.
    count = tl.atomic_add(counts + e, 0, sem="relaxed")
    ends = tl.cumsum(count, 0)
    tl.debug_barrier()
    tl.atomic_add(counts + e, ends - 2 * count, sem="relaxed")  # the first row of each expert
    _tiles(tiles, count, ends, max_tiles, ROWS)
    tl.debug_barrier()
    for start in range(0, total, CHUNK):
        at = start + lane
        expert = tl.load(ids + at, mask=at < total, other=-1)
        live = (expert >= 0) & (expert < experts)
        to = tl.atomic_add(counts + tl.where(live, expert, 0), 1, mask=live, sem="relaxed")
        tl.store(order + to, at, mask=live)


@triton.jit
def _tiles(tiles, count, ends, max_tiles, ROWS: tl.constexpr):
    """Every tile of ROWS rows, those of an expert together: they read the same weights."""
    each = (count + ROWS - 1) // ROWS
    tile_ends = tl.cumsum(each, 0)
    last = tl.sum(each, 0)
    for start in range(0, max_tiles, 32):
        tile = start + tl.arange(0, 32)
        live = tile < last
        expert = tl.where(live, _ends_before(tile_ends, tile), 0)
        number = tile - tl.gather(tile_ends - each, expert, 0)
        _store_tiles(tiles, tile, live, expert, number, count, ends, max_tiles, ROWS)


@triton.jit
def _ends_before(ends, tile):
    """How many of ``ends`` each of ``tile`` has reached."""
    return tl.sum((ends[None, :] <= tile[:, None]).to(tl.int32), axis=1)


@triton.jit
def _store_tiles(tiles, tile, live, expert, number, count, ends, max_tiles, ROWS: tl.constexpr):
    """Expert (-1 where not ``live``), first and end row; ``number``: which of its expert's."""
    end = tl.gather(ends, expert, 0)
    begin = end - tl.gather(count, expert, 0) + number * ROWS
    inside = tile < max_tiles
    tl.store(tiles + tile * 3, tl.where(live, expert, -1), mask=inside)
    tl.store(tiles + tile * 3 + 1, begin, mask=inside)
    tl.store(tiles + tile * 3 + 2, end, mask=inside)


@triton.jit
def count(
    ids, counts, total, experts, EXPERTS: tl.constexpr, CHUNK: tl.constexpr, TALLIES: tl.constexpr
):
    """Many tokens, first of three: rows by expert.

    ``counts`` (TALLIES, EXPERTS) int32 must be zero before. A program adds to one tally, and the
    next program to the next one: additions to one address wait for each other.
    """
    mine = counts + tl.program_id(0) % TALLIES * EXPERTS
    at = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    expert = tl.load(ids + at, mask=at < total, other=-1)
    live = (expert >= 0) & (expert < experts)
    tl.atomic_add(mine + tl.where(live, expert, 0), 1, mask=live, sem="relaxed")


@triton.jit
def rank(
    ids, counts, cursors, order, places, tiles, total, experts, max_tiles,
    ROWS: tl.constexpr, EXPERTS: tl.constexpr, CHUNK: tl.constexpr, TALLIES: tl.constexpr,
    EARLY: tl.constexpr = False,
):  # fmt: skip
    """Second: ``order`` as in :func:`dispatch`, its inverse ``places`` (T*K,), and ``tiles``.

    ``cursors`` (TALLIES, EXPERTS) int32 must be zero before. EARLY: see :mod:`.chain`.
    """
    program = tl.program_id(0)
    if EARLY:
        program = next_may_start_tl(wait_for_previous_tl(program))
    tally = tl.arange(0, TALLIES)[:, None]
    tallies = tl.load(counts + tally * EXPERTS + tl.arange(0, EXPERTS)[None, :])
    number = tl.sum(tallies, 0)
    mine = program % TALLIES
    before = tl.sum(tl.where(tally < mine, tallies, 0), 0)
    ends = tl.cumsum(number, 0)
    at = program * CHUNK + tl.arange(0, CHUNK)
    expert = tl.load(ids + at, mask=at < total, other=-1)
    live = (expert >= 0) & (expert < experts)
    expert = tl.where(live, expert, 0).to(tl.int32)
    first = tl.gather(ends - number + before, expert, 0)
    to = first + tl.atomic_add(cursors + mine * EXPERTS + expert, 1, mask=live, sem="relaxed")
    tl.store(order + to, at, mask=live)
    tl.store(places + at, tl.where(live, to, -1), mask=at < total)
    _tiles_by_size(tiles, number, ends, program, max_tiles, ROWS)


@triton.jit
def _tiles_by_size(tiles, count, ends, program, max_tiles, ROWS: tl.constexpr):
    """The same, shared by all programs; whole tiles come first, those of half size last.

    What a GPU does last should be short.
    """
    whole, rest = count // ROWS, count % ROWS
    large = (rest > ROWS // 2).to(tl.int32)
    small = (rest > 0).to(tl.int32) - large
    whole_ends = tl.cumsum(whole, 0)
    wholes = tl.sum(whole, 0)
    large_ends = tl.cumsum(large, 0) + wholes
    larges = wholes + tl.sum(large, 0)
    small_ends = tl.cumsum(small, 0) + larges
    last = larges + tl.sum(small, 0)
    for start in range(program * 32, max_tiles, tl.num_programs(0) * 32):
        tile = start + tl.arange(0, 32)
        of_rest = tl.where(
            tile < larges, _ends_before(large_ends, tile), _ends_before(small_ends, tile)
        )
        live = tile < last
        expert = tl.where(tile < wholes, _ends_before(whole_ends, tile), of_rest)
        expert = tl.where(live, expert, 0)
        number = tl.where(
            tile < wholes, tile - tl.gather(whole_ends - whole, expert, 0),
            tl.gather(whole, expert, 0),
        )  # fmt: skip
        _store_tiles(tiles, tile, live, expert, number, count, ends, max_tiles, ROWS)


@triton.jit
def spread(
    x, x_sf, places, operand, hidden, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr = False,
):  # fmt: skip
    """Third: a token's operand to each of its rows of ``operand`` (T*K, H), which are by expert.

    EARLY: see :mod:`.chain`.
    """
    token = tl.program_id(0)
    if EARLY:
        token = next_may_start_tl(wait_for_previous_tl(token))
    token = token.to(tl.int64)
    to = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = _operand(x, x_sf, token, to, hidden, True)
    for slot in tl.static_range(TOP_K):
        row = tl.load(places + token * TOP_K + slot)
        at = operand + row.to(tl.int64) * hidden + to
        tl.store(at, value, mask=(to < hidden) & (row >= 0))


@triton.jit
def combine(
    slots, ids, y, hidden, experts, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr = False,
):  # fmt: skip
    """``y`` (T, H) bf16: live rows of ``slots`` (T*K, H) added in fp32, ascending, from 0.

    EARLY: see :mod:`.chain`.
    """
    token = tl.program_id(0)
    if EARLY:
        token = wait_for_previous_tl(token)
    token = token.to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for slot in tl.static_range(TOP_K):
        expert = tl.load(ids + token * TOP_K + slot)
        live = (expert >= 0) & (expert < experts)
        row = slots + (token * TOP_K + slot) * hidden + at
        part = tl.load(row, mask=live & (at < hidden), other=0.0).to(tl.float32)
        # Adding 0 where nothing is live would turn -0 into +0.
        total = tl.where(live, total + part, total)
    tl.store(y + token * hidden + at, total.to(tl.bfloat16), mask=at < hidden)
