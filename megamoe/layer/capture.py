"""Recording a real engine's call of the experts module: a file that can be judged and reduced.

    from megamoe import capture

    with capture(layer.experts, "call.safetensors"):
        engine.generate(...)

Works on both of this project's modules and on vLLM's own, ``DeepseekV4MegaMoEExperts`` (before and
after ``finalize_weights``) and ``DeepGemmMegaMoEExperts``: vLLM is not imported, its modules are
known by the names of their attributes. The record covers this rank's share: its experts, and -1 for
a slot that another rank serves. The engine's own load counts are not touched. A call that is being
captured into a CUDA graph is passed over, and a replayed graph calls no hook: run the engine in
eager mode.
"""

from __future__ import annotations

import inspect
import runpy
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from megamoe.cases.checkpoint import ABOUT
from megamoe.cases.stored import StoredError, StoredProblem, to_bytes
from megamoe.golden import write_atomically
from megamoe.layer.engine_module import (
    activation_of,
    checkpoint_weights,
    class_of,
    contract_of,
    has_shared_expert,
    is_own_share,
    local_experts,
    physical_ids,
    refuse_what_no_problem_says,
    rows_of,
)
from megamoe.layer.origin import checkpoint_experts
from megamoe.spec.problem import Problem
from megamoe.spec.tensors import WEIGHTS

Weights = Mapping[str, torch.Tensor] | Callable[[torch.Tensor], Mapping[str, torch.Tensor]]
_CLAMP_NAMES: Final = ("activation_clamp", "swiglu_limit")
_MISSING: Final = object()


