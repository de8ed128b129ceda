"""The suite's own test: every planted fault turns it red, and it is said which case caught it.

The mutants are data (``helpers/mutants.py``). Each is judged by the real cases and goldens, small
ones first, until one is red.
"""

from __future__ import annotations

import functools
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from megamoe.cases import Case, golden_root, load_cases
from megamoe.golden import Store, make
from megamoe.judge import BAD
from megamoe.spec.contract import BASE
from megamoe.suite.runner import Runner
from tests.helpers.local import Local
from tests.helpers.mutants import MUTANTS, Mutant, build

AFFORDABLE = 3_000_000
"""Weights that a case touches at most: small shapes, judged in a fraction of a second."""


def _cost(case: Case) -> int:
    p = case.params
    touched = min(p.get("experts", 1), p.get("tokens", 1) * p.get("top_k", 1))
    return int(3 * p.get("hidden", 1) * p.get("intermediate", 1) * max(touched, 1))


@functools.cache
def small_cases(glob: str) -> tuple[Case, ...]:
    """Cases under the glob, one of each file in turn, so that every topic is met early."""
    known = [c for c in load_cases() if BASE.revision in c.revisions]
    chosen = [c for c in known if fnmatchcase(c.id, glob) and _cost(c) <= AFFORDABLE]
    turns: dict[str, int] = {}
    order = []
    for case in chosen:
        turns[case.source.name] = turns.get(case.source.name, -1) + 1
        order.append((turns[case.source.name], case.source.name, case))
    return tuple(case for _, _, case in sorted(order, key=lambda o: o[:2]))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_planted_fault_turns_the_suite_red(
    mutant: Mutant, tmp_path: Path, record_property: pytest.FixtureRequest
) -> None:
    backend = build(mutant, tmp_path)
    runner = Runner(Local(backend), Store(golden_root(), make, BASE))
    for case in small_cases(mutant.cases):
        verdict = runner.run(case)
        if verdict.status in BAD:
            record_property("caught_by", case.id)  # type: ignore[operator]
            print(f"{mutant.name}: caught by {case.id}: {verdict.reason}")
            return
    pytest.fail(f"{mutant.name} survived {len(small_cases(mutant.cases))} cases")


def test_the_source_without_a_fault_is_green(tmp_path: Path) -> None:
    """A copy without an edit passes the first cases of each kind: red means the fault."""
    backend = build(Mutant("none", "*", []), tmp_path)
    runner = Runner(Local(backend), Store(golden_root(), make, BASE))
    for glob in {m.cases for m in MUTANTS}:
        for case in small_cases(glob)[:5]:
            assert runner.run(case).status == "pass", case.id


def test_there_are_at_least_forty_and_no_two_alike() -> None:
    assert len(MUTANTS) >= 40
    assert len({m.name for m in MUTANTS}) == len({repr(m.edits) for m in MUTANTS}) == len(MUTANTS)
