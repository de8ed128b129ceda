"""Faults of size, of bytes and of many calls: a planted one is red in the cases that are for it.

Each fault is a backend around ``eager``, right but for one thing. Beside the cases that must see it
stands one of ordinary size that must not: the fault is in a region of its own.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megamoe.backends import eager
from megamoe.cases import CaseError, golden_root, load_cases, recipes
from megamoe.cases.kind import lacks_cuda
from megamoe.cases.load import load_file
from megamoe.cases.sweep import base
from megamoe.golden import Store, make
from megamoe.kinds import laws
from megamoe.kinds.rows import twin_findings
from megamoe.oracle.folding import leaves_bf16
from megamoe.spec.contract import BASE
from megamoe.spec.formats import E4M3_TABLE, e2m1_unpack
from megamoe.spec.problem import Problem
from megamoe.suite.runner import Runner
from tests.helpers.local import Local

CASES = {case.id: case for case in load_cases()}
ORDINARY = "forward/token-block-edge-t9"
Result = dict[str, torch.Tensor]


class Faulty:
    """``eager`` whose problem, or whose result, goes through a fault. It shows ``y`` and codes."""

    name, accumulator = "faulty", "fp32-ordered"
    contracts = (BASE.revision,)

    def __init__(self, before: Any = None, after: Any = None, prepare: Any = None) -> None:
        self.right = eager.create(contract=BASE.revision)
        self.before, self.after, self.faulty_prepare = before, after, prepare
        self.eplb_map = self.right.eplb_map

    def forward(self, problem: Problem) -> Result:
        if self.before is not None:
            problem = self.before(problem)
        out = self.right.forward(problem)
        stages = {name: out[name] for name in ("y", "l2_acts", "l2_acts_sf")}
        return stages if self.after is None else self.after(stages)

    def prepare(self, *tensors: torch.Tensor) -> None:
        self.right.prepare(*tensors)
        if self.faulty_prepare is not None:
            self.faulty_prepare(*tensors)


def status(backend: Any, case_id: str) -> str:
    runner = Runner(Local(backend), Store(golden_root(), make, BASE))
    runner.brief = True  # no pictures, for which the oracle would compute the case
    return runner.run(CASES[case_id]).status


# --- faults of the whole layer ------------------------------------------------------------------


def row_in_10_bits(out: Result) -> Result:
    y = out["y"]
    return out | {"y": y[torch.arange(len(y)) & 0x3FF]}


def last_row_of_full_buffer(out: Result) -> Result:
    y = out["y"].clone()
    if len(y) % 384 == 0 and len(y) > 384:
        y[-1] = 0
    return out | {"y": y}


def row_in_16_bits(out: Result) -> Result:
    y = out["y"]
    return out | {"y": y[torch.arange(len(y)) & 0xFFFF]}


def last_of_few_rows_of_a_model(out: Result) -> Result:
    y = out["y"].clone()
    if 3 <= len(y) <= 7 and y.shape[1] >= 2048:
        y[-1] = 0
    return out | {"y": y}


def row_of_a_model_in_8_bits(out: Result) -> Result:
    y = out["y"]
    return out | {"y": y[torch.arange(len(y)) & 0xFF]} if y.shape[1] >= 2048 else out


def channels_above_7168(out: Result) -> Result:
    y = out["y"].clone()
    y[:, 7168:] = 0
    return out | {"y": y}


def expert_offset_in_32_bits(p: Problem) -> Problem:
    """What a kernel reads whose offset of w13 wraps at 2^32 bytes: the first experts again."""
    size = p.w13_weight[0].numel()
    first = torch.where(p.topk_ids * size >= 2**32, p.topk_ids - 2**32 // size, p.topk_ids)
    return replace(p, topk_ids=first)


def byte_of(name: str, wrong: int) -> Callable[[Problem], Problem]:
    """One scale byte of a weight is read as the next smaller one."""

    def fault(p: Problem) -> Problem:
        sf = getattr(p, name)
        experts = p.topk_ids[p.topk_ids >= 0].unique()
        sf = sf.clone()
        sf[experts] = torch.where(sf[experts] == wrong, wrong - 1, sf[experts].int()).to(
            torch.uint8
        )
        return replace(p, **{name: sf})

    return fault


def nibble(name: str, wrong: int, read: int) -> Callable[[Problem], Problem]:
    """One E2M1 code is read as another."""

    def fault(p: Problem) -> Problem:
        weight = getattr(p, name).clone()
        low, high = weight & 15, weight >> 4
        low, high = (torch.where(part == wrong, read, part.int()) for part in (low, high))
        return replace(p, **{name: (low | high << 4).to(torch.uint8)})

    return fault


FORWARD: list[tuple[str, dict[str, Any], list[str]]] = [
    ("rows counted in 10 bits", {"after": row_in_10_bits},
     ["forward/rows-of-a-large-batch-wrong-t2048"]),
    ("rows counted in 16 bits", {"after": row_in_16_bits},
     ["forward/rows-beyond-16-bits-wrong-t65544"]),
    ("the last row of a full buffer", {"after": last_row_of_full_buffer},
     ["forward/rows-of-a-full-buffer-of-768-wrong"]),
    ("the last of three rows of a model", {"after": last_of_few_rows_of_a_model},
     ["forward/deepseek-v4-flash-row-lost-of-3-tokens"]),
    ("rows of a model counted in 8 bits", {"after": row_of_a_model_in_8_bits},
     ["forward/deepseek-v4-flash-few-live-rows-lost-among-512"]),
    ("channels above 7168", {"after": channels_above_7168},
     ["forward/channels-above-7168-lost-h7296-t2"]),
    ("expert offsets in 32 bits", {"before": expert_offset_in_32_bits},
     ["forward/expert-offset-above-2e31-bytes-i1280"]),
    ("byte 1 of w13", {"before": byte_of("w13_weight_scale", 1)},
     ["forward/scale-bytes-105-to-242-staged-wrongly-or-136-to-0-of-w13"]),
    ("byte 254 of w13", {"before": byte_of("w13_weight_scale", 254)},
     ["forward/scale-bytes-of-w13-wrong-gate-152-to-50-up-152-to-254"]),
    ("byte 3 of w2", {"before": byte_of("w2_weight_scale", 3)},
     ["forward/scale-bytes-105-to-241-requantised-wrongly-or-136-to-0-of-w2"]),
    ("byte 254 of w2", {"before": byte_of("w2_weight_scale", 254)},
     ["forward/scale-bytes-of-w2-wrong-136-to-254"]),
    ("nibble 9 of w13", {"before": nibble("w13_weight", 9, 8)},
     ["forward/e4m3-codes-of-hidden-states-wrong-beside-448"]),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "where"), [f[1:] for f in FORWARD], ids=[f[0] for f in FORWARD])
def test_a_fault_of_the_layer_is_red_in_its_cases(fault: dict[str, Any], where: list[str]) -> None:
    assert [status(Faulty(**fault), case) for case in where] == ["fail"] * len(where)
    if "nibble" not in str(fault):
        assert status(Faulty(**fault), ORDINARY) == "pass"


@pytest.mark.parametrize("code", [1, 7, 8, 0x35, 0x7E])
def test_a_code_of_linear_1_that_is_read_as_its_neighbour_is_red(
    code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = torch.from_numpy(E4M3_TABLE.copy()).float()
    table[code] = table[code - 1]
    linear, calls = eager.linear, itertools.count()

    def faulty(*operands: Any) -> torch.Tensor:
        with monkeypatch.context() as patch:
            if next(calls) % 2 == 0:  # linear 1; what comes after it is right
                patch.setattr(eager, "_e4m3_table", lambda device: table)
            return linear(*operands)

    monkeypatch.setattr(eager, "linear", faulty)
    case = "forward/e4m3-codes-of-hidden-states-wrong-below-the-floor"
    assert status(Faulty(), case) == "fail"


def test_another_floor_of_staging_is_seen_without_the_staging() -> None:
    class Floor(Faulty):
        def __init__(self) -> None:
            super().__init__()
            other = BASE.variant(
                "other", "a test", staging_amax_floor=1e-10, staging_exponent_min=0
            )
            self.right.contract = other

    assert status(Faulty(), "forward/staging-floor-seen-in-y") == "pass"
    assert status(Floor(), "forward/staging-floor-seen-in-y") == "fail"
    assert status(Floor(), ORDINARY) == "pass"


# --- staging, and the remap ---------------------------------------------------------------------


def rows_from_4096_not_staged(*tensors: torch.Tensor) -> None:
    tensors[3][4096 : len(tensors[0])] = 0


def test_rows_that_are_not_staged_are_red_from_their_number_on() -> None:
    faulty = Faulty(prepare=rows_from_4096_not_staged)
    statuses = {n: status(faulty, f"staging/rows-of-a-large-batch-lost-t{n}") for n in (4096, 8192)}
    assert statuses == {4096: "pass", 8192: "fail"}


def test_a_remap_by_a_row_in_10_bits_is_red_from_its_number_on() -> None:
    faulty = Faulty()
    right = faulty.right.eplb_map

    def in_10_bits(ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        return torch.cat([right(part, *rest) for part in ids.split(1024)])

    faulty.eplb_map = in_10_bits  # type: ignore[assignment]
    statuses = {n: status(faulty, f"eplb/rows-of-a-large-batch-lost-t{n}") for n in (1024, 2048)}
    assert statuses == {1024: "pass", 2048: "fail"}


# --- many calls, other weights ------------------------------------------------------------------


def test_weights_that_are_kept_by_their_shape_are_red() -> None:
    by_shape: dict[tuple[int, ...], torch.Tensor] = {}

    def cache(p: Problem) -> Problem:
        shape = tuple(p.w2_weight.shape)
        return replace(p, w2_weight=by_shape.setdefault(shape, p.w2_weight.clone()))

    case = "property/other-weights-of-the-same-shape-read-the-first"
    assert status(Faulty(), case) == "pass"
    assert status(Faulty(before=cache), case) == "fail"


def test_a_row_that_is_wrong_in_some_calls_is_found_and_the_chance_to_miss_it_is_stated() -> None:
    """The law looks at every call, so one wrong call is enough."""
    case = CASES["property/many-calls-of-a-full-buffer-differ"]
    problem = recipes.forward_problem(case)
    assert problem.num_tokens == problem.max_num_tokens == 384
    right = np.zeros((384, 8), np.uint16)
    calls = []

    def once_in(turn: int) -> laws.Forward:
        def y_of(p: Problem) -> Any:
            calls.append(p)
            y = right.copy()
            y[200, 3] = len(calls) == turn
            return y

        return y_of

    for turn in (1, 2, laws.MANY_CALLS):
        calls.clear()
        assert any(f.bad for f in laws.findings(once_in(turn), problem, "many-calls"))
        assert len(calls) == laws.MANY_CALLS
    assert 0.97**laws.MANY_CALLS < 0.01


# --- rows that repeat others --------------------------------------------------------------------


def test_rows_with_the_inputs_of_another_must_have_its_bits() -> None:
    case = CASES["forward/rows-of-a-large-batch-wrong-t512"]
    problem = recipes.forward_problem(case)
    source = recipes.twins(case.seed, 16, np.arange(512))
    assert (source[:16] == np.arange(16)).all() and set(source[16:]) == set(range(16))
    for name in ("hidden_states", "topk_ids", "topk_weights"):
        tensor = getattr(problem, name)
        assert torch.equal(tensor, tensor[source])
    y = source[:, None].repeat(256, 1).astype(np.uint16)
    assert not any(f.bad for f in twin_findings(case, {"y": y}, problem))
    y[511, 255] += 1
    (finding,) = twin_findings(case, {"y": y}, problem)
    assert finding.outside == 1 and finding.worst is not None
    assert (finding.worst.token, finding.worst.channel) == (511, 255)
    assert finding.text.startswith("y: 1 elements are not those of the token with the same inputs")
    assert re.search(r": twin .*, this token .* apart", finding.worst.line(finding.sides))


def test_codes_are_compared_where_a_slot_is_live_and_nowhere_else() -> None:
    case = CASES["forward/rows-beyond-16-bits-wrong-t32776"]
    problem = recipes.forward_problem(case)
    source = recipes.twins(case.seed, 16, np.arange(problem.num_tokens))
    ids = problem.topk_ids.numpy()[:, 0]
    codes = source[:, None, None].repeat(128, 2).astype(np.uint8)
    stages = {"l2_acts": codes, "l2_acts_sf": codes[:, :, :4].copy()}
    dead, live = (int(np.flatnonzero((ids >= 0) == is_live)[-1]) for is_live in (False, True))
    codes[dead] += 1
    assert not any(f.bad for f in twin_findings(case, stages, problem))
    codes[live, 0, 5] += 1
    bad = [f for f in twin_findings(case, stages, problem) if f.bad]
    assert [f.stage for f in bad] == ["l2_acts"] and bad[0].worst is not None
    assert (bad[0].worst.token, bad[0].worst.channel) == (live, 5)


def test_rows_alone_are_those_of_the_whole_batch() -> None:
    case = CASES["forward/rows-of-a-large-batch-wrong-t512"]
    whole, some = recipes.forward_problem(case), recipes.forward_problem(case, [3, 400, 17])
    assert torch.equal(whole.hidden_states[[3, 400, 17]], some.hidden_states)
    assert torch.equal(whole.topk_ids[[3, 400, 17]], some.topk_ids)


@pytest.mark.parametrize("distinct", [0, 6])
def test_distinct_must_be_a_number_of_the_tokens(distinct: int, tmp_path: Any) -> None:
    file = tmp_path / "x.toml"
    file.write_text(
        '[[case]]\nname = "abc"\nkind = "staging"\nbreaks = "X."\nhidden = 128\ntokens = 5\n'
        f"top_k = 1\nexperts = 1\ndistinct = {distinct}\n"
    )
    with pytest.raises(CaseError, match=f"distinct is {distinct}; it must be 1 to tokens"):
        load_file(file)


# --- what only a GPU runs -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("has_gpu", "rest"), [(True, "; use --device cuda"), (False, ", and the machine has none")]
)
def test_a_case_for_a_gpu_alone_is_not_provided_on_a_cpu(
    has_gpu: bool, rest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backend is not to blame: the machine has no GPU, or the run does not use it."""
    monkeypatch.setattr("megamoe.cases.kind.has_gpu", lambda: has_gpu)
    case = CASES["forward/deepseek-v4.1-flash-rows-of-a-large-batch-wrong-t8192"]
    verdict = Runner(Local(Faulty()), Store(golden_root(), make, BASE)).run(case)
    assert verdict.status == "not-provided"
    assert verdict.reason == f"a case with so many rows needs a CUDA device{rest}"
    assert not lacks_cuda(case, "cuda:0") and not lacks_cuda(CASES[ORDINARY], "cpu")


