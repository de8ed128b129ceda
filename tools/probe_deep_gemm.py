"""The progress of a call of the ``deep_gemm`` backend in the real package without an SM100.

    PYTHONPATH=. python3 tools/probe_deep_gemm.py [--ranks N]

Needs an older NVIDIA GPU for each rank, nvcc, and the package. torch, and by a preloaded library
the CUDA runtime, report that the GPU has compute capability 10.0; Triton has asked before. So a
forward of the module goes all the way that it would go on one: process group, symmetric buffer,
staging, the checks that the package makes of its arguments. It ends where the driver is asked for a
tensor map of packed FP4, which Hopper does not have. Nothing is computed.

A line a step and rank; another exit status than 0 if a step differs. (All steps were as expected on
one and on two H100s, 2026-11-25, with sgl-deep-gemm 0.1.5.)
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SHIM = r"""
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <stdio.h>
#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
static int pretending;
extern "C" void pretend(int on) { pretending = on; }
extern "C" cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *prop, int device) {
    char name[32];
    snprintf(name, sizeof name, "libcudart.so.%d", CUDART_VERSION / 1000);
    void *runtime = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
    void *real = runtime ? dlsym(runtime, TEXT(cudaGetDeviceProperties)) : 0;
    if (!real) return cudaErrorUnknown;
    cudaError_t error = ((cudaError_t (*)(struct cudaDeviceProp *, int))real)(prop, device);
    if (!error && pretending) prop->major = 10, prop->minor = 0;
    return error;
}
"""
HIDDEN, INTER, EXPERTS, TOP_K, TOKENS = 1024, 512, 4, 3, 33
"""The sizes on one rank; each rank has EXPERTS experts."""


def main() -> int:
    """Build the library, start a process for each rank, and report the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=1)
    ranks = parser.parse_args().ranks
    if not torch.cuda.is_available() or torch.cuda.device_count() < ranks:
        print(f"this needs {ranks} NVIDIA GPUs, a rank each", file=sys.stderr)
        return 2
    if torch.cuda.get_device_capability()[0] == 10:
        print("this GPU is an SM100: run `megamoe check --backend deep_gemm`", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as work:
        source, shim = f"{work}/shim.cpp", f"{work}/shim.so"
        Path(source).write_text(SHIM)
        flags = ["-shared", "-Xcompiler", "-fPIC", "-cudart=none"]
        subprocess.run(["nvcc", *flags, "-o", shim, source, "-ldl"], check=True)
        environment = {**os.environ, "LD_PRELOAD": shim}
        started = [
            subprocess.Popen(
                [sys.executable, __file__],
                env={**environment, "PROBE": f"{rank} {ranks} {work}"},
            )
            for rank in range(ranks)
        ]
        return max(abs(process.wait()) for process in started)


def one(rank: int, ranks: int, work: Path) -> int:
    """One rank's forward; 0 if it came as far as the tensor maps."""
    import triton

    from megamoe.backends.deep_gemm import DeepGemmBackend
    from megamoe.layer.experts import DeepseekV4MegaMoEExperts
    from megamoe.layer.kernel_weights import transform_weights
    from megamoe.layer.staging import pack_sf
    from megamoe.spec.problem import Sizes

    def say(step: str, good: bool, text: object = "") -> bool:
        print(f"rank {rank}: {'ok' if good else 'DIFFERS':8} {step:28} {text}", flush=True)
        return good

    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    real = triton.runtime.driver.active.get_current_target()
    group = None
    if ranks > 1:
        store = dist.FileStore(str(work / "store"), ranks)  # type: ignore[attr-defined]
        dist.init_process_group("nccl", store=store, rank=rank, world_size=ranks, device_id=device)
        group = dist.group.WORLD
    ctypes.CDLL(os.environ["LD_PRELOAD"]).pretend(1)
    torch.cuda.get_device_capability = lambda device=None: (10, 0)
    good = True

    generator = torch.Generator().manual_seed(rank)
    backend = DeepGemmBackend(device=device)
    layer = DeepseekV4MegaMoEExperts(
        TOKENS, group=group, num_experts=EXPERTS * ranks, num_local_experts=EXPERTS,
        experts_start_idx=EXPERTS * rank, top_k=TOP_K, hidden_size=HIDDEN,
        intermediate_size=INTER, prefix="probe", backend=backend,
    )  # fmt: skip
    weights = [p.data for p in layer.parameters()]
    for w in weights:
        w.copy_(torch.randint(100, 130, w.shape, generator=generator, dtype=torch.uint8))
    layer.to(device)
    w13, s13, w2, s2 = (w.to(device) for w in weights)
    layer.finalize_weights(written=True)
    backend.stats = torch.zeros(EXPERTS, dtype=torch.int32, device=device)

    package = backend.package()
    say("package", True, f"{package.__name__} {getattr(package, '__version__', '?')}, {real}")

    def mn_major(scale: torch.Tensor) -> torch.Tensor:
        return pack_sf(scale).transpose(1, 2).contiguous().transpose(1, 2)

    (a, a_sf), (b, b_sf) = package.transform_weights_for_mega_moe(
        (w13.view(torch.int8), mn_major(s13)), (w2.view(torch.int8), mn_major(s2))
    )
    theirs = (a.view(torch.uint8), a_sf, b.view(torch.uint8), b_sf)
    pairs = list(zip(theirs, transform_weights(w13, s13, w2, s2), strict=True))
    same = all(torch.equal(x, y) and x.stride() == y.stride() for x, y in pairs)
    good &= say("weights as it makes them", same)

    try:
        sizes = Sizes(EXPERTS * ranks, TOKENS, TOP_K, HIDDEN, 256)
        backend.new_symm_buffer(group, device, sizes)
        good &= say("I = 256 is refused", False)
    except NotImplementedError as refused:
        say("I = 256 is refused", True, refused)
    buffer = layer.get_symm_buffer()
    rows = {n: getattr(buffer, n) for n in ("x", "x_sf", "topk_idx", "topk_weights")}
    shape = ", ".join(f"{n} {tuple(t.shape)} {str(t.dtype)[6:]}" for n, t in rows.items())
    say("symmetric buffer", True, f"{type(buffer.handle).__name__} over {ranks}: {shape}")

    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16()
    ids = torch.randint(-1, EXPERTS * ranks, (TOKENS, TOP_K), generator=generator)
    routing = torch.rand(TOKENS, TOP_K, generator=generator)
    error = ""
    try:
        layer(*(t.to(device) for t in (hidden, routing, ids)), activation_clamp=10.0)
    except Exception as raised:  # any exception of its C++ code is a result here
        error = " ".join(str(raised).split())
    good &= say("staged as the contract says", staged(rows, hidden, routing, ids))
    reached = "CUDA_ERROR_INVALID_VALUE" in error
    good &= say("ended at a tensor map", reached, error or "nothing was raised")
    if dist.is_initialized():
        dist.destroy_process_group()
    return int(not good)


def staged(rows: dict[str, Any], *given: torch.Tensor) -> bool:
    """Whether the first rows are the bits of the torch staging on a CPU."""
    from megamoe.layer.staging import prepare_megamoe_inputs

    hidden, routing, ids = given
    wanted = {n: torch.empty_like(t[:TOKENS], device="cpu") for n, t in rows.items()}
    prepare_megamoe_inputs(hidden, routing, ids, *wanted.values())
    return all(
        torch.equal(rows[n][:TOKENS].cpu().view(torch.uint8), t.view(torch.uint8))
        for n, t in wanted.items()
    )


if __name__ == "__main__":
    if "PROBE" in os.environ:
        number, count, folder = os.environ["PROBE"].split()
        sys.exit(one(int(number), int(count), Path(folder)))
    sys.exit(main())