class capture:
    """Record ``calls`` calls of ``module``, after the first ``skip``, to ``path``.

    Args:
        module: the experts module; it has the four weight parameters, or their kernel-side form.
        path: the file; call 1 and later ones get ``-1``, ``-2`` before the suffix.
        tokens: rows to keep; None keeps all. A row's result does not depend on the others, but a
            bug's may.
        accumulator: class of the engine's kernel; default: of the module's backend, else
            ``sm100-mxf8f6f4``.
        activation_clamp: where the module keeps it out of sight; default: the call's argument,
            else the clamp of the module's ``activation``, else its attribute of that name or
            ``swiglu_limit``.
        weights: the four checkpoint tensors by name, or a function of the local expert ids that
            gives those rows, for a module whose weights have a form of their own.

    :class:`StoredError` for a module that is none, and at the end where no call was recorded.
    """

    def __init__(
        self, module: nn.Module, path: str | Path, *, calls: int = 1, skip: int = 0,
        tokens: list[int] | None = None, accumulator: str | None = None,
        activation_clamp: Any = _MISSING, weights: Weights | None = None,
    ) -> None:  # fmt: skip
        self.module, self.path = module, Path(path)
        self.calls, self.skip, self.tokens = calls, skip, tokens
        self._accumulator = accumulator
        self._clamp, self._weights = activation_clamp, weights
        self.files: list[Path] = []
        self.call_count = 0
        self._pending: StoredProblem | None = None
        self._handles: list[Any] = []
        self._signature = inspect.signature(module.forward)
        missing = {"hidden_states", "topk_weights", "topk_ids"} - set(self._signature.parameters)
        if missing:
            raise StoredError(
                f"{type(module).__name__}: its forward takes no {sorted(missing)[0]}; give the "
                "module of the routed experts"
            )

    def __enter__(self) -> capture:
        self._handles = [
            self.module.register_forward_pre_hook(self._before, with_kwargs=True),
            self.module.register_forward_hook(self._after, with_kwargs=True),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()
        if kind is None and not self.files:
            raise StoredError(
                f"{type(self.module).__name__}: no call was recorded, {self.call_count} were seen; "
                "graphs replay without hooks, so run the engine in eager mode"
            )

    def close(self) -> None:
        """Take the hooks off. A call that did not return is written without its output."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._pending is not None:
            self._write(self._pending)

    # --- hooks --------------------------------------------------------------------------------

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return
        self.call_count += 1
        if self.call_count <= self.skip or len(self.files) >= self.calls:
            return
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        self._pending = self._record(bound.arguments)

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._pending is None:
            return
        pending, rows = self._pending, self.tokens
        y = output["y"] if isinstance(output, Mapping) else output
        if isinstance(y, torch.Tensor) and pending.about["complete"]:
            part = (y if rows is None else y[rows]).detach().cpu()
            pending = StoredProblem(pending.problem, {"y": part}, pending.about)
        self._write(pending)

    def _write(self, record: StoredProblem) -> None:
        number = len(self.files)
        path = self.path
        if number:
            path = path.with_name(f"{path.stem}-{number}{path.suffix}")
        write_atomically(path, to_bytes(record))
        self.files.append(path)
        self._pending = None

    # --- a call as a problem ------------------------------------------------------------------

    def _record(self, call: Mapping[str, Any]) -> StoredProblem:
        """Everything on the host, before the engine can overwrite it."""
        module, rows = self.module, slice(None) if self.tokens is None else self.tokens
        refuse_what_no_problem_says(module)
        start = int(getattr(module, "experts_start_idx", 0))
        physical = physical_ids(module, call["topk_ids"]).long()[rows].cpu()
        hidden = call["hidden_states"].detach()[rows].cpu().clone()
        weight = call["topk_weights"].detach()[rows].float().cpu().clone()
        count = local_experts(module)
        local = physical - start
        ids = torch.where((local >= 0) & (local < count), local, -1)
        experts = ids[ids >= 0].unique()
        tensors = self._weights_of(experts)
        whole: dict[str, Any] = {}
        for name in WEIGHTS:
            whole[name] = torch.zeros(count, *tensors[name].shape[1:], dtype=torch.uint8)
            whole[name][experts] = tensors[name].detach().view(torch.uint8).cpu()
        problem = Problem(
            hidden, ids, weight, **whole,
            activation_clamp=self._clamp_of(call),
            fast_math=bool(call.get("fast_math", getattr(module, "fast_math", True))),
            max_num_tokens=int(getattr(module, "max_num_tokens", 0)) or len(hidden),
            **activation_of(module),
        )  # fmt: skip
        about = {
            "captured_from": f"{type(module).__module__}.{type(module).__qualname__}",
            "prefix": str(getattr(module, "prefix", "")),
            "call": self.call_count - 1,
            "tokens": self.tokens,
            "accumulator": class_of(module, self._accumulator),
            "contract": contract_of(module),
            "torch": torch.__version__,
            ABOUT: checkpoint_experts(module, experts, start),
            # A module whose ranks combine returns more than this rank's share, and one with a
            # shared expert more than the routed sum.
            "complete": not has_shared_expert(module, call)
            and (is_own_share(module) or bool(((ids >= 0) | (physical < 0)).all())),
        }
        return StoredProblem(problem, {}, about)

    def _clamp_of(self, call: Mapping[str, Any]) -> float | None:
        value = self._clamp
        if value is _MISSING:
            value = call.get("activation_clamp", _MISSING)
        if value is _MISSING:
            value = getattr(getattr(self.module, "activation", None), "clamp", _MISSING)
        for name in _CLAMP_NAMES:
            if value is _MISSING:
                value = getattr(self.module, name, _MISSING)
        if value is _MISSING:
            raise StoredError(
                f"{type(self.module).__name__}: neither the call nor the module says its "
                "activation_clamp; give it to capture (None for none)"
            )
        return None if value is None else float(value)

    def _weights_of(self, experts: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Rows ``experts`` of the four checkpoint tensors."""
        if callable(self._weights):
            return self._weights(experts)
        if self._weights is not None:
            return {name: rows_of(self._weights[name], experts) for name in WEIGHTS}
        return checkpoint_weights(self.module, experts)


def run_script(
    script: Path, arguments: list[str], path: Path, calls: int = 1, skip: int = 0
) -> list[Path]:
    """Run a Python script in this process and record the first experts module that it makes.

    That is the first module to register a parameter ``w13_weight``; processes that the script
    starts are not followed. Returns the files; :class:`StoredError` where no call was recorded.
    """
    if not script.is_file():
        raise StoredError(f"{script}: no such script")
    captures: list[capture] = []

    def on_parameter(module: nn.Module, name: str, parameter: Any) -> None:
        if name == WEIGHTS[0] and not captures:
            captures.append(capture(module, path, calls=calls, skip=skip).__enter__())

    hook = register_module_parameter_registration_hook(on_parameter)
    before = sys.argv, list(sys.path)
    sys.argv, sys.path[:] = [str(script), *arguments], [str(script.parent), *sys.path]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        if end.code not in (None, 0):
            raise StoredError(f"{script}: ended with exit code {end.code}") from end
    finally:
        sys.argv, sys.path[:] = before[0], before[1]
        hook.remove()
        for one in captures:
            one.close()
    if not captures:
        raise StoredError(f"{script}: made no module with a parameter {WEIGHTS[0]}")
    if not captures[0].files:
        raise StoredError(f"{script}: its experts module was called {captures[0].call_count} "
                          "times, and no call was recorded")  # fmt: skip
    return captures[0].files


__all__ = ["capture", "run_script"]
