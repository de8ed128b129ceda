"""The ``deep_gemm`` backend: DeepGEMM's fused kernel, upstream's and the SGLang fork's.

It needs an SM100 GPU. **It has not run on one**: without one, the tests check its weight layout
(against the ``layout`` goldens) and its calls (against the signatures of published packages).

The packages differ in their arguments and over time, so calls are bound by name to what
``inspect.signature`` finds; a required argument that this file does not know is a refusal.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple
from functools import cached_property, partial
from typing import Any, Final

import torch

from megamoe.backends.padding import padded
from megamoe.layer import staging
from megamoe.layer.kernel_weights import check_sizes, transform_weights
from megamoe.layer.ops import eplb_map_to_physical_and_record, prepare_megamoe_inputs
from megamoe.layer.ranks import one_rank
from megamoe.layer.staging import check_staging_inputs
from megamoe.layer.symm_buffer import check_capacity
from megamoe.spec import builds
from megamoe.spec.contract import MEGAMOE_SGL, NEWEST, REVISIONS
from megamoe.spec.problem import Problem, Sizes

NEEDS_SM100: Final = "DeepGEMM MegaMoE requires SM100 GPUs."
"""The contract's text."""

MULTIPLE: Final = 512
"""H and I that the package makes a buffer for are multiples of this, in every version seen: H / 32
and I / 32 bytes of scale factors a token, copied in pieces of 16."""


class UnsupportedSizes(NotImplementedError):
    """The package makes no buffer for this H and I; in its own words, why."""


class ForeignSignature(TypeError):
    """The package's function does not take the arguments of the contract; the message shows its
    signature."""


FORWARD: Final = ("y", "l1_weights", "l2_weights", "sym_buffer")
BUFFER: Final = (
    "group",
    "num_experts",
    "num_max_tokens_per_rank",
    "num_topk",
    "hidden",
    "intermediate_hidden",
)
ESSENTIALS: Final = ("activation_clamp", "fast_math")
"""Arguments of a forward without which the call would mean something else."""
STATS: Final = "cumulative_local_expert_recv_stats"
KEYWORDS: Final = (STATS, "recipe", "activation", *ESSENTIALS)
"""Arguments of a forward that are passed by name, if the version has them."""
KERNEL: Final = "fp8_fp4_mega_moe"


