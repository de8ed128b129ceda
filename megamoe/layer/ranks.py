"""Kernels that span the ranks of a process group: the place of each expert, and a group of one."""

from __future__ import annotations

import os
from typing import Any, Final

import torch
import torch.distributed as dist

INTERFACE: Final = (
    "if a host's name is an address that the others cannot reach, set GLOO_SOCKET_IFNAME on each "
    "host to the interface that they share (NCCL_SOCKET_IFNAME for NCCL)"
)
"""What mends a group of several hosts whose ranks do not find one another."""


def check_ranks(
    prefix: str, name: str, group: Any, num_experts: int, num_local_experts: int, start: int
) -> None:
    """Raise ``ValueError`` unless this rank holds the experts that a kernel over ``group`` expects.

    Such a kernel (backend ``name`` with ``global_ids``) computes the rank of physical expert ``p``
    as ``p // num_local_experts``; without a group there is no other rank.
    """
    if group is None:
        if num_local_experts != num_experts:
            raise ValueError(
                f"{prefix}: backend {name} sends tokens to the ranks that hold their experts, and "
                f"only {num_local_experts} of {num_experts} experts are here; give the process "
                "group of all ranks as group="
            )
        return
    ranks, rank = group.size(), group.rank()
    if (num_local_experts * ranks, num_local_experts * rank) != (num_experts, start):
        raise ValueError(
            f"{prefix}: backend {name} needs an equal share of the {num_experts} experts on each "
            f"rank, in the order of ranks; rank {rank} of {ranks} holds "
            f"[{start}, {start + num_local_experts})"
        )


def engine(device: str) -> str:
    """NCCL where each rank of this host has a GPU of its own, else gloo; by torchrun's
    ``LOCAL_WORLD_SIZE``."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    alone = device.startswith("cuda") and torch.cuda.device_count() >= local
    return "nccl" if alone and dist.is_nccl_available() else "gloo"


def one_rank(device: torch.device) -> Any:
    """A process group of this process alone, for a package that takes nothing less.

    The default group where that is one rank, a new group of the default one's backend where it is
    not. In a process without a default group **it becomes the default one**, over a store in
    memory: no address, no network; NCCL for a CUDA device where torch has it, else gloo.
    ``NotImplementedError`` where torch has neither.
    """
    if dist.is_available() and dist.is_initialized():
        if dist.get_world_size() == 1:
            return dist.group.WORLD
        if not _alone or _alone[0] is not dist.group.WORLD:
            # A local check: it does not ask the other ranks, and so does not wait for them.
            rank = dist.get_rank()
            group = dist.new_group([rank], use_local_synchronization=True)
            _alone[:] = [dist.group.WORLD, group]
        return _alone[1]
    nccl = dist.is_available() and device.type == "cuda" and dist.is_nccl_available()
    if not nccl and not (dist.is_available() and dist.is_gloo_available()):
        raise NotImplementedError(
            "a process group of one rank needs torch.distributed with NCCL or gloo, which this "
            "torch was built without; give a process group as group="
        )
    backend = "nccl" if nccl else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    return dist.group.WORLD


_alone: list[Any] = []
"""The default group and the group of one beside it."""
