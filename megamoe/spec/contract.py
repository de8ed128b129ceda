"""The numerics contracts as data: the rules of each stage, with their evidence.

A contract has a revision. A kernel of another revision is not wrong, it is different, and is judged
under its own. :mod:`megamoe.spec.clauses` has the form, :mod:`megamoe.spec.dialects` the contracts
of kernels whose operands have other formats than MegaMoE's.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from megamoe.spec.clauses import Clause, Contract
from megamoe.spec.dialects import DIALECTS
from megamoe.suggest import follow, hint

_KERNEL = "DeepGEMM 54e2261, sm100_fp8_fp4_mega_moe.cuh"
_MATH = "DeepGEMM 54e2261, common/math.cuh"
_STAGING = "vLLM 0.24, deepseek_v4/nvidia/ops/prepare_megamoe.py"
_ROUTER = "vLLM 0.24, fused_moe/router/base_router.py"

MEGAMOE_2026_06: Final = Contract(
    revision="2026-06",
    features=Clause(
        ("situ", "shared-expert", "shared-output"),
        "vLLM 0.28 and 0.29, sm100_fp8_fp4_mega_moe.cuh; the kernels before have plain SwiGLU of "
        "routed experts only. Outside of the kernel, vLLM adds shared experts in bfloat16",
    ),
    replica_choice=Clause("token-hash", f"{_ROUTER}: from vLLM 0.22 on; before, flat position"),
    replica_hash=Clause(2654435769, _ROUTER),
    padding_known=Clause(False, f"{_ROUTER}: no argument for it; vLLM 0.25 has one"),
    staging_amax_floor=Clause(1e-4, _STAGING),
    staging_exponent_min=Clause(1, _STAGING),
    staging_exponent_max=Clause(254, _STAGING),
    staging_clips=Clause(False, f"{_STAGING}: the cast alone, which keeps NaN"),
    cast_saturates=Clause(True, "PTX ISA, cvt.rn.satfinite.e4m3x2.f32: what both casts compile to"),
    amax_drops_nan=Clause(True, f"{_STAGING}: the reduction's max; see docs/numerics.md"),
    gate_up_order=Clause("gate-up", "vLLM 0.24: weight_loader puts w1 in rows [0, I), w3 after"),
    gate_clamped_below=Clause(False, f"{_KERNEL}: one __hmin2 for the gate, no __hmax2"),
    clamp_drops_nan=Clause(True, f"{_KERNEL}: __hmin2 and __hmax2 return the number"),
    precise_silu=Clause("g/d", f"{_KERNEL}: a division"),
    situ_tanh=Clause(
        "tanhf", "vLLM 0.29, sm100_fp8_fp4_mega_moe.cuh: tanhf in both modes; vLLM 0.27 calls "
        "__tanhf in the fast one (not seen)",
    ),
    routing_weight=Clause("activation", f"{_KERNEL}: two products, then the amax of the result"),
    bf16_before_requant=Clause(False, f"{_KERNEL}: the fp32 activations are cast directly"),
    requant_scale=Clause("product", f"{_MATH}: get_e4m3_sf_and_sf_inv"),
    requant_exponent_min=Clause(0, f"{_MATH}: no floor"),
    combine_order=Clause("ascending-slot", f"{_KERNEL}: the combine's loop over top-k"),
    shared_expert=Clause(
        "last", "vLLM 0.29, sm100_fp8_fp4_mega_moe.cuh: slot K is the highest bit of the mask"
    ),
)  # fmt: skip

_MATH_HEADER = "the common/math.cuh that vLLM 0.30 to 0.33 and DeepGEMM 2.8.2 share"
_EPLB = (
    "vLLM 0.29 and 0.33, base_router.py and prepare_megamoe.py: num_unpadded_tokens and "
    "is_padding; on by default from 0.27 (VLLM_MOE_SKIP_PADDING)"
)
MEGAMOE_2026_09: Final = (
    MEGAMOE_2026_06.carried("DeepGEMM 2.8.0 (PR #432), in vLLM 0.30 to 0.32")
    .variant(
        "2026-09",
        f"{_MATH_HEADER}: max((bits(amax) + 0x7FFFFF - 0x600000) >> 23, 113) - 8",
        requant_scale="bits",
        requant_exponent_min=105,
    )
    .variant("2026-09", _EPLB, padding_known=True)
    .variant(
        "2026-09", "vLLM 0.30 on: activation_alpha and activation_beta, which swiglu-oai is a "
        "value of",
        features=(
            "swiglu-oai", "swiglu-alpha-beta", "situ", "shared-expert", "shared-output",
        ),
    )
    .variant(
        "2026-09", "vLLM 0.32 and 0.33, sm100_fp8_fp4_mega_moe_situ.cuh (0.30 and 0.31: not seen)",
        situ_tanh="sigmoid",
    )
)  # fmt: skip

_FIRST = "vLLM 0.33, sm100_fp8_fp4_mega_moe.cuh"
MEGAMOE_2026_11: Final = (
    MEGAMOE_2026_09.carried("the kernel of vLLM 0.33, and DeepGEMM 2.8.2")
    .variant(
        "2026-11", f"{_FIRST}: kClampAfterSilu. DeepGEMM 2.8.2 has neither it nor alpha and beta. "
        "vLLM 0.33, sm100_nvfp4_mega_moe.cuh: nvfp4",
        features=(
            "swiglu-oai", "swiglu-alpha-beta", "swiglustep", "situ", "shared-expert",
            "shared-output", "nvfp4",
        ),
    )
    .variant(
        "2026-11", f"{_FIRST}, and DeepGEMM 2.8.2: slot K is taken before the mask's lowest bit",
        shared_expert="first",
    )
)  # fmt: skip

_SGL = "sgl-deep-gemm 0.2.3.post2, sm100_fp8_fp4_mega_moe.cuh"
_SGL_STAGING = "SGLang, deepseek_v4/mega_moe_pre_dispatch.cuh and fp8_utils.cuh"
MEGAMOE_SGL: Final = (
    MEGAMOE_2026_06.carried(_SGL)
    .variant("sgl", f"{_SGL}: 1.0f / d, then a product; from 0.1.6 on", precise_silu="g*(1/d)")
    .variant("sgl", f"{_SGL_STAGING}: fmaxf(amax, 1e-10f)", staging_amax_floor=1e-10)
    .variant(
        "sgl", f"{_SGL_STAGING}: no clamp of the byte", staging_exponent_min=0,
        staging_exponent_max=255,
    )
    .variant(
        "sgl", f"{_SGL_STAGING}: fmaxf(fminf(v, 448), -448) before the cast", staging_clips=True
    )
    .variant(
        "sgl", f"{_SGL}: kSwiGLUAlpha, where up gets 1 and nothing else; kUseFp8Combine",
        features=("swiglu-oai", "situ", "shared-expert", "shared-output", "fp8-combine"),
    )
    .variant("sgl", f"{_SGL}, and 0.2.5; before, tanhf as vLLM 0.29", situ_tanh="quotient")
)  # fmt: skip

REVISIONS: Final = {
    c.revision: c for c in (MEGAMOE_2026_06, MEGAMOE_2026_09, MEGAMOE_2026_11, MEGAMOE_SGL)
}
"""The revisions of MegaMoE's contract, the oldest first."""
CONTRACTS: Final = {**REVISIONS, **DIALECTS}
"""All contracts: the revisions, and those of kernels whose operands have other formats."""
BASE: Final = MEGAMOE_2026_06
"""The revision under which a golden is stored first; another revision stores its differences."""
NEWEST: Final = MEGAMOE_2026_11
"""The revision of the newest vLLM: the default if nothing else is known."""


