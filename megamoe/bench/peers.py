"""Other implementations of the same work, timed beside this project's if they are installed.

Each factory returns the step to time. An exception becomes a row with its message: a peer is never
silently absent.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from megamoe.bench.floor import Share
from megamoe.kernels.around import per_row
from megamoe.kernels.humming import launch

Step = Callable[[], object]


def sgl_deep_gemm(share: Share, hidden: torch.Tensor, ids: torch.Tensor, w: torch.Tensor) -> Step:
    """Whole forward of ``sgl-deep-gemm`` on SM90: FP8 weights, a scale per 128 by 128."""
    dist: Any = importlib.import_module("torch.distributed")
    deep_gemm: Any = importlib.import_module("deep_gemm")
    if not dist.is_initialized():
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    h, i, e = share.hidden, share.intermediate, share.experts

    def weight(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.randint(0, 0x78, (e, n, k), dtype=torch.uint8, device="cuda")
        scale = torch.full((e, n // 128, k // 128), 2.0**-7, device="cuda")
        return codes.view(torch.float8_e4m3fn), scale

    one, two = deep_gemm.transform_weights_for_mega_moe_sm90(weight(2 * i, h), weight(h, i))
    tokens = hidden.shape[0]
    buffer = deep_gemm.get_symm_buffer_for_mega_moe(
        dist.group.WORLD, e, max(tokens, 1), share.top_k, h, i
    )
    stats = torch.zeros(e, dtype=torch.int32, device="cuda")
    y = torch.empty_like(hidden)
    ids32 = ids.to(torch.int32)

    def step() -> None:
        deep_gemm.mega_moe_pre_dispatch_sm90(
            hidden, ids32, w, buffer.x, buffer.x_sf, buffer.topk_idx, buffer.topk_weights, tokens
        )
        deep_gemm.fp8_mega_moe(y, one, two, buffer, stats, activation_clamp=10.0)

    return step


def grouped_mm(share: Share, hidden: torch.Tensor, ids: torch.Tensor, w: torch.Tensor) -> Step:
    """The two products alone, in bf16, by ``torch._grouped_mm``; rows are sorted beforehand."""
    del w
    h, i, e = share.hidden, share.intermediate, share.experts
    one = torch.randn(e, 2 * i, h, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
    two = torch.randn(e, h, i, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
    order = ids.flatten().argsort()
    rows = hidden[order // share.top_k].contiguous()
    ends = torch.bincount(ids.flatten(), minlength=e).cumsum(0).to(torch.int32)
    acts = torch.randn(rows.shape[0], i, dtype=torch.bfloat16, device="cuda")

    def step() -> None:
        torch._grouped_mm(rows, one, offs=ends)
        torch._grouped_mm(acts, two, offs=ends)

    return step


def humming(share: Share, hidden: torch.Tensor, ids: torch.Tensor, w: torch.Tensor) -> Step:
    """The two products alone, by the indexed GEMM of ``humming-kernels``: E4M3 rows, a scale each.

    It gathers and scatters rows itself; rows are quantised and its routing is made beforehand. It
    compiles on the way: NVRTC's libraries must be on ``LD_LIBRARY_PATH``, or ``HUMMING_COMPILER``
    be ``nvcc``. Its result for 64 tokens differed from run to run (Stream-K), seen on one H100.
    """
    del w
    h, i, e = share.hidden, share.intermediate, share.experts

    def weight(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.randint(0, 256, (e, n, k // 2), dtype=torch.uint8, device="cuda")
        return codes, torch.randint(116, 121, (e, n, k // 32), dtype=torch.uint8, device="cuda")

    acts = torch.randn(ids.numel(), i, dtype=torch.bfloat16, device="cuda")
    one = launch(*weight(2 * i, h), *per_row(hidden), ids, share.top_k)
    two = launch(*weight(h, i), *per_row(acts), ids, 1)

    def step() -> None:
        one()
        two()

    return step


PEERS: dict[str, tuple[str, Callable[..., Step]]] = {
    "sgl-deep-gemm": ("whole forward, FP8 weights, a scale per 128", sgl_deep_gemm),
    "torch-grouped-mm": ("two products only, bf16 weights", grouped_mm),
    "humming-kernels": ("two products only, MXFP4 weights", humming),
}
"""Name -> the work that is timed, and its factory."""
