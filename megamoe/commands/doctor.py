"""``megamoe doctor``: what is here, what lacks, and what to do. It changes nothing.

Modules that may be missing are imported inside the checks, so that it runs where they are.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Final

import megamoe
from megamoe.printable import printable, quantity

OLDEST: Final = (3, 11)
OLDEST_NIX: Final = (2, 18)
"""The same number stands in nix/minimum.nix; a test compares the two."""
SECONDS: Final = 20.0
"""That a program may take to tell its version, or pip to ask its indexes."""
BROWSERS: Final = ("chromium", "chromium-browser", "google-chrome", "chrome")
PROGRAMS: Final = ("chromium", "nix", "torch-index")
"""Lines that wait for another program, and for nothing of this process."""
ESSENTIALS: Final = ("python", "torch", "numpy", "safetensors", "goldens", "eager")
"""Lines without which `check --backend eager` cannot run; all others are for more than that."""


@dataclass(frozen=True)
class Line:
    """One finding."""

    name: str
    state: str
    """ok, missing or wrong."""
    said: str
    """A version, a place, or what is wrong."""
    mend: str = ""
    """What to do; empty where there is nothing to do."""


def run(a: argparse.Namespace) -> int:
    """Exit status 0 if ``check --backend eager`` can run here, else 1."""
    lines = []
    for line in examine(a.golden):  # each is shown at once: importing torch takes seconds
        lines.append(line)
        if not a.json:
            mend = f"\n{'':<8} {'':<12} -> {line.mend}" if line.mend else ""
            print(f"{line.state:<8} {line.name:<12} {line.said}{mend}", flush=True)
    well = all(line.state == "ok" for line in lines if line.name in ESSENTIALS)
    if a.json:
        print(json.dumps({"ok": well, "lines": [asdict(line) for line in lines]}, indent=1))
        return 0 if well else 1
    print(f"`megamoe check --backend eager` {'can' if well else 'cannot'} run here")
    return 0 if well else 1


def examine(golden: str | None = None) -> Iterator[Line]:
    """A line for each thing. A check that fails in an unforeseen way is a line, too."""
    checks: dict[str, Callable[[], Line]] = {
        "megamoe": _megamoe, "python": _python,
        "torch": lambda: _package("torch", "run `make setup`, or install torch"),
        "numpy": lambda: _package("numpy", "install numpy"),
        "safetensors": lambda: _package("safetensors", "install safetensors"),
        "goldens": lambda: _goldens(golden), "eager": _eager, "gpu": _gpu,
        "triton": lambda: _package("triton", "only `--backend triton` needs it: install triton"),
        "deep_gemm": _deep_gemm, "chromium": _chromium, "nix": _nix, "torch-index": _index,
    }  # fmt: skip
    with ThreadPoolExecutor() as pool:  # other programs answer while torch is imported
        futures = {name: pool.submit(_line, name, checks[name]) for name in PROGRAMS}
        for name, check in checks.items():
            yield futures[name].result() if name in futures else _line(name, check)


def _line(name: str, check: Callable[[], Line]) -> Line:
    try:
        return check()
    except Exception as error:  # a broken package must not hide the lines after it
        message = printable(f"{type(error).__name__}: {error}".splitlines()[0][:300])
        return Line(name, "wrong", message, f"mend or install {name} again")


def _megamoe() -> Line:
    return Line("megamoe", "ok", f"{megamoe.__version__} in {Path(megamoe.__file__).parent}")


def _python() -> Line:
    version = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info[:2] < OLDEST:
        return Line("python", "wrong", version, "use Python 3.11 or newer: make setup PYTHON=...")
    return Line("python", "ok", version)


def _package(name: str, mend: str) -> Line:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Line(name, "missing", "not installed", mend)
    __import__(name)  # a version alone does not say that it loads
    return Line(name, "ok", version)


def _goldens(golden: str | None) -> Line:
    from megamoe.cases import golden_root, load_cases
    from megamoe.golden.documents import manifest_of

    root = Path(golden) if golden else golden_root()
    mend = "restore golden/, or name it with --golden DIR or MEGAMOE_GOLDEN"
    try:
        count = len(manifest_of(root)["cases"])
        cases = quantity(len(load_cases(root)), "case")
        return Line("goldens", "ok", f"{cases}, {quantity(count, 'golden')} in {root}")
    except (ValueError, OSError) as error:
        return Line("goldens", "wrong", " ".join(str(error).split()), mend)


def _eager() -> Line:
    from megamoe.backends import load_backend

    backend = load_backend("eager")
    return Line("eager", "ok", f"loads; accumulator class {backend.accumulator}")


def _gpu() -> Line:
    names = _output(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])
    import torch

    cuda = torch.version.cuda
    if not names:
        return Line("gpu", "missing", "no NVIDIA GPU, or no driver; `--device cpu` needs none")
    gpus = f"{'; '.join(names.splitlines())} (name, driver)"
    if not torch.cuda.is_available():
        why = "is a CPU build" if cuda is None else f"of CUDA {cuda} finds none"
        return Line(
            "gpu", "wrong", f"{gpus}; torch {why}", "make setup TORCH=cuda, or a new driver"
        )
    major, minor = torch.cuda.get_device_capability()
    return Line("gpu", "ok", f"{gpus}; capability {major}.{minor}, torch of CUDA {cuda}")


def _deep_gemm() -> Line:
    from megamoe.spec import builds

    folders = builds.installed_packages()
    if not folders:
        mend = "only `--backend deep_gemm` needs it: docs/deep_gemm.md"
        return Line("deep_gemm", "missing", "none installed", mend)
    lines, unknown = [], False
    for name, folder in folders.items():
        try:
            detection = builds.detect(folder)
            unknown |= not detection.same_bits
            lines.append(f"{name}: {detection.description}")
        except ValueError as error:
            unknown = True
            lines.append(f"{name}: {error}")
    mend = "`megamoe contract detect` says which headers differ" if unknown else ""
    return Line("deep_gemm", "wrong" if unknown else "ok", "; ".join(lines), mend)


def _chromium() -> Line:
    setting = os.environ.get("MEGAMOE_CHROMIUM")
    path = setting or next(filter(None, map(shutil.which, BROWSERS)), None)
    mend = "only tests of the report need it: install chromium, or set MEGAMOE_CHROMIUM"
    return _program("chromium", path, mend)


def _nix() -> Line:
    mend = "only the pinned toolchain needs it: docs/toolchain.md"
    line = _program("nix", shutil.which("nix"), mend)
    version = re.search(r"(\d+)\.(\d+)", line.said)
    if line.state == "ok" and version and tuple(map(int, version.groups())) < OLDEST_NIX:
        oldest = ".".join(map(str, OLDEST_NIX))
        return replace(line, state="wrong", mend=f"the flake needs Nix {oldest} or newer; {mend}")
    return line


def _program(name: str, path: str | None, mend: str) -> Line:
    if path is None:
        return Line(name, "missing", "not on the path", mend)
    version = _output([path, "--version"])
    if not version:
        return Line(name, "wrong", f"{path} does not tell its version", mend)
    return Line(name, "ok", f"{version.splitlines()[0]} ({path})")


def _index() -> Line:
    """Only the answer is shown, since the addresses of pip's indexes may be private."""
    output = _output([sys.executable, "-m", "pip", "index", "versions", "torch",
                   "--disable-pip-version-check", "--no-input"])  # fmt: skip
    if "+cpu" in output:
        return Line("torch-index", "ok", "an index of pip has CPU builds of torch")
    mend = (
        "`make setup` then takes the default build of torch (about 4 GB); to avoid that: "
        "pip config set global.extra-index-url INDEX, where INDEX is that of torch's CPU builds"
    )
    why = (
        "pip's indexes list no CPU build of torch" if output else "pip reaches no index with torch"
    )
    return Line("torch-index", "missing", why, mend)


def _output(command: Sequence[str]) -> str:
    """What a program prints, without control characters; empty where it fails."""
    try:
        process = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return printable(process.stdout.strip(), lines=True)
