"""``explain`` for weights of which ``y`` alone is judged: the variant that fits a wrong row."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

import megamoe
from megamoe.backends.eager import EagerBackend
from megamoe.commands.main import main
from megamoe.explain import FromProblem, explain
from megamoe.explain.variants import variants
from megamoe.explain.words import explanation
from megamoe.judge import forward_bits
from megamoe.spec.contract import CONTRACTS

TOKEN = 2
OF_FORMAT = {
    "fp8-block": ("sgl-sm90", "fp32-ordered", {"hidden": 128}),
    "w4a16": ("w4a16", "fp32", {"hidden": 128, "hidden_states": {"log2_scale": 4}}),
    "w4a8-token": ("w4a8-token", "fp32", {"hidden": 128}),
    "nvfp4": ("2026-11", "fp32", {"hidden": 256, "l2_activation_scale": 0.003}),
}
"""A contract, an accumulator class and further arguments."""


@cache
def problem_of(format_: str):
    more = OF_FORMAT[format_][2]
    return megamoe.problem(
        tokens=5, intermediate=256, experts=4, top_k=2, seed=1, clamp=1.0, weight_format=format_,
        **more,
    )  # fmt: skip


def departure_of(format_, problem, contract):
    """Where ``TOKEN`` departs if a backend computes another problem or contract."""
    revision, accumulator, _ = OF_FORMAT[format_]
    y = forward_bits(EagerBackend(contract).forward(problem), problem)["y"]
    return explain(
        FromProblem(problem_of(format_)), TOKEN, 0, accumulator, {"y": y[TOKEN]},
        contract=CONTRACTS[revision],
    )["actual"]  # fmt: skip


def fitting(format_, problem, contract):
    (step,) = departure_of(format_, problem, contract)["explanations"]
    return [way["what"] for way in step["exact"]]


@pytest.mark.parametrize(
    ("format_", "clause", "value"),
    [
        ("fp8-block", "gate_up", "bf16"), ("fp8-block", "requant_scale", "product"),
        ("fp8-block", "routing_weight", "combine"), ("fp8-block", "activation_group", 64),
        ("fp8-block", "gate_up_order", "up-gate"), ("w4a16", "gate_up", "fp32"),
        ("w4a16", "gate_clamped_below", True), ("nvfp4", "gate_clamped_below", True),
        ("w4a8-token", "gate_up", "fp32"), ("w4a8-token", "routing_weight", "accumulator"),
    ],
)  # fmt: skip
def test_a_clause_of_another_contract_is_named_and_no_other(format_, clause, value):
    contract = CONTRACTS[OF_FORMAT[format_][0]]
    own = getattr(contract, clause).value
    other = contract.variant("other", "a test", **{clause: value})
    assert fitting(format_, problem_of(format_), other) == [
        f"clause {clause} is {value} in place of {own}"
    ]


def without_slot(p):
    ids = p.topk_ids.clone()
    ids[TOKEN, 1] = -1
    return replace(p, topk_ids=ids)


def short(p):
    codes = p.w13_weight.clone()
    codes[..., codes.shape[2] // 2 :] = 0
    return replace(p, w13_weight=codes)


FAULTS = {
    "slot 1 (expert 0) is lost": ("fp8-block", without_slot),
    "every routing weight is 1": (
        "w4a16", lambda p: replace(p, topk_weights=torch.ones_like(p.topk_weights))),
    "nothing is clamped": ("w4a16", lambda p: replace(p, activation_clamp=None)),
    "the hidden states are those of token 1": (
        "w4a16", lambda p: replace(p, hidden_states=p.hidden_states.roll(1, 0))),
    "a scale factor of w2 is the one before it along K": (
        "fp8-block", lambda p: replace(p, w2_weight_scale=p.w2_weight_scale.roll(1, 2))),
    "linear 1 leaves out the last 64 of K": ("fp8-block", short),
}  # fmt: skip


@pytest.mark.parametrize("what", FAULTS)
def test_an_operand_at_a_wrong_place_is_named(what):
    format_, fault = FAULTS[what]
    names = fitting(format_, fault(problem_of(format_)), CONTRACTS[OF_FORMAT[format_][0]])
    # Where K has two scale factors, the one before is the one after as well.
    assert names[0] == what and len(names) <= 2


def test_each_variant_has_a_name_of_its_own():
    for format_, (revision, _, _) in OF_FORMAT.items():
        names = [v.what for v in variants(problem_of(format_), TOKEN, CONTRACTS[revision])]
        assert len(names) == len({*names}) > 40 and names[0] == ""


def test_a_right_row_has_no_explanation_and_a_strange_one_no_name():
    p, contract = problem_of("w4a16"), CONTRACTS["w4a16"]
    right = departure_of("w4a16", p, contract)
    assert right["explanations"] == [] and right["parts_at"] is None
    noise = replace(p, hidden_states=p.hidden_states.flip(1))
    (step,) = departure_of("w4a16", noise, contract)["explanations"]
    assert (step["exact"], step["partial"]) == ([], []) and step["tried"] > 40


def test_a_zero_row_is_called_zero():
    revision, accumulator, _ = OF_FORMAT["w4a16"]
    report = explain(
        FromProblem(problem_of("w4a16")),
        TOKEN,
        0,
        accumulator,
        {"y": np.zeros(128, np.uint16)},
        contract=CONTRACTS[revision],
    )
    (step,) = report["actual"]["explanations"]
    assert [way["what"] for way in step["exact"]] == ["y is zero"]


def test_nan_is_not_taken_for_a_lost_row_and_may_be_an_overflow():
    """Also where zero is right: of a token whose hidden values are all zero."""
    revision, accumulator, _ = OF_FORMAT["w4a16"]
    problem = problem_of("w4a16")
    problem.hidden_states[TOKEN] = 0
    nan = {"y": np.full(128, 0x7FFF, np.uint16)}
    source = FromProblem(problem)
    report = explain(source, TOKEN, 0, accumulator, nan, contract=CONTRACTS[revision])
    (step,) = report["actual"]["explanations"]
    assert step["overflow"][0]["not_finite"] == step["differing"] == 128
    assert "y is zero" not in [way["what"] for way in step["exact"]]
    if not step["exact"]:
        assert "may be an overflow or 0 * infinity" in "\n".join(explanation(step))


KERNEL = """
from dataclasses import replace
from megamoe.backends.eager import EagerBackend
from megamoe.spec.contract import CONTRACTS

