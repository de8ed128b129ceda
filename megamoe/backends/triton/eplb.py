"""Remap and record in one launch; :mod:`.kernels.eplb` is its kernel."""

from __future__ import annotations

import torch

from megamoe.backends.triton.binaries import launch
from megamoe.backends.triton.kernels.eplb import _remap


def eplb_map_to_physical_and_record(
    topk_ids: torch.Tensor,
    expert_load_view: torch.Tensor,
    logical_to_physical_map: torch.Tensor,
    logical_replica_count: torch.Tensor,
    record_enabled: torch.Tensor | bool,
) -> torch.Tensor:
    """:func:`megamoe.layer.eplb.eplb_map_to_physical_and_record` in one launch; the same bits.

    Integer additions commute, so the load does not depend on the order of the atomics. A replica
    count beyond the map's width gives -1. ``ValueError``, before any write, where map and counts
    differ in length.
    """
    if topk_ids.numel() == 0:
        return topk_ids
    if logical_replica_count.shape[0] != logical_to_physical_map.shape[0]:
        raise ValueError(
            f"logical_replica_count has {logical_replica_count.shape[0]} experts, "
            f"logical_to_physical_map {logical_to_physical_map.shape[0]}; they must be the same"
        )
    device = topk_ids.device
    if not isinstance(record_enabled, torch.Tensor):
        record_enabled = torch.full((1,), record_enabled, dtype=torch.uint8, device=device)
    record = record_enabled.reshape(-1).to(device)
    record = record.view(torch.uint8) if record.dtype == torch.bool else record
    ids = topk_ids.contiguous()
    table = logical_to_physical_map.contiguous()
    out = torch.empty_like(ids)
    load = expert_load_view if expert_load_view.is_contiguous() else expert_load_view.contiguous()
    block = 256
    launch(
        _remap, (-(-ids.numel() // block),),
        ids, load, table, logical_replica_count.contiguous(), record, out, ids.numel(),
        ids.shape[1], table.shape[0], table.shape[1], load.shape[0], BLOCK=block,
    )  # fmt: skip
    if load is not expert_load_view:
        expert_load_view.copy_(load)
    return out
