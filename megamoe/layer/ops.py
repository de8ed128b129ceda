"""The module's own staging and remap: Triton's kernels on an NVIDIA GPU, torch's code elsewhere.

Both give the same bits; a backend that brings its own ``prepare`` or ``eplb_map`` is not asked
here. Which one it is depends on the device of the first tensor alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any, Final

import torch

from megamoe.layer import eplb, staging

LEAST_CAPABILITY: Final = (8, 0)
"""The oldest that Triton supports."""


def prepare_megamoe_inputs(hidden_states: torch.Tensor, *others: torch.Tensor) -> None:
    """``staging.prepare_megamoe_inputs`` by what suits the device; the same bits."""
    name = "prepare_megamoe_inputs"
    chosen = kernel("staging", name, hidden_states.device) or staging.prepare_megamoe_inputs
    chosen(hidden_states, *others)


def eplb_map_to_physical_and_record(topk_ids: torch.Tensor, *others: Any) -> torch.Tensor:
    """``eplb.eplb_map_to_physical_and_record`` by what suits the device."""
    name = "eplb_map_to_physical_and_record"
    chosen = kernel("eplb", name, topk_ids.device) or eplb.eplb_map_to_physical_and_record
    ids: torch.Tensor = chosen(topk_ids, *others)
    return ids


def kernel(module: str, name: str, device: torch.device) -> Callable[..., Any] | None:
    """Triton's form of ``name``; None where ``device`` or what is installed cannot run it."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    if not nvidia or torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return None
    return _imported(module, name)


@cache
def _imported(module: str, name: str) -> Callable[..., Any] | None:
    try:
        found = importlib.import_module(f"megamoe.backends.triton.{module}")
    except ImportError:  # no Triton, or one that does not load
        return None
    made: Callable[..., Any] = getattr(found, name)
    return made
