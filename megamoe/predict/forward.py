"""The whole forward by a model: staging, both linears chained bit by bit, SwiGLU, the combine."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from megamoe.oracle import swiglu
from megamoe.oracle.combine import Combine
from megamoe.oracle.gates import form_of, up_table
from megamoe.oracle.groups import group_amax, scaled_codes
from megamoe.oracle.staging import quantize
from megamoe.predict import tables
from megamoe.predict.model import Model
from megamoe.predict.nvfp4 import forward_nvfp4
from megamoe.spec.contract import Contract
from megamoe.spec.formats import F32, GROUP, U8, U16, bf16_round, pack_sf
from megamoe.spec.forms import bits
from megamoe.spec.problem import Problem

Ids = npt.NDArray[np.int64]
Weights = tuple[U8, U8, U8, U8]
"""The weights of one expert: w13, its scales, w2, its scales."""
ROWS = 64
"""Slots of one expert at once, so that memory stays small."""


@dataclass
class Linears:
    """Results of linears that were computed already: contracts share most of them."""

    model: Model
    _results: dict[bytes, U16] = field(default_factory=dict)

    def rounded(self, name: object, codes: U8, sf: U8, weights: U8, weight_sf: U8) -> U16:
        """``(R, N)`` bfloat16 bits; ``name`` tells the weights of one problem apart."""
        head = f"{name}{codes.shape}".encode()
        key = hashlib.sha256(head + codes.tobytes() + sf.tobytes()).digest()
        if key not in self._results:
            self._results[key] = bf16_round(self.model.linear(codes, sf, weights, weight_sf))
        return self._results[key]


@dataclass(frozen=True)
class Prediction:
    """The prediction for ``T`` tokens and ``K`` slots with the sizes ``H`` and ``I``."""

    stages: dict[str, npt.NDArray[Any]]
    """``y`` (T, H) uint16 bits; but for NVFP4 also ``x`` (T, H) uint8, ``x_sf`` (T, H/128) int32,
    ``l2_acts`` (T, K, I) and ``l2_acts_sf`` (T, K, I/32) uint8, zeros in slots with id -1."""
    assumptions: tuple[str, ...] = ()
    """The assumptions that replace a table which nobody has recorded."""


def predict(
    problem: Problem, model: Model, contract: Contract, linears: Linears | None = None
) -> Prediction:
    """The forward of ``problem`` (CPU tensors) by ``model`` under ``contract``.

    ``linears`` of the same problem and model, where several contracts are predicted.
    ``ValueError`` where the model has no word: an operand that its unit cannot hold, or NVFP4 on a
    unit without it.
    """
    if problem.is_nvfp4:
        y, assumptions = forward_nvfp4(problem, model, contract)
        return Prediction({"y": y}, assumptions)
    layer = _Layer(problem, model, contract, linears or Linears(model))
    ids, routing = problem.topk_ids.numpy(), problem.topk_weights.numpy()
    x, x_sf = quantize(bits(problem.hidden_states), contract)
    acts = problem.intermediate_size
    codes = np.zeros((*ids.shape, acts), np.uint8)
    sf = np.zeros((*ids.shape, acts // GROUP), np.uint8)
    rows = np.zeros((*ids.shape, problem.hidden_size), np.uint16)
    for expert in np.unique(ids[ids >= 0]):
        weights = _of_expert(problem, int(expert))
        tokens, slots = np.nonzero(ids == expert)
        for start in range(0, len(tokens), ROWS):
            at = tokens[start : start + ROWS], slots[start : start + ROWS]
            weight = routing[at][:, None].astype(np.float32)
            codes[at], sf[at], rows[at] = layer.mlp(
                int(expert), x[at[0]], x_sf[at[0]], weight, weights
            )
    shared = None
    if problem.shared_weights:
        w13, w13_sf, w2, w2_sf = (tensor.numpy() for tensor in problem.shared_weights)
        one = np.ones((len(x), 1), np.float32)
        shared = layer.mlp("shared", x, x_sf, one, (w13, w13_sf, w2, w2_sf))[2]
    output = problem.shared_output
    combine = Combine(
        ids >= 0, routing, contract, problem.combine_dtype,
        None if output is None else bits(output),
    )  # fmt: skip
    stages: dict[str, npt.NDArray[Any]] = {
        "x": x, "x_sf": pack_sf(x_sf), "l2_acts": codes, "l2_acts_sf": sf,
        "y": combine.point(rows, shared),
    }  # fmt: skip
    return Prediction(stages, layer.assumptions)


def _of_expert(problem: Problem, expert: int) -> Weights:
    return (
        problem.w13_weight[expert].numpy(), problem.w13_weight_scale[expert].numpy(),
        problem.w2_weight[expert].numpy(), problem.w2_weight_scale[expert].numpy(),
    )  # fmt: skip


class _Layer:
    """What holds for every row of a call."""

    def __init__(
        self, problem: Problem, model: Model, contract: Contract, linears: Linears
    ) -> None:
        self.act, self.contract, self.linears = problem.act, contract, linears
        form = form_of(self.act, contract)
        self.gate, assumption = tables.of_gate(model.silu, model.fast, model.precise, form)
        self.up: F32 = up_table(form)
        self.assumptions = (assumption,) if assumption else ()

    def mlp(
        self, name: object, x: U8, x_sf: U8, weight: F32, weights: Weights
    ) -> tuple[U8, U8, U16]:
        """Codes, scale bytes and bfloat16 row of staged rows ``(R, H)`` of one expert."""
        w13, w13_sf, w2, w2_sf = weights
        both = self.linears.rounded((name, 1), x, x_sf, w13, w13_sf)
        half = both.shape[1] // 2
        gate, up = both[:, :half], both[:, half:]
        if self.contract.gate_up_order.value != "gate-up":
            gate, up = up, gate
        gate, up = swiglu.clamp_gate_up(gate, up, self.act, self.contract)
        value = swiglu.product(self.gate[gate], self.up[up], weight, self.contract)
        sf = swiglu.requant_exponent(group_amax(value, self.contract), self.contract)
        codes = scaled_codes(value, sf, self.contract)
        return codes, sf, self.linears.rounded((name, 2), codes, sf, w2, w2_sf)


__all__ = ["Linears", "Prediction", "predict"]
