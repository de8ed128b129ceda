"""Laws of how the layer is launched: old bytes in the buffer, a CUDA graph, a busy second stream.

:mod:`megamoe.suite.properties` changes the problem; here the problem stays and what surrounds the
call changes. Two laws need the ``run`` face, two need CUDA; where that is missing they raise
:class:`Unmet`, which is reported as not provided, never as passed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final

import numpy.typing as npt
import torch

from megamoe.judge import Finding, Place, bits, bitwise, forward_bits
from megamoe.judge.formats import BF16
from megamoe.layout import transform_weights
from megamoe.ops import prepare_megamoe_inputs
from megamoe.problem import Problem, provided
from megamoe.symm_buffer import new_symm_buffer

Call = Callable[..., Any]
"""``call(function, *arguments)``: runs the backend's code, waits for the device, names what it
raises."""

BUFFER_FIELDS: Final = ("x", "x_sf", "topk_idx", "topk_weights", "l2_acts", "l2_acts_sf")
"""What a symmetric buffer shows. What else a kernel keeps in it (its barriers) is its own, but for
the tensors that the buffer names in ``scratch``: nothing in those may outlive a call."""

BUSY_PRODUCTS: Final = 400
"""Matrix products queued on the other stream: some 50 ms on an H100, far more than a forward."""


class Unmet(Exception):
    """The law cannot be tried here; the message says why, in one line."""


def findings(backend: Any, call: Call, problem: Problem, law: str, device: str) -> list[Finding]:
    """Try ``law`` with ``problem``, whose tensors lie on ``device``; one finding a variant.

    Every variant is compared bitwise with an ordinary ``forward``. ``ValueError`` for an unknown
    law, :class:`Unmet` where it cannot be tried.
    """
    if law not in LAWS:
        raise ValueError(f"unknown law {law!r}; known: {', '.join(LAWS)}")
    variants, needs_run, needs_cuda = LAWS[law]
    if needs_run and not provided(backend, "run"):
        raise Unmet("the backend has no run")
    if needs_cuda and not device.startswith("cuda"):
        raise Unmet(f"law {law} needs CUDA; use --device cuda")
    base = _y(call(backend.forward, problem), problem)
    ids = problem.topk_ids.cpu().numpy()
    out = []
    for label, actual, order in variants(backend, call, problem):
        place = Place(("token", "channel"), tokens=order, ids=ids[order])
        found = bitwise("y", BF16, actual, base[order], place)
        if found.bad:
            text = f"{law}: {label} changes {found.outside} of {found.total} outputs"
            found = replace(found, text=text)
        out.append(found)
    return out


Made = Iterator[tuple[str, npt.NDArray[Any], list[int]]]
"""Label, bits of y, and the row of the original behind each row of y."""


def _y(output: Any, problem: Problem) -> npt.NDArray[Any]:
    return forward_bits(output, problem)["y"]


class _Run:
    """The ``run`` face with everything of its own: weights, buffer, inputs and ``y``."""

    def __init__(self, backend: Any, call: Call, problem: Problem) -> None:
        self.backend, self.call, self.problem = backend, call, problem
        p = problem
        factory = getattr(backend, "new_symm_buffer", new_symm_buffer)
        # As the module does: a form of the kernel's own, or the layout that goldens pin.
        transform = getattr(backend, "transform_weights", transform_weights)
        self.weights = call(
            getattr(backend, "pack_weights", transform),
            p.w13_weight, p.w13_weight_scale, p.w2_weight, p.w2_weight_scale,
        )  # fmt: skip
        self.buffer = call(
            factory, None, p.topk_ids.device, p.num_experts, p.max_num_tokens, p.top_k,
            p.hidden_size, p.intermediate_size,
        )  # fmt: skip
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

    def bits(self, step: Callable[[], Any]) -> npt.NDArray[Any]:
        """``y`` after ``step``; what is not written stays NaN."""
        self.y.view(torch.uint8).fill_(0xFF)
        self.call(step)
        return bits(self.y)


def _stale_bytes(backend: Any, call: Call, problem: Problem) -> Made:
    rows = list(range(problem.num_tokens))
    face = _Run(backend, call, problem)
    yield "the run face instead of forward", face.bits(face.launch), rows
    for turn in ("second", "third"):
        face.spoil()
        yield f"0xFF in the whole buffer before a {turn} call", face.bits(face.launch), rows


def _graph_replay(backend: Any, call: Call, problem: Problem) -> Made:
    rows = list(range(problem.num_tokens))
    face = _Run(backend, call, problem)
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

    call(capture)
    for turn in ("first", "second"):
        yield f"the {turn} replay of a CUDA graph", face.bits(graph.replay), rows
    face.spoil()
    yield "a replay over a buffer of 0xFF", face.bits(graph.replay), rows
    # Other tokens in the same memory: nothing of the routing may have been settled at capture.
    for tensor in face.inputs:
        tensor.copy_(tensor.flip(0))
    yield "a replay with the tokens reversed", face.bits(graph.replay), rows[::-1]


def _busy_stream(backend: Any, call: Call, problem: Problem) -> Made:
    rows = list(range(problem.num_tokens))
    here, side = torch.cuda.current_stream(), torch.cuda.Stream()
    left = torch.ones(4096, 4096, dtype=torch.bfloat16, device=problem.topk_ids.device)
    product = torch.empty_like(left)

    def beside(busy: Any, ours: Any) -> Any:
        ours.wait_stream(here)
        busy.wait_stream(here)
        with torch.cuda.stream(busy):
            for _ in range(BUSY_PRODUCTS):
                torch.mm(left, left, out=product)
        with torch.cuda.stream(ours):
            return backend.forward(problem)

    for label, busy, ours in (
        ("a busy second stream", side, here),
        ("running on a second stream beside a busy first", here, side),
    ):
        yield label, _y(call(beside, busy, ours), problem), rows


LAWS: Final[dict[str, tuple[Callable[[Any, Call, Problem], Made], bool, bool]]] = {
    "stale-bytes": (_stale_bytes, True, False),
    "graph-replay": (_graph_replay, True, True),
    "busy-stream": (_busy_stream, False, True),
}
"""Law to its variants, whether it needs ``run``, and whether it needs CUDA."""

__all__ = ["LAWS", "Unmet", "findings"]
