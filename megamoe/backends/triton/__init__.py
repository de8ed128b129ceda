"""The ``triton`` backend: a fused forward for SM90, weights packed as the checkpoint has them.

Four launches after staging's one: rows by expert (:mod:`.dispatch`), linear 1 with SwiGLU and
requantisation, linear 2 (:mod:`.linear`), combine. Nothing waits for the host, no float is added
atomically, and a token's bits depend on that token alone: every dot product runs over ascending
blocks of 32 in one accumulator, whatever tile it is in.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from megamoe.layout import check_sizes
from megamoe.problem import Problem
from megamoe.symm_buffer import SymmBuffer
from megamoe.symm_buffer import new_symm_buffer as plain_buffer

MAX_TOP_K = 32
WIDEST_NARROW = 128
"""Largest weight scale byte of the narrow kernels: 2^126 times its value is still a bf16."""


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
    counts: torch.Tensor = None  # type: ignore[assignment]
    """(experts, next power of two) int32."""
    tiles: torch.Tensor = None  # type: ignore[assignment]
    """(most tiles, 3) int32."""
    scratch: ClassVar[tuple[str, ...]] = (
        "operand", "acts", "slots", "order", "counts", "tiles",
    )  # fmt: skip
    """Fields that a call may find anything in, besides the staged ones."""


def new_symm_buffer(
    group: Any,
    device: torch.device,
    num_experts: int,
    max_num_tokens: int,
    top_k: int,
    hidden_size: int,
    intermediate_size: int,
) -> TritonBuffer:
    """A buffer for up to ``max_num_tokens`` tokens on ``device``; arguments as for the module's."""
    plain = plain_buffer(
        group, device, num_experts, max_num_tokens, top_k, hidden_size, intermediate_size
    )
    rows = plain.capacity

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    return TritonBuffer(
        **{f.name: getattr(plain, f.name) for f in fields(plain)},
        operand=empty(rows, hidden_size),
        acts=empty(rows, top_k, intermediate_size),
        slots=empty(rows, top_k, hidden_size),
        order=empty(rows * top_k, dtype=torch.int32),
        counts=empty(_power_of_two(num_experts), dtype=torch.int32),
        tiles=empty(num_experts + rows * top_k // 8 + 1, 3, dtype=torch.int32),
    )


@dataclass(frozen=True)
class Tile:
    """A block's share: BN weight rows, N tokens; copies STAGES deep, by two if PAIRED."""

    BN: int
    N: int
    STAGES: int
    WARPS: int
    PAIRED: bool = False


def tile_for(rows: int, experts: int, outputs: int) -> Tile:
    """The tile for ``rows`` (token, slot) pairs over ``experts``; its bits do not depend on it."""
    each = rows / max(1, min(rows, experts))
    if each <= 4:
        return Tile(64, 8, 6, 4, PAIRED=True)
    if each <= 16:
        return Tile(64, 16, 6, 4, PAIRED=True)
    if each <= 72:
        return Tile(128, 64, 4, 8)
    if outputs % 256:
        return Tile(128, 128, 4, 8)
    return Tile(256, 128, 4, 16)


class TritonBackend:
    """The kernels on one CUDA device of compute capability 9."""

    name = "triton"
    accumulator = "fp32-ordered"

    new_symm_buffer = staticmethod(new_symm_buffer)

    def __init__(self, device: torch.device) -> None:
        from megamoe.backends.triton import eplb, staging

        self.device = device
        self.prepare = staging.prepare_megamoe_inputs
        self.eplb_map = eplb.eplb_map_to_physical_and_record

    @staticmethod
    def pack_weights(*weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The kernels read the checkpoint's layout: nothing to do."""
        return weights

    def forward(self, problem: Problem) -> dict[str, torch.Tensor]:
        """The whole layer with a buffer of its own; every stage of ``problem.STAGES``."""
        tokens, hidden = problem.hidden_states.shape
        device = problem.hidden_states.device
        buffer = new_symm_buffer(
            None, device, problem.num_experts, problem.max_num_tokens, problem.top_k,
            hidden, problem.intermediate_size,
        )  # fmt: skip
        y = torch.empty(tokens, hidden, dtype=torch.bfloat16, device=device)
        self.prepare(
            problem.hidden_states, problem.topk_weights, problem.topk_ids,
            buffer.x, buffer.x_sf, buffer.topk_idx, buffer.topk_weights,
        )  # fmt: skip
        weights = (problem.w13_weight, problem.w13_weight_scale, problem.w2_weight,
                   problem.w2_weight_scale)  # fmt: skip
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

        ``weights``: the four uint8 tensors of a ``Problem``. Raises ``ValueError`` before any
        write for sizes or a layout that the kernels cannot take.
        """
        for _, launch in self.stages(
            y, weights, buffer, num_tokens, activation_clamp=activation_clamp, fast_math=fast_math
        ):
            launch()

    def stages(
        self,
        y: torch.Tensor,
        weights: tuple[torch.Tensor, ...],
        buffer: TritonBuffer,
        num_tokens: int,
        *,
        activation_clamp: float | None,
        fast_math: bool,
    ) -> list[tuple[str, Any]]:
        """Name and launch of each kernel of :meth:`run`, in order."""
        from megamoe.backends.triton import dispatch as d
        from megamoe.backends.triton import linear as li
        from megamoe.backends.triton.binaries import launch

        w13, s13, w2, s2 = weights
        experts, hidden = w2.shape[:2]
        inter, top_k = w2.shape[2] * 2, buffer.topk_idx.shape[1]
        _check(y, weights, buffer, num_tokens)
        if num_tokens == 0:
            return []
        rows = num_tokens * top_k
        one, two = (tile_for(rows, experts, n) for n in (2 * inter, hidden))
        max_tiles = min(experts, rows) + rows // one.N
        clamp = (
            0.0
            if activation_clamp is None
            else torch.tensor(activation_clamp, dtype=torch.bfloat16).item()
        )
        wide = _wide(s13) or _wide(s2)
        block = 1024
        blocks = -(-hidden // block)

        def later(*arguments: Any, **options: Any) -> Any:
            return partial(launch, *arguments, **options)

        return [
            ("dispatch", later(
                d.dispatch, (num_tokens + 1, blocks),
                buffer.x.view(torch.uint8), buffer.x_sf, buffer.topk_idx, buffer.operand,
                buffer.order, buffer.counts, buffer.tiles, num_tokens, hidden, top_k, experts,
                max_tiles, ROWS=one.N, BLOCK=block, EXPERTS=_power_of_two(experts),
                CHUNK=min(_power_of_two(rows), 8192), num_warps=8,
            )),
            ("linear1", later(
                li.linear1, (max_tiles * (2 * inter // one.BN),),
                buffer.operand, w13.view(torch.int16), s13.view(torch.int32),
                buffer.topk_weights, buffer.order, buffer.tiles, buffer.acts,
                buffer.l2_acts.view(torch.uint8), buffer.l2_acts_sf, hidden, inter, top_k, clamp,
                HAS_CLAMP=activation_clamp is not None, FAST=fast_math,
                BN=one.BN, N=one.N, STAGES=one.STAGES, WARPS=one.WARPS,
                WIDE=wide, PAIRED=one.PAIRED, num_warps=one.WARPS,
            )),
            ("linear2", later(
                li.linear2, (max_tiles * (hidden // two.BN),),
                buffer.acts, w2.view(torch.int16), s2.view(torch.int32), buffer.order,
                buffer.tiles, buffer.slots, hidden, inter,
                BN=two.BN, N=two.N, STAGES=two.STAGES, WARPS=two.WARPS,
                WIDE=wide, PAIRED=two.PAIRED, num_warps=two.WARPS,
            )),
            ("combine", later(
                d.combine, (num_tokens, blocks),
                buffer.slots, buffer.topk_idx, y, hidden, experts, TOP_K=top_k, BLOCK=block,
                num_warps=4,
            )),
        ]  # fmt: skip

    def fingerprint(self) -> dict[str, Any]:
        """What ran so far: hashes of the sources and of each compiled binary, and the options."""
        from megamoe.backends.triton.binaries import digests

        sources = hashlib.sha256()
        for path in sorted(Path(__file__).parent.glob("*.py")):
            sources.update(path.read_bytes())
        return {
            "sources": sources.hexdigest(),
            "options": "tiles by tile_for; contraction in steps of 128",
            "binaries": digests(),
        }


def create(device: str | torch.device = "cuda") -> TritonBackend:
    """The backend on ``device``; ``NotImplementedError`` in one line where it cannot run."""
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        raise NotImplementedError(
            "backend triton needs an NVIDIA GPU of compute capability 9.0; run with --device cuda "
            "on a machine that has one"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability[0] != 9:
        raise NotImplementedError(
            f"backend triton needs compute capability 9.0, this GPU has "
            f"{capability[0]}.{capability[1]}; its products are written for wgmma"
        )
    return TritonBackend(device)


def _check(
    y: torch.Tensor, weights: tuple[torch.Tensor, ...], buffer: TritonBuffer, num_tokens: int
) -> None:
    w2 = weights[2]
    check_sizes(w2.shape[1], w2.shape[2] * 2)
    if buffer.topk_idx.shape[1] > MAX_TOP_K:
        raise ValueError(f"backend triton takes top-k up to {MAX_TOP_K}")
    if num_tokens > buffer.max_num_tokens:
        raise ValueError(
            f"DeepSeek V4 MegaMoE got {num_tokens} tokens, but the symmetric buffer was sized "
            f"for {buffer.max_num_tokens}."
        )
    names = ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale")
    for name, tensor in (("y", y), *zip(names, weights, strict=True)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; make it contiguous")


def _wide(scale: torch.Tensor) -> bool:
    """Whether a scale byte is too large for the narrow kernels.

    Looks once at each version of a tensor, which waits for the device; later calls, and the
    capture of a graph after a first call, do not.
    """
    seen: tuple[int, bool] | None = getattr(scale, "_megamoe_wide", None)
    if seen is None or seen[0] != scale._version:
        wide = scale.numel() > 0 and int(scale.max()) > WIDEST_NARROW
        seen = (scale._version, wide)
        scale._megamoe_wide = seen  # type: ignore[attr-defined]
    return seen[1]


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


__all__ = ["Tile", "TritonBackend", "TritonBuffer", "create", "new_symm_buffer"]
