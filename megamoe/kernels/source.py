"""Files of a package that is installed, or that lies in its wheel file, without its import.

An engine's package imports much when it is imported: platforms, distributed groups, other
packages. A kernel's file needs little of that. So the file is executed alone, and stand-ins take
the place of what it imports. The files of a wheel are unpacked into a temporary folder, which the
end of the process removes.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.util
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from megamoe.kernels.registry import Need, wheel_of, wheel_version


@dataclass(frozen=True)
class Source:
    """Where the files of one package are."""

    package: str
    version: str
    names: tuple[str, ...]
    """All files, relative to the folder that holds the package."""
    wheel: Path | None
    root: Path | None
    """The folder of an installation; None for a wheel."""
    _folders: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, need: Need) -> Source:
        """The wheel that the environment names, else the installation.

        Raises ``NotImplementedError`` of one line where there is neither, or where the wheel is no
        zip file.
        """
        wheel = wheel_of(need.wheel)
        if not need.installation():
            raise NotImplementedError(need.missing())
        if wheel is not None:
            try:
                with zipfile.ZipFile(wheel) as archive:
                    names = tuple(archive.namelist())
            except (OSError, zipfile.BadZipFile) as error:
                raise NotImplementedError(f"{need.wheel}={wheel}: {error}") from None
            return cls(need.package, wheel_version(wheel), names, wheel, None)
        there = metadata.distribution(need.package)
        names = tuple(str(name) for name in there.files or ())
        root = Path(str(there.locate_file("")))
        return cls(need.package, there.version, names, None, root)

    def __str__(self) -> str:
        return f"{self.package} {self.version}" + (" (wheel)" if self.wheel else "")

    def only(self, pattern: str) -> str:
        """The one file that matches; ``NotImplementedError`` where there is none or several."""
        matches = [name for name in self.names if fnmatchcase(name, pattern)]
        if len(matches) != 1:
            several = f"several of {pattern}: {', '.join(matches)}" if matches else f"no {pattern}"
            raise NotImplementedError(f"{self} has {several}; the adapter knows other versions")
        return matches[0]

    def folder(self, *patterns: str) -> Path:
        """A folder that holds all files which match one of ``patterns``, at their places."""
        if self.root is not None:
            return self.root
        assert self.wheel is not None
        members = [n for n in self.names if any(fnmatchcase(n, one) for one in patterns)]
        with zipfile.ZipFile(self.wheel) as archive:
            archive.extractall(self._unpacked_folder, members)
        return self._unpacked_folder

    @cached_property
    def _unpacked_folder(self) -> Path:
        folder = tempfile.TemporaryDirectory(prefix="megamoe-wheel-", ignore_cleanup_errors=True)
        self._folders.append(folder)  # removed with the last reference, or at the end
        return Path(folder.name)

    def fingerprint(self, name: str) -> dict[str, Any]:
        """A backend's fingerprint: sha256 of the one file that is executed, and the version."""
        digest = hashlib.sha256((self.folder(name) / name).read_bytes()).hexdigest()
        return {"sources": digest, "options": str(self), "binaries": {}}


def execute(
    file: Path, name: str, stands: Mapping[str, Mapping[str, Any]], bare: Sequence[str] = ()
) -> ModuleType:
    """The module in ``file`` under ``name``, with stand-ins for what it imports.

    ``stands`` has the attributes of single modules. Every other module of the packages in ``bare``
    is a stand-in too: each of its attributes is an empty class. Afterwards ``sys.modules`` has no
    stand-in, so a later import gets the real package.
    """
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Triton and dataclasses look it up
    try:
        with standing_in(stands, bare):
            spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


@contextmanager
def standing_in(
    stands: Mapping[str, Mapping[str, Any]],
    bare: Sequence[str],
    real: Callable[[str], Path | None] = lambda name: None,
    modules: dict[str, ModuleType] | None = None,
) -> Iterator[None]:
    """Imports of the packages in ``bare`` give stand-ins; ``real`` may name a file for a module.

    ``modules`` holds the modules from one use to the next, so that each is executed once.
    """
    finder = _Finder(stands, tuple(bare), real)
    modules = {} if modules is None else modules
    before = {name: one for name, one in sys.modules.items() if finder.has(name)}
    for name in before:
        del sys.modules[name]
    sys.modules.update(modules)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [one for one in sys.modules if finder.has(one)]:
            modules[name] = sys.modules.pop(name)
        sys.modules.update(before)


class _Stand(ModuleType):
    """A module whose unknown attributes are empty classes."""

    __path__: list[str] = []  # noqa: RUF012 - it may hold modules

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        stand = type(name, (), {})
        setattr(self, name, stand)
        return stand


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(
        self, stands: Mapping[str, Mapping[str, Any]], bare: tuple[str, ...],
        real: Callable[[str], Path | None],
    ) -> None:  # fmt: skip
        self.stands, self.bare, self.real = stands, bare, real

    def has(self, name: str) -> bool:
        return name.partition(".")[0] in self.bare

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if not self.has(name):
            return None
        file = self.real(name)
        if file is not None:
            below = [str(file.parent)] if file.name == "__init__.py" else None
            return importlib.util.spec_from_file_location(
                name, file, submodule_search_locations=below
            )
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = _Stand(spec.name)
        for attribute, value in self.stands.get(spec.name, {}).items():
            setattr(module, attribute, value)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """A stand-in has nothing to execute."""


__all__ = ["Source", "execute", "standing_in"]
