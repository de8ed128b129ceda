"""Wrong calls are refused by the module; a kind of error case that notices when they are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megamoe.backends import load_backend
from megamoe.suite.errors import NotProvided, complaint

HIDDEN = "DeepSeek V4 MegaMoE input staging requires hidden_size to be a multiple of 128."
FULL = "DeepSeek V4 MegaMoE got 385 tokens, but the symmetric buffer was sized for 384."
OVER = {"tokens": 385, "max_num_tokens": 384}


def ask(action: str, args: dict[str, Any], message: str, backend: Any = None) -> str:
    return complaint(action, args, "ValueError", message, backend or load_backend("eager"))


def test_the_contract_s_errors_leave_nothing_written() -> None:
    assert ask("over-capacity", OVER, FULL) == ""
    assert ask("staging-hidden-size", {"hidden": 96}, HIDDEN) == ""


def test_no_error_another_text_and_another_type_are_told_apart() -> None:
    fits = {"tokens": 3, "max_num_tokens": 384}
    assert "nothing was raised" in ask("over-capacity", fits, FULL)
    assert f"but got ValueError: {FULL}" in ask("over-capacity", OVER, "Too many.")
    other = complaint("over-capacity", OVER, "KeyError", FULL, load_backend("eager"))
    assert "expected KeyError" in other


class WritesFirst:
    name, accumulator = "writes-first", "fp32"

    def prepare(self, hidden: torch.Tensor, w: Any, i: Any, x: torch.Tensor, *rest: Any) -> None:
        x.view(torch.uint8).zero_()
        raise ValueError(HIDDEN)


def test_writing_before_refusing_is_found() -> None:
    found = ask("staging-hidden-size", {"hidden": 96}, HIDDEN, WritesFirst())
    assert found == "staging-hidden-size: refused, but x_fp8 had been written by then"


def test_a_backend_without_the_callable_is_not_provided() -> None:
    with pytest.raises(NotProvided, match="forward"):
        ask("over-capacity", OVER, FULL, WritesFirst())


def test_an_unknown_action_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown action 'sing'; known: over-capacity, "):
        ask("sing", {}, "")
