"""``tools/members.py``: a sample is a part of what a kernel computes, and judged like the whole."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from megamoe.backends import simulate
from megamoe.backends.simulated_sample import linears, sample_of
from megamoe.cases import load_cases
from megamoe.cases.recipes import forward_problem
from megamoe.golden import make
from megamoe.spec.contract import BASE
from megamoe.spec.formats import GROUP
from tools.members import OF_Y, Golden, Part, of_member, of_sample

SURE = replace(simulate.blockwise("nearest"), silu="none")
"""A kernel without chance."""
PRODUCTS = 60_000


@cache
def masked():
    """Slots without an expert, two slots of one expert, and rows of the same expert."""
    recipe = {"mask": [[1, 0], [1, 1], [1, 2], [2, 1]]}
    return simulate.problem(3, tokens=6, top_k=3, intermediate=256, routing_recipe=recipe)


@cache
def case(name):
    return next(c for c in load_cases() if c.id == f"forward/{name}")


@cache
def golden(name):
    return Golden.of(case(name))


def of_kernel(kernel, name="bell-h256-i128-drifts", sample=PRODUCTS):
    problem = forward_problem(case(name))
    part = Part(case(name).id, Counter(), frozenset(), ())
    return of_member(case(name), problem, golden(name), kernel, sample, part)


def test_a_sample_with_the_kernels_own_codes_is_a_part_of_its_forward():
    """Whatever is sampled: the groups of linear 1, and y from all codes."""
    whole = simulate.forward(masked(), SURE, 0)
    samples = set()
    for seed in range(8):
        some = sample_of(masked(), SURE, seed, whole.codes, whole.sf, PRODUCTS)
        np.testing.assert_array_equal(some.codes, whole.codes[some.tokens])
        np.testing.assert_array_equal(some.sf, whole.sf[some.tokens])
        np.testing.assert_array_equal(some.y, whole.y[some.tokens][:, some.channels])
        samples.add((tuple(some.tokens), tuple(some.channels), some.groups.tobytes()))
        assert 1 not in some.tokens  # no slot of it has an expert
    assert len(samples) == 8


def test_the_groups_alone_are_the_kernels_and_the_rest_is_the_references():
    """By codes that no kernel computes, 1 with the byte 3, it shows what was computed."""
    shape = masked().topk_ids.shape
    codes = np.full((*shape, 256), 1, np.uint8)
    sf = np.full((*shape, 256 // GROUP), 3, np.uint8)
    whole = simulate.forward(masked(), SURE, 0)
    some = sample_of(masked(), SURE, 1, codes, sf, PRODUCTS)
    computed = np.zeros(some.sf.shape, np.bool_)
    computed[tuple(some.groups.T)] = True
    np.testing.assert_array_equal(some.sf == 3, ~computed)
    np.testing.assert_array_equal(some.sf[computed], whole.sf[some.tokens][computed])
    each = np.repeat(computed, GROUP, axis=-1)
    np.testing.assert_array_equal(some.codes[each], whole.codes[some.tokens][each])
    assert (some.codes[~each] == 1).all() and 0 < computed.sum() < computed.size


def test_a_sample_costs_what_it_may_cost():
    """A limit of products for each linear, and at least one group and one channel."""
    hidden, inter = masked().hidden_size, masked().intermediate_size
    codes, sf = np.zeros((6, 3, inter), np.uint8), np.zeros((6, 3, inter // GROUP), np.uint8)
    for products in (0, PRODUCTS, 10**9):
        some = sample_of(masked(), SURE, 5, codes, sf, products)
        live = int((masked().topk_ids[some.tokens] >= 0).sum())
        first, second = len(some.groups) * 2 * GROUP * hidden, live * len(some.channels) * inter
        least = 2 * GROUP * hidden, live * inter
        assert first <= max(products // 2, least[0]) and second <= max(products // 2, least[1])
    assert len(some.channels) == hidden and len(some.groups) == live * inter // GROUP


def test_operands_side_by_side_give_the_sums_of_each():
    rng = np.random.default_rng(0)
    operands = [
        (rng.integers(0, 120, (r, 64), dtype=np.uint8), np.full((r, 2), 120, np.uint8),
         rng.integers(0, 256, (n, 32), dtype=np.uint8), np.full((n, 2), 119, np.uint8))
        for r, n in ((1, 64), (2, 5), (3, 200), (1, 1))
    ]  # fmt: skip
    for one, sums in zip(operands, linears(SURE, operands, rng), strict=True):
        np.testing.assert_array_equal(sums, SURE.linear(*one, rng))


def test_nothing_to_sample_is_an_error():
    ids = masked().topk_ids * 0 - 1
    nothing = replace(masked(), topk_ids=ids)
    with pytest.raises(ValueError, match="no slot"):
        sample_of(nothing, SURE, 0, np.zeros(0, np.uint8), np.zeros(0, np.uint8), PRODUCTS)


@pytest.mark.parametrize("name", ["bell-h256-i128-drifts", "masked-slots-bell"])
def test_a_part_of_a_golden_is_the_golden_of_its_rows(name):
    """Its compact tensors have flat indices, which are of other rows there."""
    rows, channels = np.array([1, 3]), np.array([0, 7, 200])
    had = golden(name).part(rows, channels).tensors
    of_rows = replace(case(name), params={**case(name).params, "rows": rows.tolist()})
    want = make(of_rows, contract=BASE).tensors
    assert had.keys() == want.keys()
    for key, tensor in want.items():
        right = tensor[:, channels] if key.rpartition(".")[2] in OF_Y else tensor
        np.testing.assert_array_equal(had[key], right, err_msg=key)
    assert any(key.endswith("code_at") and tensor.size for key, tensor in want.items())


def test_members_are_inside():
    for kernel in (simulate.blackwell_mxf8f6f4(), simulate.hopper_e4m3(), SURE):
        part = of_kernel(kernel)
        assert not part.wrong and part.tally[kernel.accumulator, "sampled"] == 1
        assert part.tally[kernel.accumulator, "codes of samples"] % GROUP == 0


def _wrong_where(is_first):
    """Twice the last group of K in one linear only: H is 256 and I is 128."""

    def linear(codes, sf, packed, weight_sf, rng):
        if (codes.shape[1] == 256) == is_first:
            sf = np.concatenate([sf[:, :-1], sf[:, -1:] + 1], axis=1).astype(np.uint8)
        return SURE.linear(codes, sf, packed, weight_sf, rng)

    return replace(SURE, linear=linear)


@pytest.mark.parametrize(
    ("kernel", "stage"),
    [(_wrong_where(True), "of l2_acts,"), (_wrong_where(False), "of y,"),
     (replace(simulate.hopper_e4m3(), accumulator="sm100-mxf8f6f4"), "of y,")],
    ids=["linear 1", "linear 2", "another class"],
)  # fmt: skip
def test_a_kernel_that_is_no_member_is_outside(kernel, stage):
    part = of_kernel(kernel, sample=3 * PRODUCTS)
    assert part.tally[kernel.accumulator, "outside"] == 1
    lines = [line for line in part.wrong if stage in line]
    assert len(lines) == (2 if stage == "of y," else 1)  # y with its codes, and y alone


def test_the_problem_of_a_sample_has_its_channels():
    whole = simulate.forward(masked(), SURE, 0)
    some = sample_of(masked(), SURE, 0, whole.codes, whole.sf, PRODUCTS)
    cut = of_sample(masked(), some)
    assert cut.w2_weight.shape[1] == len(some.channels) == cut.w2_weight_scale.shape[1]
    assert cut.num_tokens == len(some.tokens)
