"""The kernel on your own shapes: ``pytest test_shapes.py`` draws and judges a problem of each."""

from typing import Any

import kernel

from megamoe.api.testing import forward_test

SHAPES: list[dict[str, Any]] = [
    {"tokens": 1, "hidden": 128, "intermediate": 128, "experts": 4, "top_k": 2},
    {"tokens": 33, "hidden": 256, "intermediate": 128, "experts": 8, "top_k": 3, "clamp": 10.0},
]
test_shapes = forward_test(
    kernel.forward, SHAPES, seeds=range(2), accumulator=kernel.Kernel.accumulator
)
