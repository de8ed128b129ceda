"""vLLM's remap of logical to physical experts, from one file of vLLM or of its wheel."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any, Final

import torch

from megamoe.kernels.registry import kernel
from megamoe.kernels.source import Source, execute
from megamoe.kernels.vllm_staging import contracts_of, is_interpreted, triton_stands

FACTS: Final = kernel("vllm-eplb")
FILE: Final = "vllm/*/router/base_router.py"
PADDED: Final = "num_unpadded_tokens"


class VllmEplb:
    """``eplb_map_to_physical_and_record`` of vLLM as a backend's ``eplb_map``."""

    name = FACTS.name
    accumulator = FACTS.accumulator

    def __init__(self) -> None:
        self.source = Source.of(FACTS.needs[0])
        self.file = self.source.only(FILE)
        platform = SimpleNamespace(
            is_cuda_alike=lambda: True, is_cuda=lambda: True, is_xpu=lambda: False
        )
        stands: dict[str, dict[str, Any]] = triton_stands() | {
            "vllm.platforms": {"current_platform": platform}
        }
        path = self.source.folder(self.file) / self.file
        module = execute(path, "megamoe_foreign_vllm_eplb", stands, ("vllm",))
        self._map = module.eplb_map_to_physical_and_record
        self.contracts = contracts_of(PADDED in inspect.signature(self._map).parameters)

    def eplb_map(
        self, topk_ids: torch.Tensor, expert_load_view: torch.Tensor,
        logical_to_physical_map: torch.Tensor, logical_replica_count: torch.Tensor,
        record_enabled: torch.Tensor, *unpadded: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Physical ids of ``topk_ids`` (T, K); adds to ``expert_load_view`` in place."""
        more = dict(zip((PADDED,), unpadded, strict=False))
        physical: torch.Tensor = self._map(
            topk_ids=topk_ids, expert_load_view=expert_load_view,
            logical_to_physical_map=logical_to_physical_map,
            logical_replica_count=logical_replica_count, record_enabled=record_enabled, **more,
        )  # fmt: skip
        return physical

    def fingerprint(self) -> dict[str, Any]:
        """The digest of vLLM's file, its version, and whether Triton's interpreter runs it."""
        options = f"{self.source}, Triton's interpreter" if is_interpreted() else str(self.source)
        return self.source.fingerprint(self.file) | {"options": options}


def create(device: str | torch.device = "cuda") -> VllmEplb:
    """The backend; ``NotImplementedError`` of one line where vLLM is missing or another."""
    del device
    if not torch.cuda.is_available() and not is_interpreted():
        raise NotImplementedError(
            "vLLM's remap needs an NVIDIA GPU; without one, TRITON_INTERPRET=1 runs it on a CPU"
        )
    return VllmEplb()
