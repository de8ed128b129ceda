"""Expert-parallel load balancing: logical to physical expert ids, and how often each is used.

Pure torch, the same code on CPU and CUDA, without a synchronisation. Source: the numerics
contract, stage "remap" (vLLM 0.24, ``fused_moe/router/base_router.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megamoe.spec.contract import NEWEST, Contract


@dataclass
class EplbLayerState:
    """The replicas of one layer; views into the engine's tensors of all layers."""

    expert_load_view: torch.Tensor | None = None
    """(physical experts) int32, tokens seen by each; added to in place."""
    logical_to_physical_map: torch.Tensor | None = None
    """(logical experts, replicas) integer physical ids; -1 where an expert has fewer."""
    logical_replica_count: torch.Tensor | None = None
    """(logical experts) integer, replicas of each."""
    should_record_tensor: torch.Tensor | None = None
    """One bool on the device; None: always record."""

    @property
    def active(self) -> bool:
        """Whether ids need a mapping."""
        return self.logical_to_physical_map is not None


def eplb_map_to_physical_and_record(
    topk_ids: torch.Tensor,
    expert_load_view: torch.Tensor,
    logical_to_physical_map: torch.Tensor,
    logical_replica_count: torch.Tensor,
    record_enabled: torch.Tensor | bool,
    num_unpadded_tokens: torch.Tensor | int | None = None,
    *,
    contract: Contract = NEWEST,
) -> torch.Tensor:
    """Physical expert of every (token, slot), and one count for each in the load.

    ``topk_ids`` (T, K) integer; ``expert_load_view`` (P,) int32, changed in place;
    ``logical_to_physical_map`` (L, R); ``logical_replica_count`` (L,); ``record_enabled`` one
    bool. Gives ids of the dtype and shape of ``topk_ids``; an empty input is returned itself.

    Ids are cast to int32 first, so a wider id wraps. An id outside [0, L) gives -1. A map entry
    outside [0, P) is returned as it is and not counted; nor are rows from ``num_unpadded_tokens``
    on, which are padding. The token's row chooses the replica, by Knuth's multiplicative hash.
    """
    if topk_ids.numel() == 0:
        return topk_ids
    device = topk_ids.device
    logical = topk_ids.to(torch.int32).long()
    valid = (logical >= 0) & (logical < logical_to_physical_map.shape[0])
    row = torch.arange(topk_ids.shape[0], device=device).unsqueeze(-1)
    logical = torch.where(valid, logical, 0)
    if contract.replica_choice.value == "token-hash":
        place = (row * contract.replica_hash.value) & 0xFFFFFFFF
    else:
        place = torch.arange(topk_ids.numel(), device=device).view(topk_ids.shape)
    replica = place % logical_replica_count[logical].long().clamp_min(1)
    physical = torch.where(valid, logical_to_physical_map[logical, replica].long(), -1)

    in_load = (physical >= 0) & (physical < expert_load_view.shape[0])
    in_load &= torch.as_tensor(record_enabled, device=device).bool()
    if num_unpadded_tokens is not None and contract.padding_known.value:
        in_load &= row < num_unpadded_tokens
    # Ids that do not count add 0 to expert 0: no data-dependent shape, so nothing waits.
    expert_load_view.index_add_(
        0,
        torch.where(in_load, physical, 0).flatten(),
        in_load.flatten().to(expert_load_view.dtype),
    )
    return physical.to(topk_ids.dtype)


def served_ids(
    physical: torch.Tensor, first: int, count: int, *, foreign_may_stay: bool
) -> torch.Tensor:
    """Physical ids as indices of the ``count`` experts from ``first`` on, -1 for any other id.

    ``foreign_may_stay``: any other id may become any index outside of [0, count).
    """
    if foreign_may_stay:
        # One launch or none, in place of five.
        if first == 0:
            return physical
        if physical.dtype in (torch.int32, torch.int64):  # others might wrap into the range
            return physical - first
    index = physical.long() - first
    return torch.where((index >= 0) & (index < count), index, -1)
