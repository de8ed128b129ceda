"""One benchmark run: it prints and saves each row as soon as the row is measured."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megamoe.bench import timing
from megamoe.bench.floor import SHARES, Share, floor
from megamoe.bench.peers import PEERS
from megamoe.bench.rows import Row, rate
from megamoe.layer.kernel_weights import packed_weights
from megamoe.spec.problem import Sizes


def measure(
    backend: Any, shares: Sequence[str], tokens: Sequence[int], peers: Sequence[str],
    repeats: int, device: str = "cuda",
) -> Iterator[Row]:  # fmt: skip
    """Time ``backend`` (with ``run``) and ``peers`` for every share and token count.

    A failure, of the backend or of a peer, is a row with the reason.
    """
    for name in shares:
        for count in tokens:
            yield from _one(backend, SHARES[name], count, peers, repeats, device)
            _forget()


def _one(
    backend: Any, share: Share, tokens: int, peers: Sequence[str], repeats: int, device: str
) -> Iterator[Row]:
    generator = torch.Generator(device=device).manual_seed(tokens)
    hidden = torch.randn(tokens, share.hidden, generator=generator, device=device).bfloat16()
    order = torch.rand(tokens, share.experts, generator=generator, device=device)
    ids = order.argsort(1)[:, : share.top_k].contiguous()
    weights = torch.rand(tokens, share.top_k, generator=generator, device=device)
    timer = _Timer(share, tokens, len(ids.unique()), repeats)
    yield from _own(timer, backend, hidden, ids, weights, generator)
    for peer in peers:
        _forget()
        scope, make = PEERS[peer]
        try:
            row = timer.row(peer, scope, make(share, hidden, ids, weights))
        except Exception as error:
            row = timer.failure(peer, scope, error)
        yield row


@dataclass(frozen=True)
class _Timer:
    share: Share
    tokens: int
    experts: int
    repeats: int

    def row(self, what: str, scope: str, step: Any) -> Row:
        events, host = timing.events(step, self.repeats), timing.host(step, self.repeats)
        try:
            graph, note = timing.graph(step, self.repeats), ""
        except Exception as error:
            graph, note = None, f"no CUDA graph: {_line(error)}"
        row = self._row(what, scope, events=events, graph=graph, note=note, host=host)
        return replace(row, tflops=rate(row))

    def failure(self, what: str, scope: str, error: BaseException) -> Row:
        return self._row(what, scope, note=_line(error))

    def _row(self, what: str, scope: str, **rest: Any) -> Row:
        least = floor(self.share, self.tokens, self.experts)
        return Row(self.share.name, self.tokens, what, scope, least, self.experts, **rest)


def _own(timer: _Timer, backend: Any, *inputs: Any) -> Iterator[Row]:
    """The rows of ``backend``; its memory goes with the iterator."""
    scope = "whole forward"
    try:
        for scope, step in _own_steps(backend, timer.share, *inputs):
            yield timer.row(backend.name, scope, step)
    except Exception as error:
        yield timer.failure(backend.name, scope, error)


def _own_steps(
    backend: Any, share: Share, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor,
    generator: torch.Generator,
) -> Iterator[tuple[str, Any]]:  # fmt: skip
    """The whole forward of ``backend``, then its stages; their memory goes with the iterator."""
    tokens = hidden.shape[0]
    packed = packed_weights(backend, *random_weights(share, generator))
    sizes = Sizes(share.experts, tokens, share.top_k, share.hidden, share.intermediate)
    buffer = backend.new_symm_buffer(None, hidden.device, sizes)
    y = torch.empty_like(hidden)
    views = [t[:tokens] for t in (buffer.x, buffer.x_sf, buffer.topk_idx, buffer.topk_weights)]
    options: dict[str, Any] = {"activation_clamp": 10.0, "fast_math": True}

    def prepare() -> None:
        backend.prepare(hidden, weights, ids, *views)

    def whole() -> None:
        prepare()
        backend.run(y, packed, buffer, tokens, **options)

    yield "whole forward", whole
    yield "stage staging", prepare
    if hasattr(backend, "stages"):
        for stage, launch in backend.stages(y, packed, buffer, tokens, **options):
            yield f"stage {stage}", launch


def random_weights(share: Share, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Checkpoint layout: any nibbles, scales of real models' size."""
    e, h, i = share.experts, share.hidden, share.intermediate

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(
            low, high, shape, generator=generator, device=generator.device, dtype=torch.uint8
        )

    return (
        draw(0, 256, e, 2 * i, h // 2),
        draw(116, 121, e, 2 * i, h // 32),
        draw(0, 256, e, h, i // 2),
        draw(116, 121, e, h, i // 32),
    )


def _forget() -> None:
    """Free the memory of steps that are no longer timed."""
    gc.collect()
    torch.cuda.empty_cache()


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
