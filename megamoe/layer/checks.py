"""The checks of the module's arguments: a wrong one is an error of one line, before any write.

Nothing here reads an element of a tensor, so nothing waits for the device. The one exception is
:func:`check_wide_ids`, which reads ids in the host's memory only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, Final

import torch

from megamoe import schema

IDS: Final = (torch.int32, torch.int64)
"""Types of ids; an engine's router gives one or the other."""
ROUTING: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Types of routing weights. All become float32: two exactly, float64 to nearest even."""
INT32: Final = torch.iinfo(torch.int32)


def describe(value: Any) -> str:
    """``value`` and its type, in a few words."""
    if value is None:
        return "None"
    if isinstance(value, torch.Tensor):
        return f"a tensor of {value.dtype} {tuple(value.shape)}"
    return f"{schema.preview(value)} ({type(value).__name__})"


def check_text(name: str, value: Any) -> None:
    """``ValueError`` unless ``value`` is a string."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is {describe(value)}, expected a string")


def check_module(prefix: Any, start: Any, logical: Any, **counts: Any) -> None:
    """``ValueError`` for arguments of the module's constructor that are nothing to build from.

    ``counts`` are integers from 1 on; ``start`` is the first of ``num_local_experts`` among
    ``num_experts``, and ``logical``, None or an integer, the experts of the checkpoint.
    """
    check_text("prefix", prefix)
    for name, value in counts.items():
        check_count(prefix, name, value)
    check_count(prefix, "experts_start_idx", start, 0)
    total, local = counts["num_experts"], counts["num_local_experts"]
    if start > total - local:
        raise ValueError(
            f"{prefix}: local experts [{start}, {start + local}) are not within the {total} "
            "physical ones; check experts_start_idx and num_local_experts"
        )
    if logical is not None:
        check_count(prefix, "num_logical_experts", logical)
        if logical > total:
            raise ValueError(
                f"{prefix}: num_logical_experts is {logical}, more than the {total} physical ones "
                "that hold them"
            )


def check_count(prefix: str, name: str, value: Any, least: int = 1) -> None:
    """``ValueError`` unless ``value`` is an integer from ``least`` on."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"{prefix}: {name} is {describe(value)}, expected an integer from {least} on"
        )


def check_flag(prefix: str, name: str, value: Any) -> None:
    """``ValueError`` unless ``value`` is True or False: any string would count as True."""
    if not isinstance(value, bool):
        raise ValueError(f"{prefix}: {name} is {describe(value)}, expected True or False")


def is_number(value: Any) -> bool:
    """Whether ``value`` is a real number and no bool; NaN is one."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_clamp(prefix: str, value: Any) -> None:
    """``ValueError`` unless ``value`` is None or a number from 0 on; NaN is not."""
    if value is not None and not (is_number(value) and value >= 0):
        raise ValueError(
            f"{prefix}: activation_clamp is {describe(value)}, expected None or a number from 0 on"
        )


def check_tensors(prefix: str, device: torch.device, hidden: Any, weights: Any, ids: Any) -> None:
    """``ValueError`` unless the three are tensors that the layer takes, their shapes apart.

    ``hidden`` two-dimensional bfloat16, ``weights`` of :data:`ROUTING` and ``ids`` of :data:`IDS`,
    all dense or strided memory of ``device``. A tensor that asks for a gradient is refused where
    torch would record one, since the layer has no backward.
    """
    kinds = {
        "hidden_states": (hidden, (torch.bfloat16,)), "topk_weights": (weights, ROUTING),
        "topk_ids": (ids, IDS),
    }  # fmt: skip
    for name, (tensor, dtypes) in kinds.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{prefix}: {name} is {describe(tensor)}, expected a tensor")
        if tensor.ndim != 2:
            raise ValueError(
                f"{prefix}: {name} has shape {tuple(tensor.shape)}, expected two dimensions"
            )
        if tensor.dtype not in dtypes:
            *more, last = map(str, dtypes)
            expected = f"{', '.join(more)} or {last}" if more else last
            raise ValueError(f"{prefix}: {name} are {tensor.dtype}, expected {expected}")
        if tensor.layout != torch.strided:
            raise ValueError(f"{prefix}: {name} are {tensor.layout}, expected torch.strided")
        if tensor.device != device:
            raise ValueError(
                f"{prefix}: {name} are on {tensor.device}, the layer is on {device}; move one"
            )
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{prefix}: {name} require a gradient, and the layer has no backward; call it "
                "under torch.no_grad() or torch.inference_mode()"
            )


