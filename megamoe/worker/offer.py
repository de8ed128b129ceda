"""What a file offers, and what a judge needs to choose a contract. Part of ``serve.py``: needs
Python 3.10 and torch only."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def offer(spec: str, modules: Mapping[str, str], packages: Iterable[str]) -> dict[str, Any]:
    """``default`` and ``packages`` of a backend that was loaded from ``spec``."""
    return {"default": default_of(spec, modules), "packages": package_folders(packages)}


def default_of(spec: str, modules: Mapping[str, str]) -> str | None:
    """The default of the factory's parameter ``contract``; None: it has no such parameter."""
    try:
        parameter = inspect.signature(_factory(spec, modules)).parameters.get("contract")
    except (AttributeError, KeyError, ImportError, TypeError, ValueError):
        return None  # an object, an older megamoe, a built-in callable that tells nothing
    return None if parameter is None else str(parameter.default)[:80]


def _factory(spec: str, modules: Mapping[str, str]) -> Any:
    """The object or factory that ``spec`` names; its module has been imported by now."""
    file, _, attribute = spec.rpartition(":")
    if not file:
        return importlib.import_module(modules["backends"]).factory_of(spec)
    stem = Path(file).stem if file.endswith(".py") else "__init__"  # of a package's folder
    factory = getattr(sys.modules[f"megamoe_backend_{stem}"], attribute)
    if (
        not isinstance(factory, type)
        and hasattr(factory, "name")
        and hasattr(factory, "accumulator")
    ):
        raise TypeError("a backend as it is, whatever a call of it would take")
    return factory


def lacks(module: Any, name: str, callables: Iterable[str], file: str) -> str:
    """The end of "FILE has no NAME": the name that was meant, what could be a backend, and what to
    write for one. ``file``: as it was given."""
    candidates = [
        n for n, value in vars(module).items() if _may_be_backend(n, value, module, callables)
    ]
    if not candidates:
        return f"; it has nothing that could be one: a class with {', '.join(callables)}"
    of_lower = {one.lower(): one for one in candidates}
    near = difflib.get_close_matches(name.lower(), of_lower, 1)
    owner = next((n for n in candidates if callable(getattr(getattr(module, n), name, None))), "")
    best, hint = candidates[0], "; it has"
    if owner:
        best, hint = owner, f"; {name} is a method of {owner}: name the class; it has"
    elif near:
        best, hint = of_lower[near[0]], f"; did you mean {of_lower[near[0]]}? It has"
    return f"{hint} {', '.join(candidates)}; name one, as {file}:{best}"


def _may_be_backend(name: str, value: Any, module: Any, callables: Iterable[str]) -> bool:
    """A class or an object with one of ``callables``, or a factory; an import only if it says its
    accumulator class, as a class of torch does not."""
    if name.startswith("_") or inspect.ismodule(value):
        return False
    is_own = getattr(value, "__module__", None) == module.__name__
    if inspect.isfunction(value):
        takes = inspect.signature(value).parameters.values()
        required = {p.name for p in takes if p.default is p.empty and p.kind not in (2, 4)}
        return is_own and required <= {"device", "contract"}
    says = hasattr(value, "accumulator") or (is_own and isinstance(value, type))
    return says and any(callable(getattr(value, one, None)) for one in callables)


def needs(name: str, arguments: Sequence[str], is_class: bool) -> str:
    """Why a function or a class that needs arguments cannot create a backend."""
    takes = f"takes {', '.join(arguments)}"
    if is_class:
        return (
            f"{name} is a class that {takes}, and megamoe gives it device and contract at most; "
            "add defaults, or name a function that returns the object"
        )
    return (
        f"{name} is a function that {takes}; name a class, or a function that returns a backend "
        "and takes nothing but device and contract"
    )


def is_in_package(file: Path, name: str) -> str:
    """What to write in place of a file that imports from its own package."""
    start = f"{file.name} has a relative import, which works in a package only; "
    if not (file.expanduser().parent / "__init__.py").is_file():
        return f"{start}import by the whole name, or add {file.parent / '__init__.py'}"
    package = file.parent if file.parent.name else file.expanduser().resolve().parent
    return f"{start}name the package, {package}:{name}, and import {name} in its __init__.py"


def package_folders(names: Iterable[str]) -> dict[str, str]:
    """The folders of those packages among these names that this process has imported."""
    out = {}
    for name in names:
        path = getattr(sys.modules.get(name), "__path__", None)
        try:
            out[name] = os.path.abspath(next(iter(path or ())))  # noqa: PTH100
        except (StopIteration, TypeError, ValueError):
            continue  # no package, or a stand-in that lies nowhere
    return out
