"""The kernel on your own shapes, each drawn and judged when the test runs: ``pytest test_shapes.py``."""

import kernel

from megamoe.api.testing import forward_test

SHAPES = [
    {"tokens": 1, "hidden": 128, "intermediate": 128, "experts": 4, "top_k": 2},
    {"tokens": 33, "hidden": 256, "intermediate": 128, "experts": 8, "top_k": 3, "clamp": 10.0},
]
test_shapes = forward_test(
    kernel.forward, SHAPES, seeds=range(2), accumulator=kernel.Kernel.accumulator
)
