"""What a backend is given and what it may return: plain data, shared by everybody.

Nothing here computes. The oracle and the backends both import this module and
:mod:`megamoe.spec.formats`, and nothing else in common.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch


@dataclass(frozen=True)
class Sizes:
    """What a symmetric buffer is made for."""

    num_experts: int
    """Physical experts of all ranks that share the buffer; E on one rank."""
    max_num_tokens: int
    """Tokens that a call may bring to a rank; buffers have at least so many rows."""
    top_k: int
    """K: ids and weights are (tokens, K)."""
    hidden_size: int
    """H: hidden states are (tokens, H)."""
    intermediate_size: int
    """I: activations between the products are (tokens, K, I)."""


@dataclass(frozen=True)
class Problem:
    """One forward call of the layer, with weights in the checkpoint's layout.

    Shapes: ``T`` tokens, ``H`` hidden, ``I`` intermediate, ``E`` local physical experts, ``K``
    top-k. All tensors are contiguous and on one device. Experts that no id names hold zeros.
    """

    hidden_states: torch.Tensor
    """(T, H) bfloat16."""
    topk_ids: torch.Tensor
    """(T, K) int64, physical; -1 marks a slot that takes no part."""
    topk_weights: torch.Tensor
    """(T, K) float32, routing weights; the routed scaling factor is already in them."""
    w13_weight: torch.Tensor
    """(E, 2I, H/2) uint8, two E2M1 a byte; rows [0, I) gate (w1), [I, 2I) up (w3)."""
    w13_weight_scale: torch.Tensor
    """(E, 2I, H/32) uint8, UE8M0."""
    w2_weight: torch.Tensor
    """(E, H, I/2) uint8, two E2M1 a byte."""
    w2_weight_scale: torch.Tensor
    """(E, H, I/32) uint8, UE8M0."""
    activation_clamp: float | None
    """Upper bound of the gate, bound of the up projection on both sides; None for none."""
    fast_math: bool
    """Silu by approximate exponential and reciprocal (True) or by expf and division (False)."""
    max_num_tokens: int
    """Capacity of the symmetric buffer; at least T."""

    @property
    def num_tokens(self) -> int:
        return self.hidden_states.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.hidden_states.shape[1]

    @property
    def intermediate_size(self) -> int:
        return self.w13_weight.shape[1] // 2

    @property
    def num_experts(self) -> int:
        return self.w13_weight.shape[0]

    @property
    def top_k(self) -> int:
        return self.topk_ids.shape[1]

    @property
    def letters(self) -> dict[str, int]:
        """The sizes by their letters, for :meth:`megamoe.spec.tensors.Tensor.sizes`."""
        return {
            "T": self.num_tokens, "K": self.top_k, "H": self.hidden_size,
            "I": self.intermediate_size, "E": self.num_experts,
        }  # fmt: skip

    @property
    def buffer_sizes(self) -> Sizes:
        """What its symmetric buffer is made for."""
        return Sizes(
            self.num_experts, self.max_num_tokens, self.top_k, self.hidden_size,
            self.intermediate_size,
        )  # fmt: skip

    def to(self, device: str | torch.device) -> Problem:
        """The same problem with every tensor on ``device``."""
        moved: dict[str, Any] = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)


Output = torch.Tensor | Mapping[str, torch.Tensor]
"""What ``forward`` returns: ``y`` alone, or a mapping with ``y`` and any stage.

:data:`megamoe.spec.tensors.STAGES` names them.
"""


@runtime_checkable
class Backend(Protocol):
    """Something that computes the layer, or a part of it.

    Besides the two names it may offer any of these callables; a case kind whose callable is
    missing is reported as ``not provided``. :data:`megamoe.spec.tensors.TENSORS` says shape and
    dtypes of each tensor:

    ``forward(problem: Problem) -> Output``

    ``prepare(hidden_states, topk_weights, topk_ids, x_fp8, x_sf, topk_idx_out,
    topk_weights_out) -> None``, in place: (T, H) bf16, (T, K) float32, (T, K) int32 or int64 to
    (T, H) float8_e4m3fn, (T, H/128) int32, (T, K) int64, (T, K) float32.

    ``eplb_map(topk_ids, expert_load_view, logical_to_physical_map, logical_replica_count,
    record_enabled) -> ids`` with the dtype and shape of ``topk_ids``; adds to
    ``expert_load_view`` in place.

    ``transform_weights(w13, w13_scale, w2, w2_scale) -> (w13, w13_sf, w2, w2_sf)``: the
    kernel-side weight layout of kind ``layout``, scale factors as int32.
    """

    name: str
    accumulator: str


def provided(backend: Any, callable_name: str) -> bool:
    """Whether ``backend`` offers ``callable_name``."""
    return callable(getattr(backend, callable_name, None))
