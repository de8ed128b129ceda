"""The table of tensors, held against what is said of them elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megamoe.backends.simulate import problem
from megamoe.cases import KINDS, kind_of
from megamoe.compare import rejudge, stages
from megamoe.layer.kernel_weights import transform_weights
from megamoe.layer.staging import prepare_megamoe_inputs
from megamoe.layer.symm_buffer import new_symm_buffer
from megamoe.spec.tensors import (
    ACTIVATIONS,
    NVFP4_FACTORS,
    OPERATIONS,
    STAGES,
    TENSORS,
    WEIGHTS,
)

SIZES = {"T": 5, "K": 3, "H": 256, "I": 384, "E": 4, "L": 6, "P": 8, "R": 2, "S": 256}


@pytest.mark.parametrize("tensor", TENSORS.values(), ids=TENSORS.keys())
def test_a_row_of_the_table_agrees_with_itself(tensor):
    assert TENSORS[tensor.name] is tensor
    assert all(size > 0 for size in tensor.sizes(SIZES))
    assert len(tensor.places) in (0, len(tensor.shape))
    assert 1 <= tensor.digest_axes <= max(1, len(tensor.shape))
    if tensor.packed:
        assert tensor.dtypes == (torch.int32,)
    elif tensor.form is not None:
        assert {8 * d.itemsize for d in tensor.dtypes} == {tensor.form.width}


def test_shapes_in_numbers():
    assert TENSORS["x_sf"].sizes(SIZES) == (5, 2)
    assert TENSORS["w13_weight"].sizes(SIZES) == (4, 768, 128)
    assert TENSORS["record_enabled"].sizes(SIZES) == ()


def test_operations_name_rows_of_the_table():
    inputs = [name for o in OPERATIONS.values() for name in (*o.takes, *o.may_take)]
    outputs = [name for o in OPERATIONS.values() for name in o.returns]
    assert set(inputs) | set(outputs) == set(TENSORS)
    assert all(TENSORS[name].places for name in outputs)
    assert {kind_of(name).needs for name in KINDS} - {None} == set(OPERATIONS)


def test_a_problem_has_the_shapes_and_dtypes_of_the_table():
    p = problem(1, tokens=3, shared_recipe={"size": 384}, shared_output_recipe={})
    more = [n for n in OPERATIONS["forward"].may_take if n not in NVFP4_FACTORS]
    for name in (*ACTIVATIONS, *WEIGHTS, *more):
        tensor = getattr(p, name)
        assert tuple(tensor.shape) == TENSORS[name].sizes(p.letters)
        assert tensor.dtype == TENSORS[name].dtypes[0]


def test_the_module_under_test_has_the_shapes_and_dtypes_of_the_table():
    p = problem(1, tokens=3)
    buffer = new_symm_buffer(None, torch.device("cpu"), p.buffer_sizes)
    rows = {**p.letters, "T": p.max_num_tokens}
    for name in (*OPERATIONS["prepare"].returns, "l2_acts", "l2_acts_sf"):
        tensor = getattr(buffer, name)
        assert tuple(tensor.shape) == TENSORS[name].sizes(rows)
        assert tensor.dtype in TENSORS[name].dtypes
    inputs = (getattr(p, name) for name in OPERATIONS["prepare"].takes)
    prepare_megamoe_inputs(*inputs, *(getattr(buffer, n) for n in OPERATIONS["prepare"].returns))
    weights = transform_weights(*(getattr(p, name) for name in WEIGHTS))
    for name, tensor in zip(OPERATIONS["transform_weights"].returns, weights, strict=True):
        assert tuple(tensor.shape) == TENSORS[name].sizes(p.letters)
        assert tensor.dtype in TENSORS[name].dtypes


def test_what_runs_on_a_strangers_machine_says_the_same():
    """``rejudge`` imports nothing of megamoe, so it has a list of its own."""
    assert {n for n in STAGES if not TENSORS[n].reads_masked} == set(rejudge.SLOTS)


@pytest.mark.parametrize("name", [n for n in KINDS if kind_of(n).ask is not None])
def test_the_parts_of_a_kind_are_what_its_operation_gives_back(name):
    kind = kind_of(name)
    operation, parts = OPERATIONS[kind.needs], kind.parts
    stages = {*parts.result, *parts.written}
    assert stages <= {*operation.returns}
    assert stages == {*operation.returns} or parts.result == ("y",)  # what else a forward shows
    assert {*parts.written.values()} <= {*operation.takes, *operation.returns}
    assert parts.rows in ("", *operation.takes)


def test_order_of_computation():
    names = "ids load x_sf x topk_idx topk_weights beyond l2_acts_sf l2_acts w13 w13_sf w2 w2_sf y"
    assert names.split() == stages.ORDER


def test_words_are_unpacked_for_the_comparison():
    words = np.array([[0x04030201]], np.int32)
    assert TENSORS["x_sf"].elements(words).tolist() == [[1, 2, 3, 4]]
    assert TENSORS["l2_acts_sf"].elements(words) is words
    assert TENSORS["ids"].form_of(np.zeros(1, np.int32)).name == "int32"
    assert TENSORS["ids"].form_of(np.zeros(1, np.int64)).name == "int64"
