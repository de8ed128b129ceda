"""The oracle as a backend: slow, exact, and a check of the suite itself.

It is the only backend that imports the oracle. Judging it proves nothing about a kernel; a red
here means that the store, the judge or the oracle changed.
"""

from __future__ import annotations

import numpy as np
import torch

from megamoe import oracle
from megamoe.spec.contract import NEWEST, Contract
from megamoe.spec.contract import contract as find_contract
from megamoe.spec.features import FEATURES
from megamoe.spec.formats import U16
from megamoe.spec.problem import Problem


def create(device: str | torch.device = "cpu", contract: str = NEWEST.revision) -> OracleBackend:
    """The backend for ``device``; it computes on the CPU and copies the results there."""
    return OracleBackend(torch.device(device), find_contract(contract))


def _bits(tensor: torch.Tensor) -> U16:
    return tensor.cpu().contiguous().view(torch.int16).numpy().view(np.uint16)


def _bf16(bits: U16) -> torch.Tensor:
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


class OracleBackend:
    """Every stage as :mod:`megamoe.oracle` derives it."""

    name = "oracle"
    accumulator = "exact"
    features = FEATURES

    def __init__(self, device: torch.device, contract: Contract = NEWEST) -> None:
        self.device, self.contract = device, contract
        self.contracts = (contract.revision,)

    def forward(self, problem: Problem) -> dict[str, torch.Tensor]:
        local = problem.to("cpu")
        golden = oracle.forward(local, ["exact"], contract=self.contract)
        if golden.only_y:
            return {"y": _bf16(golden.y).to(self.device)}
        tensors = oracle.staging(
            _bits(local.hidden_states), local.topk_weights.numpy(), local.topk_ids.numpy(),
            self.contract,
        )  # fmt: skip
        out = {
            "y": _bf16(golden.y),
            "x": torch.from_numpy(tensors["x"]),
            "x_sf": torch.from_numpy(tensors["x_sf"]),
            "l2_acts": torch.from_numpy(golden.codes),
            "l2_acts_sf": torch.from_numpy(golden.sf),
        }
        return {name: tensor.to(self.device) for name, tensor in out.items()}

    def prepare(
        self,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        x_fp8: torch.Tensor,
        x_sf: torch.Tensor,
        topk_idx_out: torch.Tensor,
        topk_weights_out: torch.Tensor,
    ) -> None:
        tensors = oracle.staging(
            _bits(hidden_states), topk_weights.cpu().numpy(), topk_ids.cpu().numpy(),
            self.contract,
        )  # fmt: skip
        tokens = hidden_states.shape[0]
        x_fp8.view(torch.uint8)[:tokens].copy_(torch.from_numpy(tensors["x"]))
        x_sf[:tokens].copy_(torch.from_numpy(tensors["x_sf"]))
        topk_idx_out[:tokens].copy_(torch.from_numpy(tensors["topk_idx"]))
        topk_weights_out[:tokens].copy_(torch.from_numpy(tensors["topk_weights"]))

    def eplb_map(
        self,
        topk_ids: torch.Tensor,
        expert_load_view: torch.Tensor,
        logical_to_physical_map: torch.Tensor,
        logical_replica_count: torch.Tensor,
        record_enabled: torch.Tensor,
        num_unpadded_tokens: int | None = None,
    ) -> torch.Tensor:
        ids, load = oracle.eplb(
            topk_ids.cpu().numpy(),
            expert_load_view.cpu().numpy(),
            logical_to_physical_map.cpu().numpy(),
            logical_replica_count.cpu().numpy(),
            bool(record_enabled),
            self.contract,
            num_unpadded_tokens,
        )
        expert_load_view.copy_(torch.from_numpy(load))
        return torch.from_numpy(ids).to(topk_ids.device)

    def transform_weights(
        self,
        w13: torch.Tensor,
        w13_scale: torch.Tensor,
        w2: torch.Tensor,
        w2_scale: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Kernel-side layout; the scale factors get MN-major strides, as the kernel reads them."""
        arrays = (t.cpu().numpy() for t in (w13, w13_scale, w2, w2_scale))
        layout = {k: torch.from_numpy(v).to(self.device) for k, v in oracle.layout(*arrays).items()}
        for name in ("w13_sf", "w2_sf"):
            layout[name] = layout[name].transpose(1, 2).contiguous().transpose(1, 2)
        return layout["w13"], layout["w13_sf"], layout["w2"], layout["w2_sf"]
