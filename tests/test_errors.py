"""Wrong calls are refused by the module; a kind of error case that notices when they are not."""

from __future__ import annotations

from typing import Any

import torch

from megamoe.backends import load_backend
from megamoe.kinds.errors import ACTIONS, complaint
from megamoe.layer import acts
from tests.helpers.local import Local

HIDDEN = "DeepSeek V4 MegaMoE input staging requires hidden_size to be a multiple of 128."
FULL = "DeepSeek V4 MegaMoE got 385 tokens, but the symmetric buffer was sized for 384."
OVER = {"tokens": 385, "max_num_tokens": 384}


def ask(action: str, args: dict[str, Any], message: str, backend: Any = None) -> str:
    refused = acts.ACTIONS[action](args, Local(backend or load_backend("eager")).served)
    return complaint(action, refused, "ValueError", message)


def test_the_contract_s_errors_leave_nothing_written() -> None:
    assert ask("over-capacity", OVER, FULL) == ""
    assert ask("staging-hidden-size", {"hidden": 96}, HIDDEN) == ""


def test_no_error_another_text_and_another_type_are_told_apart() -> None:
    fits = {"tokens": 3, "max_num_tokens": 384}
    assert "nothing was raised" in ask("over-capacity", fits, FULL)
    assert f"but got ValueError: {FULL}" in ask("over-capacity", OVER, "Too many.")
    refused = acts.ACTIONS["over-capacity"](OVER, Local(load_backend("eager")).served)
    other = complaint("over-capacity", refused, "KeyError", FULL)
    assert "expected KeyError" in other


class WritesFirst:
    name, accumulator = "writes-first", "fp32"

    def prepare(self, hidden: torch.Tensor, w: Any, i: Any, x: torch.Tensor, *rest: Any) -> None:
        x.view(torch.uint8).zero_()
        raise ValueError(HIDDEN)


def test_writing_before_refusing_is_found() -> None:
    found = ask("staging-hidden-size", {"hidden": 96}, HIDDEN, WritesFirst())
    assert found == "staging-hidden-size: refused, but x_fp8 had been written by then"


def test_the_judge_knows_every_wrong_call_that_the_worker_can_make() -> None:
    """And what a backend must offer for each: test_suite holds the judge to saying so."""
    assert set(ACTIONS) == set(acts.ACTIONS)
