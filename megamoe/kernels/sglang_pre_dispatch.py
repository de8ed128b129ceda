"""SGLang's pre-dispatch for SM100 as staging.

SGLang compiles it with nvcc when it is first called. Its module is executed without the rest of
SGLang, whose import needs the whole engine: only the modules that compile are real.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch

from megamoe.kernels.here import require
from megamoe.kernels.registry import kernel
from megamoe.kernels.source import Source, standing_in

FACTS: Final = kernel("sglang-pre-dispatch")
MODULE: Final = "sglang/kernels/ops/moe/dsv4.py"
FILES: Final = (MODULE, "sglang/kernels/jit/*", "sglang/srt/environ.py")
REAL: Final = ("sglang.kernels.jit", "sglang.kernels.ops.moe.dsv4", "sglang.srt.environ")
WORDS: Final = 4
"""Rows of scale factors begin at multiples of 16 bytes: four int32."""


class SglangPreDispatch:
    """``mega_moe_pre_dispatch`` of SGLang as a backend's ``prepare``."""

    name = FACTS.name
    accumulator = FACTS.accumulator
    contracts = FACTS.contracts

    def __init__(self, function: Any = None) -> None:
        self.source: Source | None = None
        if function is None:
            self.source = Source.of(FACTS.needs[0])
            function = _load(self.source)
        self._dispatch = function

    def prepare(
        self, hidden_states: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor,
        x_fp8: torch.Tensor, x_sf: torch.Tensor, topk_idx_out: torch.Tensor,
        topk_weights_out: torch.Tensor,
    ) -> None:  # fmt: skip
        """Staging, in place.

        The kernel takes int32 ids and rows of scale factors at multiples of 16 bytes; the rows of
        the tokens are copied into ``x_sf`` afterwards. Rows of ids and weights beyond the tokens
        become -1 and 0 (:mod:`megamoe.spec.rest`).
        """
        rows, words = x_sf.shape
        tokens = len(hidden_states)
        wide = torch.empty(rows, -(-words // WORDS) * WORDS, dtype=torch.int32,
                           device=x_sf.device)[:, :words]  # fmt: skip
        codes = x_fp8.view(torch.float8_e4m3fn) if x_fp8.dtype == torch.uint8 else x_fp8
        self._dispatch(
            hidden_states, topk_ids.to(torch.int32), topk_weights, codes, wide, topk_idx_out,
            topk_weights_out, quant_group_size=32,
        )  # fmt: skip
        x_sf[:tokens].copy_(wide[:tokens])

    def fingerprint(self) -> dict[str, Any] | None:
        """The digest of the CUDA source, and SGLang's version."""
        if self.source is None:
            return None
        return self.source.fingerprint(self.source.only("sglang/*/mega_moe_pre_dispatch.cuh"))


def _load(source: Source) -> Any:
    source.only(MODULE)
    root = source.folder(*FILES)

    def real(name: str) -> Path | None:
        if not any(name == one or name.startswith(f"{one}.") for one in REAL):
            return None
        base = root.joinpath(*name.split("."))
        package = base / "__init__.py"
        return package if package.is_file() else base.with_suffix(".py")

    stands: dict[str, dict[str, Any]] = {
        "sglang.srt.utils.common": {
            "is_cuda": torch.cuda.is_available,
            "get_cuda_version": _cuda_version,
        },
    }
    modules: dict[str, ModuleType] = {}
    with standing_in(stands, ("sglang",), real, modules):
        function = importlib.import_module("sglang.kernels.ops.moe.dsv4").mega_moe_pre_dispatch

    def call(*args: Any, **kwargs: Any) -> None:
        # The compiler is started by the first call, and imports more of SGLang by then.
        with standing_in(stands, ("sglang",), real, modules):
            function(*args, **kwargs)

    return call


def _cuda_version() -> tuple[int, int]:
    major, _, minor = str(torch.version.cuda or "0.0").partition(".")
    return int(major), int(minor)


def create(device: str | torch.device = "cuda") -> SglangPreDispatch:
    """The backend; ``NotImplementedError`` of one line where a package or the GPU is missing."""
    del device
    require(FACTS)
    return SglangPreDispatch()
