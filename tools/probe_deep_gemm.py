"""How far the real package goes where no SM100 is: its SM90 GEMMs, then our backend's call.

    PYTHONPATH=. python3 tools/probe_deep_gemm.py [--ranks N]

Needs an older NVIDIA GPU for each rank, nvcc, and the package. On a Hopper GPU the package's own
bfloat16 and FP8 GEMMs run first, beside sums in float64. Then whoever asks torch, or, by a
preloaded library, the CUDA runtime, is told that the GPU has compute capability 10.0; Triton has
asked before. So a forward of the module goes all the way that it would go on such a GPU: process
group, symmetric buffer, staging, the checks that the package makes of its arguments. It ends where
the driver is asked for a tensor map of packed FP4, which Hopper does not have. No part of the fused
kernel is computed.

Prints a line for each step and rank. The exit status is 0 if every step is as expected.
docs/toolchain.md says which packages it has run with.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import os
import subprocess
import sys
import tempfile
from functools import partial
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
"""Of one rank; EXPERTS on each."""
GEMM_ERROR = 2**-8
"""One rounding to bfloat16 of the largest output; a wrong order of data gives about 1."""


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
    own = 0
    if torch.cuda.get_device_capability() == (9, 0):  # the package asks what GPU it has only once
        alone = {**os.environ, "PROBE": ""}
        own = subprocess.run([sys.executable, __file__], env=alone, check=False).returncode
    with tempfile.TemporaryDirectory() as work:
        source, shim = f"{work}/shim.cpp", f"{work}/shim.so"
        Path(source).write_text(SHIM)
        flags = ["-shared", "-Xcompiler", "-fPIC", "-cudart=none"]
        subprocess.run(["nvcc", *flags, "-o", shim, source, "-ldl"], check=True)
        environment = {**os.environ, "LD_PRELOAD": shim}
        processes = [
            subprocess.Popen(
                [sys.executable, __file__],
                env={**environment, "PROBE": f"{rank} {ranks} {work}"},
            )
            for rank in range(ranks)
        ]
        return max(abs(own), *(abs(process.wait()) for process in processes))


def tell(who: str, step: str, good: bool, text: object = "") -> bool:
    """Print a step's line; whether it was as expected."""
    print(f"{who}: {'ok' if good else 'DIFFERS':8} {step:28} {text}", flush=True)
    return good


def gemms() -> int:
    """The package's own SM90 GEMMs; 0 if they are right."""
    package = importlib.import_module("deep_gemm")
    good = True
    for name, error in gemm_errors(package, torch.device("cuda", 0)).items():
        text = f"error {error:.5f} of the largest output"
        good &= tell("package", f"SM90 GEMM, {name}", error < GEMM_ERROR, text)
    return int(not good)


def one(rank: int, ranks: int, work: Path) -> int:
    """One rank's forward; 0 if it came as far as the tensor maps."""
    import triton

    from megamoe.backends.deep_gemm import DeepGemmBackend
    from megamoe.layer.experts import DeepseekV4MegaMoEExperts
    from megamoe.layer.kernel_weights import transform_weights
    from megamoe.layer.staging import pack_sf
    from megamoe.spec.problem import Sizes

    say = partial(tell, f"rank {rank}")
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
    layer.finalize_weights(without_loader=True)
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
    good &= say("staged as the contract says", is_staged(rows, hidden, routing, ids))
    is_invalid_value = "CUDA_ERROR_INVALID_VALUE" in error
    good &= say("ended at a tensor map", is_invalid_value, error or "nothing was raised")
    if dist.is_initialized():
        dist.destroy_process_group()
    return int(not good)


def gemm_errors(package: Any, device: torch.device) -> dict[str, float]:
    """The largest error of an SM90 GEMM by kind, relative to the largest output.

    (64, 7168) times (2112, 7168) transposed: bfloat16, and E4M3 with a float32 scale for each 128
    channels of a row and each 128 x 128 weights. The sums that they are compared with are float64.
    """
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(n, 7168, device=device, generator=generator).bfloat16() for n in (64, 2112))
    out = torch.empty(64, 2112, device=device, dtype=torch.bfloat16)

    def error(x: torch.Tensor, w: torch.Tensor) -> float:
        exact = x.double() @ w.double().T
        return float((out.double() - exact).abs().max() / exact.abs().max())

    package.bf16_gemm_nt(a, b, out)
    errors = {"bfloat16": error(a, b)}
    blocks = torch.nn.functional.pad(b.float(), (0, 0, 0, -2112 % 128)).view(-1, 128, 56, 128)
    a_sf = a.float().view(64, 56, 128).abs().amax(-1) / 448
    b_sf = blocks.abs().amax((1, 3)) / 448
    codes = (a.float().view(64, 56, 128) / a_sf[:, :, None]).view(64, 7168).to(torch.float8_e4m3fn)
    weight = (blocks / b_sf[:, None, :, None]).view(-1, 7168)[:2112].to(torch.float8_e4m3fn)
    package.fp8_gemm_nt((codes, a_sf), (weight, b_sf), out.zero_())
    x = codes.double() * a_sf.double().repeat_interleave(128, 1)
    w = weight.double() * b_sf.double().repeat_interleave(128, 0)[:2112].repeat_interleave(128, 1)
    errors["E4M3"] = error(x, w)
    return errors


def is_staged(rows: dict[str, Any], *inputs: torch.Tensor) -> bool:
    """Whether the first rows are the bits of the torch staging on a CPU."""
    from megamoe.layer.staging import prepare_megamoe_inputs

    hidden, routing, ids = inputs
    expected = {n: torch.empty_like(t[:TOKENS], device="cpu") for n, t in rows.items()}
    prepare_megamoe_inputs(hidden, routing, ids, *expected.values())
    return all(
        torch.equal(rows[n][:TOKENS].cpu().view(torch.uint8), t.view(torch.uint8))
        for n, t in expected.items()
    )


if __name__ == "__main__":
    if "PROBE" in os.environ:
        if not os.environ["PROBE"]:
            sys.exit(gemms())
        number, count, folder = os.environ["PROBE"].split()
        sys.exit(one(int(number), int(count), Path(folder)))
    sys.exit(main())
