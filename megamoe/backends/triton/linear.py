"""The two grouped products on Hopper's tensor cores, weights decoded in registers (Gluon).

Weights are the ``wgmma`` operand A and tokens its operand B, so a tile of few tokens still fills
the instruction. Per 128 of the contraction a block copies its packed weight rows and the bf16 rows
of its tokens to shared memory, asynchronously and several steps ahead; a thread takes eight
nibbles of a row in one 32-bit load and turns them into operand registers.

Each thread must hold, for every 32 of the contraction, the elements that ``wgmma`` gives it: with
``t`` its place among four lanes, positions ``16 b + 8 a + 2 t + h`` (a, b, h in 0, 1). Eight
adjacent nibbles are elements ``8 t + 4 h + 2 b + a``. The operand B is stored in the former order
(:data:`PERMUTE` of :mod:`.dispatch`), so no nibble has to change threads. A sum over 32 takes the
same 32 terms either way, and blocks of 32 ascend: the class ``fp32-ordered``.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from megamoe.backends.triton.layouts import (
    act_layout,
    mma_layout,
    operand_layout,
    packed_layout,
    row_layout,
    scale_copy_layout,
    store_layout,
    weight_copy_layout,
)

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.7, 3.6

# Per register: eight nibbles of one row, in the order of bits of :mod:`.packing`, and a pair of
# equal bf16 factors. A nibble s.eem becomes the bf16 whose exponent ends in ee and whose mantissa
# begins with m: its value times 2^-126, subnormals included. Exact products give it its size.
_TAKE: gl.constexpr = gl.constexpr("""
shl.b32 a, $4, 6;
shl.b32 b, $4, 2;
shf.r.wrap.b32 c, $4, $4, 4;
shr.b32 m, $4, 8;
and.b32 a, a, 0x81c081c0;
and.b32 b, b, 0x81c081c0;
and.b32 c, c, 0x81c081c0;
and.b32 d, $4, 0x81808180;
and.b32 m, m, 0x00400040;
or.b32 d, d, m;
""")
# $5 a word of four scale bytes, $7 which of them: 2^(byte - 1) twice, which gives the nibble its
# size too. A larger byte than the narrow kernels were promised becomes infinite: a wrong promise
# must not pass for a number.
_FACTOR: gl.constexpr = gl.constexpr("""
prmt.b32 k, $5, 0, $7;
mov.b32 m, 0x00810081;
min.u16x2 k, k, m;
mad.lo.u32 k, k, 0x80, 0x3f003f00;
""")
_UNIT: gl.constexpr = gl.constexpr("""
mov.b32 k, 0x7e807e80;
mul.rn.bf16x2 a, a, k;
mul.rn.bf16x2 b, b, k;
mul.rn.bf16x2 c, c, k;
mul.rn.bf16x2 d, d, k;
""")
_SCALE: gl.constexpr = gl.constexpr("""
mul.rn.bf16x2 $0, a, FACTOR;
mul.rn.bf16x2 $1, b, FACTOR;
mul.rn.bf16x2 $2, c, FACTOR;
mul.rn.bf16x2 $3, d, FACTOR;
""")
_OPEN: gl.constexpr = gl.constexpr("{ .reg .b32 a, b, c, d, m, k;")
_NARROW_ASM: gl.constexpr = gl.constexpr(
    _OPEN.value + _TAKE.value + _FACTOR.value + _SCALE.value.replace("FACTOR", "k") + "}"
)
_WIDE_ASM: gl.constexpr = gl.constexpr(
    _OPEN.value + _TAKE.value + _UNIT.value + _SCALE.value.replace("FACTOR", "$5") + "}"
)


@gluon.jit
def decoded(
    packed, words, BN: gl.constexpr, layout: gl.constexpr, operand: gl.constexpr, WIDE: gl.constexpr
):
    """(BN, 32) int16 of nibbles and (BN,) int32 of four scale bytes to (BN, 128) bf16."""
    group = gl.arange(0, 32, layout=gl.SliceLayout(0, layout)) // 8
    if WIDE:
        byte = (words[:, None] >> (group * 8)[None, :]) & 0xFF
        # 2^(byte - 127) as bf16; byte 0 is subnormal there, byte 255 is NaN.
        bits = gl.where((byte == 0) | (byte == 255), (byte << 7) | 0x40, byte << 7)
        scale = bits.to(gl.int16).to(gl.bfloat16, bitcast=True)
        o0, o1, o2, o3 = gl.inline_asm_elementwise(
            _WIDE_ASM,
            "=&r,=&r,=&r,=&r,r,r",
            [packed, scale],
            dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        chosen = 0x4040 + group * 0x0101
        o0, o1, o2, o3 = gl.inline_asm_elementwise(
            _NARROW_ASM,
            "=&r,=&r,=&r,=&r,r,r,r,r,r",
            [packed, words[:, None], chosen[None, :]],
            dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16),
            is_pure=True,
            pack=2,
        )
    both = gl.join(gl.join(o0, o2), gl.join(o1, o3))  # (..., b, a)
    split = both.reshape([BN, 4, 4, 2, 2, 2])  # row, chunk, t, h, b, a
    ordered = split.permute([0, 1, 4, 5, 2, 3]).reshape([BN, 128])
    return gl.convert_layout(ordered, operand, assert_trivial=True)


@gluon.jit
def _decoded_slot(
    ws, ss, slot, BN: gl.constexpr, layout: gl.constexpr, operand: gl.constexpr, WIDE: gl.constexpr
):
    """:func:`decoded` of a stage in shared memory."""
    words = ss.index(slot).load(gl.SliceLayout(1, layout))
    return decoded(ws.index(slot).load(layout), words, BN, layout, operand, WIDE)


@gluon.jit
def started(number, EARLY: gl.constexpr):
    """``number``, once all that the kernels before have written is there to be read.

    Whatever is read of earlier kernels must hang on what this returns. EARLY lets the next kernel
    start at once, up to this same call (programmatic dependent launch). Not before a kernel that
    fills the GPU: its blocks would settle wherever there is room, and not evenly.
    """
    code: gl.constexpr = "griddepcontrol.wait; mov.b32 $0, $1;"
    early: gl.constexpr = "griddepcontrol.launch_dependents; griddepcontrol.wait; mov.b32 $0, $1;"
    return gl.inline_asm_elementwise(
        early if EARLY else code, "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _copy_weights(w_ptr, s_ptr, ws, ss, k, STAGES: gl.constexpr):
    """Start the copies of step ``k``'s weight rows and scales."""
    async_copy.async_copy_global_to_shared(ws.index(k % STAGES), w_ptr + k * 32)
    async_copy.async_copy_global_to_shared(ss.index(k % STAGES), s_ptr + k)