def bind(
    function: Callable[..., Any],
    leading: tuple[str, ...],
    keywords: Mapping[str, Any],
    required: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Those of ``keywords`` that ``function`` takes, to be passed after the ``leading`` positions.

    Raises :class:`ForeignSignature`, one line with the signature found, if the leading parameters
    have other names or another order, one of ``required`` is missing, the function requires an
    argument that is in neither, or Python cannot tell its signature.
    """
    name = getattr(function, "__name__", "the function")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # compiled functions may tell nothing
        raise ForeignSignature(
            f"{name} does not tell its signature, so no call can be checked"
        ) from None
    parameters = signature.parameters
    declaration = f"{name}({', '.join(parameters)})"
    if tuple(parameters)[: len(leading)] != leading:
        raise ForeignSignature(f"{declaration} does not begin with {', '.join(leading)}")
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for missing in (n for n in required if n not in parameters):
        raise ForeignSignature(
            f"{declaration} has no {missing}; this version cannot follow the contract"
        )
    for parameter in list(parameters.values())[len(leading) :]:
        unknown = parameter.name not in keywords and parameter.kind not in variadic
        if unknown and parameter.default is inspect.Parameter.empty:
            raise ForeignSignature(
                f"{declaration} requires {parameter.name}, which is not known here"
            )
    options = {n: value for n, value in keywords.items() if n in parameters}
    try:
        signature.bind(*leading, **options)
    except TypeError as error:  # positional or by name, the other way round
        raise ForeignSignature(f"{declaration} cannot be called by name: {error}") from None
    return options


def new_symm_buffer(group: Any, device: torch.device, sizes: Sizes, *, package: Any = None) -> Any:
    """The package's buffer on ``device``, for one rank or all of ``group``.

    The arguments are the module's. The kernel's signature is looked at too, so that one that does
    not fit is refused before there is anything to write to. :class:`UnsupportedSizes` for an H or
    I that the package refuses.
    """
    hidden, inter = sizes.hidden_size, sizes.intermediate_size
    check_sizes(hidden, inter)
    package = load_package(device, package)
    bind(_function(package, KERNEL), FORWARD, dict.fromkeys(KEYWORDS), ESSENTIALS)
    make = _function(package, "get_symm_buffer_for_mega_moe")
    options = bind(make, BUFFER, {"activation": "swiglu"})
    ranks = one_rank(device) if group is None else group
    with _current(device):
        try:
            return make(ranks, *astuple(sizes), **options)
        except RuntimeError as error:
            fits = not (hidden % MULTIPLE or inter % MULTIPLE)
            if fits or "Assertion error" not in str(error):  # no matter of sizes
                raise
            raise UnsupportedSizes(
                f"deep_gemm {_version(package)} makes no buffer for hidden size {hidden} and "
                f"intermediate size {inter}: {' '.join(str(error).split())}; the "
                f"versions seen take multiples of {MULTIPLE} only"
            ) from error


class DeepGemmBackend:
    """DeepGEMM's ``fp8_fp4_mega_moe`` behind the module's and the judge's interfaces."""

    name = "deep_gemm"
    accumulator = "sm100-mxf8f6f4"

    global_ids = True
    """The kernel sends tokens over the group by the physical ids of all ranks."""

    eplb_map = staticmethod(eplb_map_to_physical_and_record)
    transform_weights = staticmethod(transform_weights)

    def __init__(self, package: Any = None, device: str | torch.device = "cuda") -> None:
        self._package = package
        self.device = torch.device(device)
        self.stats: torch.Tensor | None = None
        """(E,) int32, tokens received by each local expert so far; counted where it is set."""
        # Without a package of its own, the function is the same for every layer: one buffer.
        self.new_symm_buffer: Callable[..., Any] = (
            new_symm_buffer if package is None else partial(new_symm_buffer, package=package)
        )
        self._fit: tuple[Any, bool, frozenset[str]] | None = None

    @cached_property
    def contracts(self) -> tuple[str, ...] | None:
        """The revision that the installed kernel follows, by its headers; None: not known."""
        try:
            detection = builds.detect(builds.installed_packages()["deep_gemm"])
        except (KeyError, ValueError):
            return None
        return (detection.builds[0].revision,) if detection.same_bits else None

    def prepare(self, *tensors: Any) -> None:
        """The module's staging, as the contract of the kernel has it."""
        contract = REVISIONS[self.contracts[0]] if self.contracts else NEWEST
        if contract is MEGAMOE_SGL:
            staging.prepare_megamoe_inputs(*tensors, contract=contract)
            return
        hidden_states, topk_weights, topk_ids = tensors[:3]
        if len(hidden_states):
            check_staging_inputs(hidden_states, topk_weights, topk_ids, contract)
        prepare_megamoe_inputs(*tensors)

    def package(self, device: torch.device | None = None) -> Any:
        """The package; ``NotImplementedError`` where it is missing or cannot run on ``device``."""
        return load_package(device or self.device, self._package)

    def ready(self, device: torch.device) -> None:
        """Raise the error that would stop a call on ``device``; nothing is written."""
        self._kernel(device)

    def _kernel(self, device: torch.device) -> tuple[Callable[..., Any], frozenset[str]]:
        """The kernel and which of ``KEYWORDS`` it takes; a counter that is set must be one."""
        kernel, counts = _function(self.package(device), KERNEL), self.stats is not None
        if self._fit is None or self._fit[:2] != (kernel, counts):
            required = (*ESSENTIALS, STATS) if counts else ESSENTIALS
            takes = frozenset(bind(kernel, FORWARD, dict.fromkeys(KEYWORDS), required))
            self._fit = (kernel, counts, takes)
        return kernel, self._fit[2]

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

        ``weights`` are those of ``transform_weights``. Raises before any write.
        """
        kernel, takes = self._kernel(y.device)
        if y.shape[0] != num_tokens:
            raise ValueError(f"y has {y.shape[0]} rows for {num_tokens} tokens; give it as many")
        values = {
            STATS: self.stats,
            "recipe": (1, 1, 32),
            "activation": "swiglu",
            "activation_clamp": activation_clamp,
            "fast_math": fast_math,
        }
        options = {name: value for name, value in values.items() if name in takes}
        w13, w13_sf, w2, w2_sf = weights
        # The package tells packed E2M1 by the signed byte.
        one, two = (w13.view(torch.int8), w13_sf), (w2.view(torch.int8), w2_sf)
        with _current(y.device):
            kernel(y, one, two, buffer, **options)

    def forward(self, problem: Problem) -> torch.Tensor:
        """``y`` of one rank; the kernel's intermediate codes lie in pool order and stay inside.

        For sizes that the package refuses it is the first H channels of a larger layer's
        (:func:`megamoe.backends.padding.padded`), bit for bit the same.
        """
        p = problem
        self.ready(p.hidden_states.device)
        check_sizes(p.hidden_size, p.intermediate_size)
        check_staging_inputs(p.hidden_states, p.topk_weights, p.topk_ids)
        tokens = p.num_tokens
        check_capacity(tokens, p.max_num_tokens)
        if tokens == 0:
            return torch.empty_like(p.hidden_states)
        device = p.hidden_states.device
        try:
            buffer = self.new_symm_buffer(None, device, p.buffer_sizes)
        except UnsupportedSizes:
            p = padded(p, MULTIPLE)
            buffer = self.new_symm_buffer(None, device, p.buffer_sizes)
        y = torch.empty(p.hidden_states.shape, dtype=torch.bfloat16, device=device)
        rows = (buffer.x, buffer.x_sf, buffer.topk_idx, buffer.topk_weights)
        self.prepare(p.hidden_states, p.topk_weights, p.topk_ids, *(t[:tokens] for t in rows))
        weights = transform_weights(
            p.w13_weight, p.w13_weight_scale, p.w2_weight, p.w2_weight_scale
        )
        self.run(
            y, weights, buffer, tokens,
            activation_clamp=p.activation_clamp, fast_math=p.fast_math,
        )  # fmt: skip
        return y[:, : problem.hidden_size].contiguous()


def create(device: str | torch.device = "cuda") -> DeepGemmBackend:
    """The backend; missing requirements are an error of the first use, so that ``layout`` is
    judged."""
    return DeepGemmBackend(device=device)


def load_package(device: torch.device, package: Any = None) -> Any:
    """``package``, or else the one installed; ``NotImplementedError`` where it cannot run."""
    if _capability(device) != 10:
        raise NotImplementedError(NEEDS_SM100)
    if package is None:
        try:
            package = importlib.import_module("deep_gemm")
        except ImportError as error:
            raise NotImplementedError(
                f"backend deep_gemm needs the package deep_gemm ({error}); install DeepGEMM or "
                "sgl-deep-gemm"
            ) from None
    return package


def _capability(device: torch.device) -> int:
    """Major compute capability of ``device``; 0 where it is no NVIDIA GPU."""
    if device.type != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return 0
    return torch.cuda.get_device_capability(device)[0]


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """``device`` as the current one, which the package takes whatever its arguments lie on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _function(package: Any, name: str) -> Callable[..., Any]:
    attribute = getattr(package, name, None)
    if not callable(attribute):
        raise NotImplementedError(
            f"deep_gemm {_version(package)} has no {name}; install a version with Mega MoE"
        )
    function: Callable[..., Any] = attribute
    return function


def _version(package: Any) -> str:
    return str(getattr(package, "__version__", "of unknown version"))
