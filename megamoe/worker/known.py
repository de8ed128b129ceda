"""The names of backends: built in, and entry points of installed packages. No torch in here."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Final

from megamoe.suggest import follow, hint

ENTRY_POINT_GROUP: Final = "megamoe.backends"

BUILTINS: Final = {
    "eager": "megamoe.backends.eager",
    "oracle": "megamoe.backends.oracle",
    "model": "megamoe.backends.model",
    "triton": "megamoe.backends.triton.backend",
    "deep_gemm": "megamoe.backends.deep_gemm",
}
"""Name to module; each module has ``create(device) -> backend``."""


KERNELS: Final = {
    name: f"megamoe.kernels.{name.replace('-', '_')}"
    for name in (
        "sgl-deep-gemm", "vllm-staging", "vllm-eplb", "sglang-pre-dispatch", "humming",
        "torch-grouped-mm", "torch-scaled-grouped-mm", "triton-kernels-mxfp4",
    )
}  # fmt: skip
"""Adapters of published kernels, as :data:`BUILTINS`; ``megamoe kernels`` says what each needs."""


def available() -> list[str]:
    """The names: built in first, then published kernels, then entry points."""
    return [*BUILTINS, *KERNELS, *sorted(e.name for e in entry_points(group=ENTRY_POINT_GROUP))]


def entry_point(name: str) -> EntryPoint | None:
    """The entry point with this name, if an installed package has one."""
    return next((e for e in entry_points(group=ENTRY_POINT_GROUP) if e.name == name), None)


def is_file(spec: str) -> bool:
    """Whether ``spec`` means a file, and no name."""
    return ":" in spec or spec.endswith(".py")


def file_of(spec: str) -> str:
    """The path in ``path/to/file.py:OBJECT``, whose ``:OBJECT`` may lack, or in
    ``path/to/package:OBJECT``."""
    path, _, name = spec.rpartition(":")
    return path if path and not name.endswith(".py") else spec


def source_of(path: Path) -> Path:
    """The file that Python runs for the path of a backend: of a package folder its
    ``__init__.py``."""
    return path / "__init__.py" if path.is_dir() else path


def unknown(spec: str) -> str:
    """The message for a name that no backend has."""
    names = available()
    text = f"unknown backend {spec!r}{hint(spec, names)}"
    return follow(text, f"known: {', '.join(names)}, or path/to/file.py:OBJECT")
