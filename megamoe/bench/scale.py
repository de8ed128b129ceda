"""A model of scale: the bytes that ranks send each other, and a time that no forward can beat.

All of this is arithmetic on counts of bytes and operations and on published speeds. Nothing here
was measured, but for the floor of an H100 (:mod:`megamoe.bench.floor`).

The dispatch sends one row for each live (token, slot) whose expert another rank owns: H codes, a
scale byte for each 32 of them, and 8 bytes for the expert's index and the routing weight. The
owner returns a row of H bf16 values. Rows are not merged if a token has several experts on one
rank. A rank that owns the expert of its own token sends nothing.

What the model assumes: each token chooses its top-k experts with equal probability, and their
replicas too; each rank has the same number of tokens; a link carries its published speed in both
directions at once; NVLink, the network and the computation overlap perfectly; a message costs
nothing but its bytes. So a time is a floor, and a real forward is slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from rich.table import Table

from megamoe.bench.floor import FLOOR_BANDWIDTH, FLOOR_FLOPS, Share, operations, weight_bytes
from megamoe.layer.eplb import eplb_map_to_physical_and_record
from megamoe.layer.rebalance import Placement, rebalance_experts
from megamoe.spec.formats import GROUP
from megamoe.spec.models import Model

EP_SIZES: Final = (8, 16, 32, 64, 128, 256, 512)
NODE: Final = 8
"""Ranks that NVLink joins; all others are behind the network."""

Rows = npt.NDArray[Any]
"""(R, R): rows that rank r, the first axis, sends to the owner o of their experts."""


@dataclass(frozen=True)
class Machine:
    """The speeds of one GPU and its links, per second."""

    name: str
    nvlink: float
    """Bytes each way."""
    network: float
    """Bytes each way."""
    bandwidth: float
    """Bytes of device memory."""
    flops: float
    """Dense FP8 operations."""
    source: str


MACHINES: Final = (
    Machine(
        "H100", 450e9, 50e9, FLOOR_BANDWIDTH, FLOOR_FLOPS,
        "NVLink 4: 900 GB/s in both directions together (NVIDIA, 'Introducing NVIDIA HGX H100'). "
        "Network: one ConnectX-7 a GPU (NVIDIA, DGX H100 user guide), 400 Gb/s. Memory and FP8: "
        "the floor of this project, measured on one H100.",
    ),
    Machine(
        "B200", 900e9, 50e9, 8e12, 4.5e15,
        "NVLink 5: 18 links of 100 GB/s in both directions together (NVIDIA, NVLink page). "
        "Network: one ConnectX-7 a GPU, 400 Gb/s. Memory and FP8: an eighth of the 64 TB/s and "
        "of half the 72 PFLOP/s (which count sparsity) that NVIDIA gives for a DGX B200.",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """One EP size: the bytes of the rank that has most of each, and floors in microseconds."""

    model: str
    tokens: int
    ranks: int
    experts: int
    """Physical experts of a rank."""
    dispatch: float
    """Bytes that a rank sends to owners."""
    back: float
    """Bytes that a rank returns as an owner."""
    compute: float
    nvlink: float
    network: float

    @property
    def floor(self) -> float:
        """Microseconds, if the three overlap perfectly."""
        return max(self.compute, self.nvlink, self.network)

    @property
    def bound(self) -> str:
        """What takes longest."""
        times = {"compute": self.compute, "NVLink": self.nvlink, "network": self.network}
        return max(times, key=lambda name: times[name])


def row_bytes(hidden: int) -> tuple[int, int]:
    """Bytes of a row of H values to its owner, and of the row that comes back."""
    return hidden + hidden // GROUP + 8, 2 * hidden


def traffic(
    model: Model,
    tokens: int | Sequence[torch.Tensor],
    ranks: int,
    placement: Placement | None = None,
) -> list[dict[str, float]]:
    """Payload bytes that each rank sends to other ranks: ``dispatch`` and ``return``.

    ``tokens`` is a number of tokens a rank, for which the bytes are expected values under uniform
    routing; or the ids of each rank, (T, K) integer tensors, for which they are exact integers.
    Ids are logical with a ``placement`` of one layer, which is then asked as the module asks it,
    and physical without; an id of no expert is a slot without effect. Physical experts divide
    evenly over the ranks. ``ValueError`` where they do not.
    """
    if isinstance(tokens, int):
        rows = expected_rows(model, tokens, ranks)
    else:
        rows = count_rows(model, tokens, ranks, placement)
    there, back = row_bytes(model.hidden_size)
    others = rows * ~np.eye(ranks, dtype=bool)
    return [
        {"dispatch": out * there, "return": arrivals * back}
        for out, arrivals in zip(others.sum(1).tolist(), others.sum(0).tolist(), strict=True)
    ]


def count_rows(
    model: Model, ids: Sequence[torch.Tensor], ranks: int, placement: Placement | None = None
) -> Rows:
    """The rows of ``ids``, one (T, K) tensor a rank, as (R, R) int64."""
    if len(ids) != ranks:
        raise ValueError(
            f"there are ids of {len(ids)} ranks, expected {ranks}; give one tensor each"
        )
    experts = placement.physical_to_logical.shape[1] if placement else model.num_experts
    if experts % ranks:
        raise ValueError(
            f"{model.name}: {experts} physical experts do not divide over {ranks} ranks; give a "
            "placement with more replicas"
        )
    if placement and len(placement.replica_count) != 1:
        raise ValueError(
            f"{model.name}: the placement is of {len(placement.replica_count)} layers, expected one"
        )
    rows = np.zeros((ranks, ranks), dtype=np.int64)
    for rank, own in enumerate(ids):
        physical = own = own.cpu()
        if placement is not None:
            load = torch.zeros(experts, dtype=torch.int32)
            table, count = placement.logical_to_physical[0], placement.replica_count[0]
            physical = eplb_map_to_physical_and_record(own, load, table, count, False)
        flat = physical.flatten().numpy()
        live = flat[(flat >= 0) & (flat < experts)]
        rows[rank] = np.bincount(live // (experts // ranks), minlength=ranks)
    return rows


def expected_rows(model: Model, tokens: int, ranks: int) -> Rows:
    """The expected rows under uniform routing, (R, R) float64, for ``tokens`` tokens a rank."""
    return np.tile(tokens * model.top_k * _chances(model, ranks).sum(1), (ranks, 1))


@cache
def _chances(model: Model, ranks: int) -> Rows:
    """(R, places) float64: the chance that a slot of a token goes to each place of each rank.

    Where the ranks do not divide the experts, some experts get replicas, as the public balancer
    places them for equal loads.
    """
    places = -(-model.num_experts // ranks) * ranks
    placement = rebalance_experts(torch.ones(1, model.num_experts), places, 1, 1, ranks)
    count = placement.replica_count[0, placement.physical_to_logical[0]].numpy()
    return (1 / (model.num_experts * count)).reshape(ranks, -1)


def estimate(model: Model, tokens: int, ranks: int, machine: Machine) -> Estimate:
    """Bytes and floors of one forward with ``tokens`` tokens a rank on ``ranks`` ranks."""
    chances = _chances(model, ranks)
    rows = expected_rows(model, tokens, ranks)
    share = Share(model.name, model.hidden_size, model.intermediate_size, 1, model.top_k)
    # A token has a place among its top-k with top-k times the chance of a slot.
    active_experts = (1 - (1 - model.top_k * chances) ** (tokens * ranks)).sum(1)
    compute = max(
        weight_bytes(share, 1) * float(active_experts.max()) / machine.bandwidth,
        operations(share, 1) / model.top_k * float(rows.sum(0).max()) / machine.flops,
    )
    node = np.arange(ranks) // NODE
    near = (node[:, None] == node) & ~np.eye(ranks, dtype=bool)
    far = node[:, None] != node
    volumes = traffic(model, tokens, ranks)
    return Estimate(
        model.name, tokens, ranks, chances.shape[1],
        max(s["dispatch"] for s in volumes), max(s["return"] for s in volumes),
        1e6 * compute,
        1e6 * link_bytes(rows * near, model.hidden_size) / machine.nvlink,
        1e6 * link_bytes(rows * far, model.hidden_size) / machine.network,
    )  # fmt: skip


def link_bytes(rows: Rows, hidden: int) -> float:
    """Bytes one way, in or out, through the link of the rank that has most.

    ``rows`` (R, R) are those that take the link. A rank sends rows to owners and returns rows as
    an owner; it receives the opposite of both.
    """
    there, back = row_bytes(hidden)
    as_source, as_owner = rows.sum(1), rows.sum(0)
    out, into = as_source * there + as_owner * back, as_owner * there + as_source * back
    return float(max(out.max(), into.max()))


def link_bound_from(estimates: Sequence[Estimate]) -> int | None:
    """The smallest EP size whose links take longer than the computation; None if there is none."""
    return min((p.ranks for p in estimates if p.bound != "compute"), default=None)


def table(machine: Machine, estimates: Sequence[Estimate]) -> Table:
    """Estimates for a terminal: MB of 10^6 bytes that a rank sends, and microseconds."""
    out = Table(
        "model", "T a rank", "EP", "experts a rank", "dispatch MB", "return MB", "compute",
        "NVLink", "network", "floor", "bound",
        title=f"{machine.name}: arithmetic, not measured",
    )  # fmt: skip
    for p in estimates:
        out.add_row(
            p.model, str(p.tokens), str(p.ranks), str(p.experts), f"{p.dispatch / 1e6:.2f}",
            f"{p.back / 1e6:.2f}", f"{p.compute:.0f}", f"{p.nvlink:.0f}", f"{p.network:.0f}",
            f"{p.floor:.0f}", p.bound,
        )  # fmt: skip
    return out
