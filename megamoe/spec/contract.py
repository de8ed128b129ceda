"""The numerics contract as data: what each stage computes, and how that is known.

A contract has a revision. A kernel of another revision is not wrong, it is different, and is
judged under its own. Nothing in here is a tolerance: what freedom the hardware has is in
:mod:`megamoe.spec.accumulators`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Generic, TypeVar

T = TypeVar("T")

_DEEPGEMM = "DeepGEMM 54e2261, sm100_fp8_fp4_mega_moe.cuh"
_DEEPGEMM_MATH = "DeepGEMM 54e2261, common/math.cuh"
_VLLM_STAGING = "vLLM 0.24, deepseek_v4/nvidia/ops/prepare_megamoe.py"
_VLLM_ROUTER = "vLLM 0.24, fused_moe/router/base_router.py"


@dataclass(frozen=True)
class Clause(Generic[T]):
    """One value of the contract with its evidence: where it was read, or who measured it."""

    value: T
    evidence: str


@dataclass(frozen=True)
class Contract:
    """Everything that decides an output bit, apart from how sums are accumulated."""

    revision: str
    group_size: Clause[int]
    """Values along the contraction that share one UE8M0 scale factor."""
    size_multiple: Clause[int]
    """H and I are multiples of this."""
    replica_hash: Clause[int]
    """Replica of a logical expert for row t: ((t * hash) mod 2**32) mod max(count, 1)."""
    staging_amax_floor: Clause[float]
    """Lower bound of a group's amax before the division by 448."""
    staging_exponent_min: Clause[int]
    staging_exponent_max: Clause[int]
    """The staged UE8M0 byte is clamped to this range."""
    cast_saturates: Clause[bool]
    """E4M3 cast: to nearest even; beyond 448 saturates, infinities included; NaN is 0x7F."""
    amax_drops_nan: Clause[bool]
    """A group's amax ignores NaN members."""
    gate_up_order: Clause[str]
    """Rows of w13: 'gate-up' is [0, I) gate (w1), [I, 2I) up (w3)."""
    gate_clamped_below: Clause[bool]
    clamp_drops_nan: Clause[bool]
    """min and max of the clamp return their non-NaN operand, so NaN becomes a bound."""
    precise_silu: Clause[str]
    """fast_math off: 'g/d' or 'g*(1/d)' with d = fl(1 + expf(-g))."""
    weight_before_amax: Clause[bool]
    """The routing weight multiplies before the amax is taken."""
    requant_factor: Clause[str]
    """t = amax * fl32(1/448): a product with the rounded reciprocal."""
    requant_exponent_min: Clause[int]
    """Lowest UE8M0 byte of requantisation; 0 means no floor."""
    bf16_before_requant: Clause[bool]
    combine_order: Clause[str]
    """'ascending-slot': fp32 sum of the bf16 rows from 0, live slots in ascending order."""


MEGAMOE_2026_06: Final = Contract(
    revision="2026-06",
    group_size=Clause(32, f"{_DEEPGEMM}: kGranK"),
    size_multiple=Clause(128, f"{_VLLM_STAGING}: its own check and message"),
    replica_hash=Clause(2654435769, f"{_VLLM_ROUTER}: from vLLM 0.22 on; before, slot mod count"),
    staging_amax_floor=Clause(1e-4, f"{_VLLM_STAGING}; SGLang's own pre-dispatch has 1e-10"),
    staging_exponent_min=Clause(1, _VLLM_STAGING),
    staging_exponent_max=Clause(254, _VLLM_STAGING),
    cast_saturates=Clause(True, "PTX ISA, cvt.rn.satfinite.e4m3x2.f32: what both casts compile to"),
    amax_drops_nan=Clause(True, f"{_VLLM_STAGING}: the reduction's max; see docs/numerics.md"),
    gate_up_order=Clause("gate-up", "vLLM 0.24: weight_loader puts w1 in rows [0, I), w3 after"),
    gate_clamped_below=Clause(False, f"{_DEEPGEMM}: one __hmin2 for the gate, no __hmax2"),
    clamp_drops_nan=Clause(True, f"{_DEEPGEMM}: __hmin2 and __hmax2 return the number"),
    precise_silu=Clause("g/d", f"{_DEEPGEMM}; vLLM 0.27.1 and sgl-deep-gemm 0.2.5: g * (1/d)"),
    weight_before_amax=Clause(True, f"{_DEEPGEMM}: two products, then the amax of the result"),
    requant_factor=Clause("fl32(1/448)", f"{_DEEPGEMM_MATH}: get_e4m3_sf_and_sf_inv"),
    requant_exponent_min=Clause(0, f"{_DEEPGEMM_MATH}; from about 2026-09 a floor of 105"),
    bf16_before_requant=Clause(False, f"{_DEEPGEMM}: the fp32 activations are cast directly"),
    combine_order=Clause("ascending-slot", f"{_DEEPGEMM}: the combine's loop over top-k"),
)

REVISIONS: Final = {c.revision: c for c in (MEGAMOE_2026_06,)}
CURRENT: Final = MEGAMOE_2026_06


@dataclass(frozen=True)
class Model:
    """One row of the shape table: what users run."""

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


_PUBLISHED = "model configuration as published"
MODELS: Final = {
    m.name: m
    for m in (
        Model("deepseek-v4-flash", 4096, 2048, 256, 6, 1.5, 10.0, _PUBLISHED),
        Model("deepseek-v4-pro", 7168, 3072, 384, 6, 2.5, 10.0, _PUBLISHED),
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
