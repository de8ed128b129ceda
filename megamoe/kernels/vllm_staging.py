"""vLLM's staging kernel, from one file of an installed vLLM or of its wheel."""

from __future__ import annotations

import inspect
import os
from types import ModuleType, SimpleNamespace
from typing import Any, Final

import torch

from megamoe.kernels.registry import kernel
from megamoe.kernels.source import Source, execute

FACTS: Final = kernel("vllm-staging")
FILE: Final = "vllm/*/prepare_megamoe.py"
"""Its folder moved between versions."""
LEADING: Final = ("hidden_states", "topk_weights", "topk_ids")
PADDED: Final = "is_padding"


def triton_stands() -> dict[str, dict[str, Any]]:
    """Stand-in for the module from which vLLM's files take Triton."""
    import triton
    import triton.language as tl

    return {"vllm.triton_utils": {"triton": triton, "tl": tl, "HAS_TRITON": True}}


def is_interpreted() -> bool:
    """Whether Triton interprets kernels in this process."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def contracts_of(knows_padding: bool) -> tuple[str, ...]:
    """The contracts of a file that takes the padding rows, or of an older one."""
    return ("2026-09", "2026-11") if knows_padding else ("2026-06",)


class VllmStaging:
    """``prepare_megamoe_inputs`` of vLLM as a backend's ``prepare``."""

    name = FACTS.name
    accumulator = FACTS.accumulator

    def __init__(self) -> None:
        self.source = Source.of(FACTS.needs[0])
        self.file = self.source.only(FILE)
        self.module = _load(self.source, self.file)
        function = self.module.prepare_megamoe_inputs
        parameters = tuple(inspect.signature(function).parameters)
        if parameters[:3] != LEADING:
            raise NotImplementedError(
                f"{self.source}: prepare_megamoe_inputs({', '.join(parameters)}) does not begin "
                f"with {', '.join(LEADING)}; the adapter knows other versions"
            )
        self.contracts = contracts_of(PADDED in parameters)

    def prepare(self, *tensors: torch.Tensor) -> None:
        """Staging, in place: ``(hidden_states, topk_weights, topk_ids, x_fp8, x_sf, topk_idx_out,
        topk_weights_out)`` and, from 2026-09 on, the mask of padding rows.

        ``x_fp8`` may come as bytes; the kernel stores E4M3 values, so it gets a view of that type.
        """
        codes = tensors[3]
        if codes.dtype in (torch.uint8, torch.int8):
            codes = codes.view(torch.float8_e4m3fn)
        self.module.prepare_megamoe_inputs(*tensors[:3], codes, *tensors[4:])

    def fingerprint(self) -> dict[str, Any]:
        """The digest of vLLM's file, and its version."""
        return self.source.fingerprint(self.file)


def _load(source: Source, file: str) -> ModuleType:
    """The file with stand-ins. Its default quantisation is E4M3 with a UE8M0 byte per 32."""
    scale = SimpleNamespace(
        dtype=torch.uint8, static=False,
        group_shape=SimpleNamespace(row=1, col=32, is_per_group=lambda: True),
    )  # fmt: skip
    quant = "vllm.model_executor.layers.quantization.utils.quant_utils"
    stands: dict[str, dict[str, Any]] = triton_stands() | {
        quant: {
            "FP8_DTYPE": torch.float8_e4m3fn,
            "kMxfp8Dynamic": SimpleNamespace(
                dtype=torch.float8_e4m3fn, symmetric=True, scale2=None, scale=scale
            ),
        }
    }
    path = source.folder(file) / file
    return execute(path, "megamoe_foreign_vllm_staging", stands, ("vllm",))


def create(device: str | torch.device = "cuda") -> VllmStaging:
    """The backend; ``NotImplementedError`` of one line where vLLM is missing or another."""
    del device
    if is_interpreted():
        raise NotImplementedError(
            "Triton's interpreter casts to E4M3 wrongly, so it cannot judge staging; unset "
            "TRITON_INTERPRET"
        )
    if not torch.cuda.is_available():
        raise NotImplementedError("vLLM's staging kernel needs an NVIDIA GPU")
    return VllmStaging()
