"""The experts of one rank: the slot rows of the rows that came, by the backend of that rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megamoe.layer.symm_buffer import aligned_capacity, new_symm_buffer
from megamoe.spec.contract import NEWEST, REVISIONS, Contract
from megamoe.spec.features import Activation
from megamoe.spec.problem import Sizes, provides

Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""``(x, x_sf, experts, routing)`` of R rows to their slot rows (R, H) bfloat16. ``experts`` (R,)
int64 are local; a row with -1 may be anything."""


class SlotRows:
    """Slot rows by ``backend``: by its ``slot_rows`` or else by its ``run``."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self._room: Any = None

    @property
    def runs(self) -> bool:
        """Whether they are computed by ``run``, from weights in the form of the backend."""
        return not provides(self.backend, "slot_rows")

    @property
    def contract(self) -> Contract:
        """The rules of the combine: those that the backend computes."""
        contracts = getattr(self.backend, "contracts", None)
        return REVISIONS[contracts[0]] if contracts else NEWEST

    def computed_by(self, weights: tuple[torch.Tensor, ...], act: Activation) -> Compute:
        """The slot rows of rows that came, with these weights."""
        if not self.runs:
            return lambda x, sf, experts, routing: self.backend.slot_rows(
                x, sf, experts, routing, weights, act
            )
        return lambda x, sf, experts, routing: self._by_run(x, sf, experts, routing, weights, act)

    def _by_run(
        self, x: torch.Tensor, sf: torch.Tensor, experts: torch.Tensor, routing: torch.Tensor,
        weights: tuple[torch.Tensor, ...], act: Activation,
    ) -> torch.Tensor:  # fmt: skip
        """The rows as tokens of one slot each: the combine of one bfloat16 row is that row.

        A row of -0 comes out as +0, which no sum from +0 can tell apart.
        """
        rows, hidden = x.shape
        y = torch.empty(rows, hidden, dtype=torch.bfloat16, device=x.device)
        if not rows:
            return y
        buffer = self._room_for(rows, hidden, weights)
        buffer.x[:rows].view(torch.uint8).copy_(x)
        buffer.x_sf[:rows].copy_(sf)
        buffer.topk_idx[:rows, 0] = experts
        buffer.topk_weights[:rows, 0] = routing
        self.backend.run(
            y, weights, buffer, rows, activation_clamp=act.clamp, fast_math=act.fast_math
        )
        return y

    def _room_for(self, rows: int, hidden: int, weights: tuple[torch.Tensor, ...]) -> Any:
        """A buffer of the backend for at least so many rows; it grows by doubling."""
        local, inter = weights[0].shape[0], weights[2].shape[2] * 2
        if self._room is None or self._room.capacity < rows:
            most = aligned_capacity(max(rows, 0 if self._room is None else 2 * self._room.capacity))
            sizes = Sizes(local, most, 1, hidden, inter)
            make = getattr(self.backend, "new_symm_buffer", new_symm_buffer)
            self._room = make(None, weights[0].device, sizes)
        return self._room
