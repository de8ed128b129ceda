"""The layer over the ranks of a process group, timed: the whole, its stages, and the link alone.

Each rank holds one share's experts of its own, so N ranks have N times as many. Routing is uniform
over all of them. Every rank runs the same program at the same time. A time is the median over the
repeats, and of each repeat the slowest rank counts. Time on a GPU is the device's own, with the
caches flushed before each repeat; on a CPU it is that of the clock.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import median
from time import perf_counter
from typing import Any, Final

import torch
import torch.distributed as dist

from megamoe.bench import scale, timing
from megamoe.bench.floor import SHARES, Share
from megamoe.layer.expert_parallel import ExpertParallel
from megamoe.layer.experts import DeepseekV4MegaMoEExperts
from megamoe.layer.messages import all_to_all
from megamoe.layer.own_ranks import spanning
from megamoe.spec.models import MODELS

CLAMP: Final = 10.0
STAGES: Final = ("stage", "header", "dispatch", "experts", "return", "combine")
COLUMNS: Final = ("share", "T", "forward", *STAGES, "link there", "link back", "one rank", "floor",
                  "MB there", "MB back")  # fmt: skip

Step = Callable[[], object]


@dataclass(frozen=True)
class RankRow:
    """One share and number of tokens; times in microseconds.

    ``floor`` is the arithmetic of :mod:`megamoe.bench.scale` on the published speeds of
    ``machine``, and ``bound`` what takes longest in it. ``one_rank`` is the forward of the same
    tokens without a group, with the share's experts only. A backend that sends its rows itself has
    no stages, bytes and link.
    """

    share: str
    tokens: int
    """Of each rank."""
    what: str
    scope: str
    floor: float
    experts: int
    """Of each rank."""
    ranks: int
    forward: float
    one_rank: float
    bound: str
    machine: str
    stages: dict[str, float] = field(default_factory=dict)
    """Of a second series, with marks between the stages. Dispatch and return include the wait for
    other ranks."""
    bytes: dict[str, int] = field(default_factory=dict)
    """``dispatch`` and ``return``: payload to other ranks, of the rank that sends most."""
    link: dict[str, float] = field(default_factory=dict)
    """One ``all_to_all`` of as many bytes, evenly to all other ranks, and nothing else."""

    def line(self) -> str:
        """The row of a table with :data:`COLUMNS`."""
        link, size = self.link, {k: n / 1e6 for k, n in self.bytes.items()}
        cells = [
            self.forward, *(self.stages.get(s) for s in STAGES), link.get("dispatch"),
            link.get("return"), self.one_rank, self.floor, size.get("dispatch"), size.get("return"),
        ]  # fmt: skip
        return "| " + " | ".join([self.share, str(self.tokens), *map(_cell, cells)]) + " |"


def head() -> str:
    """The first two lines of the table."""
    return f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 10 else f"{value:.0f}"


class World:
    """The ranks of a process group, for a measurement."""

    def __init__(self, group: Any, device: torch.device) -> None:
        self.group, self.device = group, device
        self.rank, self.size = group.rank(), group.size()

    @property
    def warm(self) -> int:
        """Repeats that do not count."""
        return 3 if self.device.type == "cuda" else 1

    def meet(self) -> None:
        """Wait until every rank is here."""
        # NCCL's barrier needs a GPU, and would guess it. The group is not bound to its device by
        # init_process_group(device_id=): a group of one rank beside it (layer.ranks.one_rank) would
        # then be split off it, and wait for all ranks.
        nccl = dist.get_backend(self.group) == "nccl"
        dist.barrier(self.group, device_ids=[self.device.index] if nccl else None)

    def most(self, values: Sequence[float]) -> list[float]:
        """The largest of each value over the ranks."""
        device = "cpu" if dist.get_backend(self.group) == "gloo" else self.device
        every = torch.tensor(list(values), dtype=torch.float64, device=device)
        dist.all_reduce(every, op=dist.ReduceOp.MAX, group=self.group)
        out: list[float] = every.tolist()
        return out

    def exchange(self, rows: torch.Tensor, counts: list[int]) -> None:
        """As many rows to each rank as ``counts`` says, and as many from it."""
        all_to_all(rows, counts, counts, self.group)

    def mark(self) -> Any:
        """A moment: an event on a GPU, else seconds."""
        if self.device.type != "cuda":
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin: Any, end: Any) -> float:
        """Microseconds."""
        if self.device.type != "cuda":
            return float(end - begin) * 1e6
        return float(begin.elapsed_time(end)) * 1e3

    def settle(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(
    world: World, backend: Any, shares: Sequence[str], tokens: Sequence[int], repeats: int
) -> Iterator[RankRow]:
    """A row for every share and number of tokens; collective. Errors of the layer pass through."""
    for name in shares:
        for count in tokens:
            yield _row(world, backend, SHARES[name], count, repeats)
            gc.collect()
            if world.device.type == "cuda":
                torch.cuda.empty_cache()


def _row(world: World, backend: Any, share: Share, tokens: int, repeats: int) -> RankRow:
    experts = share.experts * world.size
    model, speeds = replace(MODELS[share.name.lower()], num_experts=experts), machine(world.device)
    least = scale.estimate(model, tokens, world.size, speeds)
    return RankRow(
        share.name, tokens, backend.name, f"whole forward over {world.size} ranks", least.floor,
        share.experts, world.size, **_over(world, backend, share, tokens, repeats),
        one_rank=_alone(world, backend, share, tokens, repeats), bound=least.bound,
        machine=speeds.name,
    )  # fmt: skip


def _over(world: World, backend: Any, share: Share, tokens: int, repeats: int) -> dict[str, Any]:
    """The forward over the group, and its parts if the layer sends rows by our dispatch."""
    tensors = _inputs(world, share, tokens, share.experts * world.size)
    layer = _module(world, backend, share, tokens, world.group)

    def forward() -> None:
        layer(*tensors, activation_clamp=CLAMP)

    out: dict[str, Any] = {"forward": _slowest(world, _times(world, forward, repeats))}
    if isinstance(layer.backend, ExpertParallel):
        out |= _parts(world, layer.backend, forward, repeats)
    return out


def _alone(world: World, backend: Any, share: Share, tokens: int, repeats: int) -> float:
    """The forward without a group, with the share's experts only."""
    tensors = _inputs(world, share, tokens, share.experts)
    layer = _module(world, backend, share, tokens, None)
    return _slowest(world, _times(world, lambda: layer(*tensors, activation_clamp=CLAMP), repeats))


