"""megamoe: the golden-output testbed for fused FP8 x FP4 mixture-of-experts kernels.

What an engine's code imports from vLLM is here under the same names, and is loaded when it is
first asked for: ``import megamoe`` alone imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megamoe.layer.capture import capture
    from megamoe.layer.deep_gemm_experts import DeepGemmMegaMoEExperts, MegaMoEActivation
    from megamoe.layer.experts import DeepseekV4MegaMoEExperts
    from megamoe.layer.ops import eplb_map_to_physical_and_record, prepare_megamoe_inputs

__version__ = "0.1.0"
__all__ = [
    "DeepGemmMegaMoEExperts",
    "DeepseekV4MegaMoEExperts",
    "MegaMoEActivation",
    "capture",
    "eplb_map_to_physical_and_record",
    "prepare_megamoe_inputs",
]

_HOME = {
    "DeepGemmMegaMoEExperts": "deep_gemm_experts",
    "DeepseekV4MegaMoEExperts": "experts",
    "MegaMoEActivation": "deep_gemm_experts",
    "capture": "capture",
    "eplb_map_to_physical_and_record": "ops",
    "prepare_megamoe_inputs": "ops",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.layer.{_HOME[name]}"), name)
    globals()[name] = found  # asked for once
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
