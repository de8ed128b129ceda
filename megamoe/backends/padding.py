"""The same layer in larger sizes, for kernels that take fewer sizes than the contract."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn.functional import pad

from megamoe.spec.formats import GROUP, UE8M0_BIAS
from megamoe.spec.problem import Problem


def padded(problem: Problem, multiple: int) -> Problem:
    """``problem`` with H and I raised to multiples of ``multiple`` (itself one of 128) by zeros.

    The first H channels of its ``y`` have the bits of ``problem``'s: new channels are groups of
    their own, of zeros, and a sum does not change where products of zero follow it. NaN and
    infinity in a token do not leave it: what they make of new channels meets weights of zero, in a
    ``y`` that is NaN without them or, where the clamp stopped them, is finite.
    """
    hidden, inter = problem.hidden_size, problem.intermediate_size
    more_h, more_i = -hidden % multiple, -inter % multiple
    if not (more_h or more_i):
        return problem

    def grow(
        weight: torch.Tensor, per_byte: int, more_rows: int, more: int, zero: int = 0
    ) -> torch.Tensor:
        return pad(weight, (0, more // per_byte, 0, more_rows), value=zero)

    def both(weight: torch.Tensor, per_byte: int, zero: int = 0) -> torch.Tensor:
        halves = weight.unflatten(1, (2, inter))  # gate and up
        return grow(halves, per_byte, more_i, more_h, zero).flatten(1, 2)

    one = UE8M0_BIAS  # the byte of a scale of 1
    return replace(
        problem,
        hidden_states=pad(problem.hidden_states, (0, more_h)),
        w13_weight=both(problem.w13_weight, 2),
        w13_weight_scale=both(problem.w13_weight_scale, GROUP, one),
        w2_weight=grow(problem.w2_weight, 2, more_h, more_i),
        w2_weight_scale=grow(problem.w2_weight_scale, GROUP, more_h, more_i, one),
    )
