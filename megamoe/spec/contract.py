"""The numerics contract as data: the rules of each stage, with their evidence.

A contract has a revision. A kernel of another revision is not wrong, it is different, and is judged
under its own. A clause is a choice that decides bits; the oracle reads every clause. Facts that no
known kernel changes, such as groups of 32, are in :mod:`megamoe.spec.formats`. The freedom of the
hardware is in :mod:`megamoe.spec.accumulators`. Nothing in here is a tolerance.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from typing import Any, Final, Generic, TypeVar

from megamoe.suggest import hint

T = TypeVar("T")


@dataclass(frozen=True)
class Clause(Generic[T]):
    """One value of the contract with its evidence: the source of the text, or the measurement."""

    value: T
    evidence: str


@dataclass(frozen=True)
class Contract:
    """Everything that decides an output bit, apart from how sums are accumulated."""

    revision: str

    features: Clause[tuple[str, ...]]
    """The features (:data:`megamoe.spec.features.FEATURES`) for which the clauses have rules. A
    case that asks for any other feature is not of this contract."""

    # --- EPLB remap ---
    replica_choice: Clause[str]
    """Replica of a logical expert, of ``max(count, 1)``: 'token-hash' is
    ``(t * replica_hash) mod 2**32`` of the token's row t, 'flat-position' is ``t * K + slot``."""
    replica_hash: Clause[int]
    padding_known: Clause[bool]
    """The remap gets the number of rows that are no padding, and counts only those in the load.
    Staging gets the mask of padding rows, and gives them id -1 and weight 0. Both still write the
    rest of such a row."""

    # --- staging ---
    staging_amax_floor: Clause[float]
    """Lower bound of a group's amax."""
    staging_exponent_min: Clause[int]
    staging_exponent_max: Clause[int]
    """The UE8M0 byte is clamped to this range. Where that leaves 255, for an infinite amax, the
    factor ``2**(127 - e)`` is -inf: its bits are those of ``254 - e`` in the exponent field."""
    staging_clips: Clause[bool]
    """Scaled values are clipped to +-448 before the cast, so that NaN becomes 448."""

    # --- casts of both quantisations ---
    cast_saturates: Clause[bool]
    """E4M3 cast, to nearest even: beyond 448 gives 448, infinities included; else NaN."""
    amax_drops_nan: Clause[bool]
    """A group's amax ignores NaN members."""

    # --- SwiGLU ---
    gate_up_order: Clause[str]
    """Rows of w13: 'gate-up' is [0, I) gate (w1), [I, 2I) up (w3); 'up-gate' the reverse."""
    gate_clamped_below: Clause[bool]
    clamp_drops_nan: Clause[bool]
    """min and max of the clamp return their non-NaN operand, so NaN becomes a bound."""
    precise_silu: Clause[str]
    """fast_math off: 'g/d' or 'g*(1/d)' with d = fl(1 + expf(-g))."""
    situ_tanh: Clause[str]
    """SiTU's tanh: 'tanhf' of a quotient in either mode; 'sigmoid', ``2 * sigmoid(2x) - 1``; or
    'quotient': for the scales (4, 25) gate and sigmoid are one quotient of T = tanh(g/4),
    ``2T(1+T)**2 / (1+T*T)``, and tanhf or, in the fast form, tanh.approx is meant."""
    routing_weight: Clause[str]
    """The place of the multiplication: 'activation', before the amax is taken, or 'combine', by
    ``fma(row, weight, sum)``. The clause speaks of MXFP4: NVFP4 has 'combine' under each contract
    that has a rule for it."""

    # --- requantisation ---
    bf16_before_requant: Clause[bool]
    """Activations are rounded to bfloat16 before the amax is taken."""
    requant_scale: Clause[str]
    """The rule from amax to the UE8M0 byte. 'product': t = fl(amax * fl32(1/448)), field(t) +
    (mantissa(t) != 0). 'bits': (bits(amax) + 0x1FFFFF >> 23) - 8, which is the same for amax above
    448 * 2**-127, and 247 in place of 255 for infinity."""
    requant_exponent_min: Clause[int]
    """Lowest UE8M0 byte; 0 means no floor."""

    # --- combine ---
    combine_order: Clause[str]
    """'ascending-slot': fp32 sum of the bf16 rows from 0, live slots in ascending order;
    'descending-slot': the reverse."""
    shared_expert: Clause[str]
    """The place of the fused shared expert's row in the sum: 'first', before the slots, or
    'last'."""

    @property
    def clauses(self) -> dict[str, Clause[Any]]:
        """Name to clause, in the order of computation."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "revision"}

    def changed(self, revision: str, evidence: str, **values: Any) -> Contract:
        """A contract with other ``values`` of some clauses; ``TypeError`` for an unknown clause."""
        clauses = {name: Clause(value, evidence) for name, value in values.items()}
        return replace(self, revision=revision, **clauses)

    def carried(self, where: str) -> Contract:
        """The same; the evidence of every clause says that ``where`` has it too."""
        kept: dict[str, Any] = {
            name: Clause(clause.value, f"{clause.evidence}; the same in {where}")
            for name, clause in self.clauses.items()
        }
        return replace(self, **kept)

    def differences(self, other: Contract) -> list[str]:
        """Names of the clauses whose values differ."""
        mine, theirs = self.clauses, other.clauses
        return [name for name in mine if mine[name].value != theirs[name].value]


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

_CACHED = "the common/math.cuh that vLLM 0.30 to 0.33 and DeepGEMM 2.8.2 share"
_EPLB = (
    "vLLM 0.29 and 0.33, base_router.py and prepare_megamoe.py: num_unpadded_tokens and "
    "is_padding; on by default from 0.27 (VLLM_MOE_SKIP_PADDING)"
)
MEGAMOE_2026_09: Final = (
    MEGAMOE_2026_06.carried("DeepGEMM 2.8.0 (PR #432), in vLLM 0.30 to 0.32")
    .changed(
        "2026-09",
        f"{_CACHED}: max((bits(amax) + 0x7FFFFF - 0x600000) >> 23, 113) - 8",
        requant_scale="bits",
        requant_exponent_min=105,
    )
    .changed("2026-09", _EPLB, padding_known=True)
    .changed(
        "2026-09", "vLLM 0.30 on: activation_alpha and activation_beta, which swiglu-oai is a "
        "value of",
        features=(
            "swiglu-oai", "swiglu-alpha-beta", "situ", "shared-expert", "shared-output",
        ),
    )
    .changed(
        "2026-09", "vLLM 0.32 and 0.33, sm100_fp8_fp4_mega_moe_situ.cuh (0.30 and 0.31: not seen)",
        situ_tanh="sigmoid",
    )
)  # fmt: skip

_FIRST = "vLLM 0.33, sm100_fp8_fp4_mega_moe.cuh"
MEGAMOE_2026_11: Final = (
    MEGAMOE_2026_09.carried("the kernel of vLLM 0.33, and DeepGEMM 2.8.2")
    .changed(
        "2026-11", f"{_FIRST}: kClampAfterSilu. DeepGEMM 2.8.2 has neither it nor alpha and beta. "
        "vLLM 0.33, sm100_nvfp4_mega_moe.cuh: nvfp4",
        features=(
            "swiglu-oai", "swiglu-alpha-beta", "swiglustep", "situ", "shared-expert",
            "shared-output", "nvfp4",
        ),
    )
    .changed(
        "2026-11", f"{_FIRST}, and DeepGEMM 2.8.2: slot K is taken before the mask's lowest bit",
        shared_expert="first",
    )
)  # fmt: skip

_SGL = "sgl-deep-gemm 0.2.3.post2, sm100_fp8_fp4_mega_moe.cuh"
_SGL_STAGING = "SGLang, deepseek_v4/mega_moe_pre_dispatch.cuh and fp8_utils.cuh"
MEGAMOE_SGL: Final = (
    MEGAMOE_2026_06.carried(_SGL)
    .changed("sgl", f"{_SGL}: 1.0f / d, then a product; from 0.1.6 on", precise_silu="g*(1/d)")
    .changed("sgl", f"{_SGL_STAGING}: fmaxf(amax, 1e-10f)", staging_amax_floor=1e-10)
    .changed(
        "sgl", f"{_SGL_STAGING}: no clamp of the byte", staging_exponent_min=0,
        staging_exponent_max=255,
    )
    .changed(
        "sgl", f"{_SGL_STAGING}: fmaxf(fminf(v, 448), -448) before the cast", staging_clips=True
    )
    .changed(
        "sgl", f"{_SGL}: kSwiGLUAlpha, where up gets 1 and nothing else; kUseFp8Combine",
        features=("swiglu-oai", "situ", "shared-expert", "shared-output", "fp8-combine"),
    )
    .changed("sgl", f"{_SGL}, and 0.2.5; before, tanhf as vLLM 0.29", situ_tanh="quotient")
)  # fmt: skip

REVISIONS: Final = {
    c.revision: c for c in (MEGAMOE_2026_06, MEGAMOE_2026_09, MEGAMOE_2026_11, MEGAMOE_SGL)
}
BASE: Final = MEGAMOE_2026_06
"""The revision under which a golden is stored first; another revision stores its differences."""
NEWEST: Final = MEGAMOE_2026_11
"""The revision of the newest vLLM: the default if nothing else is known."""


_REMAP: Final = ("replica_choice", "replica_hash")
_QUANTISE: Final = ("cast_saturates", "amax_drops_nan")


_OF_FEATURES: Final = {"situ_tanh": "situ", "shared_expert": "shared-expert"}


def decides(clause: str, kind: str, asked: Collection[str] = ()) -> bool:
    """Whether a clause can decide a bit of a case of ``kind`` with the features ``asked``."""
    if clause == "features" or _OF_FEATURES.get(clause, "") not in ("", *asked):
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
        return REVISIONS[revision]
    except KeyError:
        raise ValueError(
            f"unknown contract {revision!r}{hint(revision, REVISIONS)}; known: "
            f"{', '.join(REVISIONS)}, or auto"
        ) from None
