"""Contracts of published kernels whose operands have other formats than MegaMoE's.

A *dialect* has the stages of the layer, and other operands: other weights, other scale factors,
other rounding points. Its cases are forward cases of its own format
(:data:`megamoe.spec.features.DIALECT_FORMATS`). It has no rule for anything else: no remap, no
staging into MegaMoE's buffer, no layout of weights.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final

from megamoe.spec.clauses import Clause, Contract
from megamoe.spec.features import dialect_fault

if TYPE_CHECKING:
    from megamoe.spec.problem import Problem  # which has torch: lists of cases go without


@dataclass(frozen=True)
class Dialect(Contract):
    """A contract with operands of its own. :attr:`clauses` has the clauses that it reads."""

    weights: Clause[str]
    """The format of the weights, as :data:`megamoe.spec.features.WEIGHT_FORMATS` has it. It is the
    one feature that each case of the dialect asks for."""
    activation_scale: Clause[str]
    """The rule from a group of hidden states to its fp32 scale and its codes. 'reciprocal':
    ``s = fl(max(amax, floor) / 448)``, ``r = fl(1 / s)``, codes of ``fl(x * r)``; 'quotient': the
    same scale, codes of ``fl(x / s)``."""
    activation_group: Clause[int]
    """Hidden states that share a scale."""
    token_scale_floor: Clause[float]
    """Lower bound of the fp32 scale of a row, ``fl(amax / 448)``. Rows of hidden states and of
    activations, each with one scale."""
    token_codes: Clause[str]
    """The codes of a row v with scale s: 'reciprocal', of ``fl(v * fl(1 / s))``, or 'quotient', of
    ``fl(v / s)``."""
    gate_up: Clause[str]
    """The type of gate and up between linear 1 and the clamp: 'fp32' or 'bf16'."""
    clamp_nan: Clause[str]
    """What the clamp makes of NaN: 'upper', the upper bound of gate and up; 'first', the bound that
    meets it first, which is the lower one of up."""
    silu_type: Clause[str]
    """The type of silu before up is multiplied: 'fp32' or 'bf16'. The product is rounded to
    bfloat16 in either case."""
    requant_group: Clause[int]
    """Activations that share a scale."""
    requant_amax_floor: Clause[float]
    """Lower bound of a group's amax before it becomes a scale."""
    routing_type: Clause[str]
    """The type of the routing weight where it is multiplied: 'fp32', as it is given, or 'bf16'."""

    @property
    def clauses(self) -> dict[str, Clause[Any]]:
        """The clauses that decide a bit of a forward of this format."""
        every = super().clauses
        return {name: every[name] for name in _ORDER if every[name] is not _NONE}

    def takes(self, features: Collection[str]) -> bool:
        """A call of the dialect's format, with no more features than it has."""
        return self.weights.value in features and super().takes(features)

    def knows(self, kind: str, features: Collection[str] = ()) -> bool:
        """Forward cases and laws of the layer."""
        return kind in ("forward", "property") and self.takes(features)


_ORDER: Final = (
    "features", "weights", "staging_amax_floor", "activation_scale", "activation_group",
    "token_scale_floor", "token_codes", "cast_saturates", "gate_up", "gate_up_order",
    "gate_clamped_below", "clamp_nan", "precise_silu", "silu_type", "routing_weight",
    "routing_type", "bf16_before_requant", "requant_group", "requant_scale",
    "requant_amax_floor", "combine_order",
)  # fmt: skip
"""In the order of computation."""
_NONE: Final[Any] = Clause(None, "no rule: a dialect does not have this stage or option")
"""The value of a field that is no clause of a dialect."""
_UNREAD: Final[dict[str, Any]] = {
    f.name: _NONE for f in fields(Dialect) if f.name not in ("revision", *_ORDER)
}
"""The fields of :class:`Contract` that speak of stages and options that no dialect has."""

# --- FP8 weights with a scale per 128 x 128: SGLang's kernel for Hopper -------------------------

_SM90 = "sgl-deep-gemm 0.1.5, sm90_fp8_mega_moe.cuh"
_PRE = "sgl-deep-gemm 0.1.5, sm90_mega_moe_pre_dispatch.cuh"

