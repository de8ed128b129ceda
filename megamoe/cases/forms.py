"""The forms of the kinds: which parameters a case may have, their defaults and their checks.

No torch in here, so that a list of cases takes no more than the start of Python. What is done with
a case stands in :mod:`megamoe.kinds`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from megamoe.cases.kind import (
    Case,
    CaseError,
    Form,
    Params,
    complete_capacity,
    complete_distinct,
    complete_unpadded,
    knows_padding,
)
from megamoe.spec.contract import Contract
from megamoe.spec.features import (
    COMBINE_DTYPES,
    DIALECT_FORMATS,
    SIZE_MULTIPLE,
    WEIGHT_FORMATS,
    Activation,
    dialect_fault,
    features_of,
    nvfp4_fault,
)

# --- staging, eplb, layout, errors ------------------------------------------------------------


def _staging(where: str, params: Params) -> None:
    """By default ids are int64."""
    params.setdefault("ids_dtype", "int64")
    complete_capacity(where, params)
    complete_unpadded(where, params)
    complete_distinct(where, params)
    if "distinct" in params and "unpadded" in params:
        raise CaseError(f"{where}: distinct and unpadded together are not known")


def _eplb(where: str, params: Params) -> None:
    """By default ids are int32 and the load is recorded."""
    params.setdefault("ids_dtype", "int32")
    params.setdefault("record", True)
    complete_unpadded(where, params)


STAGING: Final = Form(
    keys={
        "hidden": int, "tokens": int, "top_k": int, "experts": int, "ids_dtype": str,
        "capacity": int, "hidden_recipe": dict, "routing_recipe": dict, "unpadded": int,
        "distinct": int,
    },
    required=("hidden", "tokens", "top_k", "experts"),
    needs="prepare",
    choices={"ids_dtype": ("int32", "int64")},
    complete=_staging,
    knows=knows_padding,
)  # fmt: skip
EPLB: Final = Form(
    keys={
        "tokens": int, "top_k": int, "logical": int, "physical": int, "ids_dtype": str,
        "record": bool, "map_recipe": dict, "ids_recipe": dict, "unpadded": int,
    },
    required=("tokens", "top_k", "logical", "physical"),
    needs="eplb_map",
    choices={"ids_dtype": ("int32", "int64")},
    complete=_eplb,
    knows=knows_padding,
)  # fmt: skip
LAYOUT: Final = Form(
    keys={
        "model": str, "ep": int, "hidden": int, "intermediate": int, "experts": int,
        "touched": list, "weights_recipe": dict,
    },
    required=("hidden", "intermediate", "experts"),
    needs="transform_weights",
)  # fmt: skip
ERRORS: Final = Form(
    keys={"action": str, "args": dict, "raises": str, "message": str},
    required=("action", "raises", "message"),
    needs=None,
    complete=lambda where, params: params.setdefault("args", {}),
)

# --- forward and property ---------------------------------------------------------------------

FAMILIES: Final = ("zero-freedom", "envelope")


def act_of(params: Mapping[str, Any]) -> Activation:
    """The activation of a case, between the two products."""
    clamp = params["clamp"]
    return Activation(
        params.get("activation", "swiglu"), None if clamp == "none" else float(clamp),
        float(params.get("activation_alpha", 1.0)), float(params.get("activation_beta", 0.0)),
        params["fast_math"],
    )  # fmt: skip


def _forward(where: str, params: Params) -> None:
    """Defaults of the scalars; rows are those of the case, or its distinct ones."""
    complete_capacity(where, params)
    complete_distinct(where, params)
    if "distinct" in params:
        params.setdefault("rows", list(range(params["distinct"])))
    params.setdefault("clamp", "none")
    params.setdefault("fast_math", True)
    if isinstance(params["clamp"], str) and params["clamp"] != "none":
        raise CaseError(f"{where}: clamp is {params['clamp']!r}; a number or 'none'")
    if fault := act_of(params).fault():
        raise CaseError(f"{where}: {fault}")
    if params.get("combine_dtype", "bf16") not in COMBINE_DTYPES:
        raise CaseError(f"{where}: combine_dtype must be one of {', '.join(COMBINE_DTYPES)}")
    if params.get("shared_recipe", {}).get("size", SIZE_MULTIPLE) % SIZE_MULTIPLE:
        raise CaseError(f"{where}: the size of shared_recipe must be a multiple of 128")
    if fault := _format_fault(params):
        raise CaseError(f"{where}: {fault}")
    rows = params.get("rows")
    inside = rows is None or (
        all(isinstance(r, int) and 0 <= r < params["tokens"] for r in rows)
        and rows == sorted(set(rows))
    )
    if not inside:
        raise CaseError(f"{where}: rows must be ascending, each below tokens")


def _format_fault(params: Params) -> str:
    """The reason why the weights' format is unknown here; empty if it is known."""
    scale = params.get("l2_activation_scale")
    if params.get("weight_format", "mxfp4") not in WEIGHT_FORMATS:
        return f"weight_format must be one of {', '.join(WEIGHT_FORMATS)}"
    if params.get("weight_format") == "nvfp4":
        return nvfp4_fault(_features(params), params["hidden"], params["intermediate"], scale)
    if params.get("weight_format") in DIALECT_FORMATS:
        fault = dialect_fault(
            params["weight_format"], _features(params), params["hidden"], params["intermediate"]
        )
        if fault:
            return fault
    return "" if scale is None else "l2_activation_scale needs weight_format = 'nvfp4'"