# --- recipes ------------------------------------------------------------------------------------


def test_the_sweeps_reach_every_byte_and_every_code() -> None:
    """Of finite values; 254 and 255 come of infinities only, and have cases of their own."""
    w13, w2, codes, nibbles = set(), set(), set(), [set(), set()]
    for case in CASES.values():
        recipe = case.params.get("weights_recipe", {})
        if recipe.get("kind") != "sweep":
            continue
        p = recipes.forward_problem(case)
        w13 |= set(np.unique(p.w13_weight_scale.numpy()))
        w2 |= set(np.unique(p.w2_weight_scale.numpy()))
        if recipe.get("of") == "probe" and case.params["hidden_recipe"]["kind"] == "codes":
            out = eager.create(contract=BASE.revision).forward(p)
            codes |= set(np.unique(out["x"].numpy()))
            for at, weight in enumerate((p.w13_weight, p.w2_weight)):
                nibbles[at] |= set(np.unique(e2m1_unpack(weight.numpy())))
    assert w13 == set(range(255)) and w2 == set(range(255))
    assert codes >= set(range(0x7F)) | set(range(0x81, 0xFF))
    assert nibbles == [set(range(16))] * 2


@pytest.mark.parametrize("wrong", [{"of": "grid"}, {"scale": 3}, {}])
def test_a_sweep_names_what_it_needs(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="it needs gate_scale, up_scale, w2_scale and may"):
        base({"kind": "sweep", **wrong})


