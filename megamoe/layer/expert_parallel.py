"""Expert parallelism: a backend of one rank, over all ranks of a process group.

Rank ``r`` of ``n`` holds the physical experts ``[r * E, (r + 1) * E)``, E a rank. A call has six
stages, and :data:`STAGES` names them:

- *stage*: the module writes E4M3 codes and scale factors of its own tokens into its buffer;
- *header*: each rank tells every other how many rows it will send, or that its call was refused;
- *dispatch*: one row for each live (token, slot) goes to the rank that holds the expert: the
  token's codes and scale factors as bytes, the expert and the routing weight;
- *experts*: the owner computes the slot rows of all rows that came, in bfloat16;
- *return*: the slot rows go back the way they came, with a row that says whether the owner failed;
- *combine*: the token's rank adds its slot rows in ascending slot order.

No step of the arithmetic knows how many ranks there are, so neither do the bits. The collectives
are those of ``torch.distributed``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch

from megamoe.backends.eager_combine import combine
from megamoe.layer.kernel_weights import packed_weights
from megamoe.layer.messages import all_to_all
from megamoe.layer.ops import prepare_megamoe_inputs
from megamoe.layer.slot_rows import Compute, SlotRows
from megamoe.layer.symm_buffer import new_symm_buffer
from megamoe.spec.features import Activation
from megamoe.spec.problem import Problem, Sizes, provides

STAGES: Final = ("stage", "header", "dispatch", "experts", "return", "combine")
REFUSAL: Final = -1
"""In place of a count in the header: the call of this rank was refused."""
ROUTE_BYTES: Final = 8
"""Bytes of a dispatched row besides its codes and scale factors: int32 expert, fp32 weight."""


class RankError(RuntimeError):
    """A call failed because of another rank; one line that names this rank, that one, the stage."""


@dataclass(frozen=True)
class _Batch:
    """This rank's tokens in its buffer."""

    x: torch.Tensor
    """(T, H) uint8: E4M3 codes."""
    x_sf: torch.Tensor
    """(T, H/128) int32."""
    ids: torch.Tensor
    """(T, K) int64, of all ranks."""
    routing: torch.Tensor
    """(T, K) float32."""
    most: int
    """Tokens that a call may bring."""

    @classmethod
    def of(cls, buffer: Any, tokens: int) -> _Batch:
        """The first rows of a symmetric buffer."""
        x, ids = buffer.x[:tokens].view(torch.uint8), buffer.topk_idx[:tokens]
        return cls(
            x, buffer.x_sf[:tokens], ids, buffer.topk_weights[:tokens], buffer.max_num_tokens
        )


