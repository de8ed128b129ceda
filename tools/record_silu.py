"""Record silu of every bfloat16 gate as a GPU computes it: the one step that is not IEEE.

    python tools/record_silu.py FILE.npz

Needs a CUDA GPU, CuPy with nvcc, and Triton. Four tables of 65,536 fp32 words, by the bits of the
gate: ``fast`` (``__expf`` and ``rcp.approx.ftz``) and ``precise`` (``expf`` and IEEE division) in
CUDA C++, as DeepGEMM's kernels write them, and ``triton_fast`` and ``triton_precise`` of this
project's own epilogue. ``provenance`` is JSON. Prints how many words differ from the oracle's
reference, and between the two ways.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megamoe.backends.triton.kernels.epilogue import _silu_fast, _silu_precise
from megamoe.oracle.gates import silu_table
from megamoe.spec.formats import bf16_decode

SOURCE = r"""
extern "C" __global__ void silu(const float* gate, float* fast, float* precise, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float g = gate[i], r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(__fadd_rn(1.0f, __expf(-g))));
    fast[i] = __fmul_rn(g, r);
    precise[i] = __fdiv_rn(g, __fadd_rn(1.0f, expf(-g)));
}
"""


def by_cuda(gates: np.ndarray) -> dict[str, np.ndarray]:
    """Tables of the intrinsics."""
    import cupy

    kernel = cupy.RawKernel(SOURCE, "silu", options=("--std=c++17",), backend="nvcc")
    fast, precise = (cupy.empty(gates.size, cupy.float32) for _ in range(2))
    kernel((256,), (256,), (cupy.asarray(gates), fast, precise, np.int32(gates.size)))
    return {"fast": cupy.asnumpy(fast), "precise": cupy.asnumpy(precise)}


@gluon.jit
def _kernel(gates, fast, precise):  # type: ignore[no-untyped-def]
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    at = gl.program_id(0) * 128 + gl.arange(0, 128, layout=layout)
    gate = gl.load(gates + at)
    gl.store(fast + at, _silu_fast(gate))
    gl.store(precise + at, _silu_precise(gate))


def by_triton(gates: np.ndarray) -> dict[str, np.ndarray]:
    """Tables of this project's epilogue."""
    import torch

    device_gates = torch.from_numpy(gates).cuda()
    fast, precise = torch.empty_like(device_gates), torch.empty_like(device_gates)
    _kernel[(gates.size // 128,)](device_gates, fast, precise, num_warps=4)
    return {"triton_fast": fast.cpu().numpy(), "triton_precise": precise.cpu().numpy()}


def main() -> int:
    """The command line."""
    import cupy
    import torch
    import triton

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    gates = bf16_decode(np.arange(1 << 16, dtype=np.uint16))
    tables = by_cuda(gates) | by_triton(gates)
    device = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    provenance = {
        "device": device, "cupy": cupy.__version__,
        "cuda": cupy.cuda.runtime.runtimeGetVersion(), "torch": torch.__version__,
        "triton": triton.__version__,
    }  # fmt: skip
    arrays: dict[str, Any] = {"provenance": json.dumps(provenance), **tables}
    np.savez_compressed(args.file, **arrays)
    finite = np.isfinite(gates)
    reference = silu_table("g/d")
    print(provenance)
    for name, table in tables.items():
        other = (table.view(np.uint32) != reference.view(np.uint32)) & finite
        print(f"{name}: {int(other.sum())} of {int(finite.sum())} words are not the reference's")
    for mode in ("fast", "precise"):
        other = tables[mode].view(np.uint32) != tables[f"triton_{mode}"].view(np.uint32)
        print(f"{mode}: {int((other & finite).sum())} words differ between CUDA C++ and Triton")
    return 0


if __name__ == "__main__":
    sys.exit(main())
