"""The limit of a case: as asked for until one hangs, then learned from the cases that passed."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from megamoe.backends.eager import EagerBackend
from megamoe.cases import golden_root, load_cases
from megamoe.golden import Store, make
from megamoe.judge import LEARNED_LIMIT, Verdict
from megamoe.spec.contract import NEWEST
from megamoe.suite.check import _Run
from megamoe.suite.patience import ENOUGH, LEAST, TIMES, Patience
from megamoe.suite.progress import Progress
from megamoe.suite.runner import Runner
from megamoe.suite.settings import Settings
from tests.helpers.local import Local

HANGS = Verdict("forward/h", "forward", "error", "case forward/h: no result within 120 s, ...")
DURATIONS = {"forward/small": 0.1, "forward/long": 30.0}


def add_passes(patience: Patience, seconds: float, count: int = ENOUGH) -> None:
    for _ in range(count):
        assert patience.add(Verdict("forward/small", "forward", "pass", seconds=seconds)) == ""


def test_the_first_hang_shortens_the_limit_and_says_so_once() -> None:
    patience = Patience(120.0, True, DURATIONS)
    add_passes(patience, 0.3)
    assert patience.of("forward/small") is None, "nothing hangs"
    message = patience.add(HANGS)
    assert message.startswith("a case hangs; from now on one of a second has 10 s, not 120: ")
    assert "--timeout" in message and "--maxfail 1" in message
    assert patience.of("forward/small") == LEAST
    assert patience.add(HANGS) == ""


def test_a_long_case_and_a_slow_backend_keep_more_time() -> None:
    """A right case that is slow must not become a hang."""
    patience = Patience(120.0, True, DURATIONS)
    add_passes(patience, 0.3)
    patience.add(HANGS)
    assert patience.of("forward/long") is None, f"{TIMES} times 30 s is more than 120 s"
    slow = Patience(120.0, True, DURATIONS)
    add_passes(slow, 6.0)  # ten times as slow as it may be by its recorded seconds
    slow.add(HANGS)
    assert slow.of("forward/small") == TIMES * 6.0
    add_passes(slow, 12.03, 1)
    assert slow.of("forward/small") == 61, "it goes on to learn, in whole seconds"


def test_nothing_is_learned_where_somebody_asked_or_too_few_passed() -> None:
    user_limit = Patience(120.0, False, DURATIONS)
    add_passes(user_limit, 0.1)
    assert user_limit.add(HANGS) == "" and user_limit.of("forward/small") is None
    few = Patience(120.0, True, DURATIONS)
    add_passes(few, 0.1, ENOUGH - 1)
    assert few.add(HANGS) == "" and few.of("forward/small") is None
    error = Verdict("forward/h", "forward", "error", "the backend raised X")
    other = Patience(120.0, True, DURATIONS)
    add_passes(other, 0.1)
    assert other.add(error) == "" and other.of("forward/small") is None


def test_a_run_gives_the_learned_limit_to_its_next_case() -> None:
    cases = [case for case in load_cases() if case.kind == "forward"][: ENOUGH + 2]
    progress = Progress(len(cases), Console(file=io.StringIO()), Settings(), {})
    run = _Run(cases, progress, None, patience=Patience(120.0, True, {}))
    for case in cases[:ENOUGH]:
        run.on_result(case, (Verdict(case.id, case.kind, "pass", seconds=0.1), []))
    assert run.order(cases[-1]).timeout is None
    run.on_result(cases[ENOUGH], (replace(HANGS, case_id=cases[ENOUGH].id), []))
    assert run.order(cases[-1]).timeout == LEAST
    assert isinstance(progress.console.file, io.StringIO)
    assert "\na case hangs; from now on " in progress.console.file.getvalue()


@pytest.mark.parametrize("has_learned", [True, False])
def test_a_hang_within_a_learned_limit_says_whose_limit_it_was(has_learned: bool) -> None:
    class Hangs(Local):
        def ask(self, request: object, seconds: float) -> dict[str, str]:
            return {"broken": f"no result within {seconds:g} s"}

    case = next(case for case in load_cases() if case.name == "token-block-edge-t1")
    runner = Runner(Hangs(EagerBackend(NEWEST)), Store(golden_root(), make, NEWEST), None, 10.0)
    runner.has_learned = has_learned
    reason = runner.run(case).reason
    assert "no result within 10 s" in reason and reason.endswith(LEARNED_LIMIT) is has_learned
