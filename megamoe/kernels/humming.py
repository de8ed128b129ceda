"""The indexed product of humming-kernels for both products; it has run on an H200.

The library compiles on the way: NVRTC's libraries must be on ``LD_LIBRARY_PATH``, or
``HUMMING_COMPILER`` be ``nvcc``.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch

from megamoe.kernels import around
from megamoe.kernels.here import require
from megamoe.kernels.registry import kernel
from megamoe.spec.problem import Problem

FACTS: Final = kernel("humming")
COMPILER: Final = "HUMMING_COMPILER"


class Humming:
    """Both products by humming: E4M3 rows with one scale each, MXFP4 weights."""

    name = FACTS.name
    accumulator = FACTS.accumulator
    contracts = FACTS.contracts
    features = FACTS.features
    batch_invariant = FACTS.batch_invariant

    def forward(self, problem: Problem) -> torch.Tensor:
        """``y`` (T, H) bfloat16."""
        p = problem
        around.plain_swiglu_only(p)
        routes = around.Routes.of(p.topk_ids, p.num_experts)

        def product(weight: torch.Tensor, scale: torch.Tensor) -> around.Product:
            def step(rows: torch.Tensor) -> torch.Tensor:
                codes, of_row = around.per_row(rows)
                output: torch.Tensor = launch(
                    weight, scale, codes, of_row, routes.expert.unsqueeze(-1), 1, True
                )()
                return output

            return step

        first = product(p.w13_weight, p.w13_weight_scale)
        second = product(p.w2_weight, p.w2_weight_scale)
        return around.forward(p, routes, first, second)

    def fingerprint(self) -> dict[str, Any]:
        """The package's version, and the compiler where the environment names one."""
        compiler = os.environ.get(COMPILER, "")
        options = f"indexed, {COMPILER}={compiler}" if compiler else "indexed"
        return {"sources": FACTS.needs[0].installation(), "options": options, "binaries": {}}


def launch(
    weight: torch.Tensor, weight_scale: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor,
    ids: torch.Tensor, top_k: int, batch_invariant: bool = False,
) -> Callable[[], Any]:  # fmt: skip
    """One launch: for every slot ``s`` of ``ids``, row ``s // top_k`` by the expert of the slot.

    ``weight`` (E, N, K/2) and ``weight_scale`` (E, N, K/32) uint8, ``codes`` (R, K) E4M3, ``scale``
    (R, 1) float32, ``ids`` (R, top_k) int64 in ``[0, E)``. The call returns (slots, N) bfloat16.
    The library's heuristic chooses the kernel for this number of slots. Without
    ``batch_invariant`` it may split K over blocks, which add their bfloat16 results.
    """
    layers: Any = importlib.import_module("humming.layer")
    kernels: Any = importlib.import_module("humming.kernel.humming")
    tune: Any = importlib.import_module("humming.tune")
    routing: Any = importlib.import_module("humming.testing.data")
    ops: Any = importlib.import_module("humming.ops")
    experts, n, half = weight.shape
    with torch.device(weight.device):
        layer = layers.HummingLayer(
            n, 2 * half, {"quant_method": "mxfp4"}, {"dtype": "float8e4m3"},
            num_experts=experts, torch_dtype=torch.bfloat16,
        )  # fmt: skip
    layer.load_from_tensors({"weight": weight, "weight_scale": weight_scale})
    layer.transform()
    config, kind = layer.humming_config, "indexed"
    tuning = tune.get_heuristics_config(
        config, shape_m=ids.numel(), use_batch_invariant=batch_invariant, gemm_type=kind
    )
    configs = kernels.HummingKernel.prepare_kernels(config.to_str(), {"gemm_type": kind}, tuning)
    routed = routing.generate_moe_tensors(ids, experts, kind, tuning["block_shape"][0])
    outputs = torch.empty(ids.numel(), n, dtype=torch.bfloat16, device=weight.device)
    call = partial(
        ops.launch_kernel,
        configs=configs,
        inputs=codes,
        weight=layer.weight,
        weight_scale=layer.weight_scale,
        weight_scale_2=layer.weight_scale_2,
        input_scale=scale,
        outputs=outputs,
        sorted_ids=routed[2],
        expert_ids=routed[3],
        num_tokens_padded=routed[4],
        locks=layer.locks,
        top_k=top_k,
    )

    def step() -> torch.Tensor:
        call()
        return outputs

    return step


def create(device: str | torch.device = "cuda") -> Humming:
    """The backend; ``NotImplementedError`` of one line where the package or the GPU is missing."""
    del device
    require(FACTS)
    return Humming()
