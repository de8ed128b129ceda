"""The build of the kernel in a package, by the bytes of the headers that it compiles.

A version string does not identify numerics: vLLM releases share headers, and one version has been
published with two kernels. The table ``builds.toml`` has the hashes, which revision of
:mod:`megamoe.spec.contract` a build follows, and in which clauses it differs. A revision may be
named there before its clauses are written down.

The six headers speak for the kernel ``fp8_fp4_mega_moe``. Staging and the remap of experts are
Python around it, and newer packages have other kernels (SiTU, NVFP4) in headers of their own.
"""

from __future__ import annotations

import hashlib
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

DIGITS: Final = 16
"""Hex digits of a sha256 that the table holds."""

PACKAGES: Final = ("deep_gemm", "sgl_deep_gemm", "vllm")
"""Distributions for which :func:`installed_packages` looks; tokenspeed-deepgemm installs as
deep_gemm."""

_HOLDERS: Final = ("deep_gemm", "sgl_deep_gemm", "vllm.third_party.deep_gemm")
"""Modules that hold the kernel."""
_ENGINES: Final = {
    "vllm": ("third_party/deep_gemm", "../deep_gemm"),
    "sglang": ("../sgl_deep_gemm", "../deep_gemm"),
}
"""Engines, which load the kernel when they first need it: where theirs lies, the first that is."""
KERNEL_MODULES: Final = (*_HOLDERS, *_ENGINES)
"""Modules that say which kernel a process has loaded, or will; see :func:`kernels`."""


@dataclass(frozen=True)
class Header:
    """One of the hashed files, below ``include/deep_gemm``."""

    path: str
    bits: bool
    """Whether the text can decide an output bit; otherwise it decides only places and times."""
    why: str


@dataclass(frozen=True)
class Build:
    """One package or commit."""

    name: str
    revision: str
    """The contract revision that it follows; it may not be in ``contract.REVISIONS`` yet."""
    differs: Mapping[str, Any]
    """Clause -> value, where it is not the revision's."""
    notes: tuple[str, ...]
    hashes: Mapping[str, str]
    """Header's path -> the first digits of its sha256."""


def _read(text: str) -> tuple[tuple[Header, ...], dict[str, Build]]:
    data: dict[str, Any] = tomllib.loads(text)
    headers = tuple(Header(**table) for table in data["file"])
    builds: dict[str, Build] = {}
    for table in data["headers"]:
        paths = (header.path for header in headers)
        hashes = MappingProxyType(dict(zip(paths, table["sha256"], strict=True)))
        differs = MappingProxyType(
            {k: tuple(v) if isinstance(v, list) else v for k, v in table.get("differs", {}).items()}
        )
        for name in table["builds"]:
            if name in builds:
                raise ValueError(f"builds.toml has {name} twice")
            notes = tuple(table.get("notes", ()))
            builds[name] = Build(name, table["revision"], differs, notes, hashes)
    return headers, builds


HEADERS, BUILDS = _read(Path(__file__).with_name("builds.toml").read_text(encoding="utf-8"))
KERNEL: Final = HEADERS[-1].path
"""The header by which a folder of headers is found."""


@dataclass(frozen=True)
class Detection:
    """The build of a folder's headers, or the nearest one."""

    where: Path
    """The folder ``include/deep_gemm``."""
    hashes: Mapping[str, str]
    """Header's path -> the first digits of its sha256, "" where the file is missing."""
    builds: tuple[Build, ...]
    """The builds with these six headers, or the nearest builds; empty: no build is near."""
    differing: tuple[Header, ...]
    """Headers that are not those of ``builds``; empty where all six are."""

    @property
    def exact(self) -> bool:
        """All six headers are those of ``builds``."""
        return bool(self.builds) and not self.differing

    @property
    def same_bits(self) -> bool:
        """Whether every difference is in a file that cannot decide an output bit."""
        return bool(self.builds) and not any(header.bits for header in self.differing)

    @property
    def description(self) -> str:
        """A description of one line, for a person."""
        if not self.builds:
            return "none of the builds known here: not one of the six headers is theirs"
        names = ", ".join(build.name for build in self.builds)
        if self.exact:
            return names
        files = ", ".join(
            f"{header.path} is {'another' if self.hashes[header.path] else 'missing'}"
            for header in self.differing
        )
        if self.same_bits:
            return f"the bits of {names}; {files}, which is of the schedule or the layout only"
        return f"none of the builds known here; the nearest is {names}, but {files}"


