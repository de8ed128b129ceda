"""The layer with the face of vLLM 0.33: parameters in the kernel's layout, the clamp at the start.

Where vLLM passes its configuration, this takes ``max_num_tokens`` and a process group. The
computation itself is a backend's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Self

import torch
from torch import nn

from megamoe.layer.kernel_weights import (
    check_sizes,
    checkpoint_layout,
    kernel_rows,
    per_expert,
    transform_weights,
)
from megamoe.layer.routed import RoutedExperts, as_bytes, packed_weights
from megamoe.layer.staging import pack_sf
from megamoe.spec.contract import MEGAMOE_2026_11
from megamoe.spec.formats import GROUP
from megamoe.spec.problem import provided
from megamoe.spec.tensors import WEIGHTS
from megamoe.spec.texts import text

SUPPORTED: Final = {"mxfp4": ("situ", "swiglu")}
"""Weight format to the activations that some backend computes; which, its ``features`` say."""

SharedExperts = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class MegaMoEActivation:
    """What comes between the two products, as vLLM 0.33 says it.

    ``swiglu``: ``g * sigmoid(alpha * g) * (u + beta)``, g and u bounded by ``clamp`` where there
    is one. ``situ``: alpha and beta are its two scales, and it takes no clamp.
    """

    name: str = "swiglu"
    clamp: float | None = None
    alpha: float = 1.0
    beta: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in ("swiglu", "situ"):
            raise ValueError(f"Unsupported MegaMoE activation {self.name!r}.")
        if not (math.isfinite(self.alpha) and math.isfinite(self.beta)):
            raise ValueError(f"MegaMoE activation scales must be finite: {self}.")
        if self.clamp is not None and not self.clamp >= 0:  # NaN is not
            raise ValueError(f"MegaMoE activation clamp must be >= 0: {self}.")
        if self.name == "situ" and (self.clamp is not None or self.alpha <= 0 or self.beta < 0):
            raise ValueError(
                "SiTU takes no clamp, a positive alpha and a non-negative beta; got "
                f"{self}."
            )  # fmt: skip


class DeepGemmMegaMoEExperts(RoutedExperts):
    """FP8 x FP4 routed experts; for the sizes, ``group`` and ``backend`` see ``RoutedExperts``.

    Args:
        activation: what comes between the products; what the backend does not compute is
            refused at the first call.
        weight_format: ``mxfp4``.
        shared_experts: a module that is added to the routed sum, as :meth:`forward` says.
        fast_math: silu by approximate exponential and reciprocal, or by expf and division.

    ``NotImplementedError`` for another activation or weight format, ``ValueError`` where H or I
    is not a multiple of 128. That there is no SM100 is the backend's word, at the first call:
    this module may be made anywhere.

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
        _check_supported(activation, weight_format)
        check_sizes(hidden_size, intermediate_size)
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
        experts, rows, hidden = num_local_experts, 2 * intermediate_size, hidden_size
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
            given = {"loaded": tuple(loaded_weight.shape), "shard": shard, "shard_id": shard_id}
            raise ValueError(text(key, self.face, **given))
        half = None if second else int(shard_id == "w3")
        there = kernel_rows(rows, half, param is scale).to(param.device)
        data = as_bytes(loaded_weight, weight_name).to(param.device)
        data = pack_sf(data) if param is scale else data.view(param.dtype)
        for local in replicas:
            param.data[local, there] = data
        self._packed = None
        return True if return_success else None

    def get_expert_weights(self) -> list[torch.Tensor]:
        """Every parameter as (E, n): row ``e`` is all of local expert ``e``, contiguous.

        They are views, for transfer between ranks: writing a row replaces an expert.
        """
        self._lent = True
        return [per_expert(getattr(self, name).detach()) for name in WEIGHTS]

    def _weights_in_use(self) -> tuple[torch.Tensor, ...]:
        weights = tuple(getattr(self, name).detach() for name in WEIGHTS)
        given = tuple(t.view(torch.uint8) if t.dtype == torch.int8 else t for t in weights)
        backend = self.backend
        own = getattr(backend, "transform_weights", transform_weights) is not transform_weights
        if provided(backend, "run") and not own and not provided(backend, "pack_weights"):
            return given
        state = None if self._lent else _state(weights)
        if self._packed is None or state is None or self._packed[0] != state:
            one, two, three, four = given
            made: tuple[torch.Tensor, ...] = checkpoint_layout(one, two, three, four)
            if provided(backend, "run"):
                made = packed_weights(backend, *made)
            self._packed = state, made
        return self._packed[1]

    def _device(self) -> torch.device:
        return self.w13_weight.device

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """What was made for the backend is made again where the parameters are now."""
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
        rounds once more than a fused kernel. Where the ranks' parts are summed afterwards, only
        one rank must be given them.
        """
        (own,) = self._shared
        if own is not None and shared_experts is not None:
            raise ValueError(
                f"{self.prefix} fuses the shared expert into MegaMoE; pass shared_experts=None."
            )
        a = self.activation
        asked: dict[str, Any] = {}
        if (a.name, a.alpha, a.beta) != ("swiglu", 1.0, 0.0):
            asked = {
                "activation": a.name, "activation_alpha": a.alpha, "activation_beta": a.beta,
            }  # fmt: skip
        y = self._layer(hidden_states, topk_weights, topk_ids, a.clamp, self.fast_math, **asked)
        shared = shared_experts if own is None else own
        if shared is None or not len(y):
            return y
        return (y + shared(hidden_states)).to(torch.bfloat16)

    @property
    def shared_experts(self) -> SharedExperts | None:
        """What the constructor was given."""
        return self._shared[0]


def _check_supported(activation: MegaMoEActivation, weight_format: str) -> None:
    names = SUPPORTED.get(weight_format, ())
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
    """What changes when a weight is written in place or replaced.

    None, which never counts as unchanged, where torch keeps no count of writes.
    """
    if any(t.is_inference() for t in weights):
        return None
    return tuple((t.data_ptr(), t._version) for t in weights)
