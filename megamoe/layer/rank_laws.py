"""The laws of a case of kind ``ep``: changes of a call over ranks that must not change a bit.

Every rank of the team runs the same law at the same time, in :mod:`megamoe.layer.rank_acts`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.distributed as dist

from megamoe.layer.expert_parallel import ExpertParallel
from megamoe.layer.experts import DeepseekV4MegaMoEExperts
from megamoe.layer.moves import move_over_ranks
from megamoe.layer.rebalance import initial_placement, logical_load, rebalance_experts

LONGEST_DELAY: Final = 0.02
"""Seconds that a rank may sleep before a stage, under law ``delays``."""
POISON: Final = 0xFF
ARGUMENTS: Final = ("hidden_states", "topk_weights", "topk_ids")

Variants = Iterator[tuple[str, torch.Tensor]]
"""Label and ``y`` (T, H) bfloat16 of this rank's tokens."""


@dataclass
class Call:
    """The module of this rank, and the arguments of the case's call."""

    module: DeepseekV4MegaMoEExperts
    inputs: Mapping[str, torch.Tensor]
    plain: Mapping[str, Any]
    load: torch.Tensor
    """(1, P) int32: the load of all physical experts that this rank recorded."""

    @property
    def rank(self) -> int:
        return int(self.plain["rank"])

    @property
    def spans(self) -> ExpertParallel | None:
        """The project's own dispatch; None for a backend that spans the ranks itself."""
        backend = self.module.backend
        return backend if isinstance(backend, ExpertParallel) else None

    def y(self, **overrides: torch.Tensor) -> torch.Tensor:
        """One call of the module."""
        inputs = {**self.inputs, **overrides}
        out: torch.Tensor = self.module(
            inputs["hidden_states"], inputs["topk_weights"], inputs["topk_ids"],
            activation_clamp=self.plain["activation_clamp"], fast_math=self.plain["fast_math"],
        )  # fmt: skip
        return out


def _layer(call: Call) -> Variants:
    yield from ()


def _delays(call: Call) -> Variants:
    """The ranks reach every stage at other times; on a GPU another stream is busy too."""
    spans = call.spans
    previous = None if spans is None else spans.at
    for turn in range(3):
        wait = random.Random(f"{call.plain['seed']} {call.rank} {turn}")

        def at(stage: str, wait: random.Random = wait) -> None:
            time.sleep(wait.random() * LONGEST_DELAY)
            if previous is not None:
                previous(stage)

        at("stage")
        if spans is not None:
            spans.at = at
        with _busy(call.inputs["topk_ids"].device):
            yield f"delays, turn {turn + 1}", call.y()
    if spans is not None and previous is not None:
        spans.at = previous


class _busy:
    """On a GPU: matrix products on a second stream, queued before the call."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> None:
        if self.device.type == "cuda":
            self.stream = torch.cuda.Stream(self.device)
            with torch.cuda.stream(self.stream):
                a = torch.ones(4096, 4096, dtype=torch.bfloat16, device=self.device)
                for _ in range(100):
                    a @ a

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.stream.synchronize()


def _repeats(call: Call) -> Variants:
    """Calls with other tokens, and old bytes in the buffer, between two calls of the case."""
    buffer = call.module.get_symm_buffer()
    ids = call.inputs["topk_ids"]
    elsewhere = torch.where(ids >= 0, (ids + 1) % call.plain["logical"], ids)
    empty = {name: call.inputs[name][:0] for name in ARGUMENTS}
    others: Mapping[str, dict[str, torch.Tensor]] = {
        "after a call with other experts": {"topk_ids": elsewhere},
        "after a call without tokens": empty,
    }
    for label, before in others.items():
        call.y(**before)
        for part in vars(buffer).values() if hasattr(buffer, "__dict__") else ():
            if isinstance(part, torch.Tensor):
                part.view(torch.uint8).fill_(POISON)
        yield label, call.y()


def _static(call: Call) -> Variants:
    spans = _ours(call)
    spans.static = True
    yield "messages of fixed shapes", call.y()
    spans.static = False
    yield "messages of the rows that there are", call.y()


def _rebalance(call: Call) -> Variants:
    """The load of the calls so far decides a new placement, and the weights move, twice.

    A backend of a group has the load of its own tokens, so the ranks add theirs.
    """
    physical, logical = call.load.shape[1], int(call.plain["logical"])
    placement = initial_placement(1, physical, logical)
    for turn in ("first", "second"):
        call.y()
        total = call.load.clone() if dist.get_backend() == "nccl" else call.load.cpu()
        dist.all_reduce(total)
        load = logical_load(total, placement) * (1 if turn == "first" else -1)
        new = rebalance_experts(load - load.min(), physical, 1, 1, int(call.plain["of"]))
        old, to = placement.physical_to_logical[0], new.physical_to_logical[0]
        move_over_ranks(call.module.get_expert_weights(), old, to, dist.group.WORLD)
        device = call.load.device
        maps = new.logical_to_physical.to(device), new.replica_count.to(device)
        call.module.set_eplb_state(0, call.load, *maps)
        placement = new
        yield f"after the {turn} rebalance", call.y()


def _graph(call: Call) -> Variants:
    """Replays of a captured call. NCCL can be captured; gloo, which waits on the host, cannot."""
    spans = _ours(call)
    if dist.get_backend() != "nccl":
        raise NotImplementedError("a CUDA graph over ranks needs NCCL, one GPU a rank")
    spans.static = True
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call.y(), call.y()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # NCCL's own thread may call CUDA meanwhile: only this thread's calls must be fit for a graph.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        y = call.y()
    for turn in ("first", "second", "third"):
        y.view(torch.uint8).fill_(POISON)
        graph.replay()
        torch.cuda.synchronize()
        yield f"the {turn} replay of a CUDA graph", y.clone()
    spans.static = False


def _ours(call: Call) -> ExpertParallel:
    spans = call.spans
    if spans is None:
        raise NotImplementedError(
            f"the backend spans the ranks itself; law {call.plain['law']} is of megamoe's dispatch"
        )
    return spans


def refusal(call: Call) -> list[str] | None:
    """Type and text of the error of a call in which one rank brings a token too many."""
    _ours(call)  # only our dispatch tells the other ranks; in any other they would wait
    inputs = dict(call.inputs)
    if call.rank == call.plain["refuses"] % call.plain["of"]:
        rows = call.plain["max_num_tokens"] + 1
        for name in ARGUMENTS:
            tensor = inputs[name]
            inputs[name] = torch.ones(
                rows, tensor.shape[1], dtype=tensor.dtype, device=tensor.device
            )
    try:
        call.y(**{name: inputs[name] for name in ARGUMENTS})
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None


LAWS: Final[Mapping[str, Callable[[Call], Variants]]] = {
    "layer": _layer, "delays": _delays, "repeats": _repeats, "static": _static,
    "graph-replay": _graph, "rebalance": _rebalance, "refused": _layer,
}  # fmt: skip

__all__ = ["LAWS", "Call", "refusal"]
