"""Finding a backend: by its name, in a file, or as an entry point of an installed package.

What a backend is stands in :class:`megamoe.problem.Backend`; ``docs/backends.md`` shows how to
write one.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch

from megamoe.accumulators import ACCUMULATORS
from megamoe.problem import provided

ENTRY_POINT_GROUP: Final = "megamoe.backends"

BUILT_IN: Final = {
    "eager": "megamoe.backends.eager",
    "oracle": "megamoe.backends.oracle",
    "triton": "megamoe.backends.triton",
    "deep_gemm": "megamoe.backends.deep_gemm",
}
"""Name to module; each module has ``create(device) -> backend``."""

CALLABLES: Final = ("forward", "prepare", "eplb_map", "transform_weights")


class BackendError(ValueError):
    """A backend cannot be found, made or used; the message is one line and says how to mend it."""


def available() -> list[str]:
    """Names that :func:`load_backend` knows: built in first, then entry points."""
    return [*BUILT_IN, *sorted(e.name for e in entry_points(group=ENTRY_POINT_GROUP))]


def load_backend(spec: str, device: str | torch.device = "cpu") -> Any:
    """The backend that ``spec`` names, checked to be one.

    ``spec`` is a name (built in, or an entry point of the group ``megamoe.backends``), ``auto``,
    or ``path/to/file.py:OBJECT_OR_FACTORY``. A class or a function is called to get the object,
    with ``device`` as keyword argument where it takes one. Raises :class:`BackendError`.
    """
    if spec == "auto":
        spec = _automatic(torch.device(device))
    if ":" in spec or spec.endswith(".py"):
        found = _from_file(spec)
    elif spec in BUILT_IN:
        found = _attempt(spec, "importing it", lambda: importlib.import_module(BUILT_IN[spec]))
        found = found.create
    else:
        found = _from_entry_point(spec)
    return checked(_made(spec, found, torch.device(device)), spec)


def _automatic(device: torch.device) -> str:
    """``triton`` where its kernels have been seen to run, else ``eager``."""
    fast = (
        device.type == "cuda"
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability(device)[0] == 9
        and importlib.util.find_spec("triton") is not None
    )
    return "triton" if fast else "eager"


def checked(
    backend: Any, spec: str = "given object", callables: tuple[str, ...] = CALLABLES
) -> Any:
    """``backend`` itself if it has a name, a known accumulator class and one of ``callables``."""
    name = getattr(backend, "name", None)
    if not isinstance(name, str) or not name:
        raise BackendError(
            f"backend {spec}: {type(backend).__name__} has no `name`; give it a non-empty string"
        )
    accumulator = getattr(backend, "accumulator", None)
    if accumulator not in ACCUMULATORS:
        known = ", ".join(ACCUMULATORS)
        raise BackendError(
            f"backend {spec}: `accumulator` is {accumulator!r}; set it to one of {known}"
        )
    if not any(provided(backend, c) for c in callables):
        raise BackendError(
            f"backend {spec}: nothing to judge; give it one of {', '.join(callables)}"
        )
    return backend


def _from_file(spec: str) -> Any:
    name, _, attribute = spec.rpartition(":")
    if not name or not attribute or attribute.endswith(".py"):
        raise BackendError(
            f"backend {spec}: say which object, as in path/to/file.py:OBJECT_OR_FACTORY"
        )
    path = Path(name).expanduser().resolve()
    if path.suffix != ".py" or not path.is_file():
        raise BackendError(f"backend {spec}: no Python file at {path}; check the path before the :")
    module = _attempt(spec, "importing it", lambda: _import_file(path))
    if not hasattr(module, attribute):
        names = [n for n in vars(module) if not n.startswith("_")]
        raise BackendError(
            f"backend {spec}: {path.name} has no {attribute!r}; it has {', '.join(names) or 'none'}"
        )
    return getattr(module, attribute)


def _import_file(path: Path) -> ModuleType:
    """The module in ``path``; its folder joins the import path last, as a script's would first."""
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    name = f"megamoe_backend_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    if module_spec is None or module_spec.loader is None:
        raise ImportError(f"cannot import {path}")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    try:
        module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _from_entry_point(spec: str) -> Any:
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        if entry.name == spec:
            return _attempt(spec, "importing it", entry.load)
    raise BackendError(
        f"unknown backend {spec!r}; known: {', '.join(available())}, or path/to/file.py:OBJECT"
    )


def _made(spec: str, found: Any, device: torch.device) -> Any:
    """The backend object: ``found`` itself, or what calling it gives."""
    is_object = hasattr(found, "name") and hasattr(found, "accumulator")
    if isinstance(found, type) or (callable(found) and not is_object):
        try:
            parameters = inspect.signature(found).parameters
        except (TypeError, ValueError):  # some built-in callables tell nothing
            parameters = {}  # type: ignore[assignment]
        arguments = {"device": device} if "device" in parameters else {}
        return _attempt(spec, "making it", lambda: found(**arguments))
    return found


def _attempt(spec: str, doing: str, step: Any) -> Any:
    """``step()``, with whatever it raises as one line."""
    try:
        return step()
    except BackendError:
        raise
    except (Exception, SystemExit) as error:
        lines = str(error).strip().splitlines() or ["no message"]
        raise BackendError(
            f"backend {spec}: {doing} raised {type(error).__name__}: {lines[0]}"
        ) from error
