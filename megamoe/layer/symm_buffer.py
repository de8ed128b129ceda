"""The symmetric buffer: staging writes into it, and the fused kernel reads from it.

On one rank it is plain memory of the layout that the ranks of a group would share. One buffer
serves every layer of a model with the same sizes, so it is cached, and a layer must never rely on
its old content.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch

from megamoe.layer.modes import lasting
from megamoe.spec.contract import NEWEST, Contract
from megamoe.spec.formats import GROUP
from megamoe.spec.problem import Sizes
from megamoe.spec.texts import text

CAPACITY_MULTIPLE: Final = 384
"""Rows are allotted in this multiple: the least common one of the kernel's M blocks (8 to 192)."""


@dataclass
class SymmBuffer:
    """Buffers of one rank for ``capacity`` tokens; zeros when new."""

    x: torch.Tensor
    """(capacity, H) float8_e4m3fn: staged hidden states."""
    x_sf: torch.Tensor
    """(capacity, H/128) int32: their scale factors, four UE8M0 bytes to a word."""
    topk_idx: torch.Tensor
    """(capacity, K) int64: experts of this rank. A slot that is not served here holds -1, or any id
    outside of this rank's experts if the backend sets ``ignores_foreign_ids``."""
    topk_weights: torch.Tensor
    """(capacity, K) float32."""
    l2_acts: torch.Tensor
    """(capacity, K, I) float8_e4m3fn: requantised activations by token and slot."""
    l2_acts_sf: torch.Tensor
    """(capacity, K, I/32) uint8: their scale factors."""
    max_num_tokens: int
    """Tokens that a call may bring; the capacity is this, aligned up to 384."""
    group: Any = None
    """The process group; held here so that the cache's key, its id, stays its own."""

    @property
    def capacity(self) -> int:
        """Rows allotted."""
        return self.x.shape[0]


def aligned_capacity(max_num_tokens: int) -> int:
    """Rows for ``max_num_tokens``: the next multiple of 384, at least one."""
    return max(1, -(-max_num_tokens // CAPACITY_MULTIPLE)) * CAPACITY_MULTIPLE


def check_capacity(num_tokens: int, max_num_tokens: int, contract: Contract = NEWEST) -> None:
    """Raise the contract's ``ValueError`` for more tokens than a buffer was sized for."""
    if num_tokens > max_num_tokens:
        raise ValueError(text("capacity", contract, tokens=num_tokens, most=max_num_tokens))


def new_symm_buffer(group: Any, device: torch.device, sizes: Sizes) -> SymmBuffer:
    """A new buffer of zeros. ``num_experts`` decides nothing here; in a kernel's own it may."""
    rows, top_k = aligned_capacity(sizes.max_num_tokens), sizes.top_k
    hidden, inter = sizes.hidden_size, sizes.intermediate_size

    def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(rows, *shape, dtype=dtype, device=device)

    return SymmBuffer(
        x=zeros(hidden, dtype=torch.uint8).view(torch.float8_e4m3fn),
        x_sf=zeros(hidden // 128, dtype=torch.int32),
        topk_idx=zeros(top_k, dtype=torch.int64),
        topk_weights=zeros(top_k, dtype=torch.float32),
        l2_acts=zeros(top_k, inter, dtype=torch.uint8).view(torch.float8_e4m3fn),
        l2_acts_sf=zeros(top_k, inter // GROUP, dtype=torch.uint8),
        max_num_tokens=sizes.max_num_tokens,
        group=group,
    )


_CACHE: dict[tuple[Any, ...], Any] = {}


def get_symm_buffer(
    group: Any, device: torch.device, sizes: Sizes, *, factory: Any = new_symm_buffer
) -> Any:
    """The buffer for these sizes, the same object at every call.

    ``factory`` takes the three arguments; a backend whose kernel wants memory of its own kind
    brings its own, and its buffers are kept apart.
    """
    key = (factory, id(group), str(device), sizes)
    if key not in _CACHE:
        # The group is kept beside the buffer: an id may be given out again once it is gone.
        with lasting():
            _CACHE[key] = (factory(group, device, sizes), group)
    return _CACHE[key][0]


def clear_symm_buffers() -> None:
    """Forget every buffer; layers that hold one keep it."""
    _CACHE.clear()
