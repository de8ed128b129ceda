"""``fp8_mega_moe`` of sgl-deep-gemm: the whole forward on Hopper; it has run on an H200.

The package's weights are E4M3 with an fp32 scale per 128 x 128. A problem with MXFP4 weights is
refused: a block of 128 x 128 has 512 scale factors of MXFP4 and one of FP8, so no exact conversion
exists in general.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any, Final

import torch

from megamoe.kernels.here import require
from megamoe.kernels.registry import kernel
from megamoe.layer.ranks import one_rank
from megamoe.spec.problem import Problem

FACTS: Final = kernel("sgl-deep-gemm")
BLOCK: Final = 128
RECIPE: Final = (128, 128, 128)
HIDDEN: Final = 512
INTERMEDIATE: Final = 256
"""H and I are multiples of these: a row of fp32 scales, one per 128 hidden states and one per 64
activations, must have a multiple of 16 bytes. The package asserts it (``layout/mega_moe.cuh``)."""
NEEDED: Final = (
    "fp8_mega_moe", "mega_moe_pre_dispatch_sm90", "get_symm_buffer_for_mega_moe",
    "transform_weights_for_mega_moe_sm90",
)  # fmt: skip
STATS: Final = "cumulative_local_expert_recv_stats"


class SglDeepGemm:
    """The package's pre-dispatch and forward as a backend's ``forward``."""

    name = FACTS.name
    accumulator = FACTS.accumulator
    contracts = FACTS.contracts
    features = FACTS.features

    def __init__(self, device: str | torch.device = "cuda", package: Any = None) -> None:
        self.device = torch.device(device)
        self.package = _package() if package is None else package
        self._buffers: dict[tuple[int, ...], Any] = {}

    def forward(self, problem: Problem) -> torch.Tensor:
        """``y`` (T, H) bfloat16.

        ``NotImplementedError`` for sizes that the kernel does not take and for weights of another
        format: nothing is written then.
        """
        p = problem
        one, two = block_weights(p)
        tokens, device = p.num_tokens, p.hidden_states.device
        if tokens == 0:
            return torch.empty_like(p.hidden_states)
        l1, l2 = self.package.transform_weights_for_mega_moe_sm90(one, two)
        buffer = self._buffer(p)
        self.package.mega_moe_pre_dispatch_sm90(
            p.hidden_states, p.topk_ids.to(torch.int32), p.topk_weights, buffer.x, buffer.x_sf,
            buffer.topk_idx, buffer.topk_weights, tokens,
        )  # fmt: skip
        y = torch.empty_like(p.hidden_states)
        # Without the counter the compiled function gets None, which 0.1.5 does not take.
        stats = torch.zeros(p.num_experts, dtype=torch.int32, device=device)
        self.package.fp8_mega_moe(
            y, l1, l2, buffer, cumulative_local_expert_recv_stats=stats, recipe=RECIPE,
            activation="swiglu", activation_clamp=p.activation_clamp, fast_math=p.fast_math,
        )  # fmt: skip
        return y

    def fingerprint(self) -> dict[str, Any]:
        """The package's version; its compiled code is part of it."""
        said = str(getattr(self.package, "__version__", "of unknown version"))
        return {"sources": said, "options": f"recipe {RECIPE}", "binaries": {}}

    def _buffer(self, p: Problem) -> Any:
        """A symmetric buffer on one rank; problems of the same sizes share one."""
        sizes = p.buffer_sizes
        key = (
            sizes.num_experts, max(sizes.max_num_tokens, 1), sizes.top_k, sizes.hidden_size,
            sizes.intermediate_size,
        )  # fmt: skip
        if key not in self._buffers:
            make = self.package.get_symm_buffer_for_mega_moe
            self._buffers[key] = make(one_rank(p.hidden_states.device), *key)
        return self._buffers[key]


Weight = tuple[torch.Tensor, torch.Tensor]


def block_weights(p: Problem) -> tuple[Weight, Weight]:
    """Both weights as the package takes them: E4M3 codes and fp32 scales of blocks of 128 x 128.

    ``(E, 2I, H)`` and ``(E, 2I/128, H/128)``, then ``(E, H, I)`` and ``(E, H/128, I/128)``.
    ``NotImplementedError`` for weights of another format or other sizes.
    """
    if p.weight_format != "fp8-block":
        raise NotImplementedError(
            f"fp8_mega_moe takes E4M3 weights with an fp32 scale per 128 x 128, not "
            f"{p.weight_format}; no conversion between the two is exact"
        )
    hidden, intermediate = p.w2_weight.shape[1:]
    if hidden % HIDDEN or intermediate % INTERMEDIATE:
        raise NotImplementedError(
            f"fp8_mega_moe takes H in multiples of {HIDDEN} and I in multiples of {INTERMEDIATE}, "
            f"not {hidden} and {intermediate}"
        )
    pairs = ((p.w13_weight, p.w13_weight_scale), (p.w2_weight, p.w2_weight_scale))
    for codes, scale in pairs:
        blocks = (codes.shape[0], *(size // BLOCK for size in codes.shape[1:]))
        if tuple(scale.shape) != blocks or scale.dtype != torch.float32:
            raise ValueError(
                f"scales {tuple(scale.shape)} {scale.dtype} for codes {tuple(codes.shape)}; give "
                f"float32 {blocks}"
            )
    (one, one_sf), (two, two_sf) = pairs
    return (one.view(torch.float8_e4m3fn), one_sf), (two.view(torch.float8_e4m3fn), two_sf)


def _package() -> Any:
    """The package ``deep_gemm``, of sgl-deep-gemm; ``NotImplementedError`` where it cannot run."""
    require(FACTS)
    package = importlib.import_module("deep_gemm")
    return suitable(package)


def suitable(package: Any) -> Any:
    """``package`` itself if it has every function; ``NotImplementedError`` of one line if not."""
    lacking = [name for name in NEEDED if not callable(getattr(package, name, None))]
    said = getattr(package, "__version__", "of unknown version")
    if lacking:
        raise NotImplementedError(
            f"deep_gemm {said} has no {', '.join(lacking)}; install sgl-deep-gemm==0.1.5"
        )
    if STATS not in inspect.signature(package.fp8_mega_moe).parameters:
        raise NotImplementedError(
            f"fp8_mega_moe of deep_gemm {said} takes no {STATS}; install sgl-deep-gemm==0.1.5"
        )
    return package


def create(device: str | torch.device = "cuda") -> SglDeepGemm:
    """The backend; ``NotImplementedError`` of one line where the package or the GPU is missing."""
    return SglDeepGemm(device)