# --- kernels that fold scale factors into bfloat16 operands ---------------------------------------

NO_BFLOAT16 = (
    "forward/weight-scale-bytes-at-their-ends",
    "forward/scale-bytes-to-247-staged-wrongly",
    "forward/scale-bytes-of-w13-wrong-gate-152-to-254-up-152-to-50",
    "forward/scale-bytes-of-w13-wrong-gate-152-to-50-up-152-to-254",
    "forward/scale-bytes-105-to-0-requantised-wrongly-or-136-to-241-of-w2",
    "forward/scale-bytes-of-w2-wrong-136-to-254",
    "forward/infinite-hidden-value-with-clamp",
)
"""Forward cases in which a code with its scale factor is no bfloat16 number."""


def test_a_backend_that_folds_scales_is_asked_only_what_it_can_compute():
    for case_id in (*NO_BFLOAT16, ORDINARY, "forward/directed-subnormal-scale"):
        backend = Faulty()
        assert status(backend, case_id) == "pass"
        backend.folds_scales = True
        expected = "not-provided" if case_id in NO_BFLOAT16 else "pass"
        assert status(backend, case_id) == expected


@pytest.mark.parametrize(
    ("code", "sf", "leaves"),
    [
        (0x7E, 246, False),  # 448 * 2**119 < 2**128
        (0x77, 247, False),  # 240 * 2**120 < 2**128
        (0x78, 247, True),  # 256 * 2**120 = 2**128
        (0x00, 254, False),
        (0x7F, 254, False),  # NaN stays NaN
        (0x7E, 255, False),  # a factor of NaN
        (0x01, 3, False),  # 2**-9 * 2**-124 = 2**-133, the least bfloat16
        (0x01, 2, True),
        (0x02, 2, False),
        (0x0F, 0, True),  # 15 * 2**-10 * 2**-127
        (0x80, 0, False),  # -0
    ],
)
def test_an_activation_leaves_bfloat16_where_its_product_is_none(code, sf, leaves):
    problem = recipes.forward_problem(CASES[ORDINARY])
    codes = np.zeros((1, 1, 32), np.uint8)
    codes[0, 0, 5] = code
    assert leaves_bf16(problem, codes, np.full((1, 1, 1), sf, np.uint8)) is leaves
