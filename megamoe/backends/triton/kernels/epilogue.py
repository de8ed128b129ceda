"""What follows the sums: SwiGLU, routing weight and requantisation; rows of the combine (Gluon)."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megamoe.backends.triton.kernels.layouts import ROWS, boxed_layout, store_layout


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

    Not in pairs: where a thread converted 32 values in pairs, stored the codes and decoded them,
    half of the decoded ones were wrong while the stored ones were right. What was read of the PTX
    was right; whose fault it is has not been shown.
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
    HAS_CLAMP: gl.constexpr, FAST: gl.constexpr, HAS_BOXES: gl.constexpr,
):  # fmt: skip
    """SwiGLU, routing weight and requantisation of ``gate`` and ``up`` (rows, channels).

    Both are bfloat16 values, in bfloat16 or fp32.

    HAS_BOXES: ``acts`` for :mod:`.overlapped`, rows in the order of the sort; else for :mod:`.few`,
    rows as those of ``codes``. Each has its own order within 32 (:mod:`.dispatch`).
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

    groups = value.reshape([N, BI // 32, 32])
    size = gl.abs(groups)
    amax = gl.max(gl.where(size != size, 0.0, size), axis=2)
    bits = (amax * 0.002232142857142857).to(gl.int32, bitcast=True)
    exponent = (bits >> 23) + gl.where((bits & 0x7FFFFF) != 0, 1, 0)
    # 2^(127 - e) and 2^(e - 127); the ends of the range are subnormal in fp32.
    down = gl.where(exponent < 254, (254 - exponent) << 23, 0x400000 >> (exponent - 254))
    back = gl.where(exponent > 0, exponent << 23, 0x400000)
    down = gl.expand_dims(down.to(gl.float32, bitcast=True), 2)
    back = gl.expand_dims(back.to(gl.float32, bitcast=True), 2)
    code = _e4m3_code(groups * down)
    act = (_e4m3_value(code) * back).to(gl.bfloat16)

    live = (row < end)[:, None]
    column = channel0 + gl.arange(0, BI, layout=gl.SliceLayout(0, layout))[None, :]
    at = pair.to(gl.int64)[:, None] * inter + column
    byte = gl.convert_layout(code.reshape([N, BI]), layout).to(gl.uint8)
    gl.store(codes + at, byte, mask=live)
    split = act.reshape([N, BI // 32, 4, 2, 2, 2])  # row, group, t, h, b, a
    if HAS_BOXES:
        boxed_l: gl.constexpr = boxed_layout(N, layout)
        tile = split.permute([0, 1, 4, 5, 2, 3]).reshape([N, BI])
        own = first + gl.arange(0, N, layout=gl.SliceLayout(1, boxed_l))
        to = channel0 + gl.arange(0, BI, layout=gl.SliceLayout(0, boxed_l))
        gl.store(
            acts + own.to(gl.int64)[:, None] * inter + to[None, :],
            gl.convert_layout(tile, boxed_l, assert_trivial=True), mask=(own < end)[:, None],
        )  # fmt: skip
    else:
        tile = split.permute([0, 1, 2, 4, 5, 3]).reshape([N, BI])
        gl.store(acts + at, gl.convert_layout(tile, layout), mask=live)
    sf_l: gl.constexpr = exponent.type.layout
    n = first + gl.arange(0, N, layout=gl.SliceLayout(1, sf_l))
    g = channel0 // 32 + gl.arange(0, BI // 32, layout=gl.SliceLayout(0, sf_l))
    sf_at = gl.load(order + gl.minimum(n, end - 1)).to(gl.int64)[:, None] * (inter // 32)
    gl.store(sf + sf_at + g[None, :], exponent.to(gl.uint8), mask=(n < end)[:, None])


@gluon.jit
def store_rows(
    acc, first, end, channel0, order, slots, hidden,
    N: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """(64, N) sums of the second product to bf16 rows of ``slots``."""
    out_l: gl.constexpr = store_layout(ROWS, WARPS)
    row = first + gl.arange(0, N, layout=gl.SliceLayout(1, out_l))
    at = gl.load(order + gl.minimum(row, end - 1)).to(gl.int64)[:, None] * hidden
    at = at + channel0 + gl.arange(0, ROWS, layout=gl.SliceLayout(0, out_l))[None, :]
    y = gl.convert_layout(acc.to(gl.bfloat16).permute([1, 0]), out_l)
    gl.store(slots + at, y, mask=(row < end)[:, None])
