"""What an experts module of an engine says of itself, by the names of its attributes: its weights,
experts, activation, class and contract. vLLM is not imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from megamoe.cases.stored import StoredError
from megamoe.layer.eplb import eplb_map_to_physical_and_record
from megamoe.layer.kernel_weights import checkpoint_layout
from megamoe.spec.accumulators import SM100_MXF8F6F4, accumulator
from megamoe.spec.contract import MEGAMOE_2026_06, MEGAMOE_2026_11, REVISIONS
from megamoe.spec.tensors import WEIGHTS


def activation_of(module: nn.Module) -> dict[str, Any]:
    """Fields of the problem that a module with the face of vLLM 0.33 says."""
    act = getattr(module, "activation", None)
    parameters = {n: getattr(act, n, None) for n in ("name", "alpha", "beta")}
    if not isinstance(parameters["name"], str) or None in parameters.values():
        return {}
    return {
        "activation": parameters["name"], "activation_alpha": float(parameters["alpha"] or 0.0),
        "activation_beta": float(parameters["beta"] or 0.0),
    }  # fmt: skip


def checkpoint_weights(module: nn.Module, experts: torch.Tensor) -> dict[str, torch.Tensor]:
    """Rows ``experts`` of ``module``'s weights in the checkpoint's layout, uint8.

    From its parameters while they are there; afterwards from the kernel-side form, undone. A
    backend that packs weights its own way must know the way back (``unpack_weights``).
    """
    candidates = [getattr(module, name, None) for name in WEIGHTS]
    if any(t is None for t in candidates):
        first = getattr(module, "_transformed_l1_weights", None)
        second = getattr(module, "_transformed_l2_weights", None)
        if first is not None and second is not None:
            candidates = [*first, *second]
        else:
            candidates = _unpack(module, list(getattr(module, "_weights", None) or [None]))
    if len(candidates) != len(WEIGHTS) or any(not isinstance(t, torch.Tensor) for t in candidates):
        raise StoredError(
            f"{type(module).__name__}: its weights are neither parameters nor in the kernel's "
            "layout; give them to capture as weights="
        )
    tensors = [t for t in candidates if isinstance(t, torch.Tensor)]
    w13, w13_sf, w2, w2_sf = (rows_of(t.data, experts) for t in tensors)
    if w13_sf.dtype == w2_sf.dtype == torch.int32 and w13.element_size() == w2.element_size() == 1:
        w13, w13_sf, w2, w2_sf = checkpoint_layout(w13, w13_sf, w2, w2_sf)
    by_name = dict(zip(WEIGHTS, (w13, w13_sf, w2, w2_sf), strict=True))
    wrong = [name for name, t in by_name.items() if t.element_size() != 1 or t.ndim != 3]
    if wrong:
        raise StoredError(
            f"{type(module).__name__}: {wrong[0]} has a form that is not known here; give the "
            "checkpoint's tensors to capture as weights="
        )
    return {name: t.contiguous().view(torch.uint8) for name, t in by_name.items()}


def _unpack(module: nn.Module, tensors: list[Any]) -> list[Any]:
    """The checkpoint's weights, from a backend's ``pack_weights`` by its ``unpack_weights``."""
    backend: Any = getattr(module, "backend", None)
    if not hasattr(backend, "pack_weights"):
        return tensors
    if not hasattr(backend, "unpack_weights"):
        raise StoredError(
            f"{type(module).__name__}: backend {backend.name} keeps weights in a form of its own "
            "and has no unpack_weights; give the checkpoint's tensors to capture as weights=, or "
            "capture a call with another backend"
        )
    return list(backend.unpack_weights(*tensors))


def physical_ids(module: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Physical experts of all ranks; the engine's load is read, not counted up."""
    state = getattr(module, "eplb_state", None)
    table = getattr(state, "logical_to_physical_map", None)
    if state is None or table is None:
        return ids
    load = state.expert_load_view.clone()
    return eplb_map_to_physical_and_record(ids, load, table, state.logical_replica_count, False)


def local_experts(module: nn.Module) -> int:
    """How many experts the module holds on this rank; :class:`StoredError` if it does not say."""
    for name in ("num_local_experts", "num_experts"):
        if hasattr(module, name):
            return int(getattr(module, name))
    raise StoredError(f"{type(module).__name__} does not say its num_local_experts")


def class_of(module: nn.Module, override: str | None) -> str:
    """The accumulator class: ``override``, else the backend's, else that of DeepGEMM on SM100."""
    own = getattr(getattr(module, "backend", None), "accumulator", None)
    return accumulator(override or own or SM100_MXF8F6F4.name).name


def contract_of(module: nn.Module) -> str:
    """The contract of ``y``: the single revision that a backend names, else that of the class."""
    revisions: Any = getattr(getattr(module, "backend", None), "contracts", None) or ()
    if len(revisions) == 1 and revisions[0] in REVISIONS:
        return str(revisions[0])
    newer = any(kind.__name__ == "DeepGemmMegaMoEExperts" for kind in type(module).__mro__)
    return MEGAMOE_2026_11.revision if newer else MEGAMOE_2026_06.revision


def refuse_what_no_problem_says(module: nn.Module) -> None:
    """:class:`StoredError` for an activation or weights that a problem cannot hold."""
    activation = getattr(module, "activation", None)
    parameters = [
        getattr(activation, n, v) for n, v in (("name", "swiglu"), ("alpha", 1), ("beta", 0))
    ]
    if parameters != ["swiglu", 1, 0]:
        raise StoredError(
            f"{type(module).__name__} computes {activation}; only plain swiglu can be recorded"
        )
    form = getattr(module, "weight_format", "mxfp4")
    form = str(getattr(form, "value", form)).lower()  # vLLM's may be an enumeration
    if form != "mxfp4":
        raise StoredError(f"{type(module).__name__} has {form} weights; only mxfp4 can be recorded")


def has_shared_expert(module: nn.Module, call: Mapping[str, Any]) -> bool:
    """Whether ``y`` includes a shared expert, from the call or fused in the module."""
    candidates = (call.get("shared_experts"), getattr(module, "shared_experts", None))
    fused = any(name.startswith("shared_l1") for name, _ in module.named_parameters())
    return fused or any(one is not None for one in candidates)


def is_own_share(module: nn.Module) -> bool:
    """Whether ``y`` of this project's module is the sum of this rank alone."""
    from megamoe.layer.routed import RoutedExperts

    return isinstance(module, RoutedExperts) and not module.collective


def rows_of(tensor: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """Rows ``experts`` of ``tensor``, on its device."""
    return tensor[experts.to(tensor.device)]


__all__ = [
    "activation_of", "checkpoint_weights", "class_of", "contract_of", "has_shared_expert",
    "is_own_share", "local_experts", "physical_ids", "refuse_what_no_problem_says",
    "rows_of",
]  # fmt: skip
