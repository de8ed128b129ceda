"""Laws of the surroundings of a call and of an engine's tensors: neither decides a bit.

Part of :mod:`megamoe.layer.launch_laws`, which has the laws of memory, graphs and streams. The
modes are torch's: they are set around the backend's ``forward``, and ``docs/contract.md`` says what
each means. The tensors go through the module, with the backend plugged in, since the contract
promises dense ones to a backend and all others to the module. An engine also writes weights in
place between calls: only what they hold at a call decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Final

import torch

from megamoe.cases.laws import ALL_WEIGHTS, MODES, after, after_write
from megamoe.layer.experts import DeepseekV4MegaMoEExperts
from megamoe.layer.routed import RoutedExperts
from megamoe.spec.problem import Problem
from megamoe.spec.tensors import WEIGHTS

Variants = Iterator[tuple[str, torch.Tensor | Exception, list[int]]]
"""Label, ``y`` or the exception in its place, and the row of the original behind each row of it."""


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _modes(device: torch.device) -> Mapping[str, Mapping[str, AbstractContextManager[Any]]]:
    """The modes of torch, by law and within a law by label."""
    kind = device.type
    return {
        "autocast": {
            f"autocast to {str(dtype).removeprefix('torch.')}": torch.autocast(kind, dtype)
            for dtype in (torch.bfloat16, torch.float16)
        },
        "grad-mode": {
            "inference mode": torch.inference_mode(),
            "no grad": torch.no_grad(),
            "grad mode": torch.enable_grad(),
        },
        # No device but this one is for certain: a tensor without a place has no numbers.
        "torch-defaults": {
            "a default dtype of float64": _default_dtype(torch.float64),
            "a default dtype of bfloat16": _default_dtype(torch.bfloat16),
            "a default device of meta": torch.device("meta"),
        },
    }


def _under(law: str) -> Callable[..., Variants]:
    """The variants of a law about torch's modes, by process: one call in each mode, and then one in
    none, which sees what the modes left behind."""

    def variants(
        backend: Any, problem: Problem, processes: Sequence[Sequence[str]] = MODES[law]
    ) -> Variants:
        def call(mode: AbstractContextManager[Any]) -> torch.Tensor:
            with mode:
                return _forward(backend, problem)

        modes = _modes(problem.topk_ids.device)[law]
        calls = dict[str, Callable[[], torch.Tensor]]()
        for labels in processes:
            calls |= {label: partial(call, modes[label]) for label in labels}
            calls[after(tuple(labels))] = partial(call, nullcontext())
        return _outputs(problem, calls)

    return variants


def _outputs(problem: Problem, calls: Mapping[str, Callable[[], torch.Tensor]]) -> Variants:
    """``y`` of each call, or the exception that it raised: who mends one sees the others too. A
    backend that declines one declines the law."""
    rows = list(range(problem.num_tokens))
    for label, call in calls.items():
        try:
            yield label, _plain(call()), rows
        except NotImplementedError:
            raise
        except Exception as error:
            yield label, error, rows


def _forward(backend: Any, problem: Problem) -> torch.Tensor:
    y = backend.forward(problem)
    return y if isinstance(y, torch.Tensor) else y["y"]


def _plain(y: torch.Tensor) -> torch.Tensor:
    """A copy that outlives inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        return y.clone()


# --- tensors ------------------------------------------------------------------------------------


def _sliced(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor, tensor.flip(1)], dim=1)[:, : tensor.shape[1]]


def _padded(tensor: torch.Tensor) -> torch.Tensor:
    return torch.stack([tensor, tensor.flip(0)], dim=1)[:, 0]


def _transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.t().contiguous().t()


def _odd_ones(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with a stride that no new tensor has, on each axis of one element."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    strides = [step + 5 if size == 1 else step for size, step in pairs]
    return tensor.clone().as_strided(tensor.shape, strides)


FORMS: Final[Mapping[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "columns of wider tensors": _sliced,
    "rows of padded tensors": _padded,
    "transposed tensors": _transposed,
    "odd strides of axes of one": _odd_ones,
}


def _engine_tensors(backend: Any, problem: Problem) -> Variants:
    """The module's ``y`` for each form of the same ids, weights and hidden states.

    Routing weights have a narrower type only if that type holds all of them, so the law does not
    need the rounding of the conversion.
    """
    p, layer = problem, _layer(backend, problem)
    usual = p.hidden_states, p.topk_weights, p.topk_ids
    forms = {"the module in place of the backend alone": usual}
    for label, form in FORMS.items():
        forms[label] = form(usual[0]), form(usual[1]), form(usual[2])
    forms["ids of int32"] = usual[0], usual[1], usual[2].int()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        if torch.equal(usual[1].to(dtype).float(), usual[1]):
            label = f"weights of {str(dtype).removeprefix('torch.')}"
            forms[label] = usual[0], usual[1].to(dtype), usual[2]
    # Some routers return them so: weights and ids side by side in one tensor.
    packed = torch.cat([usual[1].view(torch.int32), usual[2].int()], dim=1)
    weights, ids = packed[:, : p.top_k].view(torch.float32), packed[:, p.top_k :]
    forms["weights and ids in one tensor"] = usual[0], weights, ids

    def call(tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        y: torch.Tensor = layer(
            *tensors, activation_clamp=p.activation_clamp, fast_math=p.fast_math
        )
        return y

    return _outputs(p, {k: partial(call, tensors) for k, tensors in forms.items()})


def _layer(backend: Any, problem: Problem) -> RoutedExperts:
    """The module with the problem's weights. The older face: its forward takes the clamp."""
    p = problem
    layer = DeepseekV4MegaMoEExperts(
        p.max_num_tokens, num_experts=p.num_experts, num_local_experts=p.num_experts,
        experts_start_idx=0, top_k=p.top_k, hidden_size=p.hidden_size,
        intermediate_size=p.intermediate_size, prefix="experts", backend=backend,
    ).to(p.topk_ids.device)  # fmt: skip
    for name in WEIGHTS:
        parameter = getattr(layer, name)
        parameter.data.copy_(getattr(p, name))
    layer.finalize_weights(without_loader=True)
    return layer


# --- weights ------------------------------------------------------------------------------------


def _weights_in_place(backend: Any, problem: Problem) -> Variants:
    """A call with other weights in the memory of one tensor, or of all; then the right ones are
    written there, and the call is repeated.

    The other weights are those of the experts with tokens, in another order: each is one that the
    format allows. As in the module, each call has a problem of its own around the same tensors.
    """
    right = {name: getattr(problem, name) for name in WEIGHTS} | problem.expert_factors
    experts = problem.topk_ids[problem.topk_ids >= 0].unique()
    memory: list[Any] = []  # what is kept by an address must not meet another tensor there

    def call(names: Sequence[str]) -> torch.Tensor:
        weights = {name: tensor.clone() for name, tensor in right.items()}
        memory.append(weights)
        for name in names:
            weights[name][experts] = right[name][experts.roll(1)]
        _forward(backend, replace(problem, **weights))
        for name in names:
            weights[name].copy_(right[name])
        return _forward(backend, replace(problem, **weights))

    calls = {after_write(name): partial(call, [name]) for name in right}
    calls[after_write(ALL_WEIGHTS)] = partial(call, [*right])
    return _outputs(problem, calls)


LAWS: Final[Mapping[str, Callable[[Any, Problem], Variants]]] = {
    "autocast": _under("autocast"),
    "grad-mode": _under("grad-mode"),
    "torch-defaults": _under("torch-defaults"),
    "engine-tensors": _engine_tensors,
    "weights-in-place": _weights_in_place,
}

__all__ = ["LAWS"]
