"""The ``model`` backend: the forward bit by bit as DeepGEMM's SM100 kernel is modelled.

It computes on the CPU what :mod:`megamoe.predict` predicts. Judged by the derived goldens it says
whether the model is a member of its class; it says nothing of a machine.
"""

from __future__ import annotations

import numpy as np
import torch

from megamoe.predict import SM100, predict
from megamoe.spec.contract import NEWEST, Contract
from megamoe.spec.contract import contract as find_contract
from megamoe.spec.features import DIALECT_FORMATS, FEATURES
from megamoe.spec.problem import Problem


def create(device: str | torch.device = "cpu", contract: str = NEWEST.revision) -> ModelBackend:
    """The backend; it computes on the CPU and copies the results to ``device``."""
    return ModelBackend(torch.device(device), find_contract(contract))


class ModelBackend:
    """Every stage of a forward by the model ``sm100``."""

    name = "model"
    accumulator = SM100.accumulator
    features = tuple(name for name in FEATURES if name not in DIALECT_FORMATS)

    def __init__(self, device: torch.device, contract: Contract = NEWEST) -> None:
        self.device, self.contract = device, contract
        self.contracts = (contract.revision,)

    def forward(self, problem: Problem) -> dict[str, torch.Tensor]:
        prediction = predict(problem.to("cpu"), SM100, self.contract)
        out = {}
        for name, array in prediction.stages.items():
            if name == "y":
                tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
            else:
                tensor = torch.from_numpy(array)
            out[name] = tensor.to(self.device)
        return out
