"""What made a result: ``python -m megamoe.suite.provenance DIRECTORY``, which ``ci/shard.sh`` runs.

provenance.json beside result.json says which code, goldens, toolchain and machine, as digests where
a name could lie. ``python -m ci.merge`` refuses shards that differ in :data:`SAME`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from megamoe.cases import golden_root
from megamoe.environment import ROOT, provenance, revision

NAME: Final = "provenance.json"
FILES: Final = ("result.json", "junit.xml")
"""Sealed: their digests stand in provenance.json."""

SAME: Final = ("backend", "device", "tier", "kind", "case", "revision", "digests", "versions")
"""What shards of one judgement share. GPU names and drivers are not among them: hosts differ."""

CODE: Final = ("megamoe/**/*.py", "megamoe/**/*.json")
GOLDENS: Final = ("cases/*.toml", "*.json", "recorded/**/*.json")
"""Of golden/. The manifest has the tensors' digests, the durations decide who judges what."""
TOOLCHAIN: Final = ("toolchain.toml", "flake.nix", "flake.lock", "nix/**/*", "requirements/*")

_JIT_PACKAGES: Final = {"deep_gemm": ("deep-gemm", "sgl-deep-gemm")}
"""A backend -> distributions whose sources it compiles on the way."""

Provenance = dict[str, Any]


def write(folder: Path, root: Path = ROOT) -> Provenance:
    """Read ``folder``/result.json, write ``folder``/provenance.json and return what it says."""
    report = json.loads((folder / "result.json").read_text())
    facts = provenance(report["worker"])
    hosts = {name: facts.pop(name) for name in ("system", "gpu", "driver") if name in facts}
    out: Provenance = {
        "format": 1,
        "shard": report["shard"],
        **{name: report[name] for name in ("backend", "device", "tier", "kind", "case")},
        "revision": revision(root),
        "digests": {
            "code": digest(root, CODE),
            "goldens": digest(golden_root(), GOLDENS),
            "toolchain": digest(root, TOOLCHAIN),
            **_of_backend(report["backend"]),
        },
        "versions": {**facts, **_compiler(report["device"])},
        "machine": {**hosts, "class": report["recorded"]["machine_class"]},
        "files": {name: sha256(folder / name) for name in FILES},
    }
    (folder / NAME).write_text(json.dumps(out, indent=1) + "\n")
    return out


def digest(root: Path, patterns: Iterable[str]) -> str:
    """Of names and bytes of every file under ``root`` that a pattern matches."""
    paths = {path for pattern in patterns for path in root.glob(pattern) if path.is_file()}
    return _sha256(
        b"".join(
            f"{path.relative_to(root).as_posix()}\0{sha256(path)}\n".encode()
            for path in sorted(paths)
            if "__pycache__" not in path.parts
        )
    )


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    return _sha256(path.read_bytes())


def _of_backend(name: str) -> dict[str, str]:
    """Of a backend from outside: its file, or the package that it compiles."""
    file = Path(name.rpartition(":")[0])
    if file.is_file():
        return {"backend": sha256(file)}
    if name not in _JIT_PACKAGES or (spec := find_spec(name)) is None or not spec.origin:
        return {}
    return {"backend": digest(Path(spec.origin).parent, ("**/*",)), **_distribution(name)}


def _distribution(name: str) -> dict[str, str]:
    for distribution in _JIT_PACKAGES[name]:
        try:
            return {"package": f"{distribution} {metadata.version(distribution)}"}
        except metadata.PackageNotFoundError:
            continue
    return {}


def _compiler(device: str) -> dict[str, str]:
    """The CUDA compiler that backends of just-in-time kernels find."""
    if device == "cpu":
        return {}
    home = os.environ.get("CUDA_HOME")
    try:
        output = subprocess.run(
            [f"{home}/bin/nvcc" if home else "nvcc", "--version"],
            capture_output=True, text=True, timeout=60, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return {}
    match = re.search(r"V(\d[\d.]*)", output)
    return {"nvcc": match[1]} if match else {}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    write(Path(sys.argv[1]))
