"""``fp8_mega_moe`` of sgl-deep-gemm: the whole forward on Hopper; it has run on an H200.

The package's weights are E4M3 with an fp32 scale per 128 x 128. A problem with MXFP4 weights is
refused: a block of 128 x 128 has 512 scale factors of MXFP4 and one of FP8, so no exact conversion
exists in general.

Six of the published versions have another kernel for Hopper than the version before: 0.1.3, which
is the first, 0.1.4, 0.1.4.post1, 0.1.5, 0.1.6 and 0.2.5. Those before 0.1.5 requantise by powers of
two, which is a contract of its own. 0.1.3 and 0.1.4 have no pre-dispatch: this module stages for
them. The wheels of 0.1.5.post2 and later were compiled for torch 2.13: with an older one
they are refused before they are loaded (:func:`check_links`).
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from megamoe.kernels.here import require
from megamoe.kernels.registry import kernel
from megamoe.layer.ranks import one_rank
from megamoe.spec.dialects import SGL_SM90, SGL_SM90_0_1_4, Dialect
from megamoe.spec.problem import Problem, Sizes

FACTS: Final = kernel("sgl-deep-gemm")
BLOCK: Final = 128
RECIPE: Final = (128, 128, 128)
HIDDEN: Final = 512
INTERMEDIATE: Final = 256
"""H and I are multiples of these: a row of fp32 scales, one per 128 hidden states and one per 64
activations, must have a multiple of 16 bytes. The package asserts it (``layout/mega_moe.cuh``)."""
FUNCTIONS: Final = (
    "fp8_mega_moe", "get_symm_buffer_for_mega_moe", "transform_weights_for_mega_moe_sm90",
)  # fmt: skip
PRE_DISPATCH: Final = "mega_moe_pre_dispatch_sm90"
CONTINUOUS: Final = (0, 1, 5)
"""From this version on scales are no powers of two."""
Weight = tuple[torch.Tensor, torch.Tensor]
"""Codes and scales."""
STATS: Final = "cumulative_local_expert_recv_stats"


class SglDeepGemm:
    """The package's pre-dispatch and forward as a backend's ``forward``."""

    name = FACTS.name
    accumulator = FACTS.accumulator
    features = FACTS.features

    def __init__(self, device: str | torch.device = "cuda", package: Any = None) -> None:
        self.device = torch.device(device)
        self.package = _package() if package is None else package
        self.contract = contract_of(str(getattr(self.package, "__version__", "")))
        self.contracts = (self.contract.revision,)
        self._buffers: dict[tuple[Any, ...], Buffer] = {}

    def forward(self, problem: Problem) -> torch.Tensor:
        """``y`` (T, H) bfloat16.

        ``NotImplementedError`` for sizes that the kernel does not take and for weights of another
        format: nothing is written then.
        """
        p = problem
        weights = self._transform(*block_weights(p))
        y = torch.empty_like(p.hidden_states)
        if p.num_tokens == 0:
            return y
        device, sizes = p.hidden_states.device, p.buffer_sizes
        key = (device, *vars(sizes).values())
        if key not in self._buffers:
            self._buffers[key] = self.new_symm_buffer(None, device, sizes)
        buffer = self._buffers[key]
        rows = (buffer.x, buffer.x_sf, buffer.topk_idx, buffer.topk_weights)
        self.prepare(p.hidden_states, p.topk_weights, p.topk_ids, *rows)
        self.run(
            y, weights, buffer, p.num_tokens, activation_clamp=p.activation_clamp,
            fast_math=p.fast_math,
        )  # fmt: skip
        return y

    # --- the run face: the laws of a launch use it -----------------------------------------------

    def new_symm_buffer(self, group: Any, device: torch.device, sizes: Sizes) -> Buffer:
        """The package's buffer for one rank."""
        buffer = self.package.get_symm_buffer_for_mega_moe(
            one_rank(device) if group is None else group, sizes.num_experts,
            max(sizes.max_num_tokens, 1), sizes.top_k, sizes.hidden_size, sizes.intermediate_size,
        )  # fmt: skip
        # Without the counter the compiled function gets None, which 0.1.5 does not take.
        stats = torch.zeros(sizes.num_experts, dtype=torch.int32, device=device)
        return Buffer(buffer, stats, buffer.x, buffer.x_sf, buffer.topk_idx, buffer.topk_weights)

    def pack_weights(self, *weights: torch.Tensor) -> tuple[Weight, Weight]:
        """The four tensors of a problem in the package's form."""
        return self._transform(*pairs_of(*weights))

    def prepare(
        self,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        x: torch.Tensor,
        x_sf: torch.Tensor,
        topk_idx: torch.Tensor,
        weights: torch.Tensor,
    ) -> None:
        """The package's pre-dispatch, or what it does where the package has none; rows of
        ``topk_idx`` beyond the tokens become -1."""
        tokens = len(hidden_states)
        if not callable(getattr(self.package, PRE_DISPATCH, None)):
            x[:tokens], x_sf[:tokens] = staged(hidden_states)
            topk_idx.fill_(-1)
            topk_idx[:tokens].copy_(topk_ids)
            weights[:tokens].copy_(topk_weights)
            return
        self.package.mega_moe_pre_dispatch_sm90(
            hidden_states, topk_ids.to(torch.int32), topk_weights, x, x_sf, topk_idx, weights,
            tokens,
        )  # fmt: skip

    def run(
        self,
        y: torch.Tensor,
        weights: tuple[Any, ...],
        buffer: Buffer,
        num_tokens: int,
        *,
        activation_clamp: float | None = None,
        fast_math: bool = True,
    ) -> None:
        """The fused part, from the staged rows of ``buffer`` to ``y`` (T, H) bfloat16."""
        self.package.fp8_mega_moe(
            y[:num_tokens], *weights, buffer.package,
            cumulative_local_expert_recv_stats=buffer.stats, recipe=RECIPE, activation="swiglu",
            activation_clamp=activation_clamp, fast_math=fast_math,
        )  # fmt: skip

    def _transform(self, one: Weight, two: Weight) -> tuple[Weight, Weight]:
        first, second = self.package.transform_weights_for_mega_moe_sm90(one, two)
        return first, second

    def fingerprint(self) -> dict[str, Any]:
        """The package's version; its compiled code is part of it."""
        version = str(getattr(self.package, "__version__", "of unknown version"))
        return {"sources": version, "options": f"recipe {RECIPE}", "binaries": {}}


