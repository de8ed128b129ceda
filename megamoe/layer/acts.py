"""The acts of a worker on a backend besides calls: laws of a launch, wrong calls, several ranks.

They need more of a backend than one call: its weights, its buffer, its streams. So they run beside
the backend and return bytes for the judge, as every call does. They need megamoe in the worker's
Python; without it these cases are not provided.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch

from megamoe.layer import launch_laws, rank_acts
from megamoe.layer.deep_gemm_experts import DeepGemmMegaMoEExperts, MegaMoEActivation
from megamoe.layer.experts import DeepseekV4MegaMoEExperts
from megamoe.layer.routed import RoutedExperts
from megamoe.spec.contract import Contract, contract
from megamoe.spec.problem import Problem
from megamoe.spec.tensors import OPERATIONS
from megamoe.spec.texts import NEWER_FACE

Args = Mapping[str, Any]


def run(host: Any, request: Mapping[str, Any], inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    """The result and further keys of the reply to ``request``; raises the backend's exceptions."""
    plain = dict(request["plain"])
    if request["call"] == "refuse":
        revision = contract(plain["contract"])
        return None, {"refused": ACTIONS[plain["action"]](plain["args"], host, revision)}
    if request["call"] == "ep":
        return rank_acts.run(host, request, inputs)
    law = plain.pop("law")
    more = {"processes": plain.pop("processes")} if "processes" in plain else {}
    problem = Problem(**inputs, **plain)
    outputs, labels, orders, errors = dict[str, Any](), list[str](), list[list[int]](), []
    for label, y, order in launch_laws.variants(host.backend, problem, law, **more):
        if isinstance(y, Exception):
            errors.append([label, *host.error(y)])
            continue
        outputs[str(len(labels))] = y
        labels.append(label)
        orders.append(order)
    return outputs, {"labels": labels, "orders": orders, "errors": errors}


# --- wrong calls --------------------------------------------------------------------------------