SGL_SM90: Final = Dialect(
    revision="sgl-sm90",
    features=Clause(("fp8-block",), f"{_SM90}: SwiGLU of routed experts with a clamp, no more"),
    weights=Clause("fp8-block", f"{_SM90}: kGranK 128; gate_sf, up_sf and l2_sf of 128 x 128"),
    staging_amax_floor=Clause(1e-10, f"{_PRE}: fmaxf(local_max, 1e-10f)"),
    activation_scale=Clause("reciprocal", f"{_PRE}: absmax / 448, 1 / raw_scale, then a product"),
    activation_group=Clause(128, f"{_PRE}: kGroupSize == 128"),
    cast_saturates=Clause(True, f"{_PRE}: __NV_SATFINITE; the constructor of __nv_fp8x2_e4m3 too"),
    gate_up=Clause("fp32", f"{_SM90}: final_accum goes into the clamp as it is"),
    gate_up_order=Clause("gate-up", f"{_SM90}: gate_n, and up_n = I/128 + gate_n"),
    gate_clamped_below=Clause(False, f"{_SM90}: clamp_gate has one cute::min"),
    clamp_nan=Clause("upper", f"{_SM90}: cute::min(x, bound) is t < u ? t : u, so NaN gives u"),
    precise_silu=Clause("g*(1/d)", f"{_SM90}: x * sig, sig = 1.0f / (1.0f + e)"),
    routing_weight=Clause("activation", f"{_SM90}: swiglu *= weight, and amax *= abs(weight)"),
    bf16_before_requant=Clause(False, f"{_SM90}: the fp32 activations are cast directly"),
    requant_group=Clause(64, f"{_SM90}: kL2ActsSFGranK"),
    requant_scale=Clause(
        "continuous", f"{_SM90}: sf = amax * fl(1/448), sf_inv = 1 / sf; sgl-project/DeepGEMM #63"
    ),
    requant_amax_floor=Clause(1e-10, f"{_SM90}: fmaxf(amax, 1e-10f)"),
    combine_order=Clause("ascending-slot", f"{_SM90}: __ffs of the mask of live slots"),
    token_scale_floor=_NONE, token_codes=_NONE, silu_type=_NONE, routing_type=_NONE, **_UNREAD,
)  # fmt: skip

_OLD = "sgl-deep-gemm 0.1.4, sm90_fp8_mega_moe.cuh"
SGL_SM90_0_1_4: Final = (
    SGL_SM90.carried(f"{_OLD}, which has no staging of its own: that of 0.1.5 is meant")
    .variant(
        "sgl-sm90-0.1.4", f"{_OLD}: fast_log2_ceil(amax * fl(1/448)), then powers of two",
        requant_scale="product",
    )
    .variant("sgl-sm90-0.1.4", f"{_OLD}: no floor", requant_amax_floor=0.0)
)  # fmt: skip

# --- MXFP4 weights beside bfloat16: FlashInfer's kernels for Hopper ------------------------------

_RUNNER = "flashinfer-ai/flashinfer fb28d72 (0.6.18), cutlass_fused_moe_kernels.cuh"

W4A16: Final = Dialect(
    revision="w4a16",
    features=Clause(("w4a16",), f"{_RUNNER}: SwiGLU of routed experts; other options: not read"),
    weights=Clause("w4a16", f"{_RUNNER}: use_wfp4a16, Fp4Type weights beside __nv_bfloat16"),
    gate_up=Clause(
        "bf16", f"{_RUNNER}: UnfusedGemmOutputType; also torch._grouped_mm, Marlin, and "
        "triton_kernels without a fused activation. With one, triton_kernels has fp32",
    ),
    gate_up_order=Clause(
        "gate-up", "megamoe's problem; FlashInfer takes up before gate: the caller swaps the halves"
    ),
    gate_clamped_below=Clause(False, f"{_RUNNER}: SwigluBiasAdaptor, one minimum for the gate"),
    clamp_nan=Clause("upper", f"{_RUNNER}: cutlass::minimum<float> is fminf, and comes first"),
    precise_silu=Clause(
        "g*(1/d)", f"{_RUNNER}: cutlass Sigmoid, then a product with the gate. FlashInfer compiles "
        "with -use_fast_math (jit/core.py), which makes it the fast form",
    ),
    silu_type=Clause(
        "fp32", f"{_RUNNER}: ComputeElem is float; vLLM's and SGLang's swiglu_limit_func is torch "
        "in bfloat16: it rounds silu too",
    ),
    routing_weight=Clause(
        "row", f"{_RUNNER}: thread_output + row_scale * expert_result of a bfloat16 row. "
        "triton_kernels (_matmul_ogs.py, gammas) has 'accumulator'",
    ),
    routing_type=Clause(
        "fp32", f"{_RUNNER}: float const* scales. vLLM rounds it to bfloat16 for Marlin "
        "(marlin_template.h) and for triton_kernels (make_routing_data)",
    ),
    combine_order=Clause("ascending-slot", f"{_RUNNER}: finalizeMoeRoutingKernel, k_idx"),
    staging_amax_floor=_NONE, activation_scale=_NONE, activation_group=_NONE, cast_saturates=_NONE,
    bf16_before_requant=_NONE, requant_group=_NONE, requant_scale=_NONE, requant_amax_floor=_NONE,
    token_scale_floor=_NONE, token_codes=_NONE, **_UNREAD,
)  # fmt: skip