def detect(folder: Path) -> Detection:
    """Identify the MegaMoE headers below ``folder``, at any depth.

    Raises ``ValueError`` of one line if there is no such folder, no headers, or several copies that
    differ.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; name a package's or a checkout of DeepGEMM")
    places = sorted(path.parent.parent for path in folder.rglob(KERNEL))
    if not places:
        raise ValueError(
            f"{folder} has no MegaMoE headers (no {KERNEL} below it): name the folder of a package "
            f"such as {', '.join(PACKAGES)}, or a checkout of DeepGEMM from 2026-04 on"
        )
    hashes = {place: _hashes(place) for place in places}
    first = places[0]
    others = [place for place in places if hashes[place] != hashes[first]]
    if others:
        raise ValueError(
            f"{folder} has several sets of MegaMoE headers that differ; name one of "
            f"{', '.join(str(place) for place in (first, *others))}"
        )
    return _nearest(first, hashes[first])


def _hashes(place: Path) -> Mapping[str, str]:
    hashes = {}
    for header in HEADERS:
        path = place / header.path
        data = path.read_bytes() if path.is_file() else None
        hashes[header.path] = "" if data is None else hashlib.sha256(data).hexdigest()[:DIGITS]
    return MappingProxyType(hashes)


def _nearest(where: Path, hashes: Mapping[str, str]) -> Detection:
    """The build with the fewest headers that differ; those that decide bits count first."""

    def differing(build: Build) -> tuple[Header, ...]:
        return tuple(h for h in HEADERS if hashes[h.path] != build.hashes[h.path])

    def distance(build: Build) -> tuple[int, int]:
        those = differing(build)
        return sum(header.bits for header in those), len(those)

    # Of builds that are equally near, name the latest in the table.
    nearest = min(reversed(BUILDS.values()), key=distance)
    those = differing(nearest)
    if len(those) == len(HEADERS):
        return Detection(where, hashes, (), HEADERS)
    same = tuple(build for build in BUILDS.values() if build.hashes == nearest.hashes)
    return Detection(where, hashes, same, those)


def installed_packages() -> dict[str, Path]:
    """Package -> its folder, for the installed packages; nothing is imported."""
    folders = {}
    for name in PACKAGES:
        for place in _places(name):
            if name == "vllm":  # which carries a DeepGEMM of its own
                place = place / "third_party" / "deep_gemm"
            if place.is_dir():
                folders[name] = place
                break
    return folders


def kernels(modules: Mapping[str, Path]) -> dict[str, Path]:
    """The kernels in use among the :data:`KERNEL_MODULES`, by module, with their folders.

    An engine counts only if no module that holds the kernel is loaded yet.
    """
    folders = {name: folder for name, folder in modules.items() if name in _HOLDERS}
    if folders:
        return folders
    for engine, places in _ENGINES.items():
        if engine not in modules:
            continue
        there = [modules[engine] / place for place in places if (modules[engine] / place).is_dir()]
        if there:
            folders[engine] = there[0].resolve()
    return folders


def _places(package: str) -> list[Path]:
    if package in sys.modules and getattr(sys.modules[package], "__spec__", None) is None:
        return []  # a stand-in that somebody put there; find_spec would raise
    spec = find_spec(package)
    return [] if spec is None else [Path(p) for p in spec.submodule_search_locations or ()]


def build_of(name: str) -> Build | None:
    """The build of that name, with any of ``vllm 0.24.0``, ``vllm-0.24.0``, ``vllm==0.24.0``."""
    return {_plain(build.name): build for build in BUILDS.values()}.get(_plain(name))


def _plain(name: str) -> str:
    words = "".join(c if c.isalnum() or c == "." else " " for c in name.lower()).split()
    return " ".join(words)
