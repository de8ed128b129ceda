"""The state that a call must not change. Part of ``serve.py``: needs Python 3.10 and torch only."""

from __future__ import annotations

import locale
import os
import resource
import signal
import sys
from collections.abc import Sequence
from typing import Any

import torch

LIMITS = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]


class State:
    """Watches the settings that decide bits, or the places where a later call reads and writes."""

    def __init__(self, files: Sequence[int]) -> None:
        """``files``: descriptors that must not change."""
        self.files = files
        self.functions = {(torch, n): getattr(torch, n) for n in ("empty", "zeros", "full")} | {
            (torch.Tensor, n): getattr(torch.Tensor, n)
            for n in ("detach", "contiguous", "cpu", "view", "copy_")
        }  # fmt: skip

    def now(self) -> dict[str, Any]:
        """The state by name; raises ``OSError`` if a folder or a descriptor is gone."""
        one, bit = 1.0, 2.0**-53
        return {
            "working directory": os.getcwd(),  # noqa: PTH109
            "default dtype of torch": str(torch.get_default_dtype()),
            "default device of torch": str(torch.get_default_device()),
            "thread count of torch": torch.get_num_threads(),
            "grad mode of torch": torch.is_grad_enabled(),
            "deterministic mode of torch": torch.are_deterministic_algorithms_enabled(),
            "autocast of torch": [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")],
            "precision of float32 products": torch.get_float32_matmul_precision(),
            "function of torch": [
                n for (owner, n), f in self.functions.items() if getattr(owner, n) is not f
            ],
            "locale": locale.setlocale(locale.LC_ALL),
            "rounding mode": str([one + bit, -one - bit, (one + 2 * bit) + bit]),
            "flushing of subnormals": 5e-324 * one == 0,
            "timer": [signal.getitimer(which)[0] > 0 for which in range(3)],
            "resource limits": [resource.getrlimit(which) for which in LIMITS],
            "standard files": [[(s := os.fstat(n)).st_dev, s.st_ino] for n in self.files],
            "sys.stdout and sys.stderr": [
                getattr(f, "closed", 0) for f in (sys.stdout, sys.stderr)
            ],
            **{f"variable {k}": hash(v) for k, v in os.environ.items()},
        }
