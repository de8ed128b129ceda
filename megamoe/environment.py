"""What machine this is, and which versions: the one answer, for reports, goldens and timings."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import megamoe

ROOT: Final = Path(__file__).resolve().parents[1]
KERNELS: Final = (
    "safetensors", "triton", "deep_gemm", "sgl-deep-gemm", "vllm", "sglang", "humming-kernels",
    "apache-tvm-ffi",
)  # fmt: skip
"""Distributions that may take part in a result; they are named where they are installed."""
_GPU: Final = ("/dev/nvidiactl", "/proc/driver/nvidia/gpus", "/dev/nvmap", "/dev/dxg", "/dev/kfd")
"""What the driver of a GPU shows: NVIDIA's, that of its boards, that of WSL, and AMD's."""


def versions() -> dict[str, str]:
    """Versions of what takes part in a result."""
    out = {
        "megamoe": megamoe.__version__,
        "python": platform.python_version(),
    }
    # Of the packages' metadata: a run of `check` imports torch in judges and workers only.
    for name in ("torch", "numpy", *KERNELS):
        with suppress(metadata.PackageNotFoundError):
            out[name] = metadata.version(name)
    return out


def machine(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What ran the backend: processor, cores, system and, with CUDA, the GPU."""
    out: dict[str, Any] = {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.system(),
    }
    return out | {name: facts[name] for name in ("gpu", "capability", "cuda") if name in facts}


def has_gpu() -> bool:
    """Whether a driver of a GPU shows itself here. torch is not asked: that would start CUDA."""
    return any(Path(path).exists() for path in _GPU)


def slug(text: str) -> str:
    """``text`` as a file name: lower case, runs of anything else than letters and digits as -."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unnamed"


def machine_class(facts: Mapping[str, Any]) -> str:
    """The class of machines that share bits: GPU model and compute capability, or the processor.

    ``facts`` are those of a worker: ``processor``, and with CUDA ``gpu`` and ``capability``.
    """
    if "gpu" in facts:
        major, minor = facts["capability"]
        return f"{slug(str(facts['gpu']))}-sm{major}{minor}"
    return f"cpu-{slug(str(facts['processor']))}"


def provenance(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What ran the backend, for people: it decides nothing. ``facts`` are those of a worker."""
    out: dict[str, Any] = {
        "megamoe": megamoe.__version__,
        **{name: facts.get(name) for name in ("python", "numpy", "torch", "triton")},
        "system": f"{platform.system()} {facts['processor']}",
    }
    if "gpu" in facts:
        out |= {name: facts[name] for name in ("gpu", "capability", "cuda")}
        out["driver"] = _driver()
    return out


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return (process.stdout.splitlines() or [""])[0].strip() or None


def revision(root: Path = ROOT) -> str:
    """The commit, with ``-modified`` where the tree is not that of the commit.

    MEGAMOE_REVISION says it where git cannot, as in a build from an unpacked source; else
    ``unknown``, and the digests alone decide.
    """
    setting = os.environ.get("MEGAMOE_REVISION", "").strip()
    if setting:
        return setting
    try:
        top, head = _git(root, "rev-parse", "--show-toplevel", "HEAD").split("\n")[:2]
        if Path(top).resolve() != root.resolve():
            return "unknown"  # an unpacked source inside somebody else's repository
        return head + ("-modified" if _git(root, "status", "--porcelain").strip() else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=root, capture_output=True, text=True, timeout=60, check=True
    ).stdout