@dataclass
class Buffer:
    """The package's symmetric buffer, the fields that a law of launch fills with other bytes, and
    the counter of received tokens."""

    package: Any
    stats: torch.Tensor
    """(E,) int32. Nothing reads it."""
    x: torch.Tensor
    """(capacity, H) float8_e4m3fn."""
    x_sf: torch.Tensor
    """(capacity, H/128) float32."""
    topk_idx: torch.Tensor
    """(capacity, K) int64."""
    topk_weights: torch.Tensor
    """(capacity, K) float32."""


def block_weights(p: Problem) -> tuple[Weight, Weight]:
    """Both weights as the package takes them: E4M3 codes and fp32 scales of blocks of 128 x 128.

    ``(E, 2I, H)`` and ``(E, 2I/128, H/128)``, then ``(E, H, I)`` and ``(E, H/128, I/128)``.
    ``NotImplementedError`` for weights of another format or other sizes.
    """
    if p.weight_format != "fp8-block":
        raise NotImplementedError(
            f"fp8_mega_moe takes E4M3 weights with an fp32 scale per 128 x 128, not "
            f"{p.weight_format}; no conversion between the two is exact"
        )
    return pairs_of(p.w13_weight, p.w13_weight_scale, p.w2_weight, p.w2_weight_scale)


