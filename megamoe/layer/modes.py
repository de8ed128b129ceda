"""torch's modes around a call: none of them may decide a bit."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A block in which no product on ``device`` takes another type than its operands'.

    If autocast is off, which is the usual case, nothing changes and nothing costs time.
    """
    kind = device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def lasting() -> AbstractContextManager[Any]:
    """A block whose tensors can be written later.

    A tensor from inference mode cannot be written outside of it, and a buffer, or a parameter,
    outlives the call that creates it.
    """
    return torch.inference_mode(False)
