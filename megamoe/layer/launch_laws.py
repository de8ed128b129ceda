"""Laws of a launch: old bytes in the buffer, a CUDA graph, a busy second stream.

:mod:`megamoe.layer.engine_laws` has those of torch's modes, and of the tensors and
weights of an engine.

:mod:`megamoe.kinds.laws` changes the problem; here the problem stays and what surrounds the
call changes. So these run in the worker, which hands back ``y`` of every variant, and the judge
compares them. Two laws need the ``run`` face, two need CUDA; a backend without is not judged by
them, and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import torch

from megamoe.layer import engine_laws
from megamoe.layer.engine_laws import Variants
from megamoe.layer.kernel_weights import packed_weights
from megamoe.layer.ops import prepare_megamoe_inputs
from megamoe.layer.symm_buffer import new_symm_buffer
from megamoe.spec.problem import Problem
from megamoe.spec.tensors import OPERATIONS

BUFFER_FIELDS: Final = (*OPERATIONS["prepare"].returns, "l2_acts", "l2_acts_sf")
"""The visible part of a symmetric buffer.

A kernel may keep further data in it (its barriers). Nothing may outlive a call in the tensors that
the buffer names in ``scratch``.
"""

BUSY_PRODUCTS: Final = 400
"""Matrix products queued on the other stream: some 50 ms on an H100, far more than a forward."""
DELAY_PRODUCTS: Final = 100
"""Matrix products queued before the inputs: longer than the host takes to launch a forward."""


def variants(backend: Any, problem: Problem, law: str, **more: Any) -> Variants:
    """Run ``law`` with ``problem``, whose tensors lie on the backend's device.

    Each variant's ``y`` must have the bits of an ordinary ``forward``. The caller has checked that
    the backend meets the law's needs. ``more``: the ``processes`` of a law of torch's modes whose
    calls are made here; without it, all.
    """
    return LAWS[law](backend, problem, **more)


class _Run:
    """The ``run`` face with everything of its own: weights, buffer, inputs and ``y``."""

    def __init__(self, backend: Any, problem: Problem) -> None:
        self.backend, self.problem = backend, problem
        p = problem
        factory = getattr(backend, "new_symm_buffer", new_symm_buffer)
        self.weights = packed_weights(
            backend, p.w13_weight, p.w13_weight_scale, p.w2_weight, p.w2_weight_scale
        )
        self.buffer = factory(None, p.topk_ids.device, p.buffer_sizes)
        self.inputs = [p.hidden_states.clone(), p.topk_weights.clone(), p.topk_ids.clone()]
        self.y = torch.empty_like(p.hidden_states)
        self.prepare = getattr(backend, "prepare", prepare_megamoe_inputs)

    def launch(self) -> None:
        """Staging and the fused part, without waiting."""
        b, tokens = self.buffer, self.problem.num_tokens
        rows = [getattr(b, name)[:tokens] for name in BUFFER_FIELDS[:4]]
        self.prepare(*self.inputs, *rows)
        self.backend.run(
            self.y, self.weights, b, tokens,
            activation_clamp=self.problem.activation_clamp, fast_math=self.problem.fast_math,
        )  # fmt: skip

    def spoil(self) -> None:
        """0xFF in every byte that a call may find in the buffer: NaN, id -1, the largest scale."""
        for name in (*BUFFER_FIELDS, *getattr(self.buffer, "scratch", ())):
            tensor = getattr(self.buffer, name, None)
            if isinstance(tensor, torch.Tensor):
                tensor.view(torch.uint8).fill_(0xFF)

    def y_of(self, step: Callable[[], Any]) -> torch.Tensor:
        """``y`` after ``step``; an element that nobody writes stays NaN."""
        self.y.view(torch.uint8).fill_(0xFF)
        step()
        _wait(self.y)
        return self.y.clone()


def _stale_bytes(backend: Any, problem: Problem) -> Variants:
    rows = list(range(problem.num_tokens))
    face = _Run(backend, problem)
    yield "the run face instead of forward", face.y_of(face.launch), rows
    for turn in ("second", "third"):
        face.spoil()
        yield f"0xFF in the whole buffer before a {turn} call", face.y_of(face.launch), rows


def _graph_replay(backend: Any, problem: Problem) -> Variants:
    rows = list(range(problem.num_tokens))
    face = _Run(backend, problem)
    graph = torch.cuda.CUDAGraph()

    def capture() -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compile and allocate before the capture
            face.launch()
            face.launch()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            face.launch()

    capture()
    torch.cuda.synchronize()
    for turn in ("first", "second"):
        yield f"the {turn} replay of a CUDA graph", face.y_of(graph.replay), rows
    face.spoil()
    yield "a replay over a buffer of 0xFF", face.y_of(graph.replay), rows
    # Other tokens in the same memory: nothing of the routing may have been settled at capture.
    for tensor in face.inputs:
        tensor.copy_(tensor.flip(0))
    yield "a replay with the tokens reversed", face.y_of(graph.replay), rows[::-1]


class Stream:
    """A CUDA stream and the work that ``busy-stream`` queues on it; nothing waits for the device.

    Tests put another class in its place that needs no GPU.
    """

    def __init__(self, stream: Any, device: torch.device) -> None:
        self.stream = stream
        with torch.cuda.stream(stream):
            self.left = torch.ones(4096, 4096, dtype=torch.bfloat16, device=device)
            self.product = torch.empty_like(self.left)

    def after(self, other: Stream) -> None:
        self.stream.wait_stream(other.stream)

    def products(self, count: int) -> None:
        with torch.cuda.stream(self.stream):
            for _ in range(count):
                torch.mm(self.left, self.left, out=self.product)

    def write(self, to: torch.Tensor, source: torch.Tensor) -> None:
        with torch.cuda.stream(self.stream):
            to.copy_(source)

    def run(self, function: Callable[[], Any]) -> Any:
        """The backend's code, to which this is the current stream."""
        with torch.cuda.stream(self.stream):
            return function()

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """The content of ``tensor`` at this point of the stream."""
        with torch.cuda.stream(self.stream):
            return tensor.clone()


