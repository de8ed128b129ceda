"""Wrong calls: the error must be the contract's, word for word, and nothing may be written.

An *action* makes one wrong call through the module under test, with the backend plugged in, or
through the backend's own ``prepare``. Everything the call could have written is poisoned before
and compared after.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megamoe.experts import DeepseekV4MegaMoEExperts
from megamoe.problem import provided

Args = Mapping[str, Any]


class NotProvided(Exception):
    """The backend lacks the callable that this action needs."""


@dataclass(frozen=True)
class Outcome:
    """What a wrong call did."""

    error: BaseException | None
    written: tuple[str, ...]
    """Names of tensors that changed although the call was refused."""


def complaint(action: str, args: Args, raises: str, message: str, backend: Any) -> str:
    """Empty if the call was refused as the contract says; otherwise one line saying what it did.

    Raises :class:`NotProvided`, and ``ValueError`` for an unknown action.
    """
    if action not in ACTIONS:
        raise ValueError(f"unknown action {action!r}; known: {', '.join(ACTIONS)}")
    outcome = ACTIONS[action](args, backend)
    wanted = getattr(builtins, raises)
    if outcome.error is None:
        return f"{action}: nothing was raised; expected {raises}: {message}"
    got = f"{type(outcome.error).__name__}: {outcome.error}"
    if type(outcome.error) is not wanted or str(outcome.error) != message:
        return f"{action}: expected {raises}: {message} but got {got}"
    if outcome.written:
        return f"{action}: refused, but {', '.join(outcome.written)} had been written by then"
    return ""


def _attempt(call: Callable[[], Any], watched: Mapping[str, torch.Tensor]) -> Outcome:
    before = {name: tensor.clone() for name, tensor in watched.items()}
    error: BaseException | None = None
    try:
        call()
    except Exception as raised:
        error = raised
    written = tuple(
        name for name, tensor in watched.items()
        if not torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8))
    )  # fmt: skip
    return Outcome(error, written)


def _module(backend: Any, *, tokens: int = 384, hidden: int = 128, inter: int = 128) -> Any:
    return DeepseekV4MegaMoEExperts(
        tokens, num_experts=4, num_local_experts=4, experts_start_idx=0, top_k=2,
        hidden_size=hidden, intermediate_size=inter, prefix="layers.0.ffn.experts",
        backend=backend,
    )  # fmt: skip


def _over_capacity(args: Args, backend: Any) -> Outcome:
    """``tokens`` into a buffer for ``max_num_tokens``; the load counts with EPLB on."""
    if not provided(backend, "forward"):
        raise NotProvided("forward")
    tokens, capacity = args["tokens"], args["max_num_tokens"]
    module = _module(backend, tokens=capacity)
    module.finalize_weights()
    load = torch.full((1, 4), 7, dtype=torch.int32)
    module.set_eplb_state(
        0, load, torch.arange(4).view(1, 4, 1), torch.ones(1, 4, dtype=torch.int64)
    )
    buffer = module.get_symm_buffer()
    watched = {"the load": load}
    for name in ("x", "x_sf", "topk_idx", "topk_weights"):
        tensor = getattr(buffer, name)
        tensor.view(torch.uint8).fill_(0x5A)
        watched[f"buffer.{name}"] = tensor
    hidden = torch.ones(tokens, 128, dtype=torch.bfloat16)
    weights = torch.ones(tokens, 2)
    ids = torch.zeros(tokens, 2, dtype=torch.int32)
    return _attempt(lambda: module(hidden, weights, ids, activation_clamp=10.0), watched)


def _stage(backend: Any, hidden: int, ids_shape: tuple[int, int]) -> Outcome:
    """Three tokens of ``hidden`` channels, weights (3, 2), ids of another shape if so asked."""
    if not provided(backend, "prepare"):
        raise NotProvided("prepare")
    out = {
        "x_fp8": torch.zeros(8, hidden, dtype=torch.uint8).view(torch.float8_e4m3fn),
        "x_sf": torch.zeros(8, -(-hidden // 128), dtype=torch.int32),
        "topk_idx_out": torch.zeros(8, 2, dtype=torch.int64),
        "topk_weights_out": torch.zeros(8, 2),
    }
    for tensor in out.values():
        tensor.view(torch.uint8).fill_(0x5A)
    rows = torch.ones(3, hidden, dtype=torch.bfloat16)
    ids = torch.zeros(*ids_shape, dtype=torch.int32)
    return _attempt(lambda: backend.prepare(rows, torch.ones(3, 2), ids, *out.values()), out)


def _staging_hidden(args: Args, backend: Any) -> Outcome:
    return _stage(backend, args["hidden"], (3, 2))


def _staging_shapes(args: Args, backend: Any) -> Outcome:
    rows, slots = args["ids_shape"]
    return _stage(backend, 128, (rows, slots))


def _sizes(args: Args, backend: Any) -> Outcome:
    module = _module(backend, hidden=args["hidden"], inter=args["intermediate"])
    return _attempt(module.finalize_weights, dict(module.named_parameters()))


def _load(args: Args, backend: Any) -> Outcome:
    """``shard_id`` of expert 0 with a tensor of ``shape`` into ``parameter``."""
    module = _module(backend)
    name = args.get("parameter", "w13_weight")
    loaded = torch.ones(*args["shape"], dtype=torch.uint8)
    weight_name = f"layers.0.ffn.experts.0.{args['shard_id']}.weight"

    def call() -> None:
        module.weight_loader(getattr(module, name), loaded, weight_name, args["shard_id"], 0)

    return _attempt(call, dict(module.named_parameters()))


ACTIONS: dict[str, Callable[[Args, Any], Outcome]] = {
    "over-capacity": _over_capacity,
    "staging-hidden-size": _staging_hidden,
    "staging-shapes": _staging_shapes,
    "finalize-sizes": _sizes,
    "load-weight": _load,
}
"""Action name (as in the case files) to what is done; its arguments are the case's ``args``."""
