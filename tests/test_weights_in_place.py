"""What is kept of weights that were written since is red, and the tensor that it was of is named.

``eager`` computes; only what it is given is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from megamoe.backends.eager import EagerBackend
from megamoe.cases import Case, load_cases, recipes
from megamoe.cases.laws import ALL_WEIGHTS, after_write
from megamoe.kinds.property import launch_findings
from megamoe.layer import launch_laws
from megamoe.spec.contract import CONTRACTS
from megamoe.spec.problem import Problem
from megamoe.spec.tensors import WEIGHTS
from megamoe.worker.exchange import Caller
from tests.helpers.local import Local

LAW = "weights-in-place"
CASES = [case for case in load_cases() if case.params.get("law") == LAW]
PLAIN = next(case for case in CASES if case.name == f"{LAW}-are-read-as-they-were")

Key = Callable[[torch.Tensor], Any]


def address(tensor: torch.Tensor) -> Any:
    return tensor.data_ptr(), tensor.shape


def version(tensor: torch.Tensor) -> Any:
    return address(tensor), tensor._version


def content(tensor: torch.Tensor) -> Any:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def names_of(p: Problem) -> tuple[str, ...]:
    return *WEIGHTS, *p.expert_factors


def eager(case: Case) -> EagerBackend:
    return EagerBackend(CONTRACTS[case.revisions[0]])


class Keeps:
    """Packs the weights once for each key of the tensors ``by``, and holds what the key is of."""

    name, accumulator, features = "keeps", "fp32", EagerBackend.features

    def __init__(self, keys: dict[str, Key], case: Case = PLAIN) -> None:
        self.keys, self.backend = keys, eager(case)
        self.packed: dict[Any, Any] = {}

    def forward(self, p: Problem) -> Any:
        key = tuple(self.keys[name](getattr(p, name)) for name in names_of(p) if name in self.keys)
        weights = {name: getattr(p, name) for name in names_of(p)}
        copies = {name: tensor.clone() for name, tensor in weights.items()}
        packed, _ = self.packed.setdefault(key, (copies, weights))
        return self.backend.forward(replace(p, **packed))


def reds(backend: Any, case: Case = PLAIN) -> list[str]:
    """The variants with other bits."""
    with Caller(Local(backend), 100.0) as call:
        findings = launch_findings(None, call, recipes.forward_problem(case), LAW)
    return [f.text.split(" changes ")[0].removeprefix(f"{LAW}: ") for f in findings if f.bad]


def after(*names: str) -> list[str]:
    return [after_write(name) for name in (*names, ALL_WEIGHTS)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_weights_that_are_kept_by_address_are_red_for_each_tensor(case: Case) -> None:
    names = names_of(recipes.forward_problem(case))
    assert reds(Keeps(dict.fromkeys(names, address), case), case) == after(*names)


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_tensor_that_is_kept_by_address_is_named(name: str) -> None:
    others = {other: content for other in WEIGHTS if other != name}
    assert reds(Keeps({**others, name: address})) == [after_write(name)]


def test_a_key_of_w13_alone_is_red_for_each_tensor() -> None:
    assert reds(Keeps({"w13_weight": address})) == after(*WEIGHTS)


def test_a_key_without_the_scales_is_red_for_the_scales() -> None:
    keys = {"w13_weight": version, "w2_weight": version}
    names = ("w13_weight_scale", "w2_weight_scale")
    assert reds(Keeps(keys)) == [after_write(name) for name in names]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_key_that_counts_writes_is_green_and_so_is_a_kernel_that_keeps_nothing(
    case: Case,
) -> None:
    names = names_of(recipes.forward_problem(case))
    assert reds(Keeps(dict.fromkeys(names, version), case), case) == []
    assert reds(eager(case), case) == []


def test_no_call_has_the_memory_of_another_variants_weights() -> None:
    """There, an address would say nothing of what was kept by it."""
    addresses = list[list[int]]()

    class Looks(EagerBackend):
        def forward(self, problem: Problem) -> Any:
            addresses.append([getattr(problem, name).data_ptr() for name in WEIGHTS])
            return super().forward(problem)

    list(launch_laws.variants(Looks(), recipes.forward_problem(PLAIN), LAW))
    assert addresses[::2] == addresses[1::2], "two calls with the same tensors"
    assert len({one for call in addresses for one in call}) == len(WEIGHTS) * (len(WEIGHTS) + 1)
