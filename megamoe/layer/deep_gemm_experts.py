"""The layer with the face of vLLM 0.33: parameters in the kernel's layout, the clamp at the start.

Where vLLM passes its configuration, this takes ``max_num_tokens`` and a process group. The
computation itself is a backend's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Self

import torch
from torch import nn

from megamoe.layer.activation import MegaMoEActivation
from megamoe.layer.checks import check_flag, describe
from megamoe.layer.kernel_weights import (
    check_sizes,
    checkpoint_layout,
    kernel_rows,
    packed_weights,
    per_expert,
    transform_weights,
)
from megamoe.layer.loading import as_bytes, check_load, check_mine, looks_converted
from megamoe.layer.modes import lasting
from megamoe.layer.routed import RoutedExperts
from megamoe.layer.staging import pack_sf
from megamoe.spec.contract import MEGAMOE_2026_11
from megamoe.spec.formats import GROUP
from megamoe.spec.problem import provides
from megamoe.spec.tensors import WEIGHTS
from megamoe.spec.texts import text

ACTIVATIONS: Final = {"mxfp4": ("situ", "swiglu")}
"""Weight format to the activations that some backend computes; which, its ``features`` say."""

SharedExperts = Callable[[torch.Tensor], torch.Tensor]


class DeepGemmMegaMoEExperts(RoutedExperts):
    """FP8 x FP4 routed experts; for the sizes, ``group`` and ``backend`` see ``RoutedExperts``.

    Args:
        activation: the step between the products; the first call refuses an activation that the
            backend does not compute.
        weight_format: ``mxfp4``.
        shared_experts: a module that is added to the routed sum, as :meth:`forward` says.
        fast_math: silu by approximate exponential and reciprocal, or by expf and division.

    ``NotImplementedError`` for another activation or weight format, ``ValueError`` where H or I
    is not a multiple of 128 or an argument is of a wrong type. That there is no SM100 is the
    backend's word, at the first call: this module may be made anywhere.

    The parameters have the kernel's layout from the start, so nothing has to be finalized. A
    backend that wants another form gets a copy. It is made again once a weight was written, and
    for every call after :meth:`get_expert_weights`: what writes through those views, such as
    NCCL, need not tell torch. So for EPLB with such a backend the older face is faster.
    """

    face = MEGAMOE_2026_11

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
        activation: MegaMoEActivation,
        weight_format: str = "mxfp4",
        shared_experts: SharedExperts | None = None,
        num_logical_experts: int | None = None,
        fast_math: bool = True,
        prefix: str = "",
        backend: Any = "auto",
    ) -> None:
        _check_support(activation, weight_format)
        check_flag("MegaMoE", "fast_math", fast_math)
        _check_shared(shared_experts)
        if isinstance(hidden_size, int) and isinstance(intermediate_size, int):
            check_sizes(hidden_size, intermediate_size)  # else the base has a line for it
        super().__init__(
            max_num_tokens, group=group, num_experts=num_experts,
            num_local_experts=num_local_experts, experts_start_idx=experts_start_idx, top_k=top_k,
            hidden_size=hidden_size, intermediate_size=intermediate_size, prefix=prefix,
            num_logical_experts=num_logical_experts, backend=backend,
        )  # fmt: skip
        self.activation = activation
        self.weight_format = weight_format
        self.fast_math = fast_math
        # In a tuple: its parameters are the model's, not those of this module.
        self._shared = (shared_experts,)
        self._packed: tuple[Any, tuple[torch.Tensor, ...]] | None = None
        self._lent = False
        self._complete = False
        experts, rows, hidden = num_local_experts, 2 * intermediate_size, hidden_size
        with lasting():
            self.w13_weight = _weight(experts, rows, hidden)
            self.w13_weight_scale = _scale(experts, rows, hidden)
            self.w2_weight = _weight(experts, hidden, intermediate_size)
            self.w2_weight_scale = _scale(experts, hidden, intermediate_size)

    # --- weights ------------------------------------------------------------------------------

    def weight_loader(
        self,
        param: nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Put one checkpoint tensor of logical expert ``expert_id`` into its local replicas.

        As of :class:`megamoe.layer.experts.DeepseekV4MegaMoEExperts`, but the rows go where the
        kernel wants them. A scale must have a byte for each 32 values: vLLM's words speak of
        tiling, since it repeats coarser ones for a shared expert. An unknown shard is refused
        only where this rank would have stored it: anything but w2 belongs in w13.
        """
        second = shard_id == "w2"
        weight, scale = (
            (self.w2_weight, self.w2_weight_scale)
            if second
            else (self.w13_weight, self.w13_weight_scale)
        )
        check_load(self.prefix, self.num_logical_experts, loaded_weight, weight_name, expert_id)
        check_mine(self.prefix, param, self._parameters.values(), weight_name)
        replicas = self._local_replicas(expert_id)
        if not replicas or (param is not weight and param is not scale):
            return False if return_success else None
        if shard_id not in ("w1", "w2", "w3"):
            raise ValueError(text("shard-id", self.face, shard_id=shard_id))
        rows, depth = self.intermediate_size, self.hidden_size
        if second:
            rows, depth = depth, rows
        shard = (rows, depth // GROUP if param is scale else depth // 2)
        if tuple(loaded_weight.shape) != shard:
            key = "scale-shape" if param is scale else "weight-shape"
            sizes = {"loaded": tuple(loaded_weight.shape), "shard": shard, "shard_id": shard_id}
            raise ValueError(text(key, self.face, **sizes))
        half = None if second else int(shard_id == "w3")
        there = kernel_rows(rows, half, param is scale).to(param.device)
        data = as_bytes(loaded_weight, weight_name, param is scale).to(param.device)
        doubtful = param is scale and looks_converted(data, loaded_weight.dtype)
        data = pack_sf(data) if param is scale else data.view(param.dtype)
        for local in replicas:
            param.data[local, there] = data
            self._inventory.add(local, shard_id, param is scale, doubtful)
        self._packed, self._complete = None, False
        return True if return_success else None

    def _check_complete(self) -> None:
        """``ValueError`` where the loader was given a part of the checkpoint's tensors only.

        A module whose loader was never asked has its parameters from elsewhere.
        """
        if self._inventory.has_any and not self._complete:
            mend = "load them with weight_loader before the first call"
            self._inventory.check(mend, self._weight_of)
            self._complete = True

    def _weight_of(self, local: int, shard_id: str) -> torch.Tensor:
        parameter = self.w2_weight if shard_id == "w2" else self.w13_weight
        half = None if shard_id == "w2" else int(shard_id == "w3")
        rows = self.hidden_size if half is None else self.intermediate_size
        return parameter.data[local, kernel_rows(rows, half, scale=False).to(parameter.device)]

    def get_expert_weights(self) -> list[torch.Tensor]:
        """Every parameter as (E, n): row ``e`` is all of local expert ``e``, contiguous.

        They are views, for transfer between ranks: writing a row replaces an expert.
        """
        self._lent = True
        return [per_expert(getattr(self, name).detach()) for name in WEIGHTS]

    def _weights_in_use(self) -> tuple[torch.Tensor, ...]:
        self._check_complete()
        weights = tuple(getattr(self, name).detach() for name in WEIGHTS)
        parameters = tuple(t.view(torch.uint8) if t.dtype == torch.int8 else t for t in weights)
        backend = self.backend
        own = getattr(backend, "transform_weights", transform_weights) is not transform_weights
        if provides(backend, "run") and not own and not provides(backend, "pack_weights"):
            return parameters
        state = None if self._lent else _state(weights)
        if self._packed is None or state is None or self._packed[0] != state:
            one, two, three, four = parameters
            with lasting():
                layout: tuple[torch.Tensor, ...] = checkpoint_layout(one, two, three, four)
                if provides(backend, "run"):
                    layout = packed_weights(backend, *layout)
            self._packed = state, layout
        return self._packed[1]

    def _device(self) -> torch.device:
        return self.w13_weight.device

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move the parameters; the backend's form of the weights is prepared again."""
        super()._apply(fn, recurse)
        self._packed = None
        return self

    # --- running ------------------------------------------------------------------------------

    def forward(
        self,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: SharedExperts | None = None,
    ) -> torch.Tensor:
        """This rank's share of the layer: (T, H) bfloat16 in and out.

        ``topk_weights`` (T, K), ``topk_ids`` (T, K) integer: logical experts where an EPLB state
        is set, physical ones of all ranks otherwise.

        Shared experts, given here or to the constructor, are **not fused**: no backend does that.
        It is vLLM's fallback instead, ``y += shared_experts(hidden_states)`` in bfloat16, which
        rounds once more than a fused kernel. If the ranks' parts are summed afterwards, pass them
        on one rank only.
        """
        (own,) = self._shared
        _check_shared(shared_experts)
        if own is not None and shared_experts is not None:
            raise ValueError(
                f"{self.prefix} fuses the shared expert into MegaMoE; pass shared_experts=None."
            )
        a = self.activation
        options: dict[str, Any] = {}
        if (a.name, a.alpha, a.beta) != ("swiglu", 1.0, 0.0):
            options = {
                "activation": a.name, "activation_alpha": a.alpha, "activation_beta": a.beta,
            }  # fmt: skip
        y = self._layer(hidden_states, topk_weights, topk_ids, a.clamp, self.fast_math, **options)
        shared = shared_experts if own is None else own
        if shared is None or not len(y):
            return y
        return (y + shared(hidden_states)).to(torch.bfloat16)

    @property
    def shared_experts(self) -> SharedExperts | None:
        """The arguments of the constructor."""
        return self._shared[0]


def _check_shared(shared_experts: Any) -> None:
    if shared_experts is not None and not callable(shared_experts):
        raise ValueError(
            f"MegaMoE: shared_experts is {describe(shared_experts)}, expected None or a module"
        )


def _check_support(activation: MegaMoEActivation, weight_format: str) -> None:
    # The engine's own class will do, so it is known by its fields.
    if not all(hasattr(activation, name) for name in ("name", "clamp", "alpha", "beta")):
        raise ValueError(
            f"MegaMoE: activation is {describe(activation)}, expected a MegaMoEActivation"
        )
    if not isinstance(weight_format, str):
        raise ValueError(f"MegaMoE: weight_format is {describe(weight_format)}, expected 'mxfp4'")
    names = ACTIVATIONS.get(weight_format, ())
    bent = activation.name == "situ" and activation.beta == 0
    if activation.name in names and not bent:
        return
    # vLLM's kernel leaves up as it is there, so vLLM has no words for this end of the sentence.
    more = " with beta 0" if bent and activation.name in names else ""
    raise NotImplementedError(
        f"DeepGEMM MegaMoE {weight_format} experts support {sorted(names)}, not "
        f"{activation.name!r}{more}."
    )


def _weight(experts: int, rows: int, depth: int) -> nn.Parameter:
    zeros = torch.zeros(experts, rows, depth // 2, dtype=torch.int8)
    return nn.Parameter(zeros, requires_grad=False)


def _scale(experts: int, rows: int, depth: int) -> nn.Parameter:
    """MN-major: one word of all rows is contiguous."""
    zeros = torch.zeros(experts, depth // (4 * GROUP), rows, dtype=torch.int32)
    return nn.Parameter(zeros.transpose(1, 2), requires_grad=False)


def _state(weights: tuple[torch.Tensor, ...]) -> Any:
    """A key that changes when a weight is written in place or replaced.

    None, which never counts as unchanged, if torch does not count writes.
    """
    if any(t.is_inference() for t in weights):
        return None
    return tuple((t.data_ptr(), t._version) for t in weights)


__all__ = ["DeepGemmMegaMoEExperts", "MegaMoEActivation"]
