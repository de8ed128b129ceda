"""The module under test: the routed experts of one rank, as an engine uses them.

It has the public face of vLLM 0.24's module; where vLLM passes its configuration, this takes
``max_num_tokens`` and a process group. The computation itself is a backend's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from megamoe.backends import CALLABLES, checked, load_backend
from megamoe.layer.eplb import EplbLayerState
from megamoe.layer.kernel_weights import check_sizes, per_expert, transform_weights
from megamoe.layer.ops import eplb_map_to_physical_and_record, prepare_megamoe_inputs
from megamoe.layer.ranks import check_ranks
from megamoe.layer.staging import check_staging_inputs
from megamoe.layer.symm_buffer import check_capacity, get_symm_buffer, new_symm_buffer
from megamoe.spec.formats import GROUP
from megamoe.spec.problem import Problem, Sizes, provided
from megamoe.spec.tensors import WEIGHTS


class DeepseekV4MegaMoEExperts(nn.Module):
    """FP8 x FP4 routed experts: ``num_local_experts`` of ``num_experts`` physical ones.

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

    One rank's share is computed here: an id of another rank's expert is a slot without effect,
    and the output is this rank's part of the sum. A backend with ``global_ids`` spans the ranks
    of ``group`` instead: it is given the ids of all ranks and gives the whole sum for the tokens
    of this one. Its call is collective, so it is made for no tokens too.

    A backend offers ``forward(problem)``, which is given the weights in the checkpoint's layout,
    or ``run(y, weights, buffer, num_tokens, *, activation_clamp, fast_math)``, which is given the
    kernel-side weights and the staged buffer and writes ``y``. ``run`` is preferred.
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
        if not 0 <= experts_start_idx <= num_experts - num_local_experts:
            raise ValueError(
                f"{prefix}: local experts [{experts_start_idx}, "
                f"{experts_start_idx + num_local_experts}) are not within the {num_experts} "
                "physical ones; check experts_start_idx and num_local_experts"
            )
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
        self._backend_given = backend
        self._backend: Any = None
        if not isinstance(backend, str):
            self._check_ranks(backend)
        self._weights: tuple[torch.Tensor, ...] | None = None

        def parameter(rows: int, columns: int) -> nn.Parameter:
            zeros = torch.zeros(num_local_experts, rows, columns, dtype=torch.uint8)
            return nn.Parameter(zeros, requires_grad=False)

        self.w13_weight: nn.Parameter | None
        self.w13_weight_scale: nn.Parameter | None
        self.w2_weight: nn.Parameter | None
        self.w2_weight_scale: nn.Parameter | None
        self.w13_weight = parameter(2 * intermediate_size, hidden_size // 2)
        self.w13_weight_scale = parameter(2 * intermediate_size, hidden_size // GROUP)
        self.w2_weight = parameter(hidden_size, intermediate_size // 2)
        self.w2_weight_scale = parameter(hidden_size, intermediate_size // GROUP)

    # --- loading ------------------------------------------------------------------------------

    def weight_loader(
        self,
        param: nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Copy one checkpoint tensor of logical expert ``expert_id`` into its local replicas.

        ``loaded_weight`` is (I, H/2) for w1 and w3, (H, I/2) for w2, or their scales with 32
        values to a byte; one byte an element, of any dtype (I8 and F8_E8M0 in checkpoints): the
        bytes are taken as they are. ``param`` is the parameter of this module that it belongs
        in. Returns, if asked, whether anything was stored: False where no replica is local or
        ``param`` does not take this shard. ``ValueError`` for an unknown shard or a wrong shape.
        """
        if shard_id not in ("w1", "w2", "w3"):
            raise ValueError(f"Unsupported expert shard id: {shard_id}")
        mine = (
            (self.w2_weight, self.w2_weight_scale)
            if shard_id == "w2"
            else (self.w13_weight, self.w13_weight_scale)
        )
        stored = False
        if any(param is p for p in mine):
            for local in self._local_replicas(expert_id):
                shard = param.data[local]
                if shard_id != "w2":
                    first = self.intermediate_size if shard_id == "w3" else 0
                    shard = shard.narrow(0, first, self.intermediate_size)
                if shard.shape != loaded_weight.shape:
                    raise ValueError(
                        "DeepSeek V4 MegaMoE expert weight shape mismatch for "
                        f"{weight_name}: parameter shard {tuple(shard.shape)} vs checkpoint "
                        f"{tuple(loaded_weight.shape)}"
                    )
                # copy_ would convert a scale's value, 2^3 to 8, where its byte, 130, is meant.
                shard.copy_(_as_bytes(loaded_weight, weight_name))
                stored = True
        return stored if return_success else None

    def _local_replicas(self, expert_id: int) -> list[int]:
        """Local indices of the physical experts that hold logical expert ``expert_id``."""
        start = self.experts_start_idx
        return [
            p - start
            for p in range(start, start + self.num_local_experts)
            if p % self.num_logical_experts == expert_id
        ]

    def finalize_weights(self) -> None:
        """Make the kernel-side weights and drop the loader's parameters; a second call is idle.

        ``ValueError`` where H or I is not a multiple of 128; the parameters stay.
        """
        if self._weights is not None:
            return
        check_sizes(self.hidden_size, self.intermediate_size)
        backend = self.backend
        loaded = tuple(self._loaded())
        if provided(backend, "run"):
            self._weights = packed_weights(backend, *loaded)
        else:
            self._weights = loaded  # a Problem has the checkpoint's layout
        for name in WEIGHTS:
            setattr(self, name, None)

    def _loaded(self) -> list[torch.Tensor]:
        return [getattr(self, name).data for name in WEIGHTS]

    def get_expert_weights(self) -> list[torch.Tensor]:
        """Every weight tensor as (E, n): row ``e`` is all of local expert ``e``, contiguous.

        They are views of the weights in use, for transfer between ranks: writing a row replaces
        an expert. Call it after :meth:`finalize_weights`; before, they are the loader's.
        """
        tensors = self._weights if self._weights is not None else self._loaded()
        return [per_expert(t) for t in tensors]

    # --- running ------------------------------------------------------------------------------

    @property
    def backend(self) -> Any:
        """The backend object; a name is looked up when it is first needed."""
        if self._backend is None:
            given = self._backend_given
            if isinstance(given, str):
                found = load_backend(given, self._device())
                self._check_ranks(found)
            else:
                found = checked(given, callables=("run", *CALLABLES))
            self._backend = found
        return self._backend

    def _check_ranks(self, backend: Any) -> None:
        if getattr(backend, "global_ids", False):
            check_ranks(
                self.prefix, getattr(backend, "name", "given"), self.group, self.num_experts,
                self.num_local_experts, self.experts_start_idx,
            )  # fmt: skip

    @property
    def collective(self) -> bool:
        """Whether the ranks of the group wait for one another, each for its own tokens' sum."""
        return self.group is not None and getattr(self.backend, "global_ids", False)

    def _device(self) -> torch.device:
        if self._weights is not None:
            return self._weights[0].device
        assert self.w13_weight is not None
        return self.w13_weight.device

    def _apply(self, fn: Any, recurse: bool = True) -> DeepseekV4MegaMoEExperts:
        """Move finalized weights along with the module, as ``to`` and ``cuda`` promise."""
        super()._apply(fn, recurse)
        if self._weights is not None:
            self._weights = tuple(fn(t) for t in self._weights)
        return self

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
        ``eplb_state.should_record_tensor``, is left as it is.
        """
        self.eplb_state.expert_load_view = expert_load_view[moe_layer_idx]
        self.eplb_state.logical_to_physical_map = logical_to_physical_map[moe_layer_idx]
        self.eplb_state.logical_replica_count = logical_replica_count[moe_layer_idx]

    def forward(
        self,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *,
        activation_clamp: float | None,
        fast_math: bool = True,
    ) -> torch.Tensor:
        """This rank's share of the layer: (T, H) bfloat16 in and out.

        ``topk_weights`` (T, K), ``topk_ids`` (T, K) integer: logical experts where an EPLB state
        is set, physical ones of all ranks otherwise. All that can be wrong with the arguments is
        raised as ``ValueError`` before the buffer or the load is written.
        """
        tokens = hidden_states.shape[0]
        check_capacity(tokens, self.max_num_tokens)
        # Not empty_like: a kernel writes dense rows, whatever the strides of the input.
        y = torch.empty(hidden_states.shape, dtype=torch.bfloat16, device=hidden_states.device)
        if tokens == 0 and not self.collective:
            return y
        check_staging_inputs(hidden_states, topk_weights, topk_ids)
        self._check(hidden_states, topk_ids)
        assert self._weights is not None  # _check
        backend = self.backend
        if provided(backend, "ready"):
            backend.ready(hidden_states.device)
        buffer = self.get_symm_buffer()
        ids = self._served_ids(self._physical_ids(topk_ids))
        prepare = getattr(backend, "prepare", prepare_megamoe_inputs)
        prepare(
            hidden_states,
            topk_weights,
            ids,
            buffer.x[:tokens],
            buffer.x_sf[:tokens],
            buffer.topk_idx[:tokens],
            buffer.topk_weights[:tokens],
        )
        if provided(backend, "run"):
            backend.run(
                y,
                self._weights,
                buffer,
                tokens,
                activation_clamp=activation_clamp,
                fast_math=fast_math,
            )
            return y
        w13, w13_scale, w2, w2_scale = self._weights
        out = backend.forward(
            Problem(
                hidden_states.contiguous(),
                buffer.topk_idx[:tokens].clone(),
                buffer.topk_weights[:tokens].clone(),
                w13,
                w13_scale,
                w2,
                w2_scale,
                activation_clamp=activation_clamp,
                fast_math=fast_math,
                max_num_tokens=self.max_num_tokens,
            )
        )
        return self._taken(out, buffer, tokens)

    def _check(self, hidden_states: torch.Tensor, topk_ids: torch.Tensor) -> None:
        """What the contract has no text for, and would otherwise fail half way."""
        if self._weights is None:
            raise ValueError(f"{self.prefix}: call finalize_weights() before forward()")
        if not (provided(self.backend, "run") or provided(self.backend, "forward")):
            raise ValueError(
                f"{self.prefix}: backend {self.backend.name} has neither run nor forward"
            )
        tokens = hidden_states.shape[0]
        for name, tensor, shape in (
            ("hidden_states", hidden_states, (tokens, self.hidden_size)),
            ("topk_ids", topk_ids, (tokens, self.top_k)),
        ):
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{self.prefix}: {name} has shape {tuple(tensor.shape)}, expected {shape}"
                )
        if hidden_states.dtype != torch.bfloat16:
            raise ValueError(
                f"{self.prefix}: hidden_states are {hidden_states.dtype}, expected torch.bfloat16"
            )

    def _physical_ids(self, topk_ids: torch.Tensor) -> torch.Tensor:
        state = self.eplb_state
        if not state.active:
            return topk_ids
        assert state.expert_load_view is not None
        assert state.logical_to_physical_map is not None
        assert state.logical_replica_count is not None
        record = state.should_record_tensor
        remap = getattr(self.backend, "eplb_map", eplb_map_to_physical_and_record)
        ids: torch.Tensor = remap(
            topk_ids,
            state.expert_load_view,
            state.logical_to_physical_map,
            state.logical_replica_count,
            True if record is None else record,
        )
        return ids

    def _served_ids(self, physical: torch.Tensor) -> torch.Tensor:
        """Index among the experts that the call reaches, -1 for any other: a slot of no effect.

        Those held here, or, of a backend with ``global_ids``, those of all ranks. For a backend
        that ``ignores_foreign_ids`` such a slot may have any index that none of them has.
        """
        first, count = self.experts_start_idx, self.num_local_experts
        if getattr(self.backend, "global_ids", False):
            first, count = 0, self.num_experts
        if getattr(self.backend, "ignores_foreign_ids", False):
            # One launch or none, in place of five.
            if first == 0:
                return physical
            if physical.dtype in (torch.int32, torch.int64):  # others might wrap into the range
                return physical - first
        index = physical.long() - first
        return torch.where((index >= 0) & (index < count), index, -1)

    def _taken(self, out: Any, buffer: Any, tokens: int) -> torch.Tensor:
        """``y``, after the stages that a kernel would have left in the buffer are put there."""
        if not isinstance(out, Mapping):
            only_y: torch.Tensor = out
            return only_y
        for name in ("l2_acts", "l2_acts_sf"):
            if name in out and hasattr(buffer, name):
                target = getattr(buffer, name)[:tokens]
                target.view(torch.uint8).copy_(out[name].view(torch.uint8))
        result: torch.Tensor = out["y"]
        return result


def packed_weights(backend: Any, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The four checkpoint tensors as ``backend.run`` wants them.

    ``pack_weights`` is a backend's own form; without it ``run`` gets what ``transform_weights``
    makes, the backend's or else the project's.
    """
    transform = getattr(backend, "transform_weights", transform_weights)
    return tuple(getattr(backend, "pack_weights", transform)(*weights))


def _as_bytes(tensor: torch.Tensor, weight_name: str) -> torch.Tensor:
    if tensor.element_size() != 1:
        raise ValueError(
            f"{weight_name}: {tensor.dtype} elements, expected one byte each; is this checkpoint "
            "FP4 with UE8M0 scales?"
        )
    return tensor.view(torch.uint8)
