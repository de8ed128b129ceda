"""Remap and record as one Triton kernel; in interpreter mode the same code runs on a CPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megamoe.backends.triton.binaries import launch


@triton.jit
def _remap(
    ids, load, table, counts, record, out, total, top_k, logical_experts, table_stride,
    physical_experts, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    # The cast wraps a wide id, as the contract has it; an invalid one must not be looked up.
    logical = tl.load(ids + at, mask=inside, other=-1).to(tl.int32)
    valid = (logical >= 0) & (logical < logical_experts)
    logical = tl.where(valid, logical, 0).to(tl.int64)
    # Knuth's hash of the token's row, modulo 2^32, in 64 bits: no wrap can be signed.
    hashed = ((at // top_k).to(tl.int64) * 2654435769) & 0xFFFFFFFF
    count = tl.maximum(tl.load(counts + logical, mask=valid, other=1).to(tl.int64), 1)
    replica = hashed % count
    # A count beyond the table's width is wrong; it must not reach the neighbour's replicas.
    known = valid & (replica < table_stride)
    physical = tl.load(table + logical * table_stride + replica, mask=known, other=-1)
    physical = physical.to(tl.int64)
    tl.store(out + at, physical.to(out.dtype.element_ty), mask=inside)
    counted = inside & (physical >= 0) & (physical < physical_experts)
    counted = counted & (tl.load(record) != 0)
    tl.atomic_add(load + tl.where(counted, physical, 0), 1, mask=counted, sem="relaxed")


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
