"""Check on a GPU the few hardware facts on which the contract and the bounds depend.

Needs CuPy and a GPU of compute capability 8.9 or newer. Prints one line a fact, ``ok`` or
``DIFFERS``, and exits 1 if one differs. It checks:

- the E4M3 cast of every bfloat16, infinities and NaN included, against ``formats.e4m3_cast``;
- silu of every bfloat16 gate, in the fast and the precise form, against ``gates.silu_bounds``;
- min and max of bfloat16 pairs with NaN, against the clamp's rule.

Run: ``python tools/probe_gpu.py``
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megamoe.oracle.gates import silu_bounds, silu_table
from megamoe.spec.formats import bf16_decode, e4m3_cast

SOURCE = r"""
#include <cuda_bf16.h>
extern "C" __global__ void probe(const float* g, unsigned char* code, float* fast,
                                 float* precise, float* low, float* high, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float v = g[i];
    unsigned short pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(v));
    code[i] = pair & 0xFF;
    float d = __fadd_rn(1.0f, __expf(-v)), r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(d));
    fast[i] = __fmul_rn(v, r);
    precise[i] = __fdiv_rn(v, __fadd_rn(1.0f, expf(-v)));
    __nv_bfloat16 b = __float2bfloat16_rn(v), c = __float2bfloat16_rn(10.0f);
    low[i] = __bfloat162float(__hmin(b, c));
    high[i] = __bfloat162float(__hmin(__hmax(b, __hneg(c)), c));
}
"""


def main() -> int:
    """Print one line a fact; 0 if all hold."""
    import cupy

    kernel = cupy.RawKernel(SOURCE, "probe", options=("--std=c++17",), backend="nvcc")
    gates = bf16_decode(np.arange(65536, dtype=np.uint16))
    device_gates = cupy.asarray(gates)
    code = cupy.zeros(65536, cupy.uint8)
    out = [cupy.full(65536, 777.0, cupy.float32) for _ in range(4)]
    kernel((256,), (256,), (device_gates, code, *out, np.int32(65536)))
    fast, precise, low, high = (cupy.asnumpy(a) for a in out)
    finite = np.isfinite(gates)
    facts = {
        "e4m3 cast of every bfloat16": np.array_equal(cupy.asnumpy(code), e4m3_cast(gates)),
    }
    for name, actual, fast_math in (("fast", fast, True), ("precise", precise, False)):
        bound_low, bound_high = silu_bounds("fast" if fast_math else "g/d")
        inside = (actual >= bound_low) & (actual <= bound_high)
        table = silu_table("g/d")
        facts[f"{name} silu within its bounds, {int(finite.sum())} gates"] = inside[finite].all()
        same = float((actual == table)[finite].mean())
        print(f"      {name} silu: {same:.1%} of the gates give the oracle's reference bits")
    with np.errstate(invalid="ignore"):
        facts["gate clamp: min drops NaN"] = np.array_equal(low, np.fmin(gates, np.float32(10)))
        want = np.fmin(np.fmax(gates, np.float32(-10)), np.float32(10))
        facts["up clamp: max and min drop NaN"] = np.array_equal(high, want)
    device = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    print(
        f"{device}, CUDA runtime {cupy.cuda.runtime.runtimeGetVersion()}, CuPy {cupy.__version__}"
    )
    for fact, holds in facts.items():
        print(f"{'ok' if holds else 'DIFFERS':8}{fact}")
    return 0 if all(facts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
