"""What is known of each published kernel, and what it lacks on this machine. No torch in here, but
where only the adapter of an installed package can say what lacks."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from megamoe.spec.contract import contract as find_contract
from megamoe.suggest import follow, hint

FILE: Final = Path(__file__).parent / "registry.toml"


@dataclass(frozen=True)
class Need:
    """One package that a kernel needs."""

    package: str
    """The distribution, as a package index names it."""
    install: str
    """The argument for ``pip install``, or a sentence where no index has it."""
    wheel: str = ""
    """An environment variable that may name the package's wheel file in place of an
    installation."""
    other: tuple[str, ...] = ()
    """Distributions that hold the same module."""

    def installation(self) -> str:
        """``"vllm 0.24.0"`` where it is installed or its wheel is there; else the empty string."""
        wheel = wheel_of(self.wheel)
        if wheel is not None:
            return f"{self.package} {wheel_version(wheel)} (wheel)" if wheel.is_file() else ""
        for name in (self.package, *self.other):
            try:
                return f"{name} {metadata.version(name)}"
            except metadata.PackageNotFoundError:
                continue
        return ""

    def missing(self) -> str:
        """One line: what is missing and how to mend it."""
        wheel = wheel_of(self.wheel)
        if wheel is not None:
            return f"{self.wheel}={wheel}: no such file; name the wheel of {self.package}"
        how = f"pip install {self.install}" if " " not in self.install else self.install
        also = f", or {self.wheel}=FILE.whl" if self.wheel else ""
        return f"no package {self.package}: {how}{also}"


@dataclass(frozen=True)
class Kernel:
    """One published kernel and the claims of its adapter."""

    name: str
    """The name of its backend."""
    title: str
    url: str
    versions: str
    """The versions for which the adapter was written."""
    arch: tuple[int, ...]
    """Major compute capabilities on which the kernel runs, as its source says."""
    needs: tuple[Need, ...]
    contracts: tuple[str, ...]
    """The contracts that it claims; the version in use may narrow them."""
    accumulator: str
    features: tuple[str, ...]
    kinds: tuple[str, ...]
    theirs: str
    """The part that is the published kernel."""
    ours: str
    """The part that this project adds around it."""
    evidence: tuple[str, ...]
    module: str
    """The module with ``create(device)``."""
    batch_invariant: bool = True
    cpu: bool = False
    """It runs on a CPU too: another code of the same package."""
    interpreter: bool = False
    """Triton's interpreter runs it without a GPU (TRITON_INTERPRET=1)."""
    compiled: bool = False
    """Its wheel holds a library for one torch: only who loads it knows that it runs beside this."""

    @property
    def unknown_contracts(self) -> list[str]:
        """Those of :attr:`contracts` that this version of megamoe does not have."""
        return [name for name in self.contracts if not _is_contract(name)]

    def lacks(self, capability: Callable[[], int | None] | None = None) -> list[str]:
        """One line for each thing that it needs and that is not here; empty: it can run.

        ``capability`` gives the major compute capability of the first GPU, None without one.
        """
        out = [need.missing() for need in self.needs if not need.installation()]
        if self.unknown_contracts and len(self.unknown_contracts) == len(self.contracts):
            out.append(f"contract {', '.join(self.unknown_contracts)} is not in this megamoe")
        if self.cpu or (self.interpreter and os.environ.get("TRITON_INTERPRET") == "1"):
            return out
        major = (capability or gpu_major)()
        targets = " or ".join(f"{one}.x" for one in self.arch)
        if major is None:
            out.append(f"no NVIDIA GPU seen; it needs compute capability {targets}")
        elif major not in self.arch:
            out.append(f"the GPU has compute capability {major}.x; it needs {targets}")
        return out

    def refusals(self, capability: Callable[[], int | None] | None = None) -> list[str]:
        """As :meth:`lacks`; where nothing lacks, a compiled package is loaded, and the line is the
        one with which the adapter refuses it."""
        out = self.lacks(capability)
        if out or not self.compiled:
            return out
        try:
            importlib.import_module(self.module).create("cuda")
        except NotImplementedError as error:
            return [str(error)]
        except Exception as error:
            return [f"it cannot be loaded: {type(error).__name__}: {error}"]
        return []


def kernels() -> dict[str, Kernel]:
    """All kernels by name, in the order of the file."""
    return _read(FILE)


def kernel(name: str) -> Kernel:
    """The kernel of that name; ``ValueError`` of one line for another name."""
    by_name = kernels()
    if name not in by_name:
        text = f"unknown kernel {name!r}{hint(name, by_name)}"
        raise ValueError(follow(text, f"known: {', '.join(by_name)}"))
    return by_name[name]


@cache
def _read(file: Path) -> dict[str, Kernel]:
    entries = tomllib.loads(file.read_text("utf-8"))["kernel"]
    all_kernels = [_kernel(entry) for entry in entries]
    return {one.name: one for one in all_kernels}


def _kernel(entry: Mapping[str, Any]) -> Kernel:
    arguments = _tuples(entry)
    arguments["needs"] = tuple(Need(**_tuples(need)) for need in entry["needs"])
    arguments.setdefault("module", f"megamoe.kernels.{entry['name'].replace('-', '_')}")
    return Kernel(**arguments)


def _tuples(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The entry with tuples for lists, so that a record cannot change."""
    return {name: tuple(v) if isinstance(v, list) else v for name, v in entry.items()}


def _is_contract(name: str) -> bool:
    try:
        find_contract(name)
    except ValueError:
        return False
    return True


def wheel_of(variable: str) -> Path | None:
    """The wheel file that the environment variable names, there or not; None where it is unset."""
    path = os.environ.get(variable, "") if variable else ""
    return Path(path).expanduser() if path else None


def wheel_version(file: Path) -> str:
    """The version in the name of a wheel file: ``NAME-VERSION-...whl``."""
    parts = file.name.split("-")
    return parts[1] if len(parts) >= 5 and file.suffix == ".whl" else "of unknown version"


@cache
def gpu_major() -> int | None:
    """The major compute capability of the first GPU, as nvidia-smi says; None without one."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return int(process.stdout.split(".")[0])
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


__all__ = ["Kernel", "Need", "gpu_major", "kernel", "kernels", "wheel_of", "wheel_version"]
