"""The input and output of a backend, as plain data that all rooms share.

Nothing here computes. The oracle and the backends both import this module and
:mod:`megamoe.spec.formats`, and nothing else in common.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, Final, Protocol, runtime_checkable

import torch

from megamoe.spec.features import DIALECT_FORMATS, Activation, features_of
from megamoe.spec.tensors import WEIGHTS


@dataclass(frozen=True)
class Sizes:
    """The sizes of a symmetric buffer."""

    num_experts: int
    """Physical experts of all ranks that share the buffer; E on one rank."""
    max_num_tokens: int
    """The largest number of tokens of a call on one rank; buffers have at least this many rows."""
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
    top-k, ``S`` intermediate size of the shared expert. All tensors are contiguous and on one
    device. The weights of an expert that no id names are zeros. The fields with a default are
    options of a call; :attr:`features` lists the features that they ask for.
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
    activation: str = "swiglu"
    """One of :data:`megamoe.spec.features.ACTIVATIONS`."""
    activation_alpha: float = 1.0
    activation_beta: float = 0.0
    """The two scales of the activation; :class:`Activation` says of what."""
    combine_dtype: str = "bf16"
    """The format of the slot rows in the combine; 'fp8': E4M3 with a scale per 128 channels."""
    shared_w13_weight: torch.Tensor | None = None
    """(2S, H) uint8, E4M3 codes: the fused shared expert, a slot of its own of weight 1 that every
    token takes; rows [0, S) gate, [S, 2S) up. n shared experts are one of n times the width."""
    shared_w13_weight_scale: torch.Tensor | None = None
    """(2S, H/32) uint8, UE8M0."""
    shared_w2_weight: torch.Tensor | None = None
    """(H, S) uint8, E4M3 codes."""
    shared_w2_weight_scale: torch.Tensor | None = None
    """(H, S/32) uint8, UE8M0."""
    shared_output: torch.Tensor | None = None
    """(T, H) bfloat16: the output of a shared expert outside of the kernel; it is added to y at the
    end."""
    weight_format: str = "mxfp4"
    """One of :data:`megamoe.spec.features.WEIGHT_FORMATS`. With nvfp4 the two weight scales are (E,
    2I, H/16) and (E, H, I/16) uint8, E4M3 bytes from 0 to 0x7E, and the three fields below are
    set. With fp8-block the weights are (E, 2I, H) and (E, H, I) uint8, E4M3 codes without NaN, and
    their scales (E, 2I/128, H/128) and (E, H/128, I/128) float32, finite and not below 0. With
    w4a16 and w4a8-token they are as with mxfp4. Scale bytes are from 2 to 251 where a group has a
    weight that is not 0: there a weight is a normal bfloat16 number. With w4a8-token they are no
    more than 11 below the largest byte of the expert's matrix."""
    w13_weight_scale_2: torch.Tensor | None = None
    w2_weight_scale_2: torch.Tensor | None = None
    """(E,) float32, above 0: a weight is ``code * scale * scale_2`` of its expert."""
    l2_activation_scale: float | None = None
    """The unit of the scale bytes of linear 2's activations: one fp32 number for the layer."""

    def __repr__(self) -> str:
        """The fields in one line, without those that have their default: shape and dtype of a
        tensor, no element."""
        parts = (
            f"{name} {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
            if isinstance(value, torch.Tensor) else f"{name}={value!r}"
            for name, value in self.arguments.items()
        )  # fmt: skip
        return f"Problem({', '.join(parts)})"

    @property
    def arguments(self) -> dict[str, Any]:
        """The fields by name, but for those at their default: ``Problem(**p.arguments) == p``.

        So a new field with a default does not change a digest of them.
        """
        usual = {f.name: f.default for f in fields(self) if f.default is not MISSING}
        return {
            name: value for name, value in vars(self).items()
            if name not in usual or (value is not usual[name] and not _equal(value, usual[name]))
        }  # fmt: skip

    def at_rows(self, at: torch.Tensor) -> Problem:
        """The problem of some tokens, ``at`` int64: each one's output depends on it alone."""
        rows = {name: getattr(self, name) for name in (*_BY_TOKEN, "shared_output")}
        selection: dict[str, Any] = {n: t[at] for n, t in rows.items() if t is not None}
        return replace(self, **selection)

    def at_experts(self, at: torch.Tensor, topk_ids: torch.Tensor) -> Problem:
        """The problem with the weights of some experts, ``at`` int64, under new ids (T, K)."""
        by_expert = {name: getattr(self, name) for name in WEIGHTS} | self.expert_factors
        selection: dict[str, Any] = {
            name: tensor[at].contiguous() for name, tensor in by_expert.items()
        }
        return replace(self, topk_ids=topk_ids, **selection)

    @property
    def act(self) -> Activation:
        """The activation between the two products."""
        return Activation(
            self.activation, self.activation_clamp, self.activation_alpha, self.activation_beta,
            self.fast_math,
        )  # fmt: skip

    @property
    def features(self) -> tuple[str, ...]:
        """The features among :data:`megamoe.spec.features.FEATURES` that the problem asks for."""
        return features_of(
            self.act, self.combine_dtype, self.shared_w13_weight is not None,
            self.shared_output is not None, self.weight_format,
        )  # fmt: skip

    @property
    def is_nvfp4(self) -> bool:
        """Its weights have the format NVFP4."""
        return self.weight_format == "nvfp4"

    @property
    def is_dialect(self) -> bool:
        """Its format is that of a dialect (:mod:`megamoe.spec.dialects`)."""
        return self.weight_format in DIALECT_FORMATS

    @property
    def only_y(self) -> bool:
        """Its stages have formats of their own: ``y`` alone is shown and judged."""
        return self.weight_format != "mxfp4"

    @property
    def expert_factors(self) -> dict[str, torch.Tensor]:
        """Fields (E,) besides the four weights: the factors of NVFP4; none of MXFP4."""
        factors = {
            "w13_weight_scale_2": self.w13_weight_scale_2,
            "w2_weight_scale_2": self.w2_weight_scale_2,
        }
        return {name: tensor for name, tensor in factors.items() if tensor is not None}

    @property
    def shared_weights(self) -> tuple[torch.Tensor, ...]:
        """w13, its scales, w2 and its scales of the shared expert; empty if there is none."""
        weights = (
            self.shared_w13_weight, self.shared_w13_weight_scale, self.shared_w2_weight,
            self.shared_w2_weight_scale,
        )  # fmt: skip
        return tuple(tensor for tensor in weights if tensor is not None)

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
            "S": 0 if self.shared_w2_weight is None else self.shared_w2_weight.shape[1],
        }  # fmt: skip

    @property
    def buffer_sizes(self) -> Sizes:
        """The sizes of its symmetric buffer."""
        return Sizes(
            self.num_experts, self.max_num_tokens, self.top_k, self.hidden_size,
            self.intermediate_size,
        )  # fmt: skip

    def to(self, device: str | torch.device) -> Problem:
        """The same problem with every tensor on ``device``."""
        tensors: dict[str, Any] = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return replace(self, **tensors)


