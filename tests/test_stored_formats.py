"""Problems whose weights are not MXFP4, as files: kept bit for bit, refused if wrong, reduced."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import megamoe
from megamoe.backends.eager import EagerBackend
from megamoe.cases.stored import StoredError, StoredProblem, load, to_bytes
from megamoe.golden.imported import import_file
from megamoe.reduce import keep, reduce
from megamoe.spec.contract import CONTRACTS
from megamoe.spec.problem import Problem
from megamoe.suite.at_hand import judge
from tests.helpers.local import Local

OF_FORMAT = {
    "nvfp4": ("2026-11", 256, {"l2_activation_scale": 0.003}),
    "fp8-block": ("sgl-sm90", 128, {}),
    "w4a16": ("w4a16", 128, {}),
    "w4a8-token": ("w4a8-token", 128, {}),
}
"""A contract that has the format, the multiple of H and I, and further fields."""


def make_problem(format_: str, **more) -> Problem:
    sizes = {"tokens": 5, "hidden": 512, "intermediate": 512, "experts": 4, "top_k": 2}
    params = {**sizes, "seed": 1, "weight_format": format_, **OF_FORMAT[format_][2], **more}
    return megamoe.problem(**params)


class Doubles(EagerBackend):
    """Wrong in the channels from 300 on of the tokens that expert 2, or the last, serves."""

    name = "doubles"

    def forward(self, problem):
        hit = (problem.topk_ids == min(2, problem.num_experts - 1)).any(1)
        y = super().forward(problem)["y"].clone()
        y[hit, 300 % problem.hidden_size :] *= 2
        return {"y": y}


@pytest.mark.parametrize("format_", OF_FORMAT)
def test_a_file_gives_back_every_bit(format_, tmp_path):
    problem = make_problem(format_)
    path = tmp_path / "p.safetensors"
    path.write_bytes(to_bytes(StoredProblem(problem, {}, {"from": "here"})))
    back = load(path).problem
    assert back.arguments.keys() == problem.arguments.keys()
    for name, value in problem.arguments.items():
        same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
        assert same(getattr(back, name), value), name


@pytest.mark.parametrize(
    ("format_", "name", "change", "message"),
    [
        ("fp8-block", "w13_weight_scale", lambda t: t.double(), r"torch.float32 \(4, 8, 4\)"),
        ("fp8-block", "w2_weight", lambda t: t[..., 256:], r"torch.uint8 \(4, 512, 512\)"),
        ("nvfp4", "w2_weight_scale_2", None, "lacks input.w2_weight_scale_2"),
        ("nvfp4", "w13_weight_scale_2", lambda t: t.half(), r"expected torch.float32 \(4,\)"),
    ],
)  # fmt: skip
def test_a_tensor_that_is_not_of_the_format_is_one_line(format_, name, change, message, tmp_path):
    path = tmp_path / "p.safetensors"
    path.write_bytes(to_bytes(StoredProblem(make_problem(format_))))
    tensors, meta = load_file(path), metadata(path)
    tensor = tensors.pop(f"input.{name}")
    if change is not None:
        tensors[f"input.{name}"] = change(tensor).contiguous()
    save_file(tensors, path, meta)
    with pytest.raises(StoredError, match=message):
        load(path)


def metadata(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("format_", OF_FORMAT)
def test_a_red_becomes_one_token_one_expert_and_the_fewest_blocks(format_, tmp_path):
    revision, multiple, _ = OF_FORMAT[format_]
    session = Local(Doubles(CONTRACTS[revision]))
    r = reduce(session, make_problem(format_))
    p = r.problem
    assert (p.num_tokens, p.num_experts, p.top_k) == (1, 1, 1)
    assert (p.hidden_size, p.intermediate_size) == (multiple, multiple)
    verdict, size = keep(r, tmp_path / "small.safetensors", {})
    assert verdict.status == "fail" and size < 200_000
    right = Local(EagerBackend(CONTRACTS[revision]))
    assert judge(load(tmp_path / "small.safetensors").problem, right)[0].status == "pass"


def test_experts_without_a_slot_cost_nothing_in_the_file():
    problem = make_problem("nvfp4")
    one = replace(problem, topk_ids=torch.full_like(problem.topk_ids, 3))
    assert len(to_bytes(StoredProblem(one))) < len(to_bytes(StoredProblem(problem))) / 2


@pytest.mark.parametrize("format_", OF_FORMAT)
def test_an_imported_file_is_a_case_of_its_format(format_, tmp_path):
    file = tmp_path / "mine.safetensors"
    file.write_bytes(
        to_bytes(StoredProblem(make_problem(format_, tokens=2, hidden=256, intermediate=256)))
    )
    case = import_file(tmp_path / "golden", file)
    assert case.params["weight_format"] == format_
    assert OF_FORMAT[format_][0] in case.revisions and "2026-06" not in case.revisions