class ExpertParallel:
    """``backend``, which computes the experts of one rank, over the ranks of ``group``.

    The backend offers ``run``, or ``slot_rows`` (:meth:`megamoe.backends.eager.EagerBackend
    .slot_rows`). All ranks make each call together, with any number of tokens, none too. A failure
    on one rank raises an error on all of them: its own error there, :class:`RankError` elsewhere.

    ``static``: shapes that do not depend on the routing, as a CUDA graph needs them. Every rank
    sends all its tokens to all others, and the owner computes a row for every slot of each. The
    bits are the same. A call inside of a capture is static whatever this says. ``max_num_tokens``
    must be the same on all ranks then.

    Raises ``NotImplementedError`` for a backend that offers neither.
    """

    global_ids = True
    """The module passes the ids of all ranks, and calls for no tokens too."""

    def __init__(self, backend: Any, group: Any, *, static: bool = False) -> None:
        if not (provides(backend, "run") or provides(backend, "slot_rows")):
            raise NotImplementedError(
                f"backend {backend.name} cannot run over several ranks: it has neither run nor "
                "slot_rows, and does not set global_ids"
            )
        self.backend, self.group, self.static = backend, group, static
        self._rows = SlotRows(backend)
        self.name, self.accumulator = backend.name, backend.accumulator
        self.prepare = getattr(backend, "prepare", prepare_megamoe_inputs)
        for name in ("eplb_map", "ready"):
            if provides(backend, name):
                setattr(self, name, getattr(backend, name))
        # A call takes the ids of no expert out itself, so nothing need be done to them before.
        self.ignores_foreign_ids = getattr(backend, "ignores_foreign_ids", False)
        by_rows = provides(backend, "slot_rows")
        act_only = ("swiglu-oai", "swiglu-alpha-beta", "swiglustep", "situ")
        has = getattr(backend, "features", ()) if by_rows else ()
        self.features = tuple(name for name in act_only if name in has)
        self.stats: torch.Tensor | None = None
        """(E,) int32, rows received by each local expert so far; counted where it is set."""
        self.traffic = {"dispatch": 0, "return": 0}
        """Payload bytes of all calls that went to other ranks."""
        self.at: Callable[[str], None] = lambda stage: None
        """Called at the start of each stage but the first, for progress and tests."""

    # --- the interface of a backend ---------------------------------------------------------------

    def pack_weights(self, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The four tensors in the form of the backend."""
        return packed_weights(self.backend, *weights) if self._rows.runs else weights

    def new_symm_buffer(self, group: Any, device: torch.device, sizes: Sizes) -> Any:
        """The buffer of this rank's own tokens: plain memory."""
        return new_symm_buffer(group, device, sizes)

    def run(
        self, y: torch.Tensor, weights: tuple[torch.Tensor, ...], buffer: Any, num_tokens: int, *,
        activation_clamp: float | None, fast_math: bool,
    ) -> None:  # fmt: skip
        """``y`` (T, H) bfloat16 from the buffer's first ``num_tokens`` rows; collective."""
        act = Activation("swiglu", activation_clamp, 1.0, 0.0, fast_math)
        y.copy_(self._over_ranks(_Batch.of(buffer, num_tokens), weights, act))

    def forward(self, problem: Problem) -> torch.Tensor:
        """``y`` of a problem with the weights of this rank's experts and ids of all ranks."""
        p = problem
        buffer = new_symm_buffer(None, p.topk_ids.device, p.buffer_sizes)
        rows = (t[: p.num_tokens] for t in (buffer.x, buffer.x_sf, buffer.topk_idx,
                                            buffer.topk_weights))  # fmt: skip
        self.prepare(p.hidden_states, p.topk_weights, p.topk_ids, *rows)
        weights = self.pack_weights(
            p.w13_weight, p.w13_weight_scale, p.w2_weight, p.w2_weight_scale
        )
        return self._over_ranks(_Batch.of(buffer, p.num_tokens), weights, p.act)

    def refuse(self, device: torch.device) -> None:
        """Tell the other ranks that this rank's call was refused; they raise :class:`RankError`.

        Not in a static call, which has no header: there the others wait until the group's timeout.
        """
        if not self.static:
            self.at("header")
            self._exchange_counts(torch.full((self.group.size(),), REFUSAL, device=device))

    # --- a call -----------------------------------------------------------------------------------

    def _over_ranks(
        self, batch: _Batch, weights: tuple[torch.Tensor, ...], act: Activation
    ) -> torch.Tensor:
        local, ids = weights[0].shape[0], batch.ids
        live = (ids >= 0) & (ids < local * self.group.size())
        compute = self._rows.computed_by(weights, act)
        capturing = ids.is_cuda and torch.cuda.is_current_stream_capturing()
        way = self._static if self.static or capturing else self._dynamic
        slots = way(batch, live, local, compute)
        self.at("combine")
        return combine(slots, live, batch.routing, self._rows.contract)

    def _dynamic(
        self, batch: _Batch, live: torch.Tensor, local: int, compute: Compute
    ) -> torch.Tensor:
        """Slot rows (T, K, H), by messages of exactly the rows that there are."""
        x, ids = batch.x, batch.ids
        order, counts = _by_owner(ids, live, local, self.group.size())
        self.at("header")
        leaving, arriving = self._exchange_counts(counts)
        self.at("dispatch")
        sending = order[: sum(leaving)]
        token = sending // ids.shape[1]
        payload = torch.cat(
            [
                x[token], batch.x_sf[token].view(torch.uint8),
                (ids.flatten()[sending] % local).int()[:, None].view(torch.uint8),
                batch.routing.flatten()[sending][:, None].view(torch.uint8),
            ],
            dim=1,
        )  # fmt: skip
        came = self._exchange("dispatch", payload, leaving, arriving)
        self.at("experts")
        failure: Exception | None = None
        hidden = x.shape[1]
        try:
            rows = self._experts(came, hidden, local, compute)
        except Exception as error:  # the others wait for this rank's rows
            failure = error
            rows = came.new_zeros(len(came), hidden, dtype=torch.bfloat16)
        self.at("return")
        status = came.new_full((1, 2 * hidden), failure is not None)
        parts = rows.view(torch.uint8).split(arriving)
        answer = torch.cat([t for part in parts for t in (part, status)])
        back = self._exchange("return", answer, arriving, leaving, beside=1)
        if failure is not None:
            raise failure
        of_owners = back.split([n for count in leaving for n in (count, 1)])
        words: list[int] = torch.cat(of_owners[1::2])[:, 0].tolist()
        if any(words):
            culprit = next(rank for rank, word in enumerate(words) if word)
            raise RankError(self._failure(culprit, "experts"))
        slots = torch.zeros(ids.numel(), hidden, dtype=torch.bfloat16, device=x.device)
        slots[sending] = torch.cat(of_owners[::2]).view(torch.bfloat16)
        return slots.view(*ids.shape, hidden)

    def _experts(
        self, came: torch.Tensor, hidden: int, local: int, compute: Compute
    ) -> torch.Tensor:
        """Slot rows of the rows that came; counts them."""
        x, sf, expert, routing = came.split((hidden, hidden // 32, 4, 4), dim=1)
        experts = expert.contiguous().view(torch.int32).flatten().long()
        if self.stats is not None:
            # Not bincount, which asks the device for the largest expert, and waits.
            self.stats.index_add_(0, experts, torch.ones_like(experts, dtype=self.stats.dtype))
        words = sf.contiguous().view(torch.int32)
        return compute(
            x.contiguous(), words, experts, routing.contiguous().view(torch.float32).flatten()
        )

    def _static(
        self, batch: _Batch, live: torch.Tensor, local: int, compute: Compute
    ) -> torch.Tensor:
        """Slot rows (T, K, H), by messages whose shapes are those of a full buffer."""
        x, ids, most = batch.x, batch.ids, batch.most
        (tokens, top_k), hidden, ranks = ids.shape, x.shape[1], self.group.size()
        live_ids = torch.where(live, ids, -1)
        mine = torch.cat(
            [x, batch.x_sf.view(torch.uint8), live_ids.int().view(torch.uint8),
             batch.routing.contiguous().view(torch.uint8)], dim=1,
        )  # fmt: skip
        self.at("dispatch")
        payload = mine.new_full((most, mine.shape[1]), 0xFF)  # ids of -1
        payload[:tokens] = mine
        came = self._exchange("dispatch", payload.repeat(ranks, 1), [most] * ranks, [most] * ranks)
        self.at("experts")
        codes, sf, their_ids, their_routing = came.split(
            (hidden, hidden // 32, 4 * top_k, 4 * top_k), dim=1
        )
        index = their_ids.contiguous().view(torch.int32).flatten().long()
        index = index - local * self.group.rank()
        here = (index >= 0) & (index < local)
        index = torch.where(here, index, -1)
        if self.stats is not None:
            self.stats.index_add_(0, index.clamp_min(0), here.to(self.stats.dtype))
        token = torch.arange(len(came), device=x.device).repeat_interleave(top_k)
        rows = compute(
            codes[token], sf.contiguous().view(torch.int32)[token], index,
            their_routing.contiguous().view(torch.float32).flatten(),
        )  # fmt: skip
        self.at("return")
        each = [most * top_k] * ranks
        back = self._exchange("return", rows.contiguous().view(torch.uint8), each, each)
        by_rank = back.view(torch.bfloat16).view(ranks, most, top_k, hidden)[:, :tokens]
        owner = (live_ids.clamp_min(0) // local)[None, :, :, None].expand(1, -1, -1, hidden)
        return by_rank.gather(0, owner).squeeze(0)

    # --- messages ---------------------------------------------------------------------------------

    def _exchange_counts(self, counts: torch.Tensor) -> tuple[list[int], list[int]]:
        """``counts`` (ranks,) int64 for all ranks, and those of all ranks for this one, as numbers.

        :class:`RankError` if another rank refused.
        """
        with self._stage_errors("header"):
            came = all_to_all(counts, None, None, self.group)
            leaving, arriving = torch.stack([counts, came]).tolist()  # one wait for both
        refusers = [rank for rank, count in enumerate(arriving) if count == REFUSAL]
        if refusers and leaving[0] != REFUSAL:
            raise RankError(self._failure(refusers[0], "stage"))
        return leaving, arriving

    def _exchange(
        self, stage: str, rows: torch.Tensor, out: list[int], into: list[int], beside: int = 0
    ) -> torch.Tensor:
        """Rows of bytes to all ranks, ``out[r]`` to rank r, and ``into[r]`` rows from it.

        ``beside`` more rows go each way, which are no payload.
        """
        self.traffic[stage] += (sum(out) - out[self.group.rank()]) * rows.shape[1]
        with self._stage_errors(stage):
            more = [n + beside for n in out], [n + beside for n in into]
            return all_to_all(rows, *more, self.group)

    @contextmanager
    def _stage_errors(self, stage: str) -> Iterator[None]:
        """A failure of the group as an error that names rank and stage."""
        try:
            yield
        except RankError:
            raise
        except RuntimeError as error:
            words = " ".join(str(error).split())[:200]
            raise RankError(f"{self._self()} lost the others in {stage}: {words}") from error

    def _self(self) -> str:
        return f"rank {self.group.rank()} of {self.group.size()}"

    def _failure(self, rank: int, stage: str) -> str:
        return f"{self._self()}: rank {rank} failed in {stage}; its own error says why"


def _by_owner(
    ids: torch.Tensor, live: torch.Tensor, local: int, ranks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The slots by owner, (T * K,) int64 indices of ``ids``, and the slots of each rank, (ranks,).

    A stable sort keeps the order of token and slot within an owner. Slots without effect come last.
    No shape depends on the data, so nothing here waits for the device.
    """
    owner, order = torch.where(live, ids // local, ranks).flatten().sort(stable=True)
    ends = torch.searchsorted(owner, torch.arange(ranks, device=ids.device), right=True)
    return order, ends.diff(prepend=ends.new_zeros(1))


__all__ = ["STAGES", "ExpertParallel", "RankError"]
