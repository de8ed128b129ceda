"""The suite's own test: every planted fault turns it red, and it is said which case caught it.

The mutants are data (``helpers/mutants.py`` and the modules that it names). Each is judged by the
real cases and goldens, small ones first, until one is red.
"""

from __future__ import annotations

import functools
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from megamoe.cases import Case, golden_root, load_cases
from megamoe.golden import Store, digest_of, make, regenerate
from megamoe.judge import BAD
from megamoe.spec.contract import BASE, CONTRACTS
from megamoe.suite.runner import Runner
from tests.helpers.local import Local
from tests.helpers.mutants import MUTANTS, Mutant, build
from tests.helpers.mutants_dialects import DIALECTS
from tests.helpers.mutants_features import FEATURES
from tests.helpers.mutants_numbers import ALLOWED, NUMBERS
from tests.helpers.mutants_places import PLACES

SMALL = [*NUMBERS, *PLACES, *FEATURES, *DIALECTS]
ALL = [*MUTANTS, *SMALL]
CASES = {case.id: case for case in load_cases()}

AFFORDABLE = 3_200_000
"""Weights that a case touches at most: small shapes, judged in a fraction of a second."""


def _cost(case: Case) -> int:
    p = case.params
    experts = min(p.get("experts", 1), p.get("tokens", 1) * p.get("top_k", 1))
    return int(3 * p.get("hidden", 1) * p.get("intermediate", 1) * max(experts, 1))


@functools.cache
def small_cases(glob: str, revision: str = BASE.revision) -> tuple[Case, ...]:
    """Cases under the glob, one of each file in turn, so that every topic is met early."""
    cases = [c for c in CASES.values() if revision in c.revisions]
    selection = [c for c in cases if fnmatchcase(c.id, glob) and _cost(c) <= AFFORDABLE]
    turns: dict[str, int] = {}
    order = []
    for case in selection:
        turns[case.source.name] = turns.get(case.source.name, -1) + 1
        order.append((turns[case.source.name], case.source.name, case))
    return tuple(case for _, _, case in sorted(order, key=lambda o: o[:2]))


@functools.cache
def store_of(revision: str) -> Store:
    """Its manifest is read and checked once: that takes longer than most cases."""
    return Store(golden_root(), make, CONTRACTS[revision])


@functools.cache
def golden_and_inputs(case_id: str, revision: str) -> tuple[Any, dict[str, Any]]:
    """What a runner loads and regenerates: once for all mutants, since no judge writes into it."""
    case = CASES[case_id]
    inputs = regenerate(case)
    return store_of(revision).load(case, digest_of(inputs)), inputs


class CachedRunner(Runner):
    """A runner of one mutant that takes goldens and inputs from :func:`golden_and_inputs`."""

    def __init__(self, mutant: Mutant, folder: Path) -> None:
        super().__init__(Local(build(mutant, folder)), store_of(mutant.contract))

    def golden(self, case: Case) -> tuple[Any, dict[str, Any]]:
        return golden_and_inputs(case.id, self.store.contract.revision)


@pytest.mark.parametrize("mutant", ALL, ids=lambda m: m.name)
def test_a_planted_fault_turns_the_suite_red(
    mutant: Mutant, tmp_path: Path, record_property: pytest.FixtureRequest
) -> None:
    runner = CachedRunner(mutant, tmp_path)
    for case in small_cases(mutant.cases, mutant.contract):
        verdict = runner.run(case)
        if verdict.status in BAD:
            record_property("caught_by", case.id)  # type: ignore[operator]
            print(f"{mutant.name}: caught by {case.id}: {verdict.reason}")
            return
    pytest.fail(f"{mutant.name} survived {len(small_cases(mutant.cases, mutant.contract))} cases")


def test_a_small_fault_names_the_case_that_shows_it() -> None:
    """One case, not a glob of many: the fault is one bit here and there."""
    for mutant in SMALL:
        assert mutant.cases in CASES, mutant.name
        assert mutant.contract in CASES[mutant.cases].revisions, mutant.name


@pytest.mark.parametrize("mutant", ALLOWED, ids=lambda m: m.name)
def test_what_the_contract_allows_is_green(mutant: Mutant, tmp_path: Path) -> None:
    """The two survivors. One that a case catches belongs into the lists of faults."""
    cases = small_cases(mutant.cases)
    runner = CachedRunner(mutant, tmp_path)
    assert cases and {runner.run(case).status for case in cases} == {"pass"}


def test_the_source_without_a_fault_is_green(tmp_path: Path) -> None:
    """A copy without an edit passes the first cases of each kind: red means the fault."""
    for revision in CONTRACTS:
        runner = CachedRunner(Mutant(f"none-{revision}", "*", [], revision), tmp_path)
        for glob in {m.cases for m in ALL if m.contract == revision}:
            for case in small_cases(glob, revision)[:5]:
                assert runner.run(case).status == "pass", case.id


def test_there_are_enough_and_no_two_alike() -> None:
    assert len(MUTANTS) >= 40 and len(SMALL) >= 60 and len(ALLOWED) <= 2
    mutants = [*ALL, *ALLOWED]
    edits = {repr((m.edits, m.contract, m.cases)) for m in mutants}
    assert len({m.name for m in mutants}) == len(edits) == len(mutants)
