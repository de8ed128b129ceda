"""``torch._grouped_mm`` for both products, in bfloat16; all else is this project's."""

from __future__ import annotations

from typing import Any, Final

import torch

from megamoe.kernels import around
from megamoe.kernels.registry import kernel
from megamoe.spec.problem import Problem

FACTS: Final = kernel("torch-grouped-mm")


class TorchGroupedMm:
    """Both products by ``torch._grouped_mm``; on a CPU torch has other code for it."""

    name = FACTS.name
    accumulator = FACTS.accumulator
    contracts = FACTS.contracts
    features = FACTS.features

    def forward(self, problem: Problem) -> torch.Tensor:
        """``y`` (T, H) bfloat16."""
        p = problem
        around.plain_swiglu_only(p)
        routes = around.Routes.of(p.topk_ids, p.num_experts)
        one = around.decoded(p.w13_weight, p.w13_weight_scale)
        two = around.decoded(p.w2_weight, p.w2_weight_scale)

        def product(weight: torch.Tensor) -> around.Product:
            # (E, N, K) becomes (E, K, N) by its strides: torch wants K to be contiguous.
            return lambda rows: torch._grouped_mm(rows, weight.transpose(1, 2), offs=routes.ends)

        return around.forward(p, routes, product(one), product(two))

    def fingerprint(self) -> dict[str, Any]:
        """torch's version."""
        return {"sources": f"torch {torch.__version__}", "options": "", "binaries": {}}


def create(device: str | torch.device = "cuda") -> TorchGroupedMm:
    """The backend; ``NotImplementedError`` where torch has no such function."""
    del device
    if not hasattr(torch, "_grouped_mm"):
        raise NotImplementedError(f"torch {torch.__version__} has no _grouped_mm; it came with 2.8")
    return TorchGroupedMm()
