"""Rows of bytes between the ranks of a process group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def all_to_all(
    sent: torch.Tensor, out: list[int] | None, into: list[int] | None, group: Any
) -> torch.Tensor:
    """``out[r]`` rows of ``sent`` to each rank r; the ``into[r]`` rows from it, on the same device.

    None twice: one row each. ``RuntimeError`` of torch where the group fails.
    """
    # gloo moves memory of the host; on a GPU it stands in where two ranks share one.
    here, device = dist.get_backend(group) == "gloo", sent.device
    sent = sent.cpu() if here else sent.contiguous()
    came = sent.new_empty(len(sent) if into is None else sum(into), *sent.shape[1:])
    dist.all_to_all_single(came, sent, into, out, group=group)
    return came.to(device)


__all__ = ["all_to_all"]