@gluon.jit
def _copy_step(x_ptr, w_ptr, s_ptr, xs, ws, ss, k, steps, STAGES: gl.constexpr):
    """Start the copies of step ``k``; a group is committed even where there is nothing left."""
    if k < steps:
        async_copy.async_copy_global_to_shared(xs.index(k % STAGES), x_ptr + k * 128)
        _copy_weights(w_ptr, s_ptr, ws, ss, k, STAGES)
    async_copy.commit_group()


@gluon.jit
def _product(
    x,
    weight,
    scale,
    rows_copy,
    weight_rows_copy,
    weight_rows_scale,
    depth,
    BN: gl.constexpr,
    N: gl.constexpr,
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
    WIDE: gl.constexpr,
    PAIRED: gl.constexpr,
):
    """(BN, N) fp32: weight rows times token rows, over ``depth`` in ascending blocks of 32."""
    mma: gl.constexpr = mma_layout(WARPS, N)
    operand: gl.constexpr = operand_layout(WARPS, N)
    packed_l: gl.constexpr = packed_layout(BN, WARPS)
    x_copy: gl.constexpr = row_layout(WARPS)
    w_copy: gl.constexpr = weight_copy_layout(WARPS)
    xs = gl.allocate_shared_memory(
        gl.bfloat16,
        [STAGES, N, 128],
        gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2),
    )
    ws = gl.allocate_shared_memory(
        gl.int16, [STAGES, BN, 32], gl.SwizzledSharedLayout(8, 2, 4, order=[1, 0])
    )
    ss = gl.allocate_shared_memory(
        gl.int32, [STAGES, BN], gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    )
    x_column = gl.arange(0, 128, layout=gl.SliceLayout(0, x_copy))
    w_column = gl.arange(0, 32, layout=gl.SliceLayout(0, w_copy))
    # Written in whole steps, so that the compiler knows rows to be aligned for 16-byte copies.
    steps = depth // 128
    x_ptr = x + rows_copy.to(gl.int64)[:, None] * (steps * 128) + x_column[None, :]
    w_ptr = weight + weight_rows_copy.to(gl.int64)[:, None] * (steps * 32) + w_column[None, :]
    s_ptr = scale + weight_rows_scale.to(gl.int64) * steps
    acc = gl.zeros([BN, N], gl.float32, mma)
    if PAIRED:
        # Two steps at a time: a row's neighbouring 64 bytes of weights are asked for together, and
        # the block meets half as often.
        for k in gl.static_range(2):  # ahead of the token rows, whose places must be fetched first
            _copy_weights(w_ptr, s_ptr, ws, ss, k, STAGES)
        for k in gl.static_range(2):
            async_copy.async_copy_global_to_shared(xs.index(k), x_ptr + k * 128)
            async_copy.commit_group()
        for k in gl.static_range(2, STAGES - 2):
            _copy_step(x_ptr, w_ptr, s_ptr, xs, ws, ss, k, steps, STAGES)
        async_copy.wait_group(STAGES - 4)
        fence_async_shared()
        barrier()
        a0 = _decoded_slot(ws, ss, 0, BN, packed_l, operand, WIDE)
        a1 = _decoded_slot(ws, ss, 1, BN, packed_l, operand, WIDE)
        for k in range(0, steps, 2):
            token = warpgroup_mma(a0, xs.index(k % STAGES).permute((1, 0)), acc, is_async=True)
            second = xs.index((k + 1) % STAGES).permute((1, 0))
            token = warpgroup_mma(a1, second, token, is_async=True)
            async_copy.wait_group(STAGES - 6)
            fence_async_shared()
            barrier()
            _copy_step(x_ptr, w_ptr, s_ptr, xs, ws, ss, k + STAGES - 2, steps, STAGES)
            _copy_step(x_ptr, w_ptr, s_ptr, xs, ws, ss, k + STAGES - 1, steps, STAGES)
            b0 = _decoded_slot(ws, ss, (k + 2) % STAGES, BN, packed_l, operand, WIDE)
            b1 = _decoded_slot(ws, ss, (k + 3) % STAGES, BN, packed_l, operand, WIDE)
            acc, a0, a1 = warpgroup_mma_wait(0, deps=[token, a0, a1])
            a0 = b0
            a1 = b1
    else:
        for k in gl.static_range(STAGES - 1):
            _copy_step(x_ptr, w_ptr, s_ptr, xs, ws, ss, k, steps, STAGES)
        async_copy.wait_group(STAGES - 2)
        fence_async_shared()
        barrier()
        a = _decoded_slot(ws, ss, 0, BN, packed_l, operand, WIDE)
        for k in range(steps):
            # The step before waited for this step's rows. All else happens while it multiplies.
            token = warpgroup_mma(a, xs.index(k % STAGES).permute((1, 0)), acc, is_async=True)
            async_copy.wait_group(STAGES - 3)
            fence_async_shared()
            barrier()
            # All have finished product k - 1, so its slot is free.
            _copy_step(x_ptr, w_ptr, s_ptr, xs, ws, ss, k + STAGES - 1, steps, STAGES)
            # In the last step the decoded operand is a stale one, which nobody uses.
            b = _decoded_slot(ws, ss, (k + 1) % STAGES, BN, packed_l, operand, WIDE)
            acc, a = warpgroup_mma_wait(0, deps=[token, a])
            a = b
    return acc