def streams(device: torch.device) -> tuple[Stream, Stream]:
    """The current stream, and another."""
    return Stream(torch.cuda.current_stream(), device), Stream(torch.cuda.Stream(), device)


def _busy_stream(backend: Any, problem: Problem) -> Variants:
    """The order of one stream is all that a launch may rely on, and must.

    The inputs are written on the kernel's stream, behind a queue of products, and ``y`` is read on
    it with nothing in between: a launch on another stream reads the old content of the inputs, or
    comes too late. Each call has its tokens in another order, lest the memory of an earlier one
    make ``y`` right.
    """
    rows = list(range(problem.num_tokens))
    inputs = (problem.hidden_states, problem.topk_ids, problem.topk_weights)
    here, side = streams(problem.topk_ids.device)
    references: list[Any] = []  # nothing goes back to the allocator while a stream may still use it

    def beside(busy: Stream, ours: Stream, order: list[int]) -> Any:
        # No expert and nothing to weigh: another y, and no harm to a kernel that takes it.
        buffers = [torch.full_like(t, -1 if t is problem.topk_ids else 0) for t in inputs]
        source = [t[order] for t in inputs]
        # The weights stay those of the first call: by now a backend has inspected them, so it need
        # not wait for the device.
        late = replace(
            problem, hidden_states=buffers[0], topk_ids=buffers[1], topk_weights=buffers[2]
        )
        ours.after(here)
        busy.after(here)
        busy.products(BUSY_PRODUCTS)
        ours.products(DELAY_PRODUCTS)
        for to, tensor in zip(buffers, source, strict=True):
            ours.write(to, tensor)
        output = ours.run(lambda: backend.forward(late))
        references.append((buffers, source, output))
        return ours.read(output if isinstance(output, torch.Tensor) else output["y"])

    for label, busy, ours, order in (
        ("a busy second stream", side, here, rows[::-1]),
        ("running on a second stream beside a busy first", here, side, rows[1:] + rows[:1]),
    ):
        y = beside(busy, ours, order)
        _wait(y)
        yield label, y, order


def _wait(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


LAWS: Final[dict[str, Callable[..., Variants]]] = {
    "stale-bytes": _stale_bytes,
    "graph-replay": _graph_replay,
    "busy-stream": _busy_stream,
    **engine_laws.LAWS,
}

__all__ = ["LAWS", "variants"]
