"""Reds by cause, and what a run prints of cases that are not red."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from megamoe.cases import Case, golden_root, load_cases
from megamoe.judge import Finding, Verdict, cause_of, causes, of_findings
from megamoe.suite import reds, results
from megamoe.suite.check import _Run, judge
from megamoe.suite.progress import Progress
from megamoe.suite.settings import Settings

RAISED = "the backend raised RuntimeError: no kernel for 33 tokens (k.py, line 7, in f)"


def red(name: str, status: str = "error", reason: str = RAISED, **more: Any) -> dict[str, Any]:
    kind = name.partition("/")[0]
    return {**Verdict(name, kind, status, f"case {name}: {reason}").to_dict(), **more}


def fail(name: str, outside: int, **more: Any) -> dict[str, Any]:
    found = Finding("y", 512, outside, rows={0: outside})
    return {**of_findings(name, name.partition("/")[0], [found], ("bitwise",)).to_dict(), **more}


def shown(cases: list[dict[str, Any]], pictures: int = 20) -> str:
    console = Console(file=io.StringIO(), width=150)
    reds.show({"backend": "k.py:K", "options": " --device cuda", "cases": cases}, console, pictures)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# --- the cause ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "reason", "cause"),
    [
        ("error", f"case eplb/a: {RAISED}", "RuntimeError in f: no kernel for N tokens"),
        ("error", "case eplb/a: the backend raised KeyError (k.py, line 9, in f)", "KeyError in f"),
        ("error", "case eplb/a: the backend raised X: at 0x7f3c of eplb/a (k.py, line 9, in f)",
         "X in f: at N of CASE"),
        ("error", "case eplb/a: no result within 120 s; last seen in k.py, line 3",
         "no result within N s; last seen in k.py, line N"),
        ("error", "case eplb/a: y has shape (4, 512), expected (3, 512); reshape it",
         "y has shape (N, N), expected (N, N); reshape it"),
        ("error", "build 4fd2a91c0e3b of w13_weight at -1.5e-3", "build ID of w13_weight at N"),
        ("fail", "y: 64 of 9,216 outside; x_sf: 3 of 4 outside", "y: N of N outside"),
        ("fail", "batch-invariance: token 3 alone changes 5 of 512 outputs",
         "batch-invariance: token N alone changes N of N outputs"),
        ("fail", "y: 64 of 512 outside; right under 2026-06 (requant_exponent_min 104)",
         "y: N of N outside; right under 2026-06 (requant_exponent_min N)"),
    ],
)  # fmt: skip
def test_the_cause_is_without_numbers_and_ids(status: str, reason: str, cause: str) -> None:
    assert cause_of("eplb/a", status, reason) == cause


def test_one_cause_for_one_fault_and_the_largest_first() -> None:
    cases = [fail("forward/a", 64), red("eplb/a"), red("eplb/b", reason=RAISED.replace("33", "4")),
             fail("property/a", 3), fail("forward/b", 5),
             red("eplb/c", reason=RAISED.replace("Runtime", "Value"))]  # fmt: skip
    found = causes(cases)
    assert [cause.line for cause in found] == [
        "3 cases: y: N of N outside",
        "2 cases: RuntimeError in f: no kernel for N tokens",
        "1 case: ValueError in f: no kernel for N tokens",
    ]
    assert [case["id"] for case in found[0].pictured] == ["forward/a", "property/a"]


def test_a_fail_and_an_error_of_one_text_are_two_causes() -> None:
    assert len(causes([red("eplb/a", "error", "lost"), red("eplb/b", "fail", "lost")])) == 2


def test_a_case_with_a_map_stands_for_those_without() -> None:
    cases = [fail("forward/a", 64, shortened=True), fail("forward/b", 64)]
    assert [case["id"] for case in causes(cases)[0].pictured] == ["forward/b"]


# --- at the end -----------------------------------------------------------------------------------


def test_one_picture_for_each_cause_and_kind() -> None:
    cases = [red(f"eplb/n{i}", reason=RAISED) for i in range(9)]
    text = shown([*cases, fail("forward/a", 64), fail("forward/b", 7), fail("property/a", 3)])
    assert text.startswith("12 red of 2 causes\n")
    assert "9 cases: RuntimeError in f: no kernel for N tokens  [eplb 9]" in text
    assert "3 cases: y: N of N outside  [forward 2, property 1]" in text
    assert text.count("alone:") == 3 and text.count("64 of 512 elements outside") == 1
    assert "  also eplb/n1, eplb/n2, eplb/n3, eplb/n4, eplb/n5, eplb/n6 and 2 more\n" in text
    assert "shortened: 9 reds have no picture here." in text
    assert "`megamoe check --backend k.py:K --case ID --device cuda` shows that" in text


def test_pictures_are_limited_and_no_cause_is_lost() -> None:
    cases = [red(f"eplb/{x}", reason=f"lost {x}") for x in "abc"]
    text = shown(cases, pictures=2)
    assert text.count("alone:") == 2 and "1 case: lost c" in text and "\n  eplb/c\n" in text
    assert "shortened: 1 reds have no picture here." in text
    assert "One stands for each cause and kind, at most 2 (--pictures)" in text


def test_nothing_is_said_where_nothing_was_left_out() -> None:
    assert "shortened" not in shown([red("eplb/a")])
    assert shown([{"id": "eplb/a", "kind": "eplb", "status": "pass", "reason": ""}]) == ""


def test_a_map_that_was_not_computed_is_said() -> None:
    text = shown([fail("forward/a", 64), fail("forward/b", 64, shortened=True)], pictures=1)
    assert "shortened: 1 fails came after the first 1, so a report has no map of them" in text


# --- what is kept ---------------------------------------------------------------------------------


class _Judged:
    """A runner whose cases fail."""

    brief = False
    details = ("a map",)

    def run(self, case: Case) -> Verdict:
        return of_findings(case.id, case.kind, [Finding("y", 4, 1)], ("bitwise",))


def run_of(cases: list[Case], **options: Any) -> _Run:
    console = Console(file=io.StringIO(), width=150)
    return _Run(cases, Progress(len(cases), console, Settings(), {}, **options), None, 2)


def test_a_fail_after_the_first_ones_says_that_its_map_is_left_out() -> None:
    cases = [case for case in load_cases(golden_root()) if case.kind == "forward"][:3]
    run, runner = run_of(cases), _Judged()
    for case in cases:
        runner.brief = run.brief()
        run.done(case, judge(runner, case))  # type: ignore[arg-type]
    report = {"cases": [v.to_dict() for v in run.all("")]}
    results.describe(report, cases, run.details)
    assert [c.get("shortened", False) for c in report["cases"]] == [False, False, True]
    assert [c["details"] for c in report["cases"]] == [("a map",), ("a map",), []]


def test_an_error_takes_no_map_from_a_later_fail() -> None:
    cases = [case for case in load_cases(golden_root()) if case.kind == "forward"][:3]
    run = run_of(cases)
    for case in cases[:2]:
        run.done(case, ValueError("lost"))
    assert run.brief() is False


# --- while it runs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quiet", "lines"),
    [
        (False, ["[1/4] pass         eplb/p 0.0 s", "[3/4] skip         eplb/s 0.0 s  why",
                 "[4/4] error        eplb/a 0.0 s  lost"]),
        (True, ["[4/4] error        eplb/a 0.0 s  lost"]),
    ],
)  # fmt: skip
def test_lines_of_a_run_that_nobody_watches(quiet: bool, lines: list[str]) -> None:
    console = Console(file=io.StringIO(), width=150)
    progress = Progress(4, console, Settings(), {}, quiet)
    judged = [("p", "pass", ""), ("n", "not-provided", "why"), ("s", "skip", "why"),
              ("a", "error", "case eplb/a: lost")]  # fmt: skip
    for name, status, reason in judged:
        progress.judged(Verdict(f"eplb/{name}", "eplb", status, reason))
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines() == lines


@pytest.mark.parametrize(
    ("terminal", "quiet", "said"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_the_table_alone_counts_what_is_not_provided(
    terminal: bool, quiet: bool, said: bool
) -> None:
    console = Console(file=io.StringIO(), width=150, force_terminal=terminal, color_system=None)
    verdicts = [
        Verdict("eplb/a", "eplb", "not-provided", "the backend has no eplb_map"),
        Verdict("layout/a", "layout", "skip", "the backend declined: no"),
    ]
    cases = [verdict.to_dict() for verdict in verdicts]
    counts = {"not-provided": 1, "skip": 1}
    report = {"backend": "b", "tier": "quick", "cases": cases, "counts": counts}
    results.print_summary(report, console, quiet)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert ("not-provided x 1: the backend has no eplb_map" in text) is said
    assert "skip x 1: the backend declined: no" in text, "a skip says so, with its reason"
    assert "not-provided" in text and "2 not judged" in text