@gluon.jit
def _silu_fast(gate):
    return gate * gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + gl.exp(-gate)],
        dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _silu_precise(gate):
    # exp by range reduction with a split ln 2 and a polynomial: about one ULP, unlike gl.exp.
    x = gl.minimum(gl.maximum(-gate, -104.0), 89.0)
    n = gl.floor(x * 1.4426950408889634 + 0.5)
    r = gl.fma(n, -0.693145751953125, x)
    r = gl.fma(n, -1.42860682030941723212e-6, r)
    p = gl.fma(r, 1.9875691500e-4, 1.3981999507e-3)
    p = gl.fma(p, r, 8.3334519073e-3)
    p = gl.fma(p, r, 4.1665795894e-2)
    p = gl.fma(p, r, 1.6666665459e-1)
    p = gl.fma(p, r, 5.0000001201e-1)
    e = gl.fma(p, r * r, r) + 1.0
    half = gl.floor(n * 0.5)
    one = ((half.to(gl.int32) + 127) << 23).to(gl.float32, bitcast=True)
    two = (((n - half).to(gl.int32) + 127) << 23).to(gl.float32, bitcast=True)
    e = e * one * two
    e = gl.where(gate != gate, gate, e)
    return gl.inline_asm_elementwise(
        "div.rn.f32 $0, $1, $2;", "=f,f,f", [gate, 1.0 + e],
        dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _e4m3_code(value):
    """E4M3 bytes as int32, saturated, one conversion each.

    Converted in pairs, and both stored and decoded, codes of a thread that has 32 came out wrong:
    half of them were decoded from other registers (Triton 3.6's ptxas; its PTX was right).
    """
    return gl.inline_asm_elementwise(
        """{ .reg .b16 t; .reg .f32 z;
        mov.f32 z, 0f00000000;
        cvt.rn.satfinite.e4m3x2.f32 t, z, $1;
        cvt.u32.u16 $0, t; }""",
        "=r,f",
        [value],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _e4m3_value(code):
    """E4M3 bytes (int32) to fp32, exact; 0x7F and 0xFF are NaN."""
    size = code & 0x7F
    value = (size << 20).to(gl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    value = gl.where(size == 0x7F, float("nan"), value)
    return gl.where(code >= 0x80, -value, value)


@gluon.jit
def activate(
    gate, up, first, end, channel0, order, topk_weights, acts, codes, sf, inter, clamp,
    HAS_CLAMP: gl.constexpr, FAST: gl.constexpr, SORTED: gl.constexpr,
):  # fmt: skip
    """SwiGLU, routing weight and requantisation of ``gate`` and ``up`` (rows, channels) bf16.

    Rows of ``acts`` are in the order of the sort if SORTED, else those of ``codes``.
    """
    layout: gl.constexpr = gate.type.layout
    N: gl.constexpr = gate.shape[0]
    BI: gl.constexpr = gate.shape[1]
    gate = gate.to(gl.float32)
    up = up.to(gl.float32)
    if HAS_CLAMP:
        gate = gl.where((gate > clamp) | (gate != gate), clamp, gate)
        up = gl.where((up < -clamp) | (up != up), -clamp, up)
        up = gl.where(up > clamp, clamp, up)
    if FAST:
        silu = _silu_fast(gate)
    else:
        silu = _silu_precise(gate)
    row = first + gl.arange(0, N, layout=gl.SliceLayout(1, layout))
    pair = gl.load(order + gl.minimum(row, end - 1))
    value = silu * up * gl.load(topk_weights + pair)[:, None]

    grouped = value.reshape([N, BI // 32, 32])
    size = gl.abs(grouped)
    amax = gl.max(gl.where(size != size, 0.0, size), axis=2)
    bits = (amax * 0.002232142857142857).to(gl.int32, bitcast=True)
    exponent = (bits >> 23) + gl.where((bits & 0x7FFFFF) != 0, 1, 0)
    # 2^(127 - e) and 2^(e - 127); the ends of the range are subnormal in fp32.
    down = gl.where(exponent < 254, (254 - exponent) << 23, 0x400000 >> (exponent - 254))
    back = gl.where(exponent > 0, exponent << 23, 0x400000)
    down = gl.expand_dims(down.to(gl.float32, bitcast=True), 2)
    back = gl.expand_dims(back.to(gl.float32, bitcast=True), 2)
    code = _e4m3_code(grouped * down)
    act = (_e4m3_value(code) * back).to(gl.bfloat16)

    live = (row < end)[:, None]
    column = channel0 + gl.arange(0, BI, layout=gl.SliceLayout(0, layout))[None, :]
    at = pair.to(gl.int64)[:, None] * inter + column
    byte = gl.convert_layout(code.reshape([N, BI]), layout).to(gl.uint8)
    gl.store(codes + at, byte, mask=live)
    act_at = row.to(gl.int64)[:, None] * inter + column if SORTED else at
    split = act.reshape([N, BI // 32, 4, 2, 2, 2])  # row, chunk, t, h, b, a
    permuted = split.permute([0, 1, 4, 5, 2, 3]).reshape([N, BI])
    gl.store(acts + act_at, gl.convert_layout(permuted, layout), mask=live)
    sf_l: gl.constexpr = exponent.type.layout
    n = first + gl.arange(0, N, layout=gl.SliceLayout(1, sf_l))
    g = channel0 // 32 + gl.arange(0, BI // 32, layout=gl.SliceLayout(0, sf_l))
    sf_at = gl.load(order + gl.minimum(n, end - 1)).to(gl.int64)[:, None] * (inter // 32)
    gl.store(sf + sf_at + g[None, :], exponent.to(gl.uint8), mask=(n < end)[:, None])


@gluon.jit
def linear1(
    x,
    w13,
    s13,
    topk_weights,
    order,
    tiles,
    acts,
    codes,
    sf,
    hidden,
    inter,
    top_k,
    clamp,
    HAS_CLAMP: gl.constexpr,
    FAST: gl.constexpr,
    BN: gl.constexpr,
    N: gl.constexpr,
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
    WIDE: gl.constexpr,
    PAIRED: gl.constexpr,
):
    """Gate and up of BN/2 channels for one tile, SwiGLU, requantisation.

    ``x`` (T, H) bf16, ``acts`` (T*K, I) bf16 out, both permuted within 32; ``codes`` (T*K, I) and
    ``sf`` (T*K, I/32) uint8 out; ``tiles`` (3, n) int32: expert (-1 for none), first, end of the
    rows in ``order``. Row r of the weight tile is gate or up by r % 16 < 8, so that both of a
    channel land in one thread.
    """
    BI: gl.constexpr = BN // 2
    blocks = inter // BI
    program = started(gl.program_id(0), False)
    tile = program // blocks
    channel0 = (program % blocks) * BI
    expert = gl.load(tiles + tile * 3)
    if expert < 0:
        return
    first = gl.load(tiles + tile * 3 + 1)
    end = gl.load(tiles + tile * 3 + 2)
    x_copy: gl.constexpr = row_layout(WARPS)
    r = first + gl.arange(0, N, layout=gl.SliceLayout(1, x_copy))
    tokens = gl.load(order + gl.minimum(r, end - 1)) // top_k
    wc = gl.arange(0, BN, layout=gl.SliceLayout(1, weight_copy_layout(WARPS)))
    wr = gl.arange(0, BN, layout=scale_copy_layout(WARPS))
    base = expert.to(gl.int64) * (2 * inter) + channel0
    wc = base + (wc // 16) * 8 + wc % 8 + ((wc // 8) % 2) * inter
    wr = base + (wr // 16) * 8 + wr % 8 + ((wr // 8) % 2) * inter
    acc = _product(x, w13, s13, tokens, wc, wr, hidden, BN, N, STAGES, WARPS, WIDE, PAIRED)

    both = acc.to(gl.bfloat16).reshape([BN // 16, 2, 8, N]).permute([0, 2, 3, 1])
    gate, up = gl.split(both)
    act_l: gl.constexpr = act_layout(N, BI, WARPS)
    gate = gl.convert_layout(gate.reshape([BI, N]).permute([1, 0]), act_l)
    up = gl.convert_layout(up.reshape([BI, N]).permute([1, 0]), act_l)
    activate(
        gate, up, first, end, channel0, order, topk_weights, acts, codes, sf, inter, clamp,
        HAS_CLAMP, FAST, False,
    )  # fmt: skip


@gluon.jit
def store_rows(
    acc, first, end, channel0, order, slots, hidden,
    BN: gl.constexpr, N: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """(BN, N) sums of the second product to bf16 rows of ``slots``."""
    out_l: gl.constexpr = store_layout(BN, WARPS)
    row = first + gl.arange(0, N, layout=gl.SliceLayout(1, out_l))
    at = gl.load(order + gl.minimum(row, end - 1)).to(gl.int64)[:, None] * hidden
    at = at + channel0 + gl.arange(0, BN, layout=gl.SliceLayout(0, out_l))[None, :]
    y = gl.convert_layout(acc.to(gl.bfloat16).permute([1, 0]), out_l)
    gl.store(slots + at, y, mask=(row < end)[:, None])


@gluon.jit
def linear2(
    acts,
    w2,
    s2,
    order,
    tiles,
    slots,
    hidden,
    inter,
    BN: gl.constexpr,
    N: gl.constexpr,
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
    WIDE: gl.constexpr,
    PAIRED: gl.constexpr,
):
    """BN channels of the second product for one tile, rounded to bf16: ``slots`` (T*K, H)."""
    blocks = hidden // BN
    program = started(gl.program_id(0), True)
    tile = program // blocks
    channel0 = (program % blocks) * BN
    expert = gl.load(tiles + tile * 3)
    if expert < 0:
        return
    first = gl.load(tiles + tile * 3 + 1)
    end = gl.load(tiles + tile * 3 + 2)
    x_copy: gl.constexpr = row_layout(WARPS)
    r = first + gl.arange(0, N, layout=gl.SliceLayout(1, x_copy))
    pairs = gl.load(order + gl.minimum(r, end - 1))
    base = expert.to(gl.int64) * hidden + channel0
    wc = base + gl.arange(0, BN, layout=gl.SliceLayout(1, weight_copy_layout(WARPS)))
    wr = base + gl.arange(0, BN, layout=scale_copy_layout(WARPS))
    acc = _product(acts, w2, s2, pairs, wc, wr, inter, BN, N, STAGES, WARPS, WIDE, PAIRED)
    store_rows(acc, first, end, channel0, order, slots, hidden, BN, N, WARPS)
