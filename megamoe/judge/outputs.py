"""The output of a backend, checked and turned into bits.

Every message names the value, the expected value and the remedy. The caller that reports the error
names the case.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
import torch

from megamoe.spec.forms import bits
from megamoe.spec.problem import Problem
from megamoe.spec.stages import STAGES
from megamoe.spec.tensors import TENSORS

Array = npt.NDArray[Any]


class BadOutput(ValueError):
    """The backend returned something that cannot be judged."""


def forward_bits(output: Any, problem: Problem) -> dict[str, Array]:
    """``forward``'s result as ``{stage: bits}``, ``y`` included. Raises :class:`BadOutput`."""
    if isinstance(output, torch.Tensor):
        output = {"y": output}
    if not isinstance(output, Mapping):
        raise BadOutput(
            f"forward returned {type(output).__name__}; return y as a torch.Tensor, or a mapping "
            "with 'y'"
        )
    if "y" not in output:
        raise BadOutput(f"forward returned {sorted(map(str, output))} without 'y'; add it")
    unknown = sorted(str(name) for name in output if name not in STAGES)
    if unknown:
        raise BadOutput(
            f"forward returned an unknown tensor {unknown[0]!r}; known: {', '.join(STAGES)}"
        )
    if problem.only_y and len(output) > 1:
        stage = min(str(name) for name in output if name != "y")
        raise BadOutput(
            f"forward returned {stage} of an {problem.weight_format.upper()} problem, whose stages "
            "have other formats than "
            "the table's; return y alone"
        )
    sizes = problem.letters
    out = {
        name: tensor_bits(name, value, TENSORS[name].sizes(sizes), TENSORS[name].dtypes)
        for name, value in output.items()
    }
    for stage, hidden in (("l2_acts", "l2_acts_sf"), ("l2_acts_sf", "l2_acts")):
        if stage in out and hidden not in out:
            raise BadOutput(
                f"forward returned {stage} without {hidden}; return both or neither, for one says "
                "nothing without the other"
            )
    return out


def tensor_bits(
    name: str, value: Any, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> Array:
    """``value``'s bits, if it is a tensor of ``shape`` and one of ``dtypes``."""
    expected = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
    if type(value).__name__ == "meta tensor":
        raise BadOutput(f"{name} lies on torch's meta device and has no numbers; name the inputs' "
                        "device where the backend creates a tensor")  # fmt: skip
    if not isinstance(value, torch.Tensor):
        raise BadOutput(f"{name} is {type(value).__name__}; expected a {expected} tensor {shape}")
    if packed := _packed(name, value, shape, dtypes):
        raise BadOutput(packed)
    if value.dtype not in dtypes:
        dtype = str(value.dtype).removeprefix("torch.")
        raise BadOutput(f"{name} has dtype {dtype}, expected {expected}; convert it in the backend")
    if tuple(value.shape) != shape:
        raise BadOutput(
            f"{name} has shape {tuple(value.shape)}, expected {shape}"
            f"{_remedy(name, tuple(value.shape), shape)}"
        )
    return bits(value)


def _remedy(name: str, actual: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """What to do about another shape, where the two say it; else nothing."""
    if len(expected) == 2 and actual == expected[::-1]:
        return f", and this is the transposed shape; return {name}.T"
    if actual[1:] == expected[1:] and actual[:1] > expected[:1]:
        return "; drop padding rows in the backend"
    return ""


def _packed(
    name: str, value: torch.Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> str:
    """What to do where scale bytes are not packed yet, four to a word."""
    if dtypes != (torch.int32,) or value.shape != (*shape[:-1], 4 * shape[-1]):
        return ""
    dtype = str(value.dtype).removeprefix("torch.")
    return (
        f"{name} is {dtype} {tuple(value.shape)}, expected int32 {shape}: four scale bytes are one "
        f"word, the first in the low byte; return the bytes as uint8 with .view(torch.int32)"
    )
