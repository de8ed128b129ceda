"""Wrong calls are refused by the module in the words of its face, and the judge notices if not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megamoe.backends import load_backend
from megamoe.cases import golden_root, load_cases
from megamoe.cases.needs import ACTIONS
from megamoe.kinds.errors import complaint
from megamoe.layer import acts
from megamoe.spec.contract import BASE, REVISIONS, contract
from megamoe.spec.texts import TEXTS, has_words, restated
from megamoe.suite.runner import Runner
from tests.helpers.local import Local

HIDDEN = "DeepSeek V4 MegaMoE input staging requires hidden_size to be a multiple of 128."
FULL = "DeepSeek V4 MegaMoE got 385 tokens, but the symmetric buffer was sized for 384."
OVER = {"tokens": 385, "max_num_tokens": 384}


def ask(action: str, args: dict[str, Any], message: str, backend: Any = None) -> str:
    eager = load_backend("eager", contract=BASE.revision)
    reply = acts.ACTIONS[action](args, Local(backend or eager).service, BASE)
    return complaint(action, reply, "ValueError", message)


def test_the_contract_s_errors_leave_nothing_written() -> None:
    assert ask("over-capacity", OVER, FULL) == ""
    assert ask("staging-hidden-size", {"hidden": 96}, HIDDEN) == ""


def test_no_error_another_text_and_another_type_are_told_apart() -> None:
    fits = {"tokens": 3, "max_num_tokens": 384}
    assert "nothing was raised" in ask("over-capacity", fits, FULL)
    assert f"but got ValueError: {FULL}" in ask("over-capacity", OVER, "Too many.")
    reply = acts.ACTIONS["over-capacity"](OVER, Local(load_backend("eager")).service, BASE)
    other = complaint("over-capacity", reply, "KeyError", FULL)
    assert "expected KeyError" in other


class WritesFirst:
    name, accumulator = "writes-first", "fp32"

    def prepare(self, hidden: torch.Tensor, w: Any, i: Any, x: torch.Tensor, *rest: Any) -> None:
        x.view(torch.uint8).zero_()
        raise ValueError(HIDDEN)


def test_a_foreign_staging_kernel_may_refuse_in_any_words() -> None:
    sgl = contract("sgl")
    assert not has_words(HIDDEN, sgl)
    assert has_words(FULL, sgl) and has_words(HIDDEN, BASE)

    def describe(error: list[str] | None, names: list[str]) -> str:
        return complaint("staging", {"error": error, "written": names}, "ValueError", None)

    assert describe(["RuntimeError", "tensor match failed"], []) == ""
    assert describe(None, []) == "staging: nothing was raised; expected any exception"
    assert describe(["RuntimeError", "x"], ["x_sf"]) == (
        "staging: refused, but x_sf had been written by then"
    )


def test_writing_before_refusing_is_found() -> None:
    text = ask("staging-hidden-size", {"hidden": 96}, HIDDEN, WritesFirst())
    assert text == "staging-hidden-size: refused, but x_fp8 had been written by then"


def test_the_judge_knows_every_wrong_call_that_the_worker_can_make() -> None:
    """And what a backend must offer for each: test_suite holds the judge to saying so."""
    assert set(ACTIONS) == set(acts.ACTIONS)


# --- the words of each face -------------------------------------------------------------------


@pytest.mark.parametrize("revision", REVISIONS)
def test_every_case_is_refused_in_the_words_of_its_contract(revision):
    """The case files hold the words of vLLM 0.24."""
    session = Local(load_backend("eager", contract=revision), contract=revision)
    root = golden_root()
    cases = [case for case in load_cases(root) if case.kind == "errors"]
    verdicts = {case.id: Runner(session, None).run(case) for case in cases}
    assert len(verdicts) == 14
    assert {v.status for v in verdicts.values()} == {"pass"}, verdicts


def test_an_older_text_under_the_newer_contract_is_a_fail():
    class Older:
        name, accumulator = "older", "fp32"

        def prepare(self, *arguments):
            load_backend("eager", contract="2026-06").prepare(*arguments)

    session = Local(Older(), contract="2026-11")
    (case,) = (c for c in load_cases(golden_root()) if c.name == "staging-takes-hidden-64")
    verdict = Runner(session, None).run(case)
    assert verdict.status == "fail"
    newer = "MegaMoE input staging requires hidden_size to be a multiple of 128."
    assert f"expected ValueError: {newer} but got ValueError: DeepSeek V4 " in verdict.reason


@pytest.mark.parametrize(
    ("parameter", "newer"),
    [
        ("w2_weight", "MegaMoE w2 weight shape (4, 8) does not match the kernel shard (4, 2)"),
        ("w2_weight_scale", "Scale shape (4, 8) does not tile (4, 2)"),
    ],
)
def test_one_older_text_has_two_newer_ones(parameter, newer):
    older = TEXTS["weight-shape"].older.format(name="a.b", shard=(4, 2), loaded=(4, 8))
    assert restated(older, BASE, shard_id="w2", parameter=parameter) == older
    text = restated(older, contract("2026-11"), shard_id="w2", parameter=parameter)
    assert text == newer


def test_a_text_of_neither_face_stays_as_it_is():
    assert restated("Too many.", contract("2026-11")) == "Too many."
