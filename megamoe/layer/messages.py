"""Rows of bytes between the ranks of a process group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def all_to_all(
    rows: torch.Tensor, out: list[int] | None, into: list[int] | None, group: Any
) -> torch.Tensor:
    """``out[r]`` rows of ``rows`` to each rank r; the ``into[r]`` rows from it, on the same device.

    None twice: one row each. ``RuntimeError`` of torch where the group fails.
    """
    # gloo moves memory of the host; on a GPU it stands in where two ranks share one.
    here, device = dist.get_backend(group) == "gloo", rows.device
    rows = rows.cpu() if here else rows.contiguous()
    came = rows.new_empty(len(rows) if into is None else sum(into), *rows.shape[1:])
    dist.all_to_all_single(came, rows, into, out, group=group)
    return came.to(device)


__all__ = ["all_to_all"]
