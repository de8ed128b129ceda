"""The data from which a judge chooses a contract. Part of ``serve.py``: needs Python 3.10 and torch
only."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def offer(spec: str, modules: Mapping[str, str], packages: Iterable[str]) -> dict[str, Any]:
    """``default`` and ``packages`` of a backend that was loaded from ``spec``."""
    return {"default": default_of(spec, modules), "packages": loaded(packages)}


def default_of(spec: str, modules: Mapping[str, str]) -> str | None:
    """The default of the factory's parameter ``contract``; None: it has no such parameter."""
    try:
        found = inspect.signature(_factory(spec, modules)).parameters.get("contract")
    except (AttributeError, KeyError, ImportError, TypeError, ValueError):
        return None  # an object, an older megamoe, a built-in callable that tells nothing
    return None if found is None else str(found.default)[:80]


def _factory(spec: str, modules: Mapping[str, str]) -> Any:
    """The object or factory that ``spec`` names; its module has been imported by now."""
    file, _, attribute = spec.rpartition(":")
    if not file:
        return importlib.import_module(modules["backends"]).factory_of(spec)
    found = getattr(sys.modules[f"megamoe_backend_{Path(file).stem}"], attribute)
    if not isinstance(found, type) and hasattr(found, "name") and hasattr(found, "accumulator"):
        raise TypeError("a backend as it is, whatever a call of it would take")
    return found


def loaded(names: Iterable[str]) -> dict[str, str]:
    """The folders of those packages among these names that this process has imported."""
    out = {}
    for name in names:
        path = getattr(sys.modules.get(name), "__path__", None)
        try:
            out[name] = os.path.abspath(next(iter(path or ())))  # noqa: PTH100
        except (StopIteration, TypeError, ValueError):
            continue  # no package, or a stand-in that lies nowhere
    return out