def check_wide_ids(prefix: str, ids: torch.Tensor) -> None:
    """``ValueError`` for an id in the host's memory that the remap's cast to int32 would wrap.

    On another device the ids are not looked at: that would stop the stream.
    """
    if ids.dtype != torch.int64 or ids.device.type != "cpu":
        return
    wide = (ids < INT32.min) | (ids > INT32.max)
    if wide.any():
        token, slot = wide.nonzero()[0].tolist()
        raise ValueError(
            f"{prefix}: topk_ids has {ids[token, slot].item()} at token {token}, slot {slot}, "
            "beyond int32; the remap would take it for another expert"
        )


def check_apart(
    prefix: str, read: Mapping[str, torch.Tensor], writes: Iterable[tuple[int, int]]
) -> None:
    """``ValueError`` where a tensor that a call reads lies in memory that it writes.

    ``writes`` are pairs of :func:`extent`. Two tensors that are only read may share memory.
    """
    for name, tensor in read.items():
        first, last = extent(tensor)
        if any(first < end and start < last for start, end in writes):
            raise ValueError(
                f"{prefix}: {name} lie in memory that the call writes (the symmetric buffer, or "
                "the expert load); give a copy"
            )


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First address of ``tensor`` and the one after its last byte; (0, 0) of an empty one."""
    if tensor.numel() == 0:
        return 0, 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * step for size, step in steps)
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()


def check_eplb(
    prefix: str, layer: Any, load: Any, table: Any, counts: Any, physical: int, logical: int
) -> None:
    """``ValueError`` unless the engine's EPLB tensors of all layers fit this layer.

    ``load`` (layers, physical) int32, ``table`` (layers, logical, replicas) and ``counts``
    (layers, logical) integer; ``layer`` is a row of all three.
    """
    check_count(prefix, "moe_layer_idx", layer, 0)
    shapes = {
        "expert_load_view": (load, 2, physical, (torch.int32,)),
        "logical_to_physical_map": (table, 3, logical, IDS),
        "logical_replica_count": (counts, 2, logical, IDS),
    }
    for name, (tensor, ndim, experts, dtypes) in shapes.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{prefix}: {name} is {describe(tensor)}, expected a tensor")
        fits = tensor.ndim == ndim and tensor.shape[1] == experts and tensor.dtype in dtypes
        if not fits:
            more = ", replicas" if ndim == 3 else ""
            raise ValueError(
                f"{prefix}: {name} is {describe(tensor)}, expected (layers, {experts}{more}) "
                f"{' or '.join(map(str, dtypes))}"
            )
        if layer >= tensor.shape[0]:
            raise ValueError(
                f"{prefix}: moe_layer_idx is {layer}, and {name} has {tensor.shape[0]} layers"
            )


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """The values of ``tensor`` with the strides of a new one; itself where it has these.

    ``is_contiguous`` says nothing of the stride of an axis with one element, and some kernels
    read that.
    """
    strides, step = [], 1
    for size in reversed(tensor.shape):
        strides.append(step)
        step *= max(size, 1)
    target = tuple(reversed(strides))
    if tensor.stride() == target:
        return tensor
    if tensor.is_contiguous():
        return tensor.as_strided(tensor.shape, target)
    return tensor.contiguous()