class Drops(EagerBackend):
    name = "drops"
    def __init__(self, device="cpu"):
        super().__init__(CONTRACTS["sgl-sm90"])
    def forward(self, p):
        ids = p.topk_ids.clone()
        hit = ids == 1
        ids[hit & (hit.flatten().cumsum(0).view_as(ids) > 2)] = -1
        return super().forward(replace(p, topk_ids=ids))
"""
CASE = "forward/fp8-block-bell-many-experts"


@pytest.mark.usefixtures("warm")
def test_the_command_names_the_rule_of_the_batch_first(tmp_path, capsys):
    kernel = tmp_path / "k.py"
    kernel.write_text(KERNEL)
    assert main(["explain", CASE, "--backend", f"{kernel}:Drops", "--contract", "sgl-sm90"]) == 0
    out = capsys.readouterr().out
    assert "cause: rows 2 and later of expert 1 are dropped: 6 rows beyond" in out
    assert "seen at token 14 as: y: slot 1 (expert 1) is lost\n" in out
    assert "--full" not in out and "--stage" not in out


def test_without_an_output_the_command_shows_the_value_and_has_no_more(capsys):
    command = ["explain", CASE, "--contract", "sgl-sm90", "--accumulator", "fp32-ordered"]
    assert main([*command, "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["actual"] is None and report["golden"] == "the store has the same bits"
    assert main([*command, "--full"]) == 2
    assert "--full: with FP8-BLOCK weights y alone is followed" in capsys.readouterr().err
    assert main([*command, "--token", "99"]) == 2
    assert "token 99 is not there; the case has 17, from 0 on" in capsys.readouterr().err
