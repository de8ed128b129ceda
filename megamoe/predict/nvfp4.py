"""The layer with NVFP4 weights by the model of ``tcgen05`` ``kind::mxf4nvf4`` (MMA-Sim 2.1.1).

A step takes 64 products as four exact sums of 16. Each has the exponent of its two scale bytes, and
the running sum its own; all are aligned to the largest of these, cut toward zero 35 bits below it,
added exactly, and cut toward zero to fp32. A group whose products are all zero takes part at -133.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from megamoe.oracle import nvfp4, swiglu
from megamoe.oracle.combine import Combine
from megamoe.oracle.gates import form_of, up_table
from megamoe.oracle.mlp import bf16_halves
from megamoe.oracle.nvfp4_codes import Requantise, grouped, staged
from megamoe.oracle.units import F64, I32, SMALLEST, narrowed
from megamoe.predict import tables
from megamoe.predict.model import Model
from megamoe.spec.contract import Contract
from megamoe.spec.formats import U8, U16, bf16_round, e2m1_decode, e4m3_decode
from megamoe.spec.forms import bits
from megamoe.spec.problem import Problem

ALIGN_BITS: Final = 35
FLOOR: Final = -133
STEP: Final = 4
"""Groups of a step."""
_ONE: Final = np.ones((1, 1), np.float32)


def step(sums: F64, fields: I32, running: F64) -> F64:
    """``(..., 4)`` exact scaled group sums and their fields, added to ``running`` ``(...)``."""
    own = np.where(running == 0, FLOOR, np.maximum(_exponent(running), SMALLEST))
    last = np.maximum(fields.max(axis=-1), own) - ALIGN_BITS
    group_sum = np.trunc(np.ldexp(sums, -last[..., None])).sum(axis=-1)
    total = np.ldexp(group_sum + np.trunc(np.ldexp(running, -last)), last)
    return narrowed(total, 23)


def chain(values: F64, sf: U8, weights: F64, weight_sf: U8) -> F64:
    """``(R, C)`` E2M1 numbers and ``(R, C/16)`` E4M3 bytes by ``(N, C)``: ``(R, N)`` from zero."""
    rows, columns = (grouped(v).transpose(1, 0, 2) for v in (values, weights))
    sums = np.matmul(rows, columns.transpose(0, 2, 1))
    terms = np.matmul((rows != 0) * 1.0, (columns != 0).transpose(0, 2, 1) * 1.0)
    (scale, field), (weight_scale, weight_field) = (_scales(s) for s in (sf, weight_sf))
    sums = sums * (scale.T[:, :, None] * weight_scale.T[:, None, :])
    fields = (field.T[:, :, None] + weight_field.T[:, None, :]).astype(np.int32)
    fields = np.where(terms == 0, FLOOR, fields)
    running = np.zeros(sums.shape[1:])
    for start in range(0, len(sums), STEP):
        part = slice(start, start + STEP)
        operands = np.moveaxis(sums[part], 0, -1), np.moveaxis(fields[part], 0, -1)
        running = step(*operands, running)
    return running


def forward_nvfp4(
    problem: Problem, model: Model, contract: Contract
) -> tuple[U16, tuple[str, ...]]:
    """``(T, H)`` bits of y, and what was assumed; ``ValueError`` for a unit without NVFP4."""
    if not model.unit.name.startswith("blackwell"):
        raise ValueError(f"model {model.name} has no NVFP4: only Blackwell's unit takes it")
    own = contract.variant(
        contract.revision, "vLLM 0.33, sm100_nvfp4_mega_moe.cuh: the combine's fma",
        routing_weight="combine", bf16_before_requant=False,
    )  # fmt: skip
    act, rule = problem.act, Requantise(np.float32(problem.l2_activation_scale))
    form = form_of(act, own)
    gate_values, assumption = tables.of_gate(model.silu, model.fast, model.precise, form)
    ids = problem.topk_ids.numpy()
    x, x_sf, x_scale = staged(bits(problem.hidden_states))
    rows = np.zeros((*ids.shape, problem.hidden_size), np.uint16)
    for at in np.unique(ids[ids >= 0]):
        expert = nvfp4.Expert.of(problem, int(at))
        token, slot = np.nonzero(ids == at)
        w13, w2 = (_codes(getattr(problem, n)[at].numpy()) for n in ("w13_weight", "w2_weight"))
        sums = chain(x[token], x_sf[token], w13, problem.w13_weight_scale[at].numpy())
        halves = bf16_halves(nvfp4.scaled(sums, expert.factor(x_scale[token])), own)
        gate, up = swiglu.clamp_gate_up(*halves, act, own)
        acts = swiglu.product(gate_values[gate], up_table(form)[up], _ONE, own)
        sf = rule.bytes_of(np.abs(acts))
        codes = _unscaled(rule.values_of(acts, sf), sf)
        row = chain(codes, sf, w2, problem.w2_weight_scale[at].numpy())
        rows[token, slot] = bf16_round(nvfp4.scaled(row, expert.l2_alpha))
    y = Combine(ids >= 0, problem.topk_weights.numpy(), own).point(rows)
    return y, (assumption,) if assumption else ()


def _codes(packed: U8) -> F64:
    return np.asarray(e2m1_decode(packed), np.float64)


def _unscaled(values: F64, sf: U8) -> F64:
    """Codes again of codes times their scale: the quotient is exact."""
    return np.asarray((grouped(values) / e4m3_decode(sf)[..., None]).reshape(values.shape))


def _scales(sf: U8) -> tuple[F64, I32]:
    """Values of E4M3 bytes, and their exponent fields: a subnormal has -6."""
    scale = np.asarray(e4m3_decode(sf), np.float64)
    return scale, np.maximum(_exponent(scale), -6)


def _exponent(value: F64) -> I32:
    return (np.frexp(value)[1] - 1).astype(np.int32)


__all__ = ["chain", "forward_nvfp4", "step"]
