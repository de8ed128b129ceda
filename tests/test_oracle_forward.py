"""The oracle's forward: the point recomputed in rational arithmetic, and what the envelope says."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from megamoe import oracle
from megamoe.backends import simulate
from megamoe.oracle import gates, swiglu
from megamoe.oracle.linear import exact_dot, float_to_odd
from megamoe.spec.contract import BASE
from megamoe.spec.formats import (
    bf16_decode,
    bf16_key,
    bf16_round,
    e4m3_encode,
    e4m3_key,
)

WIDE = {
    "hidden_recipe": {"kind": "bell", "spread": 20},
    "weights_recipe": {"w13_scale": [60, 60], "w2_scale": [60, 60]},
}
"""Scales so far apart that float64 cannot hold the sums: the rational path is taken."""


def nearest_bf16(value: Fraction) -> int:
    return int(bf16_round(np.array([float_to_odd(value)]))[0])


def fl32(value: Fraction) -> np.float32:
    """One rounding to fp32, by comparing neighbours as fractions."""
    guess = np.float32(float(value))
    near = [
        np.nextafter(guess, np.float32(-np.inf)),
        guess,
        np.nextafter(guess, np.float32(np.inf)),
    ]
    return min(near, key=lambda v: (abs(Fraction(float(v)) - value), int(v.view(np.uint32)) & 1))


def slot_by_fractions(problem, golden, token, slot):
    """Codes of one group and four bf16 outputs of one slot, without a float sum."""
    expert = int(problem.topk_ids[token, slot])
    weight = Fraction(float(problem.topk_weights[token, slot]))
    hidden = problem.hidden_states.view(torch.int16).numpy().view(np.uint16)
    x, x_sf = simulate.stage(hidden[token : token + 1])
    w13, w13_sf = problem.w13_weight[expert].numpy(), problem.w13_weight_scale[expert].numpy()
    half = len(w13) // 2
    values = []
    for channel in range(32):
        bits = [
            nearest_bf16(exact_dot(x[0], x_sf[0], w13[n], w13_sf[n]))
            for n in (channel, half + channel)
        ]
        gate, up = bf16_decode(np.array(bits, np.uint16))
        if problem.activation_clamp is not None:
            bound = np.float32(problem.activation_clamp)
            gate, up = min(gate, bound), min(max(up, -bound), bound)
        silu = gates.silu_table("g/d")[bf16_round(np.array([gate]))[0]]
        product = fl32(Fraction(float(silu)) * Fraction(float(up)))
        values.append(fl32(Fraction(float(product)) * weight))
    amax = max(abs(v) for v in values)
    scaled = Fraction(float(fl32(Fraction(float(amax)) * Fraction(float(swiglu.RECIP_448)))))
    byte = next(e for e in range(256) if Fraction(2) ** (e - 127) >= scaled)
    codes = [e4m3_encode(Fraction(float(v)) * Fraction(2) ** (127 - byte)) for v in values]
    w2, w2_sf = problem.w2_weight[expert].numpy(), problem.w2_weight_scale[expert].numpy()
    rows = [
        nearest_bf16(exact_dot(golden.codes[token, slot], golden.sf[token, slot], w2[n], w2_sf[n]))
        for n in range(4)
    ]
    return byte, codes, rows


@pytest.mark.parametrize("options", [{}, {"fast_math": False, "clamp": "none"}, WIDE])
def test_codes_and_outputs_equal_a_rational_recomputation(options):
    problem = simulate.problem(3, tokens=1, hidden=128, **options)
    golden = oracle.forward(problem, [], contract=BASE)
    for token in range(1):
        total = np.zeros(4, np.float32)
        for slot in range(2):
            byte, codes, rows = slot_by_fractions(problem, golden, token, slot)
            assert golden.sf[token, slot, 0] == byte
            assert (
                e4m3_key(golden.codes[token, slot, :32]).tolist()
                == e4m3_key(np.array(codes, np.uint8)).tolist()
            )
            total = total + bf16_decode(np.array(rows, np.uint16))
        assert bf16_key(golden.y[token, :4]).tolist() == bf16_key(bf16_round(total)).tolist()


def test_the_reference_lies_in_every_envelope():
    problem = simulate.problem(4, hidden_recipe={"kind": "bell", "spread": 8})
    golden = oracle.forward(problem, contract=BASE)
    for name, envelope in golden.envelopes.items():
        y = bf16_key(golden.y)
        assert ((bf16_key(envelope.y_lo) <= y) & (y <= bf16_key(envelope.y_hi))).all(), name
        low, high = envelope.code_interval(golden.sf)
        key = e4m3_key(golden.codes)
        assert ((low <= key) & (key <= high)).all(), name
        assert ((envelope.sf_lo <= golden.sf) & (golden.sf <= envelope.sf_hi)).all(), name


def test_an_envelope_of_one_point_is_the_reference():
    """Even of a class that truncates and never reaches the exact sum."""
    problem = simulate.problem(
        5, hidden_recipe={"kind": "grid"}, weights_recipe={"kind": "carrier"}
    )
    golden = oracle.forward(problem, any_silu=True, contract=BASE)
    assert golden.zero_freedom
    for envelope in golden.envelopes.values():
        assert np.array_equal(bf16_key(envelope.y_lo), bf16_key(golden.y))


def test_every_simulated_kernel_returns_the_bits_of_a_zero_freedom_case():
    problem = simulate.problem(
        5, hidden_recipe={"kind": "grid"}, weights_recipe={"kind": "carrier"}
    )
    golden = oracle.forward(problem, [], contract=BASE)
    for kernel in simulate.kernels()[::5] + simulate.kernels()[-4:]:
        result = simulate.forward(problem, kernel, 1)
        assert np.array_equal(bf16_key(result.y), bf16_key(golden.y)), kernel.name
        assert np.array_equal(e4m3_key(result.codes), e4m3_key(golden.codes)), kernel.name
        assert np.array_equal(result.sf, golden.sf), kernel.name


def test_zero_freedom_is_refused_when_a_class_was_not_examined():
    problem = simulate.problem(
        5, hidden_recipe={"kind": "grid"}, weights_recipe={"kind": "carrier"}
    )
    golden = oracle.forward(problem, ["fp32"], contract=BASE)
    assert golden.why == ("not every accumulator class was examined",)


def test_staged_interval_of_the_reference_codes_is_no_wider_than_end_to_end():
    problem = simulate.problem(6, hidden_recipe={"kind": "bell", "spread": 10})
    golden = oracle.forward(problem, ["fp32-ordered"], contract=BASE)
    envelope = golden.envelopes["fp32-ordered"]
    low, high = oracle.combine_interval(
        problem, golden.codes, golden.sf, "fp32-ordered", contract=BASE
    )
    assert (bf16_key(envelope.y_lo) <= bf16_key(low)).all()
    assert (bf16_key(high) <= bf16_key(envelope.y_hi)).all()


def test_masked_slots_hold_zeros_and_a_token_without_slots_gives_zero():
    problem = simulate.problem(7)
    ids = problem.topk_ids.clone()
    ids[0], ids[1, 0] = -1, -1
    golden = oracle.forward(replace(problem, topk_ids=ids), [], contract=BASE)
    assert not golden.y[0].any()
    assert not golden.codes[0].any()
    assert not golden.codes[1, 0].any()
    assert golden.codes[1, 1].any()


def test_unknown_class_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown accumulator class 'fp31'"):
        oracle.forward(simulate.problem(8), ["fp31"], contract=BASE)


SCRIPT = """
import hashlib, torch
from megamoe import oracle
from megamoe.backends import simulate
from megamoe.spec.contract import BASE
torch.set_num_threads(1)
problem = simulate.problem(9, tokens=1, top_k=1, hidden_recipe={"kind": "bell", "spread": 9})
golden = oracle.forward(problem, contract=BASE)
digest = hashlib.sha256()
for name, tensor in sorted(golden.to_tensors().items()):
    digest.update(name.encode() + tensor.tobytes())
print(digest.hexdigest())
"""


def test_the_result_does_not_depend_on_the_number_of_threads():
    """Nor, by the same exactness, on the BLAS: each count splits its products differently."""
    outputs = set()
    for threads in ("1", "3"):
        env = {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        result = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=True
        )
        outputs.add(result.stdout)
    assert len(outputs) == 1