def pairs_of(
    w13: torch.Tensor, w13_scale: torch.Tensor, w2: torch.Tensor, w2_scale: torch.Tensor
) -> tuple[Weight, Weight]:
    """As :func:`block_weights`, of the four tensors."""
    hidden, intermediate = w2.shape[1:]
    if hidden % HIDDEN or intermediate % INTERMEDIATE:
        raise NotImplementedError(
            f"fp8_mega_moe takes H in multiples of {HIDDEN} and I in multiples of {INTERMEDIATE}, "
            f"not {hidden} and {intermediate}"
        )
    for codes, scale in ((w13, w13_scale), (w2, w2_scale)):
        blocks = (codes.shape[0], *(size // BLOCK for size in codes.shape[1:]))
        if tuple(scale.shape) != blocks or scale.dtype != torch.float32:
            raise ValueError(
                f"scales {tuple(scale.shape)} {scale.dtype} for codes {tuple(codes.shape)}; give "
                f"float32 {blocks}"
            )
    return (w13.view(torch.float8_e4m3fn), w13_scale), (w2.view(torch.float8_e4m3fn), w2_scale)


def staged(hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``(T, H)`` bfloat16 to E4M3 codes (T, H) and float32 scales (T, H/128), as the pre-dispatch
    of 0.1.4.post1 and later: ``max(amax, 1e-10) / 448``, and codes of ``h * (1 / scale)``."""
    groups = hidden_states.float().unflatten(-1, (-1, BLOCK))
    size = groups.abs()
    amax = torch.where(size.isnan(), 0.0, size).amax(-1, keepdim=True)  # NaN does not count
    # On CUDA torch divides by a Python number as a product with its reciprocal: another scale.
    scale = amax.clamp_min(1e-10) / torch.full_like(amax, 448.0)
    scaled = (groups * (1.0 / scale)).clamp(-448.0, 448.0)
    return scaled.flatten(-2).to(torch.float8_e4m3fn), scale.squeeze(-1)


def contract_of(version: str) -> Dialect:
    """The contract of a version of the package; the newest where it says none."""
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    is_old = match is not None and tuple(map(int, match.groups())) < CONTINUOUS
    return SGL_SM90_0_1_4 if is_old else SGL_SM90


def _package() -> Any:
    """The package ``deep_gemm``, of sgl-deep-gemm; ``NotImplementedError`` where it cannot run."""
    require(FACTS)
    spec = importlib.util.find_spec("deep_gemm")
    try:
        importlib.import_module("tvm_ffi")  # loads a library that the package's own one needs
        if spec is not None and spec.origin is not None:
            check_links(Path(spec.origin).with_name("_C.so"))
        package = importlib.import_module("deep_gemm")
    except OSError as error:  # torch names the library, and the reason only as its cause
        raise NotImplementedError(_link_error(str(error.__cause__ or error))) from error
    return suitable(package)


def check_links(library: Path) -> None:
    """``NotImplementedError`` of one line for a compiled library that needs what this torch lacks.

    TVM's loader binds functions when they are first called. So a library that was compiled for
    another torch loads, and reads torch's objects where they had their fields. Call this before
    the package is imported: the linker does not look again at a library that is loaded.
    """
    try:
        ctypes.CDLL(str(library))  # binds all symbols
    except OSError as error:
        if re.search(r"undefined symbol: _ZN?K?(3c10|2at|5torch)", str(error)):
            raise NotImplementedError(_link_error(str(error))) from error


def _link_error(why: str) -> str:
    return (
        f"sgl-deep-gemm cannot be loaded beside torch {torch.__version__}: {why}; it was compiled "
        "for another torch: install one that it was compiled for, or sgl-deep-gemm==0.1.5"
    )


def suitable(package: Any) -> Any:
    """``package`` itself if it has every function; ``NotImplementedError`` of one line if not."""
    lacking = [name for name in FUNCTIONS if not callable(getattr(package, name, None))]
    version = getattr(package, "__version__", "of unknown version")
    if lacking:
        raise NotImplementedError(
            f"deep_gemm {version} has no {', '.join(lacking)}; install sgl-deep-gemm==0.1.5"
        )
    if STATS not in inspect.signature(package.fp8_mega_moe).parameters:
        raise NotImplementedError(
            f"fp8_mega_moe of deep_gemm {version} takes no {STATS}; install sgl-deep-gemm==0.1.5"
        )
    return package


def create(device: str | torch.device = "cuda") -> SglDeepGemm:
    """The backend; ``NotImplementedError`` of one line where the package or the GPU is missing."""
    return SglDeepGemm(device)
