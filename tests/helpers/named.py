"""What ``megamoe explain`` says of each small planted fault, on the one case that shows it.

    python -m tests.helpers.named [GLOB]

Prints a line for each fault: its name, the token, the stages outside, and the names that it got:
exact, or in part with what they leave unexplained. ``tests/test_explain_faults.py`` holds the names
that are right.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from megamoe.backends.eager import EagerBackend
from megamoe.backends.simulate import problem as small_problem
from megamoe.cases import Case, load_cases
from megamoe.cases.recipes import forward_problem
from megamoe.explain import FromProblem, explain
from megamoe.golden import regenerate
from megamoe.spec.contract import REVISIONS
from megamoe.spec.problem import Problem
from megamoe.spec.stages import STAGES
from megamoe.suite.at_hand import run
from tests.helpers.local import Local
from tests.helpers.mutants import Mutant, build
from tests.helpers.mutants_features import FEATURES
from tests.helpers.mutants_numbers import NUMBERS
from tests.helpers.mutants_places import PLACES

SMALL = [*NUMBERS, *PLACES, *FEATURES]
CLASS = "fp32-ordered"
"""The accumulator class of ``eager``, which every mutant copies."""
Stages = dict[str, Any]


@dataclass(frozen=True)
class Explanation:
    """What ``explain`` says of one fault."""

    token: int
    outside: tuple[str, ...]
    exact: tuple[str, ...]
    partial: tuple[str, ...]
    """Names, each with the values that it explains and those that it leaves wrong."""


@cache
def cases() -> dict[str, Case]:
    return {case.id: case for case in load_cases()}


def is_followed(mutant: Mutant) -> bool:
    """Whether the fault shows in a stage of a forward that ``explain`` follows."""
    case = cases()[mutant.cases]
    if case.params.get("weight_format") == "nvfp4" or "unpadded" in case.params:
        return False
    return case.kind in ("forward", "staging")


@cache
def problem_of(case_id: str) -> Problem:
    """The forward of a case. That of a staging case is a small layer with its hidden states."""
    case = cases()[case_id]
    if case.kind == "forward":
        return forward_problem(case)
    hidden = regenerate(case)["hidden_states"]
    tokens, width = hidden.shape
    problem = small_problem(case.seed, tokens=tokens, hidden=width, capacity=tokens, experts=2)
    return replace(problem, hidden_states=hidden)


@cache
def right(case_id: str, revision: str) -> Stages:
    """The stages of the unchanged ``eager``."""
    return run(problem_of(case_id), Local(EagerBackend(REVISIONS[revision])))


def place(actual: Stages, expected: Stages) -> tuple[int, int] | None:
    """The token that differs most in the first stage that differs, and a channel of its ``y``."""
    for stage in STAGES:
        if stage not in actual:
            continue
        differ = (actual[stage] != expected[stage]).reshape(len(actual[stage]), -1).sum(axis=1)
        if differ.any():
            token = int(differ.argmax())
            return token, int((actual["y"][token] != expected["y"][token]).argmax())
    return None


def explanation_of(mutant: Mutant, folder: Path) -> Explanation | None:
    """What ``explain`` says of the fault; None where it moves no stage."""
    problem = problem_of(mutant.cases)
    stages = run(problem, Local(build(mutant, folder)))
    at = place(stages, right(mutant.cases, mutant.contract))
    if at is None:
        return None
    rows = {stage: tensor[at[0]] for stage, tensor in stages.items()}
    contract = REVISIONS[mutant.contract]
    report = explain(FromProblem(problem), *at, CLASS, rows, contract=contract)["actual"]
    outside = tuple(s["stage"] for s in report["stages"] if s["outside"])
    exact, partial = (
        tuple(name for step in report["explanations"] for name in _names(step, kind))
        for kind in ("exact", "partial")
    )
    return Explanation(at[0], outside, exact, partial)


def _names(step: dict[str, Any], kind: str) -> Iterator[str]:
    for way in step[kind]:
        remainder = way["unexplained"] + way["contradicts"]
        where = f" ({way['where']})" if way["where"] else ""
        yield f"{way['what']}{where}" + (
            "" if kind == "exact" else f": explains {way['explains']}, leaves {remainder}"
        )


def main() -> None:
    """Print what is said of every fault under a glob."""
    glob = sys.argv[1] if len(sys.argv) > 1 else "*"
    for mutant in SMALL:
        if not fnmatchcase(mutant.name, glob) or not is_followed(mutant):
            continue
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            answer = explanation_of(mutant, Path(folder))
        spent = time.perf_counter() - start
        print(f"{mutant.name} [{mutant.cases} {mutant.contract}, {spent:.1f} s]", flush=True)
        if answer is None:
            print("    moves no stage")
            continue
        print(f"    token {answer.token}: {', '.join(answer.outside) or 'nothing is outside'}")
        for kind in ("exact", "partial"):
            for name in np.unique(getattr(answer, kind)):
                print(f"    {kind}: {name}", flush=True)


if __name__ == "__main__":
    main()
