"""The common part of both faces of the layer: one call of the experts that a rank holds.

:mod:`megamoe.layer.experts` has the face of vLLM 0.24, :mod:`megamoe.layer.deep_gemm_experts` that
of vLLM 0.33. A face owns its parameters and their loading.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, ClassVar

import torch

from megamoe.layer.checks import (
    check_apart,
    check_clamp,
    check_flag,
    check_tensors,
    check_wide_ids,
    dense,
    extent,
)
from megamoe.layer.eplb import served_ids
from megamoe.layer.modes import without_autocast
from megamoe.layer.ops import eplb_map_to_physical_and_record, prepare_megamoe_inputs
from megamoe.layer.rank_experts import RankExperts
from megamoe.layer.staging import check_staging_inputs
from megamoe.layer.symm_buffer import check_capacity
from megamoe.spec.contract import Contract
from megamoe.spec.features import Activation, features_of
from megamoe.spec.problem import Problem, provides


class RoutedExperts(RankExperts):
    """The experts that a rank holds, and their call. The arguments are those of the base class.

    Without ``group`` one rank's share is computed: an id of another rank's expert is a slot without
    effect, and the output is this rank's part of the sum. With a group of several ranks the call is
    collective, so it is made for no tokens too: it is given the ids of all ranks and gives the
    whole sum for the tokens of this one. A backend with ``global_ids`` or ``forward_group`` spans
    the ranks itself; for any other :class:`megamoe.layer.expert_parallel.ExpertParallel` does.

    A backend offers ``forward(problem)``, which is given the weights in the checkpoint's layout,
    or ``run(y, weights, buffer, num_tokens, *, activation_clamp, fast_math)``, which is given the
    kernel-side weights and the staged buffer and writes ``y``. ``run`` is preferred.
    """

    face: ClassVar[Contract]
    """The contract whose words refuse a call. The backend decides the computation."""

    def _layer(
        self,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation_clamp: float | None,
        fast_math: bool,
        **options: Any,
    ) -> torch.Tensor:
        """This rank's share of the routed experts: (T, H) bfloat16 in and out.

        ``options`` are further fields of the problem: such a call goes to the backend's
        ``forward``, and ``NotImplementedError`` names a feature that its ``features`` do not list.
        Every error of the arguments is raised before the buffer or the load is written.
        docs/contract.md, "The engine's tensors", describes the tensors and the surroundings of the
        call: a backend is given dense ones, and no autocast.
        """
        try:
            call = self._prepare(
                hidden_states, topk_weights, topk_ids, activation_clamp, fast_math, options
            )
        except Exception:
            # The other ranks wait for this one. If this is its first call, the backend was not
            # looked up yet.
            if self._has_ranks:
                with suppress(ValueError, NotImplementedError):
                    _ = self.backend
            refuse = getattr(self._backend, "refuse", None)
            if refuse is not None:
                refuse(self._device())
            raise
        if call is None:
            return torch.empty_like(hidden_states, dtype=torch.bfloat16)
        with without_autocast(hidden_states.device):
            return self._compute(call, hidden_states, activation_clamp, fast_math, options)

    def _prepare(
        self,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation_clamp: float | None,
        fast_math: bool,
        options: Mapping[str, Any],
    ) -> tuple[Any, tuple[torch.Tensor, ...], tuple[str, ...]] | None:
        """The staged buffer, the weights and the features; None of a call that has no work."""
        check_clamp(self.prefix, activation_clamp)
        check_flag(self.prefix, "fast_math", fast_math)
        check_tensors(self.prefix, self._device(), hidden_states, topk_weights, topk_ids)
        tokens = hidden_states.shape[0]
        check_capacity(tokens, self.max_num_tokens, self.face)
        if tokens == 0 and not self.collective:
            return None
        check_staging_inputs(hidden_states, topk_weights, topk_ids, self.face)
        weights = self._weights_in_use()
        self._check(hidden_states, topk_ids)
        backend = self.backend
        if provides(backend, "ready"):
            backend.ready(hidden_states.device)
        features = self._features_of(activation_clamp, fast_math, options)
        buffer = self.get_symm_buffer()
        self._check_memory(buffer, hidden_states, topk_weights, topk_ids)
        with without_autocast(hidden_states.device):
            ids = self._served_ids(self._physical_ids(dense(topk_ids)))
            prepare = getattr(backend, "prepare", prepare_megamoe_inputs)
            prepare(
                dense(hidden_states),
                dense(topk_weights.float()),
                ids,
                buffer.x[:tokens],
                buffer.x_sf[:tokens],
                buffer.topk_idx[:tokens],
                buffer.topk_weights[:tokens],
            )
        return buffer, weights, features

    def _compute(
        self,
        call: tuple[Any, tuple[torch.Tensor, ...], tuple[str, ...]],
        hidden_states: torch.Tensor,
        activation_clamp: float | None,
        fast_math: bool,
        options: Mapping[str, Any],
    ) -> torch.Tensor:
        """``y`` of a call that is staged."""
        buffer, weights, features = call
        backend, tokens = self.backend, hidden_states.shape[0]
        if provides(backend, "run") and not features:
            y = torch.empty(hidden_states.shape, dtype=torch.bfloat16, device=hidden_states.device)
            backend.run(
                y,
                weights,
                buffer,
                tokens,
                activation_clamp=activation_clamp,
                fast_math=fast_math,
            )
            return y
        w13, w13_scale, w2, w2_scale = weights
        out = backend.forward(
            Problem(
                dense(hidden_states),
                buffer.topk_idx[:tokens].clone(),
                buffer.topk_weights[:tokens].clone(),
                w13,
                w13_scale,
                w2,
                w2_scale,
                activation_clamp=activation_clamp,
                fast_math=fast_math,
                max_num_tokens=self.max_num_tokens,
                **options,
            )
        )
        return self._store_stages(out, buffer, tokens)

    def _features_of(
        self, clamp: float | None, fast_math: bool, options: Mapping[str, Any]
    ) -> tuple[str, ...]:
        """The features of a call; ``NotImplementedError`` for one that the backend has not."""
        if not options:  # of every ordinary call
            return ()
        act = Activation(
            options.get("activation", "swiglu"), clamp, options.get("activation_alpha", 1.0),
            options.get("activation_beta", 0.0), fast_math,
        )  # fmt: skip
        features = features_of(act, "bf16", shared_expert=False, shared_output=False)
        for name in features:
            if name not in getattr(self.backend, "features", ()):
                raise NotImplementedError(
                    f"{self.prefix}: backend {self.backend.name} does not compute {name}"
                )
        return features

    def _check(self, hidden_states: torch.Tensor, topk_ids: torch.Tensor) -> None:
        """Check arguments for which the contract has no text, and which would fail half way."""
        if not (provides(self.backend, "run") or provides(self.backend, "forward")):
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
        if self.eplb_state.active:
            check_wide_ids(self.prefix, topk_ids)

    def _check_memory(
        self, buffer: Any, hidden: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
    ) -> None:
        """Nothing that the call reads may lie where it writes."""
        if self._buffer_memory[0] is not buffer:
            parts = vars(buffer).values() if hasattr(buffer, "__dict__") else ()
            extents = [extent(part) for part in parts if isinstance(part, torch.Tensor)]
            self._buffer_memory = buffer, extents
        writes, load = self._buffer_memory[1], self.eplb_state.expert_load_view
        read = {"hidden_states": hidden, "topk_weights": weights, "topk_ids": ids}
        check_apart(self.prefix, read, writes if load is None else [*writes, extent(load)])

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

        Those held here, or, of a backend with ``global_ids``, those of all ranks.
        """
        first, count = self.experts_start_idx, self.num_local_experts
        if getattr(self.backend, "global_ids", False):
            first, count = 0, self.num_experts
        as_they_are = getattr(self.backend, "ignores_foreign_ids", False)
        return served_ids(physical, first, count, foreign_may_stay=as_they_are)

    def _store_stages(self, out: Any, buffer: Any, tokens: int) -> torch.Tensor:
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
