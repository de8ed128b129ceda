"""The sizes that users run: one row a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Model:
    """One row of the shape table: the sizes of a model that users run."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    routed_scaling: float
    clamp: float | None
    evidence: str

    def local_experts(self, ep_size: int) -> int:
        """Experts of one rank; ``ValueError`` where the ranks do not divide them."""
        if ep_size < 1 or self.num_experts % ep_size:
            raise ValueError(
                f"{self.name}: {self.num_experts} experts do not divide over {ep_size} ranks"
            )
        return self.num_experts // ep_size


_PUBLICATION = "model configuration as published"
MODELS: Final = {
    m.name: m
    for m in (
        Model("deepseek-v4-flash", 4096, 2048, 256, 6, 1.5, 10.0, _PUBLICATION),
        Model("deepseek-v4-pro", 7168, 3072, 384, 6, 2.5, 10.0, _PUBLICATION),
        Model(
            "deepseek-v4.1-flash", 5120, 2304, 384, 6, 1.5, 10.0,
            "H and I as published; experts, top-k, scaling and clamp are not known: assumed",
        ),
        Model("kimi-k3", 3584, 3072, 896, 16, 1.0, 10.0,
              "shape as published; scaling and clamp assumed"),
        Model("deepseek-v3", 7168, 2048, 256, 8, 2.5, None,
              "shape and scaling as published; V3 has no clamp"),
    )
}  # fmt: skip
