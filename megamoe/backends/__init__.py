"""The search for a backend: by its name, in a file, or as an entry point of an installed package.

:class:`megamoe.spec.problem.Backend` defines a backend; ``docs/backends.md`` shows how to write
one.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, Final

import torch

from megamoe.worker import serve
from megamoe.worker.known import BUILTINS, KERNELS, available, entry_point, unknown
from megamoe.worker.serve import BackendError
from megamoe.worker.session import METHODS, complaint

CALLABLES: Final = METHODS


class UnknownBackend(BackendError):
    """No backend has that name."""


def load_backend(spec: str, device: str | torch.device = "cpu", contract: str = serve.AUTO) -> Any:
    """The backend that ``spec`` names, checked to be one.

    ``spec`` is a name (built in, or an entry point of the group ``megamoe.backends``), ``auto``,
    or ``path/to/file.py:OBJECT_OR_FACTORY``. A class or a function is called to get the object,
    with ``device`` and ``contract`` as keyword arguments where it takes them. Raises
    :class:`BackendError`.
    """
    if spec == "auto":
        spec = _automatic(torch.device(device))
    if ":" in spec or spec.endswith(".py"):
        backend = _attempt(spec, lambda: serve.load(spec, str(device), {}, contract))
    else:
        backend = _attempt(
            spec, lambda: serve.create(factory_of(spec), torch.device(device), contract)
        )
    return check_backend(backend, spec)


def factory_of(name: str) -> Any:
    """The factory of the backend with that name, or the backend itself if it is an object."""
    module = BUILTINS.get(name) or KERNELS.get(name)
    if module is not None:
        return importlib.import_module(module).create
    entry = entry_point(name)
    if entry is None:
        raise UnknownBackend(unknown(name))
    return entry.load()


def _automatic(device: torch.device) -> str:
    """``triton`` where its kernels have been seen to run, else ``eager``."""
    fast = (
        device.type == "cuda"
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability(device)[0] == 9
        and importlib.util.find_spec("triton") is not None
    )
    return "triton" if fast else "eager"


def check_backend(
    backend: Any, spec: str = "given object", callables: tuple[str, ...] = CALLABLES
) -> Any:
    """``backend`` itself if it has a name, a known accumulator class and one of ``callables``, and
    each takes the arguments that it is called with."""
    identity = serve.identity(backend)
    methods = [name for name in callables if name in identity["callables"]]
    name, accumulator, kind = (identity[n] for n in ("name", "accumulator", "type"))
    wrong = complaint(name, accumulator, methods, kind, callables) or serve.misfit(backend)
    if wrong:
        raise BackendError(f"backend {spec}: {wrong}")
    return backend


def _attempt(spec: str, step: Callable[[], Any]) -> Any:
    """``step()``, with whatever it raises as one line."""
    try:
        return step()
    except UnknownBackend:
        raise
    except BackendError as error:
        raise BackendError(f"backend {spec}: {error}") from error
    except (Exception, SystemExit) as error:
        raise BackendError(f"backend {spec}: loading it raised {serve.one_line(error)}") from error


__all__ = ["BUILTINS", "CALLABLES", "BackendError", "available", "check_backend", "load_backend"]