_BY_TOKEN: Final = ("hidden_states", "topk_ids", "topk_weights")


def _equal(value: Any, usual: Any) -> bool:
    return not isinstance(value, torch.Tensor) and bool(value == usual)


Output = torch.Tensor | Mapping[str, torch.Tensor]
"""The result of ``forward``: ``y`` alone, or a mapping with ``y`` and any stage.

:data:`megamoe.spec.tensors.STAGES` names them.
"""


@runtime_checkable
class Backend(Protocol):
    """Something that computes the layer, or a part of it.

    Besides the two names it may offer any of these callables. If a callable is missing, its kind of
    case is ``not provided``. So is a case that asks for a feature (:mod:`megamoe.spec.features`)
    outside of the backend's ``features``, a sequence of names. :data:`megamoe.spec.tensors.TENSORS`
    says shape and dtypes of each tensor:

    ``forward(problem: Problem) -> Output``

    ``prepare(hidden_states, topk_weights, topk_ids, x_fp8, x_sf, topk_idx_out,
    topk_weights_out) -> None``, in place: (T, H) bf16, (T, K) float32, (T, K) int32 or int64 into
    the first T rows of buffers with C >= T rows, the capacity: (C, H) float8_e4m3fn, (C, H/128)
    int32, (C, K) int64, (C, K) float32. Rows from T on stay as they are.

    ``eplb_map(topk_ids, expert_load_view, logical_to_physical_map, logical_replica_count,
    record_enabled) -> ids`` with the dtype and shape of ``topk_ids``; adds to
    ``expert_load_view`` in place.

    ``transform_weights(w13, w13_scale, w2, w2_scale) -> (w13, w13_sf, w2, w2_sf)``: the
    kernel-side weight layout of kind ``layout``, scale factors as int32.
    """

    name: str
    accumulator: str


def provides(backend: Any, callable_name: str) -> bool:
    """Whether ``backend`` offers ``callable_name``."""
    return callable(getattr(backend, callable_name, None))
