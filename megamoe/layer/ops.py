"""The module's own staging and remap: Triton's kernels on an NVIDIA GPU, torch's code elsewhere.

Both give the same bits; a backend that brings its own ``prepare`` or ``eplb_map`` is not asked
here. The choice depends on the device of the first tensor, and on padding, which only torch's code
knows. The names of the arguments are those of vLLM's functions.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any, Final, overload

import torch

from megamoe.layer import eplb, staging

LEAST_CAPABILITY: Final = (8, 0)
"""The oldest that Triton supports."""


@overload
def prepare_megamoe_inputs(
    hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    x_fp8: torch.Tensor,
    x_sf: torch.Tensor,
    topk_idx_out: torch.Tensor,
    topk_weights_out: torch.Tensor,
    is_padding: torch.Tensor | None = None,
) -> None: ...
@overload
def prepare_megamoe_inputs(
    hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    x: torch.Tensor,
    x_sf: torch.Tensor,
    topk_idx_out: torch.Tensor,
    topk_weights_out: torch.Tensor,
    is_padding: torch.Tensor | None = None,
) -> None: ...
def prepare_megamoe_inputs(*args: Any, **kwargs: Any) -> None:
    """``staging.prepare_megamoe_inputs`` in the form that suits the device; the same bits.

    The fourth argument is ``x_fp8`` by name, or ``x`` as from vLLM 0.33 on.
    """
    if "x" in kwargs and "x_fp8" not in kwargs:
        kwargs["x_fp8"] = kwargs.pop("x")
    _prepare(*args, **kwargs)


def _prepare(
    hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    x_fp8: torch.Tensor,
    x_sf: torch.Tensor,
    topk_idx_out: torch.Tensor,
    topk_weights_out: torch.Tensor,
    is_padding: torch.Tensor | None = None,
) -> None:
    arguments = (
        hidden_states, topk_weights, topk_ids, x_fp8, x_sf, topk_idx_out, topk_weights_out
    )  # fmt: skip
    if is_padding is not None:  # Triton's kernel knows no padding
        staging.prepare_megamoe_inputs(*arguments, is_padding)
        return
    variant = kernel("staging", "prepare_megamoe_inputs", hidden_states.device)
    (variant or staging.prepare_megamoe_inputs)(*arguments)


def eplb_map_to_physical_and_record(
    topk_ids: torch.Tensor,
    expert_load_view: torch.Tensor,
    logical_to_physical_map: torch.Tensor,
    logical_replica_count: torch.Tensor,
    record_enabled: torch.Tensor | bool,
    num_unpadded_tokens: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """``eplb.eplb_map_to_physical_and_record`` in the form that suits the device; the same bits."""
    arguments = (
        topk_ids, expert_load_view, logical_to_physical_map, logical_replica_count, record_enabled
    )  # fmt: skip
    if num_unpadded_tokens is not None:  # Triton's kernel knows no padding
        return eplb.eplb_map_to_physical_and_record(*arguments, num_unpadded_tokens)
    variant = kernel("eplb", "eplb_map_to_physical_and_record", topk_ids.device)
    ids: torch.Tensor = (variant or eplb.eplb_map_to_physical_and_record)(*arguments)
    return ids


def kernel(module: str, name: str, device: torch.device) -> Callable[..., Any] | None:
    """Triton's form of ``name``; None if ``device`` or the installed packages cannot run it."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    if not nvidia or torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return None
    return _import(module, name)


@cache
def _import(module: str, name: str) -> Callable[..., Any] | None:
    try:
        namespace = importlib.import_module(f"megamoe.backends.triton.{module}")
    except ImportError:  # no Triton, or one that does not load
        return None
    function: Callable[..., Any] = getattr(namespace, name)
    return function