def features(case: Case) -> tuple[str, ...]:
    """The features of a case beyond plain SwiGLU of routed experts."""
    return _features(case.params)


def _features(p: Mapping[str, Any]) -> tuple[str, ...]:
    return features_of(
        act_of(p), p.get("combine_dtype", "bf16"), "shared_recipe" in p,
        "shared_output_recipe" in p, p.get("weight_format", "mxfp4"),
    )  # fmt: skip


def knows(case: Case, contract: Contract) -> bool:
    """The contract has a rule for every feature that the case asks."""
    return contract.knows(case.kind, features(case))


FORWARD: Final = Form(
    keys={
        "hidden": int, "intermediate": int, "experts": int, "top_k": int, "tokens": int,
        "model": str, "ep": int, "clamp": (int, float, str), "fast_math": bool, "capacity": int,
        "family": str, "rows": list, "hidden_recipe": dict, "weights_recipe": dict,
        "routing_recipe": dict, "activation": str, "activation_alpha": (int, float),
        "activation_beta": (int, float), "combine_dtype": str, "shared_recipe": dict,
        "shared_output_recipe": dict, "weight_format": str, "l2_activation_scale": (int, float),
        "distinct": int, "cuda_only": bool,
    },
    required=("hidden", "intermediate", "experts", "top_k", "tokens", "family"),
    needs="forward",
    choices={"family": FAMILIES},
    complete=_forward,
    is_forward=True,
    features=features,
    knows=knows,
)  # fmt: skip

LAUNCH_LAWS: Final = {
    "stale-bytes": (True, False), "graph-replay": (True, True), "busy-stream": (False, True),
    "autocast": (False, False), "grad-mode": (False, False), "torch-defaults": (False, False),
    "engine-tensors": (False, False), "weights-in-place": (False, False),
}  # fmt: skip
"""Laws of :mod:`megamoe.layer.launch_laws`: whether one needs ``run``, and whether CUDA."""
LAWS: Final = (
    "batch-invariance", "token-permutation", "replica-choice", "ep-size", "capacity",
    "stale-buffer", "padding-rows", "masked-slots", "repeat", "many-calls",
    "other-weights", *LAUNCH_LAWS,
)  # fmt: skip


def _property(where: str, params: Params) -> None:
    """Complete the parameters as those of a forward case."""
    _forward(where, params)
    format_ = params.get("weight_format", "mxfp4")
    if format_ != "mxfp4" and params["law"] == "engine-tensors":
        raise CaseError(f"{where}: law engine-tensors is the module's, which has MXFP4 weights")


PROPERTY: Final = replace(
    FORWARD,
    keys={**FORWARD.keys, "law": str},
    required=(*FORWARD.required, "law"),
    choices={**FORWARD.choices, "law": LAWS},
    complete=_property,
)

# --- ep -----------------------------------------------------------------------------------------

RANK_LAWS: Final = ("layer", "delays", "repeats", "static", "graph-replay", "refused", "rebalance")
"""The laws of :mod:`megamoe.layer.rank_laws`; ``layer`` is one call."""
SPLITS: Final = ("even", "ragged", "one-rank", "every-other")
"""The rules that give tokens to ranks, see :func:`megamoe.kinds.ep.tokens_of`."""


def _ep(where: str, params: Params) -> None:
    """As a forward case; one layer call, tokens in equal parts, and no replica by default."""
    _forward(where, params)
    params.setdefault("law", "layer")
    params.setdefault("split", "even")
    params.setdefault("physical", params["experts"])
    params.setdefault("busy_rank", 0)
    if params["physical"] < params["experts"]:
        raise CaseError(f"{where}: physical is below experts; every expert needs a place")
    if _features(params):
        raise CaseError(f"{where}: the laws of ranks are written for plain SwiGLU and MXFP4")


EP: Final = replace(
    FORWARD,
    keys={**FORWARD.keys, "law": str, "split": str, "physical": int, "busy_rank": int},
    choices={**FORWARD.choices, "law": RANK_LAWS, "split": SPLITS},
    complete=_ep,
)

FORMS: Final[Mapping[str, Form]] = {
    "staging": STAGING, "eplb": EPLB, "forward": FORWARD, "errors": ERRORS, "layout": LAYOUT,
    "property": PROPERTY, "ep": EP,
}  # fmt: skip