# --- MXFP4 weights, E4M3 rows with one scale each: humming, as vLLM calls it ----------------------

_HUMMING = "humming-kernels 0.1.19"
_QUANTISE = f"{_HUMMING}, process_input/quantization.cuh"
_EXPERTS = "vllm-project/vllm 03063c0, fused_humming_moe.py"

W4A8_TOKEN: Final = Dialect(
    revision="w4a8-token",
    features=Clause(("w4a8-token",), f"{_EXPERTS}: SwiGLU of routed experts with a clamp"),
    weights=Clause("w4a8-token", f"{_HUMMING}, transform.py: E2M1 with a UE8M0 byte per 32"),
    token_scale_floor=Clause(1e-30, f"{_QUANTISE}: fmaxf(maximum / 448, 1e-30f)"),
    token_codes=Clause("reciprocal", f"{_QUANTISE}: 1.f / scale, then a product"),
    cast_saturates=Clause(True, f"{_QUANTISE}: cvt.rn.satfinite.e4m3x2.f32"),
    gate_up=Clause("bf16", f"{_EXPERTS}: gate_up_output has c_dtype, which is bfloat16"),
    gate_up_order=Clause("gate-up", f"{_EXPERTS}: swiglu_limit_func takes the gate first"),
    gate_clamped_below=Clause(False, "vLLM, fused_moe/utils.py: one minimum for the gate"),
    clamp_nan=Clause("upper", "megamoe: vLLM's forms of swiglu_limit_func differ"),
    precise_silu=Clause("g/d", "vLLM, fused_moe/utils.py: gate / (1.0 + tl.exp(-gate))"),
    silu_type=Clause(
        "fp32", "vLLM, fused_moe/utils.py: _swiglu_limit_pad_aware_kernel; its torch form, and "
        "silu_and_mul without a clamp, round silu to bfloat16",
    ),
    routing_weight=Clause("row", "vLLM, moe_fused_mul_sum.py: acc += row * weight in fp32"),
    routing_type=Clause("fp32", "vLLM, moe_fused_mul_sum.py: the weight as it is given"),
    combine_order=Clause("ascending-slot", "vLLM, moe_fused_mul_sum.py: range(top_k)"),
    staging_amax_floor=_NONE, activation_scale=_NONE, activation_group=_NONE,
    bf16_before_requant=_NONE, requant_group=_NONE, requant_scale=_NONE, requant_amax_floor=_NONE,
    **_UNREAD,
)  # fmt: skip

DIALECTS: Final[dict[str, Dialect]] = {
    d.revision: d for d in (SGL_SM90_0_1_4, SGL_SM90, W4A16, W4A8_TOKEN)
}
"""The dialects by name, an older one of the same kernel first."""


def dialect_of(problem: Problem, contract: Contract) -> Dialect:
    """``contract``, where it has the rules for ``problem``; ``ValueError`` of one line if not."""
    fault = dialect_fault(
        problem.weight_format, problem.features, problem.hidden_size, problem.intermediate_size
    )
    if fault:
        raise ValueError(fault)
    if not isinstance(contract, Dialect) or not contract.takes(problem.features):
        names = ", ".join(name for name, d in DIALECTS.items() if d.takes(problem.features))
        raise ValueError(
            f"contract {contract.revision} has no rule for {problem.weight_format}; take one of "
            f"{names}"
        )
    return contract
