"""The experts of the checkpoint that an engine's module holds."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn


def checkpoint_experts(module: nn.Module, experts: torch.Tensor, start: int) -> dict[str, Any]:
    """``layer``, None where the prefix has no number, and ``experts`` as [local, checkpoint's].

    ``experts``: local experts, int64; ``start``: the first one's physical id. The engine's map says
    which logical expert a physical one is, since EPLB moves experts; without it physical ``p`` is
    ``p % num_logical_experts``, as it was loaded. An expert that the map does not have is left
    out.
    """
    state = getattr(module, "eplb_state", None)
    table = getattr(state, "logical_to_physical_map", None)
    logical = getattr(module, "num_logical_experts", None) or getattr(module, "num_experts", None)
    pairs = []
    for local in experts.tolist():
        physical = start + local
        if table is not None and state is not None:
            expert = _logical(table, state.logical_replica_count, physical)
        else:
            expert = physical % int(logical) if logical else physical
        if expert is not None:
            pairs.append([local, expert])
    match = re.search(r"(?:^|\.)layers\.(\d+)(?:\.|$)", str(getattr(module, "prefix", "")))
    return {"layer": int(match[1]) if match else None, "experts": pairs}


def _logical(table: torch.Tensor, counts: torch.Tensor, physical: int) -> int | None:
    inside = torch.arange(table.shape[1], device=table.device) < counts.unsqueeze(1)
    rows = ((table == physical) & inside).any(1).nonzero().flatten().tolist()
    return int(rows[0]) if rows else None
