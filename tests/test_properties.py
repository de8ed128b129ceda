"""Each law turns red for a forward that breaks it, and stays green for one that does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megamoe.problem import Problem
from megamoe.suite import properties


def problem(tokens: int = 6) -> Problem:
    """Six tokens, two slots, four experts whose first weight byte tells them apart."""
    experts = torch.arange(4, dtype=torch.uint8).view(4, 1, 1)
    ids = torch.tensor([[0, 1], [2, -1], [1, 2], [0, 2], [-1, 0], [1, 0]])[:tokens]
    return Problem(
        hidden_states=torch.arange(1.0, 1 + tokens * 128).view(tokens, 128).bfloat16(),
        topk_ids=ids,
        topk_weights=torch.full((tokens, 2), 0.5),
        w13_weight=experts.expand(4, 256, 64).contiguous(),
        w13_weight_scale=torch.full((4, 256, 4), 127, dtype=torch.uint8),
        w2_weight=experts.expand(4, 128, 64).contiguous(),
        w2_weight_scale=torch.full((4, 128, 4), 127, dtype=torch.uint8),
        activation_clamp=None,
        fast_math=True,
        max_num_tokens=384,
    )


def honest(p: Problem) -> torch.Tensor:
    """A toy layer: hidden times the live slots' weights times a number of each slot's expert."""
    live = p.topk_ids >= 0
    number = 1.0 + p.w13_weight[p.topk_ids.clamp_min(0), 0, 0].float()
    total = torch.where(live, p.topk_weights * number, 0.0).sum(1, keepdim=True)
    return torch.where(live.any(1, keepdim=True), p.hidden_states.float() * total, 0.0).bfloat16()


def counting() -> Callable[[Problem], torch.Tensor]:
    calls = iter(range(100))
    return lambda p: honest(p) + next(calls)


def leaking() -> Callable[[Problem], torch.Tensor]:
    """Adds a row that the call before left in its buffer."""
    left = [torch.zeros(128)]

    def forward(p: Problem) -> torch.Tensor:
        out = honest(p).float() + left[0].clamp(-1, 1)
        left[0] = torch.where(p.hidden_states[0].abs().float() > 1e20, 1.0, 0.0)
        return out.bfloat16()

    return forward


BROKEN: dict[str, Callable[[Problem], torch.Tensor]] = {
    "batch-invariance": lambda p: honest(p) * (2.0 if p.num_tokens == 1 else 1.0),
    "token-permutation": lambda p: honest(p) + torch.arange(p.num_tokens).unsqueeze(1) * 512,
    "replica-choice": lambda p: honest(p) * torch.where(p.topk_ids.amax(1, True) > 3, 2.0, 1.0),
    "ep-size": lambda p: honest(p) * torch.where((p.topk_ids == 0).any(1, True), 2.0, 1.0),
    "capacity": lambda p: honest(p) * (2.0 if p.max_num_tokens > 8000 else 1.0),
    "padding-rows": lambda p: honest(p) + 0 * p.hidden_states.float().sum().bfloat16(),
    "masked-slots": lambda p: honest(p) * p.topk_weights.sum(1, keepdim=True),
}


@pytest.mark.parametrize("law", properties.LAWS)
def test_a_lawful_forward_keeps_every_law(law: str) -> None:
    assert not [f.text for f in properties.findings(honest, problem(), law) if f.bad]


@pytest.mark.parametrize("law", properties.LAWS)
def test_breaking_a_law_is_found_and_named(law: str) -> None:
    forward = {"repeat": counting(), "stale-buffer": leaking()}.get(law) or BROKEN[law]
    bad = [f for f in properties.findings(forward, problem(), law) if f.bad]
    assert bad
    assert bad[0].text.startswith(f"{law}: ")
    assert bad[0].worst is not None


def test_an_unknown_law_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown law 'gravity'; known: repeat, "):
        list(properties.variants(problem(), "gravity"))
