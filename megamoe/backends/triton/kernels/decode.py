"""Packed weights to the operand A of the tensor cores, in registers (Gluon).

``wgmma`` and ``mma.sync`` take operand A alike: of every 32 of the contraction a thread holds, with
``t`` its place among four lanes, positions ``16 b + 8 a + 2 t + h`` (a, b, h in 0, 1). Of a
checkpoint's row it decodes eight adjacent nibbles, which are elements ``8 t + 4 h + 2 b + a``.
The operand B is put in the same order (:mod:`.dispatch`), so no nibble has to change threads. A
sum over 32 takes the same 32 terms either way, and blocks of 32 ascend: the class
``fp32-ordered``.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from megamoe.backends.triton.kernels.layouts import ROWS

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
def decoded(packed, words, layout: gl.constexpr, operand: gl.constexpr, WIDE: gl.constexpr):
    """(64, 32) int16 of nibbles and (64,) int32 of four scale bytes to (64, 128) bf16."""
    group = gl.arange(0, 32, layout=gl.SliceLayout(0, layout)) // 2 % 4
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
        selector = 0x4040 + group * 0x0101
        o0, o1, o2, o3 = gl.inline_asm_elementwise(
            _NARROW_ASM,
            "=&r,=&r,=&r,=&r,r,r,r,r,r",
            [packed, words[:, None], selector[None, :]],
            dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16),
            is_pure=True,
            pack=2,
        )
    both = gl.join(gl.join(o0, o2), gl.join(o1, o3))  # (..., b, a)
    split = both.reshape([ROWS, 4, 4, 2, 2, 2])  # row, t, group, h, b, a
    tile = split.permute([0, 2, 4, 5, 1, 3]).reshape([ROWS, 128])
    return gl.convert_layout(tile, operand, assert_trivial=True)
