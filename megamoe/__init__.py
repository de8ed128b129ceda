"""megamoe: the golden-output testbed for fused FP8 x FP4 mixture-of-experts kernels.

The public API (``docs/api.md``): :func:`problem` draws a problem of one's own shapes,
:func:`load_case` and :func:`cases` give those of the suite, and :func:`judge` judges an output.
What an engine's code imports from vLLM is here under the same names. All of it is loaded when it
is first asked for: ``import megamoe`` alone imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megamoe.api import Judgement, LoadedCase, Problem, cases, judge, load_case, problem
    from megamoe.layer.capture import capture
    from megamoe.layer.deep_gemm_experts import DeepGemmMegaMoEExperts, MegaMoEActivation
    from megamoe.layer.experts import DeepseekV4MegaMoEExperts
    from megamoe.layer.ops import eplb_map_to_physical_and_record, prepare_megamoe_inputs

__version__ = "0.1.0"
__all__ = [
    "DeepGemmMegaMoEExperts",
    "DeepseekV4MegaMoEExperts",
    "Judgement",
    "LoadedCase",
    "MegaMoEActivation",
    "Problem",
    "capture",
    "cases",
    "eplb_map_to_physical_and_record",
    "judge",
    "load_case",
    "prepare_megamoe_inputs",
    "problem",
]

_HOME = {
    "DeepGemmMegaMoEExperts": "layer.deep_gemm_experts",
    "DeepseekV4MegaMoEExperts": "layer.experts",
    "Judgement": "api",
    "LoadedCase": "api",
    "MegaMoEActivation": "layer.deep_gemm_experts",
    "Problem": "api",
    "capture": "layer.capture",
    "cases": "",
    "eplb_map_to_physical_and_record": "layer.ops",
    "judge": "",
    "load_case": "api",
    "prepare_megamoe_inputs": "layer.ops",
    "problem": "api",
}
"""Name to its module; of an empty one, the room of that name answers (``callable_room.py``)."""


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        from megamoe.suggest import hint  # a name with _ is somebody's question, and no mistake

        near = "" if name.startswith("_") else hint(name, __all__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{near}")
    home = _HOME[name]
    if not home:
        return import_module(f"{__name__}.{name}")
    attribute = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = attribute  # asked for once
    return attribute


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