def _attempt(call: Callable[[], Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The exception of the call, and those of ``tensors`` that it had written by then."""
    before = {name: _bytes(tensor) for name, tensor in tensors.items()}
    error: list[str] | None = None
    try:
        call()
    except Exception as exception:
        error = [type(exception).__name__, str(exception)]
    writes = [n for n, tensor in tensors.items() if not torch.equal(_bytes(tensor), before[n])]
    return {"error": error, "written": writes}


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    # Not contiguous(): a column of scale factors counts as dense whatever its strides.
    return tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _module(
    backend: Any, revision: Contract, *, tokens: int = 384, hidden: int = 128, inter: int = 128
) -> RoutedExperts:
    """A small module with the face of the contract's vLLM."""
    sizes: dict[str, Any] = {
        "num_experts": 4, "num_local_experts": 4, "experts_start_idx": 0, "top_k": 2,
        "hidden_size": hidden, "intermediate_size": inter, "prefix": "layers.0.ffn.experts",
        "backend": backend,
    }  # fmt: skip
    if revision.revision in NEWER_FACE:
        return DeepGemmMegaMoEExperts(tokens, activation=MegaMoEActivation(clamp=10.0), **sizes)
    return DeepseekV4MegaMoEExperts(tokens, **sizes)


def _over_capacity(args: Args, host: Any, revision: Contract) -> dict[str, Any]:
    """``tokens`` into a buffer for ``max_num_tokens``; the load counts with EPLB on."""
    tokens, capacity = args["tokens"], args["max_num_tokens"]
    module = _module(host.backend, revision, tokens=capacity)
    options: dict[str, Any] = {}
    if isinstance(module, DeepseekV4MegaMoEExperts):
        module.finalize_weights(without_loader=True)  # zeros will do for a call that is refused
        options["activation_clamp"] = 10.0
    load = torch.full((1, 4), 7, dtype=torch.int32)
    module.set_eplb_state(
        0, load, torch.arange(4).view(1, 4, 1), torch.ones(1, 4, dtype=torch.int64)
    )
    buffer = module.get_symm_buffer()
    tensors = {"the load": load}
    for name in OPERATIONS["prepare"].returns:
        tensor = getattr(buffer, name)
        tensor.view(torch.uint8).fill_(host.poison)
        tensors[f"buffer.{name}"] = tensor
    hidden = torch.ones(tokens, 128, dtype=torch.bfloat16)
    weights = torch.ones(tokens, 2)
    ids = torch.zeros(tokens, 2, dtype=torch.int32)
    return _attempt(lambda: module(hidden, weights, ids, **options), tensors)


def _stage(host: Any, hidden: int, ids_shape: tuple[int, int]) -> dict[str, Any]:
    """Three tokens of ``hidden`` channels, weights (3, 2), ids of another shape if so asked.

    They are on the backend's device: a kernel must not refuse them for being on another.
    """
    with torch.device(host.device):
        return _prepare(host, hidden, ids_shape)


def _prepare(host: Any, hidden: int, ids_shape: tuple[int, int]) -> dict[str, Any]:
    out = {
        "x_fp8": torch.zeros(8, hidden, dtype=torch.uint8).view(torch.float8_e4m3fn),
        "x_sf": torch.zeros(8, -(-hidden // 128), dtype=torch.int32),
        "topk_idx_out": torch.zeros(8, 2, dtype=torch.int64),
        "topk_weights_out": torch.zeros(8, 2),
    }
    for tensor in out.values():
        tensor.view(torch.uint8).fill_(host.poison)
    rows = torch.ones(3, hidden, dtype=torch.bfloat16)
    ids = torch.zeros(*ids_shape, dtype=torch.int32)
    return _attempt(lambda: host.backend.prepare(rows, torch.ones(3, 2), ids, *out.values()), out)


def _staging_hidden(args: Args, host: Any, revision: Contract) -> dict[str, Any]:
    return _stage(host, args["hidden"], (3, 2))


def _staging_shapes(args: Args, host: Any, revision: Contract) -> dict[str, Any]:
    rows, slots = args["ids_shape"]
    return _stage(host, 128, (rows, slots))


def _sizes(args: Args, host: Any, revision: Contract) -> dict[str, Any]:
    """The newer face refuses sizes in its constructor, the older one when its weights are
    loaded."""

    def make() -> RoutedExperts:
        return _module(
            host.backend, revision, hidden=args["hidden"], inter=args["intermediate"]
        )  # fmt: skip

    if revision.revision in NEWER_FACE:
        return _attempt(make, {})
    module = make()
    assert isinstance(module, DeepseekV4MegaMoEExperts)
    return _attempt(module.finalize_weights, dict(module.named_parameters()))


def _load(args: Args, host: Any, revision: Contract) -> dict[str, Any]:
    """``shard_id`` of expert 0 with a tensor of ``shape`` into ``parameter``."""
    module: Any = _module(host.backend, revision)
    name = args.get("parameter", "w13_weight")
    weight = torch.ones(*args["shape"], dtype=torch.uint8)
    weight_name = f"layers.0.ffn.experts.0.{args['shard_id']}.weight"

    def call() -> None:
        module.weight_loader(getattr(module, name), weight, weight_name, args["shard_id"], 0)

    return _attempt(call, dict(module.named_parameters()))


ACTIONS: Final[Mapping[str, Callable[[Args, Any, Contract], dict[str, Any]]]] = {
    "over-capacity": _over_capacity,
    "staging-hidden-size": _staging_hidden,
    "staging-shapes": _staging_shapes,
    "finalize-sizes": _sizes,
    "load-weight": _load,
}
"""Action name, as in the case files -> the wrong call. Its arguments are the case's ``args``, the
:class:`megamoe.worker.serve.Service`, which has the backend and the byte to fill with, and the
contract of the face."""
