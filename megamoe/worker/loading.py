"""The search for a backend and its creation. Part of ``serve.py``: needs Python 3.10 and torch
only."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
AUTO = "auto"  # of contracts: the backend's own
CALLS = {
    "forward": "problem",
    "prepare": (
        "hidden_states, topk_weights, topk_ids, x_fp8, x_sf, topk_idx_out, topk_weights_out"
    ),
    "eplb_map": (
        "topk_ids, expert_load_view, logical_to_physical_map, logical_replica_count, record_enabled"
    ),
    "transform_weights": "w13, w13_scale, w2, w2_scale",
    "forward_group": "problem, group",
    "run": "y, weights, buffer, num_tokens, *, activation_clamp, fast_math",
}
"""To each method that a backend may have, the arguments of every call of it: by place, and after
the star by name."""
CALLABLES = tuple(CALLS)


class BackendError(ValueError):
    """A backend cannot be found, created or used; the message is one line and says how to mend
    it."""


def load(spec: str, device: str, modules: Mapping[str, str], contract: str = AUTO) -> Any:
    """The backend: ``path/to/file.py:OBJECT_OR_FACTORY``, the same with the folder of a package, or
    a name that megamoe knows.

    ``modules``: where megamoe's ``backends``, ``acts`` and ``problem`` are; some or all may lack.
    """
    name, _, attribute = spec.rpartition(":")
    if ":" not in spec and not spec.endswith(".py"):
        arguments = () if contract == AUTO else (contract,)  # an older megamoe knows of none
        if "backends" not in modules:
            raise BackendError("megamoe must be installed; or give path/to/file.py:OBJECT")
        return megamoe_module(modules, "backends").load_backend(spec, device, *arguments)
    if not name or not attribute or attribute.endswith(".py"):
        raise BackendError("say which object, as in path/to/file.py:OBJECT_OR_FACTORY")
    file = Path(name).expanduser().resolve()
    try:
        module = import_file(file)
    except ImportError as error:
        if "no known parent package" not in str(error):
            raise
        about = _offer()
        raise BackendError(about.is_in_package(Path(name), attribute)) from error
    target = getattr(module, attribute, None)
    required = _required(target)
    if required or not hasattr(module, attribute):
        about = _offer()
        hint = about.lacks(module, attribute, CALLABLES, name)
        if not required:
            raise BackendError(f"{Path(name).name} has no {attribute!r}{hint}")
        raise BackendError(about.needs(attribute, required, isinstance(target, type)) + hint)
    return create(target, torch.device(device), contract)


def misfit(backend: Any) -> str:
    """Why a method of ``backend`` cannot be called as megamoe calls it; empty if each can."""
    for name, arguments in CALLS.items():
        method = getattr(backend, name, None)
        if not callable(method):
            continue
        try:
            signature = inspect.signature(method)
        except (TypeError, ValueError):  # some built-in callables tell nothing
            continue
        places, _, names = arguments.partition(", *, ")
        try:
            signature.bind(*places.split(", "), **dict.fromkeys(names.split(", ") if names else ()))
        except TypeError as error:
            return (
                f"{type(backend).__name__}.{name} takes {signature}, and megamoe calls it as "
                f"{name}({arguments}): {error}; give it these arguments, or another name if it is "
                "a method of your own"
            )
    return ""


def _offer() -> Any:
    """``offer.py``, which a worker of one file has already."""
    name = "megamoe_worker_offer"
    return sys.modules.get(name) or module_of(name, HERE / "offer.py")


def _required(factory: Any) -> list[str]:
    """The arguments that a function or a class needs, and that no factory of a backend gets."""
    if not inspect.isfunction(factory) and not isinstance(factory, type):
        return []
    try:
        takes = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # some classes of C tell nothing
        return []
    required = [p.name for p in takes if p.default is p.empty and p.kind not in (2, 4)]
    return [one for one in required if one not in ("device", "contract")]


def megamoe_module(modules: Mapping[str, str], part: str) -> Any:
    """The module of megamoe that the judge names for ``part``; an ``ImportError`` without one."""
    if part not in modules:
        raise ImportError(f"the judge names no module for {part}")
    return importlib.import_module(modules[part])


def import_file(file: Path) -> Any:
    """The module in ``file``; its folder joins the import path last, as a script's would first.
    The folder of a package means its ``__init__.py``; the folder around it joins the path."""
    file = file / "__init__.py" if file.is_dir() else file
    if file.suffix != ".py" or not file.is_file():
        raise BackendError(f"no Python file at {file}; check the path before the :")
    home = str(file.parent.parent if file.stem == "__init__" else file.parent)
    if home not in sys.path:
        sys.path.append(home)
    return module_of(f"megamoe_backend_{file.stem}", file)


def module_of(name: str, file: Path) -> Any:
    """The module in ``file``, under a name of its own."""
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(spec.name, None)
        raise
    return module


def create(target: Any, device: Any, contract: str = AUTO) -> Any:
    """The object itself, or the result of a call with optional ``device`` and ``contract``."""
    is_object = hasattr(target, "name") and hasattr(target, "accumulator")
    if not isinstance(target, type) and (is_object or not callable(target)):
        return target
    try:
        takes = dict(inspect.signature(target).parameters)
    except (TypeError, ValueError):  # some built-in callables tell nothing
        takes = {}
    arguments = {"device": device} if contract == AUTO else {"device": device, "contract": contract}
    parameter = takes.get("contract")
    if contract == AUTO and parameter is not None and parameter.default is inspect.Parameter.empty:
        raise BackendError("it needs a `contract`; give that a default, or say --contract REV")
    return target(**{name: value for name, value in arguments.items() if name in takes})
