"""The activation between the two products, as the newer face of the module takes it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megamoe.layer.checks import is_number


@dataclass(frozen=True)
class MegaMoEActivation:
    """The activation between the two products, with vLLM 0.33's arguments.

    ``swiglu``: ``g * sigmoid(alpha * g) * (u + beta)``, g and u bounded by ``clamp`` where there
    is one. ``situ``: alpha and beta are its two scales, and it takes no clamp.
    """

    name: str = "swiglu"
    clamp: float | None = None
    alpha: float = 1.0
    beta: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in ("swiglu", "situ"):
            raise ValueError(f"Unsupported MegaMoE activation {self.name!r}.")
        scales = self.alpha, self.beta
        if not all(is_number(scale) and math.isfinite(scale) for scale in scales):
            raise ValueError(f"MegaMoE activation scales must be finite: {self}.")
        if self.clamp is not None and not (is_number(self.clamp) and self.clamp >= 0):  # NaN is not
            raise ValueError(f"MegaMoE activation clamp must be >= 0: {self}.")
        if self.name == "situ" and (self.clamp is not None or self.alpha <= 0 or self.beta < 0):
            raise ValueError(
                "SiTU takes no clamp, a positive alpha and a non-negative beta; got "
                f"{self}."
            )  # fmt: skip
