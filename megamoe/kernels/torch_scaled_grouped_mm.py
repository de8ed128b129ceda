"""``torch._scaled_grouped_mm`` for both products, in E4M3; all else is this project's."""

from __future__ import annotations

import os
from typing import Any, Final

import torch

from megamoe.kernels import around
from megamoe.kernels.here import require
from megamoe.kernels.registry import kernel
from megamoe.spec.problem import Problem

FACTS: Final = kernel("torch-scaled-grouped-mm")
FAST_ACCUM: Final = "MEGAMOE_TORCH_FAST_ACCUM"
"""1 in the environment: the sum stays in the tensor core; else it is promoted every 128 of K."""


class TorchScaledGroupedMm:
    """Both products by ``torch._scaled_grouped_mm``: E4M3 rows with one scale each, and weights
    whose powers of two are folded into E4M3, with one factor an expert."""

    name = FACTS.name
    accumulator = FACTS.accumulator
    contracts = FACTS.contracts
    features = FACTS.features

    def __init__(self, *, use_fast_accum: bool = False) -> None:
        self.use_fast_accum = use_fast_accum

    def forward(self, problem: Problem) -> torch.Tensor:
        """``y`` (T, H) bfloat16."""
        p = problem
        around.plain_swiglu_only(p)
        routes = around.Routes.of(p.topk_ids, p.num_experts)

        def product(packed: torch.Tensor, scale: torch.Tensor) -> around.Product:
            weight, factor = around.folded(packed, scale)
            of_column = torch.ones_like(factor)[:, None].repeat(1, weight.shape[1])

            def step(rows: torch.Tensor) -> torch.Tensor:
                codes, of_row = around.per_row(rows)
                # The expert's power of two goes into the row's scale, as humming has it: in a
                # factor of the columns it would come after a product that may overflow.
                of_row = of_row[:, 0] * factor[routes.expert]
                # (E, N, K) becomes (E, K, N) by its strides: torch wants K to be contiguous.
                return torch._scaled_grouped_mm(
                    codes, weight.transpose(1, 2), of_row, of_column, offs=routes.ends,
                    out_dtype=torch.bfloat16, use_fast_accum=self.use_fast_accum,
                )  # fmt: skip

            return step

        first = product(p.w13_weight, p.w13_weight_scale)
        second = product(p.w2_weight, p.w2_weight_scale)
        return around.forward(p, routes, first, second)

    def fingerprint(self) -> dict[str, Any]:
        """torch's version, and the variable if it is set."""
        options = f"{FAST_ACCUM}=1" if self.use_fast_accum else ""
        return {"sources": f"torch {torch.__version__}", "options": options, "binaries": {}}


def create(device: str | torch.device = "cuda") -> TorchScaledGroupedMm:
    """The backend; ``NotImplementedError`` of one line without torch's function or the GPU."""
    del device
    if not hasattr(torch, "_scaled_grouped_mm"):
        raise NotImplementedError(
            f"torch {torch.__version__} has no _scaled_grouped_mm; it came with 2.8"
        )
    require(FACTS)
    return TorchScaledGroupedMm(use_fast_accum=os.environ.get(FAST_ACCUM) == "1")
