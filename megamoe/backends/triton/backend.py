"""The ``triton`` backend: a fused forward for SM90 and newer, weights packed in four bits.

Four launches after staging's one: rows by expert (:mod:`.kernels.dispatch`), linear 1 with SwiGLU
and requantisation, linear 2 (:mod:`.kernels.few` or :mod:`.kernels.overlapped`), combine. Nothing
waits for the host, no float is added atomically, and a token's bits depend on that token alone:
every dot product runs over ascending blocks of 32 in one accumulator, whatever tile it is in.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from megamoe.backends.triton.binaries import compile_all, on
from megamoe.backends.triton.launches import (
    TALLIES,
    Call,
    LaunchStep,
    Memory,
    Stage,
    is_wide,
    stages_of,
)
from megamoe.backends.triton.packing import pack, power_of_two, unpack
from megamoe.backends.triton.tiles import (
    CROWD,
    FEW,
    MANY,
    NEARLY,
    OVERLAPPED,
    ROUNDS,
    SPARSE,
)
from megamoe.layer.kernel_weights import check_sizes
from megamoe.layer.symm_buffer import SymmBuffer, check_capacity
from megamoe.layer.symm_buffer import new_symm_buffer as plain_buffer
from megamoe.spec.contract import MEGAMOE_2026_06
from megamoe.spec.problem import Problem, Sizes

MAX_TOP_K = 32


@dataclass
class TritonBuffer(SymmBuffer):
    """The symmetric buffer and the kernels' work space; nothing in it outlives a call."""

    operand: torch.Tensor = None  # type: ignore[assignment]
    """(capacity, H) bfloat16: staged hidden states, decoded, permuted within 32."""
    acts: torch.Tensor = None  # type: ignore[assignment]
    """(capacity, K, I) bfloat16: requantised activations, decoded, permuted within 32."""
    slots: torch.Tensor = None  # type: ignore[assignment]
    """(capacity, K, H) bfloat16: rows of the combine."""
    order: torch.Tensor = None  # type: ignore[assignment]
    """(capacity * K,) int32."""
    places: torch.Tensor = None  # type: ignore[assignment]
    """(capacity * K,) int32: the inverse of ``order``; -1 for slots without an expert here."""
    counts: torch.Tensor = None  # type: ignore[assignment]
    """(2, TALLIES, experts, next power of two) int32: rows by expert; half is ``cursors``."""
    cursors: torch.Tensor = None  # type: ignore[assignment]
    """(TALLIES, experts, next power of two) int32: rows that have been given a place."""
    tiles: torch.Tensor = None  # type: ignore[assignment]
    """(most tiles, 3) int32."""
    scratch: ClassVar[tuple[str, ...]] = (
        "operand", "acts", "slots", "order", "places", "counts", "tiles",
    )  # fmt: skip
    """Fields that a call may find anything in, besides the staged ones."""


