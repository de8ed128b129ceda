"""A case as tensors: its regenerated inputs and every oracle stage, for other people's tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from megamoe import oracle
from megamoe.cases import Case
from megamoe.golden import GoldenError, digest_of, make, regenerate, rows_of
from megamoe.spec.forms import bits
from megamoe.spec.problem import Problem
from megamoe.spec.tensors import WEIGHTS


def write_case(case: Case, path: Path) -> list[str]:
    """Write ``input.*`` and ``oracle.*`` tensors; returns their names.

    Inputs keep their dtypes; oracle stages are bits (bfloat16 as uint16, codes as uint8), but for
    ``oracle.gate_up``: the exact sums of linear 1, float64. Of the
    weights, ``input.experts`` lists the experts that an id names, and only they are written. The
    file's metadata holds the case. Raises :class:`GoldenError` for an errors case.
    """
    if case.kind == "errors":
        raise GoldenError(f"case {case.id} is a wrong call: it has no tensors to write")
    given = regenerate(case)
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, Any] = {"id": case.id, "inputs": digest_of(given)}
    for name, value in given.items():
        if isinstance(value, torch.Tensor):
            tensors[f"input.{name}"] = value
        else:
            plain[name] = value
    if case.kind in ("forward", "property"):
        problem = rows_of(Problem(**given), case.rows)
        experts = problem.topk_ids[problem.topk_ids >= 0].unique()
        tensors["input.experts"] = experts
        for name in WEIGHTS:
            tensors[f"input.{name}"] = given[name][experts]
        stage = oracle.staging(
            bits(problem.hidden_states), problem.topk_weights.numpy(), problem.topk_ids.numpy()
        )
        between: dict[str, Any] = {}
        oracle.forward(problem, (), trace=between)
        tensors |= {f"oracle.{n}": _tensor(value) for n, value in (stage | between).items()}
    tensors |= {f"oracle.{name}": _tensor(t) for name, t in make(case, given).tensors.items()}
    if case.kind == "staging":  # the store keeps float32 as its bits
        name = "oracle.topk_weights"
        tensors[name] = tensors[name].view(torch.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    metadata = {"case": json.dumps(plain), "params": json.dumps(dict(case.params))}
    save_file(contiguous, path, metadata)
    return sorted(contiguous)


def _tensor(value: Any) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(value))
