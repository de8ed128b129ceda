"""What an adapter asks before it loads its package: whether the kernel can run in this process."""

from __future__ import annotations

import torch

from megamoe.kernels.registry import Kernel


def require(kernel: Kernel) -> None:
    """``NotImplementedError``, in one line, that names all that ``kernel`` needs and lacks here.

    The GPU is the one that torch uses: nvidia-smi may show one that torch cannot use.
    """
    lacking = kernel.lacks(_major)
    if lacking:
        raise NotImplementedError("; ".join(lacking))


def _major() -> int | None:
    """The major compute capability of torch's current GPU; None without one."""
    return torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else None
