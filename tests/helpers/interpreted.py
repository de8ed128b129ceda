"""The Triton kernels of staging and remap as a backend, for Triton's interpreter on a CPU."""

from __future__ import annotations

from typing import Any

from megamoe.backends.triton import eplb, staging


class Interpreted:
    """Run under TRITON_INTERPRET=1, set before Triton is imported."""

    name = "triton-interpreted"
    accumulator = "fp32-ordered"
    contracts = ("2026-06",)

    def prepare(self, *arguments: Any) -> None:
        """Staging, in place."""
        staging.prepare_megamoe_inputs(*arguments)

    def eplb_map(self, *arguments: Any) -> Any:
        """Remap and record."""
        return eplb.eplb_map_to_physical_and_record(*arguments)
