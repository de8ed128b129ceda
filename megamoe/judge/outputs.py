"""What a backend returned, checked and turned into bits.

Every message names what came, what was expected and what to do. The case is named by whoever
reports the error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megamoe.spec.formats import GROUP
from megamoe.spec.problem import STAGES, Problem

Array = npt.NDArray[Any]


class BadOutput(ValueError):
    """The backend returned something that cannot be judged."""


def bits(tensor: torch.Tensor) -> Array:
    """The tensor's bits on the host: floats as unsigned integers, integers as they are."""
    plain = tensor.detach().contiguous().cpu()
    if plain.dtype == torch.bfloat16:
        return plain.view(torch.int16).numpy().view(np.uint16)
    if plain.dtype == torch.float32:
        return plain.view(torch.int32).numpy().view(np.uint32)
    if plain.dtype in (torch.float8_e4m3fn, torch.float8_e8m0fnu):
        return plain.view(torch.uint8).numpy()
    return plain.numpy()


def forward_bits(output: Any, problem: Problem) -> dict[str, Array]:
    """``forward``'s result as ``{stage: bits}``, ``y`` included. Raises :class:`BadOutput`."""
    if isinstance(output, torch.Tensor):
        output = {"y": output}
    if not isinstance(output, Mapping):
        raise BadOutput(f"forward returned {type(output).__name__}; return y or a mapping with 'y'")
    if "y" not in output:
        raise BadOutput(f"forward returned {sorted(map(str, output))} without 'y'; add it")
    unknown = sorted(str(name) for name in output if name not in STAGES)
    if unknown:
        raise BadOutput(
            f"forward returned an unknown tensor {unknown[0]!r}; known: {', '.join(STAGES)}"
        )
    t, h, k, i = (
        problem.num_tokens, problem.hidden_size, problem.top_k, problem.intermediate_size,
    )  # fmt: skip
    codes = (torch.float8_e4m3fn, torch.uint8)
    forms = {
        "y": ((t, h), (torch.bfloat16,)),
        "x": ((t, h), codes),
        "x_sf": ((t, h // 128), (torch.int32,)),
        "l2_acts": ((t, k, i), codes),
        "l2_acts_sf": ((t, k, i // GROUP), (torch.uint8, torch.float8_e8m0fnu)),
    }
    out = {name: checked(name, value, *forms[name]) for name, value in output.items()}
    for shown, hidden in (("l2_acts", "l2_acts_sf"), ("l2_acts_sf", "l2_acts")):
        if shown in out and hidden not in out:
            raise BadOutput(
                f"forward returned {shown} without {hidden}; return both or neither, for one says "
                "nothing without the other"
            )
    return out


def checked(
    name: str, value: Any, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> Array:
    """``value``'s bits, if it is a tensor of ``shape`` and one of ``dtypes``."""
    wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
    if not isinstance(value, torch.Tensor):
        raise BadOutput(f"{name} is {type(value).__name__}; expected a {wanted} tensor {shape}")
    if value.dtype not in dtypes:
        got = str(value.dtype).removeprefix("torch.")
        raise BadOutput(f"{name} has dtype {got}, expected {wanted}; convert it in the backend")
    if tuple(value.shape) != shape:
        raise BadOutput(
            f"{name} has shape {tuple(value.shape)}, expected {shape}; drop padding rows and "
            "reshape in the backend"
        )
    return bits(value)
