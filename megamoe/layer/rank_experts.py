"""The experts that one rank holds: the backend, the buffer, and the state of EPLB."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megamoe.backends import CALLABLES, check_backend, load_backend
from megamoe.layer.checks import check_eplb, check_module
from megamoe.layer.eplb import EplbLayerState
from megamoe.layer.loading import Inventory
from megamoe.layer.own_ranks import spanning
from megamoe.layer.ranks import check_ranks
from megamoe.layer.symm_buffer import get_symm_buffer, new_symm_buffer
from megamoe.spec.problem import Sizes
from megamoe.spec.tensors import WEIGHTS


class RankExperts(nn.Module):
    """``num_local_experts`` of ``num_experts`` physical experts, with a backend plugged in.

    Args:
        max_num_tokens: tokens that one call may bring; sizes the symmetric buffer.
        group: process group whose ranks share the buffer; None for one rank.
        num_experts: physical experts of all ranks; a replica counts as one.
        num_local_experts: physical experts held here, from ``experts_start_idx`` on.
        top_k: slots of a token.
        hidden_size, intermediate_size: H and I, multiples of 128.
        prefix: name of the layer in the model.
        num_logical_experts: experts of the checkpoint; fewer than ``num_experts`` where some are
            replicated. Physical expert ``p`` starts as a copy of ``p % num_logical_experts``.
        backend: a name for :func:`megamoe.backends.load_backend`, or a backend object.
    """

    def __init__(
        self,
        max_num_tokens: int,
        *,
        group: Any = None,
        num_experts: int,
        num_local_experts: int,
        experts_start_idx: int,
        top_k: int,
        hidden_size: int,
        intermediate_size: int,
        prefix: str,
        num_logical_experts: int | None = None,
        backend: Any = "auto",
    ) -> None:
        super().__init__()
        check_module(
            prefix, experts_start_idx, num_logical_experts, max_num_tokens=max_num_tokens,
            num_experts=num_experts, num_local_experts=num_local_experts, top_k=top_k,
            hidden_size=hidden_size, intermediate_size=intermediate_size,
        )  # fmt: skip
        self.max_num_tokens = max_num_tokens
        self.group = group
        self.num_experts = num_experts
        self.num_local_experts = num_local_experts
        self.num_logical_experts = num_logical_experts or num_experts
        self.experts_start_idx = experts_start_idx
        self.top_k = top_k
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.prefix = prefix
        self.eplb_state = EplbLayerState()
        self._inventory = Inventory(
            prefix, num_local_experts, experts_start_idx, self.num_logical_experts
        )
        self._buffer_memory: tuple[Any, list[tuple[int, int]]] = None, []
        self._backend_argument = backend
        self._backend: Any = None
        if not isinstance(backend, str):
            self._check_ranks(backend)

    def _local_replicas(self, expert_id: int) -> list[int]:
        """Local indices of the physical experts that hold logical expert ``expert_id``."""
        start = self.experts_start_idx
        return [
            p - start
            for p in range(start, start + self.num_local_experts)
            if p % self.num_logical_experts == expert_id
        ]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """A state dict fills parameters too."""
        super()._load_from_state_dict(state_dict, prefix, *rest)
        for name in WEIGHTS:
            if getattr(self, name) is not None and prefix + name in state_dict:
                self._inventory.add_all(name.startswith("w13"), name.endswith("_scale"))

    def _weights_in_use(self) -> tuple[torch.Tensor, ...]:
        """The four tensors in the form of the backend; ``ValueError`` if there are none yet."""
        raise NotImplementedError

    def _device(self) -> torch.device:
        raise NotImplementedError

    # --- backend and buffer -------------------------------------------------------------------

    @property
    def backend(self) -> Any:
        """The backend object; a name is looked up when it is first needed."""
        if self._backend is None:
            argument = self._backend_argument
            if isinstance(argument, str):
                backend = load_backend(argument, self._device())
            else:
                backend = check_backend(argument, callables=("run", *CALLABLES))
            self._check_ranks(backend)
            self._backend = spanning(backend, self.group) if self._has_ranks else backend
        return self._backend

    @property
    def _has_ranks(self) -> bool:
        return self.group is not None and self.group.size() > 1

    def _check_ranks(self, backend: Any) -> None:
        if getattr(backend, "global_ids", False) or self._has_ranks:
            check_ranks(
                self.prefix, getattr(backend, "name", "given"), self.group, self.num_experts,
                self.num_local_experts, self.experts_start_idx,
            )  # fmt: skip

    @property
    def collective(self) -> bool:
        """Whether the ranks of the group wait for one another, each for the sums of its own
        tokens."""
        return self.group is not None and getattr(self.backend, "global_ids", False)

    def get_symm_buffer(self) -> Any:
        """The buffer for this layer's sizes on its device, shared with every layer like it."""
        sizes = Sizes(
            self.num_experts, self.max_num_tokens, self.top_k, self.hidden_size,
            self.intermediate_size,
        )  # fmt: skip
        factory = getattr(self.backend, "new_symm_buffer", new_symm_buffer)
        return get_symm_buffer(self.group, self._device(), sizes, factory=factory)

    def set_eplb_state(
        self,
        moe_layer_idx: int,
        expert_load_view: torch.Tensor,
        logical_to_physical_map: torch.Tensor,
        logical_replica_count: torch.Tensor,
    ) -> None:
        """Take this layer's rows of the engine's tensors, as views.

        ``expert_load_view`` (layers, P) int32, ``logical_to_physical_map`` (layers, L, R),
        ``logical_replica_count`` (layers, L). The record flag,
        ``eplb_state.should_record_tensor``, is left as it is. ``ValueError`` where a tensor does
        not fit this layer.
        """
        check_eplb(
            self.prefix, moe_layer_idx, expert_load_view, logical_to_physical_map,
            logical_replica_count, self.num_experts, self.num_logical_experts,
        )  # fmt: skip
        self.eplb_state.expert_load_view = expert_load_view[moe_layer_idx]
        self.eplb_state.logical_to_physical_map = logical_to_physical_map[moe_layer_idx]
        self.eplb_state.logical_replica_count = logical_replica_count[moe_layer_idx]
