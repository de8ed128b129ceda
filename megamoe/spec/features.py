"""The options of a call: the function between its two products, and further features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

ACTIVATIONS: Final = ("swiglu", "swiglustep", "situ")
"""The activations between the two products, by vLLM's names."""
COMBINE_DTYPES: Final = ("bf16", "fp8")
SIZE_MULTIPLE: Final = 128
"""H and I are multiples of this."""
NVFP4_SIZE_MULTIPLE: Final = 256
"""H and I are multiples of this where weights are NVFP4."""
DIALECT_FORMATS: Final = ("fp8-block", "w4a16", "w4a8-token")
"""The formats of :mod:`megamoe.spec.dialects`."""
WEIGHT_FORMATS: Final = ("mxfp4", "nvfp4", *DIALECT_FORMATS)
"""'mxfp4': E2M1 with a UE8M0 byte per 32, hidden states staged as E4M3. 'nvfp4': E2M1 with an E4M3
byte per 16 and an fp32 factor an expert; hidden states and activations have the same codes.
'fp8-block': E4M3 with an fp32 scale per 128 x 128; hidden states and activations are E4M3 with fp32
scales. 'w4a16': the weights of mxfp4; hidden states and activations are bfloat16. 'w4a8-token': the
same weights; hidden states and activations are E4M3 with one fp32 scale a row."""
FEATURES: Final = (
    "swiglu-oai", "swiglu-alpha-beta", "swiglustep", "situ", "shared-expert", "shared-output",
    "fp8-combine", "nvfp4", *DIALECT_FORMATS,
)  # fmt: skip
"""Options of a call beyond plain SwiGLU of routed experts. A backend lists in ``features`` those
that it computes; a contract lists those for which it has a rule."""


@dataclass(frozen=True)
class Activation:
    """The activation between the two products.

    With the gate g and the up projection u, both bfloat16:

    - ``swiglu``: ``g * sigmoid(alpha * g) * (u + beta)``, g bounded from above by ``clamp`` and u
      on both sides;
    - ``swiglustep``: the same, the gated value being bounded from above in place of g;
    - ``situ``: ``alpha * tanh(g / alpha) * sigmoid(g) * beta * tanh(u / beta)``; no clamp.
    """

    name: str
    clamp: float | None
    alpha: float
    beta: float
    fast_math: bool

    def fault(self) -> str:
        """The reason why no kernel takes this activation; empty if there is none."""
        if self.name not in ACTIVATIONS:
            return f"activation is {self.name!r}; known: {', '.join(ACTIVATIONS)}"
        if self.name == "situ" and (self.clamp is not None or self.alpha <= 0 or self.beta <= 0):
            return "situ takes no clamp, and alpha and beta above 0"
        if self.name == "swiglustep" and self.clamp is None:
            return "swiglustep takes a clamp"
        return ""


def features_of(
    act: Activation, combine_dtype: str, shared_expert: bool, shared_output: bool,
    weight_format: str = "mxfp4",
) -> tuple[str, ...]:  # fmt: skip
    """The features among :data:`FEATURES` that a call asks for."""
    asks = {
        "swiglu-oai": act.name == "swiglu" and act.beta == 1.0,
        "swiglu-alpha-beta": act.name == "swiglu" and act.beta != 1.0
        and (act.alpha, act.beta) != (1.0, 0.0),
        "swiglustep": act.name == "swiglustep",
        "situ": act.name == "situ",
        "shared-expert": shared_expert,
        "shared-output": shared_output,
        "fp8-combine": combine_dtype == "fp8",
        "nvfp4": weight_format == "nvfp4",
        **{name: weight_format == name for name in DIALECT_FORMATS},
    }  # fmt: skip
    return tuple(name for name in FEATURES if asks[name])


def nvfp4_fault(
    features: tuple[str, ...], hidden: int, intermediate: int, activation_scale: float | None
) -> str:
    """The reason why no known kernel takes a call with such weights; empty if there is none.

    The range of the scale keeps ``6 * scale`` and the reciprocal of every scale in use normal.
    """
    others = {"swiglustep", "situ", "shared-expert", "shared-output", "fp8-combine"} & {*features}
    if others:
        return f"nvfp4 goes without {min(others)}"
    if hidden % NVFP4_SIZE_MULTIPLE or intermediate % NVFP4_SIZE_MULTIPLE:
        sizes = f"H {hidden} and I {intermediate}"
        return f"nvfp4 takes multiples of {NVFP4_SIZE_MULTIPLE}, not {sizes}"
    if activation_scale is None or not 2.0**-100 <= activation_scale <= 2.0**100:
        return f"nvfp4 takes an l2_activation_scale from 2**-100 to 2**100, not {activation_scale}"
    return ""


def dialect_fault(
    weight_format: str, features: tuple[str, ...], hidden: int, intermediate: int
) -> str:
    """The reason why no kernel of the dialect takes a call; empty if there is none."""
    if others := [name for name in features if name != weight_format]:
        return f"{weight_format} goes without {others[0]}"
    if hidden % SIZE_MULTIPLE or intermediate % SIZE_MULTIPLE:
        sizes = f"H {hidden} and I {intermediate}"
        return f"{weight_format} takes multiples of {SIZE_MULTIPLE}, not {sizes}"
    return ""
