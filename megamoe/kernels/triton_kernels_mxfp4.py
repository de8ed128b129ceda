"""triton_kernels' ``matmul_ogs`` for both products, as vLLM vendors it.

The package imports itself by the name ``triton_kernels``, so the folder that holds it joins the
import path, at the front: the package of that name of the package index is another project.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any, Final

import torch

from megamoe.kernels import around
from megamoe.kernels.here import require
from megamoe.kernels.registry import kernel
from megamoe.kernels.source import Source
from megamoe.spec.problem import Problem

FACTS: Final = kernel("triton-kernels-mxfp4")
FOLDER: Final = "vllm/third_party"
FILES: Final = f"{FOLDER}/triton_kernels/*.py"
NARROW: Final = 128
MAIN: Final = f"{FOLDER}/triton_kernels/matmul_ogs.py"


class TritonKernelsMxfp4:
    """Both products by ``matmul_ogs``: bfloat16 rows, MXFP4 weights."""

    name = FACTS.name
    accumulator = FACTS.accumulator
    contracts = FACTS.contracts
    features = FACTS.features

    def __init__(self) -> None:
        self.source = Source.of(FACTS.needs[0])
        self.source.only(MAIN)
        folder = self.source.folder(FILES) / FOLDER
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
        self._ogs: Any = importlib.import_module("triton_kernels.matmul_ogs")
        self._routing: Any = importlib.import_module("triton_kernels.routing")
        self._tensor: Any = importlib.import_module("triton_kernels.tensor")
        self._layout: Any = importlib.import_module("triton_kernels.tensor_details.layout")
        flags: Any = importlib.import_module("triton_kernels.matmul_ogs_details.opt_flags")
        flags.update_opt_flags_constraints({"split_k": 1})

    def forward(self, problem: Problem) -> torch.Tensor:
        """``y`` (T, H) bfloat16."""
        p = problem
        around.plain_swiglu_only(p)
        routes = around.Routes.of(p.topk_ids, p.num_experts)
        table = self.table(routes.expert, p.num_experts)

        def product(weight: torch.Tensor, scale: torch.Tensor) -> around.Product:
            w, w_scale = self.packed(weight, scale)
            config = self._ogs.PrecisionConfig(weight_scale=w_scale, out_dtype=torch.bfloat16)
            return lambda rows: self._ogs.matmul_ogs(rows, w, None, table, precision_config=config)

        first = product(p.w13_weight, p.w13_weight_scale)
        second = product(p.w2_weight, p.w2_weight_scale)
        return around.forward(p, routes, first, second)

    def table(self, expert: torch.Tensor, experts: int) -> Any:
        """The library's table for rows (N,) that are sorted by expert already: no gather."""
        hist = torch.bincount(expert, minlength=experts).to(torch.int32)
        data = self._routing.compute_expt_data_torch(hist, experts, len(expert))
        return self._routing.RoutingData(None, hist, experts, 1, data)

    def packed(self, weight: torch.Tensor, scale: torch.Tensor) -> tuple[Any, Any]:
        """``(E, N, K/2)`` and ``(E, N, K/32)`` bytes in the library's layout for this GPU.

        Its matrices are (E, K, N), with K contiguous: a transposed view, then its own conversion.
        """
        values, value_options = self._layout.make_default_matmul_mxfp4_w_layout(mx_axis=1)
        scales, scale_options = self._layout.make_default_matmul_mxfp4_w_scale_layout(
            mx_axis=1, num_warps=warps(weight.shape[1])
        )
        wrap, convert = self._tensor.wrap_torch_tensor, self._tensor.convert_layout
        w = convert(wrap(weight.transpose(1, 2), self._tensor.FP4), values, **value_options)
        return w, convert(wrap(scale.transpose(1, 2)), scales, **scale_options)

    def fingerprint(self) -> dict[str, Any]:
        """The digest of ``matmul_ogs.py``, and vLLM's version."""
        return self.source.fingerprint(MAIN)


def warps(columns: int) -> int:
    """Warps of a block, as the layout of the scales has them: 8 as vLLM does, 4 for a matrix of at
    most 128 columns.

    The kernel's block then has 128 columns, and its layout for 8 warps asks for 256: the assertion
    ``BLOCK_N % (2 * n_warps * 2 * 8) == 0`` ends the compilation.
    """
    return 8 if columns > NARROW else 4


def create(device: str | torch.device = "cuda") -> TritonKernelsMxfp4:
    """The backend; ``NotImplementedError`` of one line where vLLM or the GPU is missing."""
    del device
    require(FACTS)
    return TritonKernelsMxfp4()