def new_symm_buffer(group: Any, device: torch.device, sizes: Sizes) -> TritonBuffer:
    """A buffer for ``sizes`` on ``device``; arguments as for the module's.

    ``ValueError`` for a top-k beyond what the kernels take.
    """
    experts, top_k, hidden = sizes.num_experts, sizes.top_k, sizes.hidden_size
    if top_k > MAX_TOP_K:
        raise ValueError(f"backend triton takes top-k up to {MAX_TOP_K}, not {top_k}")
    plain = plain_buffer(group, device, sizes)
    rows = plain.capacity

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    counts = empty(2, TALLIES, power_of_two(experts), dtype=torch.int32)
    return TritonBuffer(
        **{f.name: getattr(plain, f.name) for f in fields(plain)},
        operand=empty(rows, hidden),
        acts=empty(rows, top_k, sizes.intermediate_size),
        slots=empty(rows, top_k, hidden),
        order=empty(rows * top_k, dtype=torch.int32),
        places=empty(rows * top_k, dtype=torch.int32),
        counts=counts,
        cursors=counts[1],
        tiles=empty(experts + rows * top_k // 8 + 1, 3, dtype=torch.int32),
    )


class TritonBackend:
    """The kernels on one CUDA device of compute capability 9.0 or newer.

    Newer than 9.0 all products are those of :mod:`.kernels.few`, whose instructions are to be had
    there. They have been compiled for such GPUs and **have never run on one**.
    """

    name = "triton"
    accumulator = "fp32-ordered"
    contracts = (MEGAMOE_2026_06.revision,)
    ignores_foreign_ids = True
    folds_scales = True

    new_symm_buffer = staticmethod(new_symm_buffer)

    def __init__(self, device: torch.device) -> None:
        from megamoe.backends.triton import eplb, staging

        self.device = device
        self.prepare = partial(staging.prepare_megamoe_inputs, early=True, contract=MEGAMOE_2026_06)
        self.eplb_map = eplb.eplb_map_to_physical_and_record

    @staticmethod
    def pack_weights(*weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The four uint8 tensors of a ``Problem`` in the kernels' order of bits; same shapes."""
        w13, s13, w2, s2 = weights
        packed = *pack(w13, s13, gate_and_up=True), *pack(w2, s2, gate_and_up=False)
        # Looked at now, since looking waits for the device: not in a graph's capture.
        is_wide(packed[1]), is_wide(packed[3])
        return packed

    @staticmethod
    def unpack_weights(*packed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The inverse of :meth:`pack_weights`: the checkpoint's bytes."""
        w13, s13, w2, s2 = packed
        return *unpack(w13, s13, gate_and_up=True), *unpack(w2, s2, gate_and_up=False)

    def forward(self, problem: Problem) -> dict[str, torch.Tensor]:
        """The whole layer with a buffer of its own; every stage of ``tensors.STAGES``."""
        tokens, hidden = problem.hidden_states.shape
        device = problem.hidden_states.device
        buffer = new_symm_buffer(None, device, problem.buffer_sizes)
        check_capacity(tokens, buffer.max_num_tokens)
        y = torch.empty(tokens, hidden, dtype=torch.bfloat16, device=device)
        self.prepare(
            problem.hidden_states, problem.topk_weights, problem.topk_ids,
            buffer.x, buffer.x_sf, buffer.topk_idx, buffer.topk_weights,
        )  # fmt: skip
        weights = self.pack_weights(
            problem.w13_weight, problem.w13_weight_scale, problem.w2_weight,
            problem.w2_weight_scale,
        )  # fmt: skip
        self.run(
            y, weights, buffer, tokens,
            activation_clamp=problem.activation_clamp, fast_math=problem.fast_math,
        )  # fmt: skip
        return {
            "y": y,
            "x": buffer.x[:tokens],
            "x_sf": buffer.x_sf[:tokens],
            "l2_acts": buffer.l2_acts[:tokens],
            "l2_acts_sf": buffer.l2_acts_sf[:tokens],
        }

    def run(
        self,
        y: torch.Tensor,
        weights: tuple[torch.Tensor, ...],
        buffer: TritonBuffer,
        num_tokens: int,
        *,
        activation_clamp: float | None,
        fast_math: bool,
    ) -> None:
        """``y`` (T, H) bfloat16 from the buffer's first ``num_tokens`` staged rows.

        ``weights``: from :meth:`pack_weights`. Raises ``ValueError`` before any
        write for sizes, a layout or a device that the kernels cannot take.
        """
        memory, stages = _stages(
            y, weights, buffer, num_tokens, activation_clamp=activation_clamp, fast_math=fast_math
        )
        launch(memory, stages)

    def stages(
        self,
        y: torch.Tensor,
        weights: tuple[torch.Tensor, ...],
        buffer: TritonBuffer,
        num_tokens: int,
        *,
        activation_clamp: float | None,
        fast_math: bool,
    ) -> list[tuple[str, Callable[[], None]]]:
        """Name and launch of each stage of :meth:`run`, in order; the same errors."""
        memory, stages = _stages(
            y, weights, buffer, num_tokens, activation_clamp=activation_clamp, fast_math=fast_math
        )
        return [(stage[0], partial(launch, memory, [stage])) for stage in stages]

    def fingerprint(self) -> dict[str, Any]:
        """What ran so far: hashes of the kernels' sources and of each compiled binary; options."""
        from megamoe.backends.triton.binaries import digests

        return {
            "sources": kernel_sources(Path(__file__).parent / "kernels"),
            "options": f"{FEW} {OVERLAPPED} NEARLY={NEARLY} ROUNDS={ROUNDS} SPARSE={SPARSE} "
            f"CROWDED={CROWD} MANY={MANY}",
            "binaries": digests(),
        }


def kernel_sources(folder: Path) -> str:
    """sha256 of what Triton compiles in the modules of ``folder``, and of their constants.

    Not of imports, nor of the functions that launch a kernel: an edit there is no other build, so
    a bit that it moves is a red.
    """
    sources = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "\n@gluon." not in text and "\n@triton." not in text:
            continue
        lines = text.splitlines(keepends=True)
        for node in ast.parse(text).body:
            decorators = getattr(node, "decorator_list", [])
            if decorators or isinstance(node, ast.Assign | ast.AnnAssign):
                first = min(n.lineno for n in (node, *decorators))
                sources.update("".join(lines[first - 1 : node.end_lineno]).encode())
    return sources.hexdigest()


def create(device: str | torch.device = "cuda") -> TritonBackend:
    """The backend on ``device``; ``NotImplementedError`` in one line where it cannot run."""
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        raise NotImplementedError(
            "backend triton needs an NVIDIA GPU of compute capability 9.0 or newer; run with "
            "--device cuda on a machine that has one"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability[0] < 9:
        raise NotImplementedError(
            f"backend triton needs compute capability 9.0 or newer, this GPU has "
            f"{capability[0]}.{capability[1]}"
        )
    return TritonBackend(device)


def _stages(
    y: torch.Tensor, weights: tuple[torch.Tensor, ...], buffer: TritonBuffer, num_tokens: int,
    *, activation_clamp: float | None, fast_math: bool,
) -> tuple[Memory, tuple[Stage, ...]]:  # fmt: skip
    """What a forward works on, and its launches; none for no tokens."""
    w13, s13, w2, s2 = weights
    memory = Memory(buffer, w13, s13, w2, s2, y)
    _check(memory, num_tokens)
    if num_tokens == 0:
        return memory, ()
    call = Call(
        num_tokens, buffer.capacity, w2.shape[0], w2.shape[1], w2.shape[2] * 2,
        buffer.topk_idx.shape[1], activation_clamp, fast_math, is_wide(s13) or is_wide(s2),
        y.device,
    )  # fmt: skip
    return memory, stages_of(call)


def launch(memory: Memory, stages: Sequence[Stage]) -> None:
    """``stages`` in order, on the current stream of their tensors' device."""
    from triton.runtime import driver

    device = memory.y.device
    with on(device):
        fresh = [s for _, steps in stages for s in steps
                 if isinstance(s, LaunchStep) and not s.launch.is_compiled]  # fmt: skip
        compile_all([partial(s.launch.compile, s.arguments(memory)) for s in fresh])
        stream = driver.active.get_current_stream(device.index)
        for _, steps in stages:
            for step in steps:
                step(memory, stream)


def _check(memory: Memory, num_tokens: int) -> None:
    """Everything that a kernel would read or write beyond its bounds for."""
    buffer, w2 = memory.buffer, memory.w2
    experts, hidden, inter = w2.shape[0], w2.shape[1], w2.shape[2] * 2
    check_sizes(hidden, inter)
    check_capacity(num_tokens, buffer.max_num_tokens)
    device = buffer.x.device
    requirements = (
        ("y", memory.y, (num_tokens, hidden), torch.bfloat16),
        ("w13_weight", memory.w13, (experts, 2 * inter, hidden // 2), torch.uint8),
        ("w13_weight_scale", memory.s13, (experts, 2 * inter, hidden // 32), torch.uint8),
        ("w2_weight", w2, (experts, hidden, inter // 2), torch.uint8),
        ("w2_weight_scale", memory.s2, (experts, hidden, inter // 32), torch.uint8),
    )
    for name, tensor, shape, dtype in requirements:
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype}; it must be {shape} {dtype}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; make it contiguous")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the symmetric buffer on {device}")
    sizes = buffer.x.shape[1], buffer.acts.shape[2]
    if sizes != (hidden, inter) or buffer.counts.shape[-1] < power_of_two(experts):
        raise ValueError(
            f"the symmetric buffer was made for hidden size {sizes[0]}, intermediate size "
            f"{sizes[1]} and up to {buffer.counts.shape[-1]} experts; the weights have {hidden}, "
            f"{inter} and {experts}: make the buffer with new_symm_buffer for these"
        )


__all__ = ["TritonBackend", "TritonBuffer", "create", "new_symm_buffer"]
