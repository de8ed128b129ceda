"""The public API, with its types: `mypy --strict` accepts this file, and refuses a wrong call.

python examples/own_shapes.py
pytest examples/own_shapes.py
"""

from typing import Any

import kernel

import megamoe
from megamoe.api.testing import forward_test

SHAPES: list[dict[str, Any]] = [
    {"tokens": 1, "hidden": 128, "intermediate": 128, "experts": 4, "top_k": 2},
    {"tokens": 9, "hidden": 256, "intermediate": 128, "experts": 8, "top_k": 3, "clamp": 10.0},
]
test_my_shapes = forward_test(kernel.forward, SHAPES, seeds=range(2), accumulator="fp32")


def show(tokens: int) -> megamoe.Judgement:
    """Judge one problem, and print what the judge says."""
    problem: megamoe.Problem = megamoe.problem(
        tokens=tokens, hidden=256, intermediate=128, experts=8, top_k=2
    )
    judgement = megamoe.judge(problem, kernel.forward(problem), accumulator="fp32")
    print(judgement)
    return judgement


def refusals() -> None:
    """A type checker names each of these lines, so each needs its comment."""
    megamoe.judge(5, 6)  # type: ignore[arg-type]
    megamoe.problem(tokens="4", hidden=128, intermediate=128, experts=1, top_k=1)  # type: ignore[arg-type]


if __name__ == "__main__":
    right: bool = show(tokens=5).ok
    ids: list[str] = [case.id for case in megamoe.cases("forward/token-block-*", tier="quick")]
    print(right, len(ids))
