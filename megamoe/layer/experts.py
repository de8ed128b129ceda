"""The layer with the face of vLLM 0.24: parameters as in a checkpoint, then ``finalize_weights``.

Where vLLM passes its configuration, this takes ``max_num_tokens`` and a process group. The
computation itself is a backend's.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import nn

from megamoe.layer.checks import check_flag
from megamoe.layer.kernel_weights import check_sizes, packed_weights, per_expert
from megamoe.layer.loading import as_bytes, check_load, check_mine, looks_converted
from megamoe.layer.modes import lasting
from megamoe.layer.routed import RoutedExperts
from megamoe.spec.contract import BASE
from megamoe.spec.formats import GROUP
from megamoe.spec.problem import provides
from megamoe.spec.tensors import WEIGHTS
from megamoe.spec.texts import text


class DeepseekV4MegaMoEExperts(RoutedExperts):
    """FP8 x FP4 routed experts; for the arguments see :class:`RoutedExperts`.

    The clamp of the activation is an argument of :meth:`forward`.
    """

    face = BASE

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
        super().__init__(
            max_num_tokens, group=group, num_experts=num_experts,
            num_local_experts=num_local_experts, experts_start_idx=experts_start_idx, top_k=top_k,
            hidden_size=hidden_size, intermediate_size=intermediate_size, prefix=prefix,
            num_logical_experts=num_logical_experts, backend=backend,
        )  # fmt: skip
        self._weights: tuple[torch.Tensor, ...] | None = None

        def parameter(rows: int, columns: int) -> nn.Parameter:
            with lasting():
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
        values to a byte. Weights are int8 or uint8, scales float8_e8m0fnu or uint8; the bytes are
        taken as they are. ``param`` is the parameter of this module that it belongs in. Returns,
        if asked, whether anything was stored: False where no replica is local or ``param`` does
        not take this shard. ``ValueError``, before anything is stored, for an unknown shard, a
        wrong shape or type, the name of a weight for a scale, a parameter of another module, and
        for any call after :meth:`finalize_weights`.
        """
        check_load(self.prefix, self.num_logical_experts, loaded_weight, weight_name, expert_id)
        if shard_id not in ("w1", "w2", "w3"):
            raise ValueError(text("shard-id", self.face, shard_id=shard_id))
        if self._weights is not None:
            raise ValueError(
                f"{self.prefix}: {weight_name} comes after finalize_weights(), and would not reach "
                "the weights in use; make a new module for new weights"
            )
        check_mine(self.prefix, param, self._parameters.values(), weight_name)
        mine = (
            (self.w2_weight, self.w2_weight_scale)
            if shard_id == "w2"
            else (self.w13_weight, self.w13_weight_scale)
        )
        scale = param is mine[1]
        replicas = self._local_replicas(expert_id) if any(param is p for p in mine) else []
        for local in replicas:
            shard = self._shard(param, local, shard_id)
            if shard.shape != loaded_weight.shape:
                raise ValueError(
                    text(
                        "weight-shape", self.face, name=weight_name,
                        shard=tuple(shard.shape), loaded=tuple(loaded_weight.shape),
                    )
                )  # fmt: skip
            # copy_ would convert a scale's value, 2^3 to 8, where its byte, 130, is meant.
            data = as_bytes(loaded_weight, weight_name, scale)
            shard.copy_(data)
            doubtful = scale and looks_converted(data, loaded_weight.dtype)
            self._inventory.add(local, shard_id, scale, doubtful)
        return bool(replicas) if return_success else None

    def _shard(self, param: nn.Parameter, local: int, shard_id: str) -> torch.Tensor:
        """The rows of local expert ``local`` that ``shard_id`` fills."""
        whole = param.data[local]
        if shard_id == "w2":
            return whole
        first = self.intermediate_size if shard_id == "w3" else 0
        return whole.narrow(0, first, self.intermediate_size)

    def finalize_weights(self, *, without_loader: bool = False) -> None:
        """Make the kernel-side weights and drop the loader's parameters; a second call is idle.

        ``ValueError``, after which the parameters stay, where H or I is not a multiple of 128,
        and where a tensor of the checkpoint was never given to :meth:`weight_loader`: the first
        one that lacks is named. ``without_loader``: something else wrote the parameters, with
        random numbers for instance, and nobody keeps account. References to the parameters that
        somebody kept are empty afterwards: a write through one fails.
        """
        if self._weights is not None:
            return
        check_flag(self.prefix, "without_loader", without_loader)
        check_sizes(self.hidden_size, self.intermediate_size)
        if not without_loader:
            mend = "load them with weight_loader, or say finalize_weights(without_loader=True)"
            self._inventory.check(mend, self._weight_of)
        backend = self.backend
        parameters = [getattr(self, name) for name in WEIGHTS]
        tensors = tuple(p.data for p in parameters)
        with lasting():
            if provides(backend, "run"):
                self._weights = packed_weights(backend, *tensors)
            else:
                self._weights = tensors  # a Problem has the checkpoint's layout
            for name, parameter in zip(WEIGHTS, parameters, strict=True):
                parameter.data = parameter.data.new_empty(0)
                setattr(self, name, None)

    def _weight_of(self, local: int, shard_id: str) -> torch.Tensor:
        parameter = self.w2_weight if shard_id == "w2" else self.w13_weight
        assert parameter is not None
        return self._shard(parameter, local, shard_id)

    def get_expert_weights(self) -> list[torch.Tensor]:
        """Every weight tensor as (E, n): row ``e`` is all of local expert ``e``, contiguous.

        They are views of the weights in use, for transfer between ranks: writing a row replaces
        an expert. So the weights are finalized if they are not yet, as in vLLM.
        """
        self.finalize_weights()
        assert self._weights is not None
        return [per_expert(t) for t in self._weights]

    def _weights_in_use(self) -> tuple[torch.Tensor, ...]:
        if self._weights is None:
            raise ValueError(f"{self.prefix}: call finalize_weights() before forward()")
        return self._weights

    def _device(self) -> torch.device:
        if self._weights is not None:
            return self._weights[0].device
        assert self.w13_weight is not None
        return self.w13_weight.device

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move finalized weights along with the module, as ``to`` and ``cuda`` promise."""
        super()._apply(fn, recurse)
        if self._weights is not None:
            self._weights = tuple(fn(t) for t in self._weights)
        return self

    # --- running ------------------------------------------------------------------------------

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
        return self._layer(hidden_states, topk_weights, topk_ids, activation_clamp, fast_math)
