"""Tests of a kernel in one's own pytest: problems drawn now, judged now, and no golden needed.

The kernel runs in the process of the test. So a crash ends the test run, and only inputs and
outputs are looked at. ``megamoe check`` runs the kernel in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

from megamoe.api.judging import Judgement, changed_input, judge
from megamoe.api.problems import LoadedCase, problem
from megamoe.spec.problem import Output, Problem

Forward = Callable[[Problem], Output]
"""What is tested: a problem to ``y`` (T, H) bfloat16, or to a mapping with ``y`` and stages."""


def judge_forward(
    forward: Forward, what: Problem | LoadedCase, *, accumulator: str,
    contract: str | None = None, device: str = "cpu",
) -> Judgement:  # fmt: skip
    """Call ``forward`` once with a copy of the problem on ``device``; fail the test if it is wrong.

    A kernel that writes into that copy is wrong too.

    The other arguments are those of :func:`megamoe.judge`, and so are the errors.
    """
    __tracebackhide__ = True
    original = what.problem if isinstance(what, LoadedCase) else what
    clone = _copy(original).to(device)
    output = forward(clone)
    if input_name := changed_input(clone.to("cpu").arguments, original.arguments):
        pytest.fail(f"the kernel wrote into input {input_name}", pytrace=False)
    judgement = judge(what, output, accumulator=accumulator, contract=contract)
    if not judgement.ok:
        pytest.fail(str(judgement), pytrace=False)
    return judgement


def forward_test(
    forward: Forward, shapes: Sequence[Mapping[str, Any]], *, accumulator: str,
    seeds: Sequence[int] = (0,), contract: str | None = None, device: str = "cpu",
) -> Callable[..., None]:  # fmt: skip
    """A test function for pytest: one item for each of ``shapes`` and ``seeds``.

    ``shapes``: keyword arguments of :func:`megamoe.problem`, without ``seed``. Give the result a
    name that begins with ``test``::

        test_my_shapes = forward_test(kernel.forward, SHAPES, accumulator="fp32")

    ``ValueError`` where there is nothing to test.
    """
    if not shapes or not seeds:
        raise ValueError("forward_test has no shape or no seed, and would test nothing")
    items = [
        pytest.param({**shape, "seed": seed}, id=_id(shape, seed))
        for shape in shapes for seed in seeds
    ]  # fmt: skip

    @pytest.mark.parametrize("megamoe_shape", items)
    def test(megamoe_shape: dict[str, Any]) -> None:
        __tracebackhide__ = True
        sample = problem(**megamoe_shape)
        judge_forward(forward, sample, accumulator=accumulator, contract=contract, device=device)

    test.__doc__ = "The kernel's output is right for a problem of this shape."
    return test


def _copy(problem: Problem) -> Problem:
    clones: dict[str, Any] = {
        name: value.clone() if isinstance(value, torch.Tensor) else value
        for name, value in problem.arguments.items()
    }
    return Problem(**clones)


def _id(shape: Mapping[str, Any], seed: int) -> str:
    plain = [f"{n}={v}" for n, v in shape.items() if isinstance(v, int | float | str)]
    return "-".join([*plain, f"seed={seed}"])
