"""The ``deep_gemm`` backend: DeepGEMM's fused kernel, upstream's and the SGLang fork's.

It needs an SM100 GPU. **It has not run on one**: what is checked without is its weight layout
(against the ``layout`` goldens) and its calls (against the signatures of published packages).

The packages differ in their arguments and over time, so calls are bound by name to what
``inspect.signature`` finds; a required argument that this file does not know is a refusal.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch

from megamoe.layout import check_sizes, transform_weights
from megamoe.problem import Problem
from megamoe.staging import check_staging_inputs, prepare_megamoe_inputs

NEEDS_SM100: Final = "DeepGEMM MegaMoE requires SM100 GPUs."
"""The contract's text."""


class ForeignSignature(TypeError):
    """The package's function does not take what the contract gives it; names what was found."""


FORWARD: Final = ("y", "l1_weights", "l2_weights", "sym_buffer")
BUFFER: Final = (
    "group",
    "num_experts",
    "num_max_tokens_per_rank",
    "num_topk",
    "hidden",
    "intermediate_hidden",
)
MEANT: Final = ("activation_clamp", "fast_math")
"""Arguments of a forward without which the call would mean something else."""


def bind(
    function: Callable[..., Any],
    leading: tuple[str, ...],
    named: Mapping[str, Any],
    needed: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Those of ``named`` that ``function`` takes, to be passed after the ``leading`` positions.

    Raises :class:`ForeignSignature`, one line with the signature found, if the leading parameters
    have other names or another order, one of ``needed`` is missing, or the function requires an
    argument that is in neither.
    """
    signature = inspect.signature(function)
    parameters = signature.parameters
    name = getattr(function, "__name__", "the function")
    shown = f"{name}({', '.join(parameters)})"
    if tuple(parameters)[: len(leading)] != leading:
        raise ForeignSignature(f"{shown} does not begin with {', '.join(leading)}")
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for missing in (n for n in needed if n not in parameters):
        raise ForeignSignature(f"{shown} has no {missing}; this version cannot follow the contract")
    for parameter in list(parameters.values())[len(leading) :]:
        unknown = parameter.name not in named and parameter.kind not in variadic
        if unknown and parameter.default is inspect.Parameter.empty:
            raise ForeignSignature(f"{shown} requires {parameter.name}, which is not known here")
    return {n: value for n, value in named.items() if n in parameters}


class OneRank:
    """The part of a process group that the package asks of one rank alone."""

    def size(self) -> int:
        """One."""
        return 1

    def rank(self) -> int:
        """Zero."""
        return 0

    def barrier(self) -> None:
        """Nobody to wait for."""


class DeepGemmBackend:
    """DeepGEMM's ``fp8_fp4_mega_moe`` behind the module's and the judge's interfaces."""

    name = "deep_gemm"
    accumulator = "sm100-mxf8f6f4"

    prepare = staticmethod(prepare_megamoe_inputs)
    transform_weights = staticmethod(transform_weights)

    def __init__(self, package: Any = None) -> None:
        self._package = package
        self.stats: torch.Tensor | None = None
        """(E,) int32, tokens received by each local expert so far; counted where it is set."""

    def package(self) -> Any:
        """The package; ``NotImplementedError`` where it is missing or cannot run here."""
        if _capability() < 10:
            raise NotImplementedError(NEEDS_SM100)
        if self._package is None:
            try:
                self._package = importlib.import_module("deep_gemm")
            except ImportError as error:
                raise NotImplementedError(
                    f"backend deep_gemm needs the package deep_gemm ({error}); install DeepGEMM "
                    "or sgl-deep-gemm"
                ) from None
        return self._package

    def new_symm_buffer(
        self,
        group: Any,
        device: torch.device,
        num_experts: int,
        max_num_tokens: int,
        top_k: int,
        hidden_size: int,
        intermediate_size: int,
    ) -> Any:
        """The package's buffer, for one rank or all of ``group``; arguments as the module's."""
        del device  # the package takes the current one
        check_sizes(hidden_size, intermediate_size)
        make = _function(self.package(), "get_symm_buffer_for_mega_moe")
        options = bind(make, BUFFER, {"activation": "swiglu"})
        ranks = OneRank() if group is None else group
        sizes = (num_experts, max_num_tokens, top_k, hidden_size, intermediate_size)
        return make(ranks, *sizes, **options)

    def run(
        self,
        y: torch.Tensor,
        weights: tuple[torch.Tensor, ...],
        buffer: Any,
        num_tokens: int,
        *,
        activation_clamp: float | None,
        fast_math: bool,
    ) -> None:
        """``y`` (T, H) bfloat16 from the staged buffer and the kernel-side ``weights``.

        ``weights`` are those of :func:`megamoe.layout.transform_weights`. Raises before any write.
        """
        kernel = _function(self.package(), "fp8_fp4_mega_moe")
        options = bind(
            kernel,
            FORWARD,
            {
                "cumulative_local_expert_recv_stats": self.stats,
                "recipe": (1, 1, 32),
                "activation": "swiglu",
                "activation_clamp": activation_clamp,
                "fast_math": fast_math,
            },
            MEANT,
        )
        if y.shape[0] != num_tokens:
            raise ValueError(f"y has {y.shape[0]} rows for {num_tokens} tokens; give it as many")
        w13, w13_sf, w2, w2_sf = weights
        # The package tells packed E2M1 by the signed byte.
        one, two = (w13.view(torch.int8), w13_sf), (w2.view(torch.int8), w2_sf)
        kernel(y, one, two, buffer, **options)

    def forward(self, problem: Problem) -> torch.Tensor:
        """``y`` of one rank; the kernel's intermediate codes lie in pool order and stay inside."""
        self.package()
        p = problem
        check_sizes(p.hidden_size, p.intermediate_size)
        check_staging_inputs(p.hidden_states, p.topk_weights, p.topk_ids)
        tokens = p.num_tokens
        if tokens > p.max_num_tokens:
            raise ValueError(
                f"DeepSeek V4 MegaMoE got {tokens} tokens, but the symmetric buffer was sized "
                f"for {p.max_num_tokens}."
            )
        y = torch.empty_like(p.hidden_states)
        if tokens == 0:
            return y
        buffer = self.new_symm_buffer(
            None, y.device, p.num_experts, p.max_num_tokens, p.top_k, p.hidden_size,
            p.intermediate_size,
        )  # fmt: skip
        rows = (buffer.x, buffer.x_sf, buffer.topk_idx, buffer.topk_weights)
        self.prepare(p.hidden_states, p.topk_weights, p.topk_ids, *(t[:tokens] for t in rows))
        weights = transform_weights(
            p.w13_weight, p.w13_weight_scale, p.w2_weight, p.w2_weight_scale
        )
        self.run(
            y, weights, buffer, tokens,
            activation_clamp=p.activation_clamp, fast_math=p.fast_math,
        )  # fmt: skip
        return y


def create() -> DeepGemmBackend:
    """The backend; what it lacks is said when it is first used, so that ``layout`` is judged."""
    return DeepGemmBackend()


def _capability() -> int:
    """Major compute capability of the current GPU; 0 without one."""
    return torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0


def _function(package: Any, name: str) -> Callable[..., Any]:
    found = getattr(package, name, None)
    if not callable(found):
        version = getattr(package, "__version__", "of unknown version")
        raise NotImplementedError(
            f"deep_gemm {version} has no {name}; install a version with Mega MoE"
        )
    made: Callable[..., Any] = found
    return made