def _parts(world: World, spans: ExpertParallel, forward: Step, repeats: int) -> dict[str, Any]:
    """The stages, the bytes and the link of a layer that sends rows by our dispatch."""
    marks: list[tuple[str, Any]] = []

    def step() -> None:
        marks.append(("stage", world.mark()))
        forward()
        marks.append(("end", world.mark()))

    spans.at = lambda stage: marks.append((stage, world.mark()))
    _times(world, step, repeats)
    spans.at = lambda stage: None
    stages: dict[str, list[float]] = {}
    for (name, begin), (_, end) in pairwise(marks):
        if name != "end":  # the time between two repeats
            stages.setdefault(name, []).append(world.between(begin, end))
    before = dict(spans.traffic)
    forward()
    traffic = [spans.traffic[name] - before[name] for name in ("dispatch", "return")]
    most = [int(n) for n in world.most(traffic)]
    return {
        "stages": {name: _slowest(world, took[world.warm :]) for name, took in stages.items()},
        "bytes": dict(zip(("dispatch", "return"), most, strict=True)),
        "link": {
            name: _link(world, count, repeats)
            for name, count in zip(("dispatch", "return"), most, strict=True)
        },
    }


def _link(world: World, payload: int, repeats: int) -> float:
    """Microseconds of one exchange of ``payload`` bytes of each rank; 0 where there is no other."""
    if world.size == 1:
        return 0.0
    counts = [max(1, payload // (world.size - 1) // 16)] * world.size
    counts[world.rank] = 0
    data = torch.zeros(sum(counts), 16, dtype=torch.uint8, device=world.device)
    return _slowest(world, _times(world, lambda: world.exchange(data, counts), repeats))


def _times(world: World, step: Step, repeats: int) -> list[float]:
    """Microseconds of each repeat; all ranks begin together."""
    gpu = world.device.type == "cuda"
    flush = torch.empty(timing.FLUSH_BYTES if gpu else 0, dtype=torch.uint8, device=world.device)
    took = []
    for turn in range(repeats + world.warm):
        flush.zero_()
        world.meet()
        begin = world.mark()
        step()
        end = world.mark()
        world.settle()
        if turn >= world.warm:
            took.append(world.between(begin, end))
    return took


def _slowest(world: World, took: Sequence[float]) -> float:
    return median(world.most(took))


def machine(device: torch.device) -> scale.Machine:
    """The published speeds beside which a device stands: those of a B200 for one, else an H100's.

    A CPU has none. There the floor is that of the same traffic and work on H100s.
    """
    h100, b200 = scale.MACHINES
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return b200 if "B200" in name else h100


def _inputs(world: World, share: Share, tokens: int, experts: int) -> tuple[torch.Tensor, ...]:
    """Hidden states, routing weights and ids of this rank, uniform over ``experts``."""
    device = world.device
    generator = torch.Generator(device=device).manual_seed(97 * tokens + world.rank)
    hidden = torch.randn(tokens, share.hidden, generator=generator, device=device).bfloat16()
    weights = torch.rand(tokens, share.top_k, generator=generator, device=device)
    order = torch.rand(tokens, experts, generator=generator, device=device)
    return hidden, weights, order.argsort(1)[:, : share.top_k].contiguous()


def _module(
    world: World, backend: Any, share: Share, tokens: int, group: Any
) -> DeepseekV4MegaMoEExperts:
    """A module with random weights of ordinary size."""
    ranks, rank = 1, 0
    if group is not None:
        ranks, rank, backend = world.size, world.rank, spanning(backend, group)
    module = DeepseekV4MegaMoEExperts(
        tokens, group=group, num_experts=share.experts * ranks, num_local_experts=share.experts,
        experts_start_idx=share.experts * rank, top_k=share.top_k, hidden_size=share.hidden,
        intermediate_size=share.intermediate, prefix="experts", backend=backend,
    )  # fmt: skip
    for name, parameter in list(module.named_parameters()):
        low, high = (118, 124) if name.endswith("_scale") else (0, 256)
        parameter.data = torch.randint(
            low, high, parameter.shape, dtype=torch.uint8, device=world.device
        )
    module.finalize_weights(without_loader=True)
    return module
