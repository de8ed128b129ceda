"""A case as tensors: its regenerated inputs and every oracle stage, for other people's tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from megamoe.cases import Case, kind_of
from megamoe.golden import GoldenError, digest_of, make, regenerate
from megamoe.spec.contract import Contract


def write_case(case: Case, path: Path, contract: Contract) -> list[str]:
    """Write ``input.*`` and ``oracle.*`` tensors under ``contract``; returns their names.

    Inputs keep their dtypes; oracle stages are bits (bfloat16 as uint16, codes as uint8), but for
    ``oracle.gate_up``: the exact sums of linear 1, float64. The code of a negative activation that
    rounds to zero is 0x00 in ``oracle.l2_acts`` and not 0x80 (decision 3). Of the
    weights, ``input.experts`` lists the experts that an id names, and only they are written. The
    file's metadata holds the case. Raises :class:`GoldenError` for an errors case.
    """
    kind = kind_of(case.kind)
    if kind.dump is None:
        raise GoldenError(f"case {case.id} is a wrong call: it has no tensors to write")
    inputs = regenerate(case)
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, Any] = {
        "id": case.id,
        "inputs": digest_of(inputs),
        "contract": contract.revision,
    }
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            tensors[f"input.{name}"] = value
        else:
            plain[name] = value
    stages = kind.dump(case, inputs, make(case, inputs, contract=contract), contract)
    tensors |= {name: _tensor(value) for name, value in stages.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    metadata = {"case": json.dumps(plain), "params": json.dumps(dict(case.params))}
    save_file(contiguous, path, metadata)
    return sorted(contiguous)


def _tensor(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    return torch.from_numpy(np.ascontiguousarray(value))
