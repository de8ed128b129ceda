"""A small share of ``tools/soundness.py``: simulated correct kernels never leave what is certified.

The full count, ten million results and more, is kept in docs/numerics.md.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megamoe import oracle
from megamoe.backends import simulate
from megamoe.spec.contract import BASE
from megamoe.spec.formats import e2m1_unpack

TOOL = Path(__file__).parent.parent / "tools" / "soundness.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("soundness", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules["soundness"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_no_result_of_a_simulated_correct_kernel_lies_outside(tool):
    tally, wrong = tool.run(60_000, 2_000, seed=3, small=True)
    assert not wrong
    assert sum(n for key, n in tally.items() if key[2] == "judged") >= 60_000


@pytest.mark.parametrize("kind", ["sub-fp32", "cancellation", "wide scales"])
def test_linear_sums_on_hostile_data(tool, kind):
    problem = tool.make(kind, 5, hidden=512, intermediate=128, tokens=4)
    for kernel in simulate.kernels()[:: 7 if kind != "sub-fp32" else 1]:
        tally = tool.judge_linear(problem, kernel, 1, 2, 32)
        assert tally[tool.family_of(kernel), "linear", "outside"] == 0, kernel.name


def test_a_kernel_that_rounds_codes_down_is_outside(tool):
    """The judgement can fail: truncating instead of rounding to nearest is no freedom."""
    problem = tool.make("bell", 6, hidden=256, intermediate=128, tokens=4)
    golden = oracle.forward(problem, ["fp32-ordered"], contract=BASE)
    kernel = simulate.hopper_bf16()
    result = simulate.forward(problem, kernel, 1)
    wrong = replace(
        result, codes=np.where(result.codes & 0x7F, result.codes - 1, 0).astype(np.uint8)
    )
    tally = tool.judge(problem, kernel, wrong, golden)
    assert tally["mmasim/hopper-bf16", "codes", "outside"] > 0
    assert tally["mmasim/hopper-bf16", "staged", "outside"] > 0
    assert tally["mmasim/hopper-bf16", "y", "outside"] == 0


def random_operands(seed):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (2, 32), dtype=np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    packed = rng.integers(0, 256, (8, 16), dtype=np.uint8)
    return rng, codes, packed


def instructions():
    """mmasim's instruction classes; they compile a check at import, which takes a C++ compiler."""
    try:
        from mmasim import nv_ptx
    except Exception as error:
        pytest.skip(f"mmasim's instruction classes cannot be imported here: {error}")
    return nv_ptx


def test_the_blackwell_kernel_is_mmasim_s_instruction():
    ptx = instructions()
    rng, codes, packed = random_operands(1)
    sf, weight_sf = (rng.integers(120, 134, (n, 1)).astype(np.uint8) for n in (2, 8))
    op = ptx.TCGen05MMABlockScale(
        "Blackwell", "m128n8k32.kind::mxf8f6f4.block32.f32.e4m3.e2m1.ue8m0"
    )
    a = torch.from_numpy(codes).view(torch.float8_e4m3fn)
    b = torch.from_numpy(e2m1_unpack(packed) << 2).T
    scale = [torch.from_numpy(s).view(torch.float8_e8m0fnu) for s in (sf, weight_sf)]
    expected = op(a, b, torch.zeros(2, 8), scale[0], scale[1].T)
    actual = simulate.blackwell_mxf8f6f4().linear(codes, sf, packed, weight_sf, rng)
    assert np.array_equal(actual, expected.double().numpy())


def test_the_hopper_kernels_are_mmasim_s_instructions():
    """At scale one, where the instruction itself has no scales."""
    ptx = instructions()
    rng, codes, packed = random_operands(2)
    one = [np.full((n, 1), 127, np.uint8) for n in (2, 8)]
    values = simulate.scaled(codes, one[0], packed, one[1])
    fp8 = ptx.WGMMA("Hopper", "m64n8k32.f32.e4m3.e4m3")
    a, b = (torch.from_numpy(v).to(torch.float8_e4m3fn) for v in values)
    expected = fp8(a, b.T, torch.zeros(2, 8)).double().numpy()
    actual = simulate.hopper_e4m3("e4m3").linear(codes, one[0], packed, one[1], rng)
    assert np.array_equal(actual, expected)
    bf16 = ptx.WGMMA("Hopper", "m64n8k16.f32.bf16.bf16")
    a, b = (torch.from_numpy(v).bfloat16() for v in values)
    c = torch.zeros(2, 8)
    for k in (slice(0, 16), slice(16, 32)):
        c = bf16(a[:, k], b[:, k].T, c)
    actual = simulate.hopper_bf16().linear(codes, one[0], packed, one[1], rng)
    assert np.array_equal(actual, c.double().numpy())