_REMAP: Final = ("replica_choice", "replica_hash")
_QUANTISE: Final = ("cast_saturates", "amax_drops_nan")


_OF_FEATURES: Final = {"situ_tanh": "situ", "shared_expert": "shared-expert"}


def decides(clause: str, kind: str, features: Collection[str] = ()) -> bool:
    """Whether a clause can decide a bit of a case of ``kind`` with these ``features``."""
    if clause == "features" or _OF_FEATURES.get(clause, "") not in ("", *features):
        return False
    if kind == "eplb":
        return clause in (*_REMAP, "padding_known")
    staging = clause.startswith("staging_") or clause in _QUANTISE
    if kind == "staging":
        return staging or clause == "padding_known"
    return kind in ("forward", "property", "ep") and clause not in (*_REMAP, "padding_known")


def contract(revision: str) -> Contract:
    """The contract of a revision; ``ValueError`` naming the known ones otherwise."""
    try:
        return CONTRACTS[revision]
    except KeyError:
        text = f"unknown contract {revision!r}{hint(revision, CONTRACTS)}"
        raise ValueError(follow(text, f"known: {', '.join(CONTRACTS)}, or auto")) from None


__all__ = [
    "BASE", "CONTRACTS", "NEWEST", "REVISIONS", "Clause", "Contract", "contract", "decides",
]  # fmt: skip
