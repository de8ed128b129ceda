"""Reds by symptom at the end of a run, and what it says of cases that were not judged."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from megamoe.cases import Case, golden_root, load_cases
from megamoe.judge import (
    LEARNED_LIMIT,
    TO_CATCH,
    Finding,
    Verdict,
    of_findings,
    symptom_of,
    symptoms,
)
from megamoe.suite import next_command, reds, results
from megamoe.suite.check import _Run, judge
from megamoe.suite.progress import Progress
from megamoe.suite.settings import Settings
from megamoe.suite.summary import print_summary
from megamoe.worker.session import Identity

REASON = "the backend raised RuntimeError: no kernel for 33 tokens (k.py, line 7, in f)"


def red(name: str, status: str = "error", reason: str = REASON, **more: Any) -> dict[str, Any]:
    kind = name.partition("/")[0]
    return {**Verdict(name, kind, status, f"case {name}: {reason}").to_dict(), **more}


def fail(name: str, outside: int, **more: Any) -> dict[str, Any]:
    finding = Finding("y", 512, outside, rows={0: outside})
    return {**of_findings(name, name.partition("/")[0], [finding], ("bitwise",)).to_dict(), **more}


def view(cases: list[dict[str, Any]], pictures: int = 20) -> str:
    console = Console(file=io.StringIO(), width=150)
    reds.show({"backend": "k.py:K", "options": " --device cuda", "cases": cases}, console, pictures)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# --- the symptom ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "reason", "symptom"),
    [
        ("error", f"case eplb/a: {REASON}", "RuntimeError in f: no kernel for N tokens"),
        ("error", "case eplb/a: the backend raised KeyError (k.py, line 9, in f)", "KeyError in f"),
        ("error", "case eplb/a: the backend raised X: at 0x7f3c of eplb/a (k.py, line 9, in f)",
         "X in f: at N of CASE"),
        ("error", f"case eplb/a: {REASON}; in law padding-rows: 7 rows",
         "RuntimeError in f: no kernel for N tokens"),
        ("error", "case eplb/a: the backend raised RuntimeError: under no grad, under grad mode: "
         "ValueError: no kernel for 33 tokens (k.py, line 7, in f); in law grad-mode",
         "ValueError in f: no kernel for N tokens"),
        ("error", "case eplb/a: the backend raised RuntimeError: under no grad: ValueError: x; "
         "under grad mode: another output (k.py, line 7, in f); in law grad-mode",
         "RuntimeError in f: under no grad: ValueError: x; under grad mode: another output"),
        ("error", "case eplb/a: the backend raised RuntimeError: in a call after a was written in "
         "place, in a call after b was written in place: ValueError: no kernel for 33 tokens "
         "(k.py, line 7, in f); in law weights-in-place",
         "ValueError in f: no kernel for N tokens"),
        ("error", "case eplb/a: the backend raised RuntimeError: in a call after a was written in "
         "place: ValueError: x; in a call after b was written in place: another output "
         "(k.py, line 7, in f); in law weights-in-place",
         "RuntimeError in f: in a call after a was written in place: ValueError: x; in a call "
         "after b was written in place: another output"),
        ("error", "case eplb/a: no result within 120 s; last seen in k.py, line 3",
         "no result within N s; last seen in k.py, line N"),
        ("error", "case eplb/a: y has shape (4, 512), expected (3, 512); reshape it",
         "y has shape (N, N), expected (N, N); reshape it"),
        ("error", f"no result within 9 s; last seen in k.py, line 3{LEARNED_LIMIT}",
         "no result within N s; last seen in k.py, line N"),
        ("fail", "padding-rows: 1 padding row of NaN changes 5 of 512 outputs",
         "padding-rows: N padding rows of NaN changes N of N outputs"),
        ("fail", "padding-rows: 7 padding rows of NaN changes 5 of 512 outputs",
         "padding-rows: N padding rows of NaN changes N of N outputs"),
        ("fail", "y: 3 of 9 rows have other bits, the first is 2; run it alone to see the elements",
         "y: N of N outside"),
        ("error", "build 4fd2a91c0e3b of w13_weight at -1.5e-3", "build ID of w13_weight at N"),
        ("fail", "y: 64 of 9,216 outside; x_sf: 3 of 4 outside", "y: N of N outside"),
        ("fail", "batch-invariance: token 3 alone changes 5 of 512 outputs",
         "batch-invariance: token N alone changes N of N outputs"),
        ("fail", "y: 64 of 512 outside; right under 2026-06 (requant_exponent_min 104)",
         "y: N of N outside; right under 2026-06 (requant_exponent_min 104)"),
    ],
)  # fmt: skip
def test_the_symptom_is_without_numbers_and_ids(status: str, reason: str, symptom: str) -> None:
    assert symptom_of("eplb/a", status, reason) == symptom


def test_one_symptom_for_one_text_and_the_largest_first() -> None:
    cases = [fail("forward/a", 64), red("eplb/a"), red("eplb/b", reason=REASON.replace("33", "4")),
             fail("property/a", 3), fail("forward/b", 5),
             red("eplb/c", reason=REASON.replace("Runtime", "Value"))]  # fmt: skip
    groups = symptoms(cases)
    assert [symptom.line(6) for symptom in groups] == [
        "3 of 6 reds: y: N of N outside",
        "2 of 6 reds: RuntimeError in f: no kernel for N tokens",
        "1 of 6 reds: ValueError in f: no kernel for N tokens",
    ]
    assert [case["id"] for case in groups[0].examples] == ["forward/a"], "the law holds"
    both = symptoms([fail("staging/a", 1), fail("property/a", 1)])
    assert [case["id"] for case in both[0].examples] == ["staging/a", "property/a"]


def test_a_fail_and_an_error_of_one_text_are_two_symptoms() -> None:
    assert len(symptoms([red("eplb/a", "error", "lost"), red("eplb/b", "fail", "lost")])) == 2


def test_a_case_with_a_map_stands_for_those_without() -> None:
    cases = [fail("forward/a", 64, shortened=True), fail("forward/b", 64)]
    assert [case["id"] for case in symptoms(cases)[0].examples] == ["forward/b"]


def test_what_a_case_is_there_for_is_said_of_values_and_not_of_an_exception() -> None:
    cases = [case for case in load_cases(golden_root()) if case.name == "token-block-edge-t9"]
    (name,) = (case.id for case in cases)

    def describe(one: dict[str, Any]) -> str:
        console = Console(file=io.StringIO(), width=150)
        reds.show({"backend": "k.py:K", "cases": [one, red("eplb/a", "fail", "lost")]}, console,
                  cases=cases)  # fmt: skip
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    assert f"{TO_CATCH}: " in describe(fail(name, 1)) and TO_CATCH not in describe(red(name))


# --- at the end -----------------------------------------------------------------------------------


def test_one_picture_for_each_symptom_and_kind() -> None:
    cases = [red(f"eplb/n{i}", reason=REASON) for i in range(9)]
    text = view([*cases, fail("forward/a", 64), fail("forward/b", 7), fail("property/a", 3)])
    assert text.startswith("12 reds show 2 symptoms; one fault can show several. N stands for a")
    assert view(cases).startswith("9 reds show one symptom. N stands for a number.\n")
    assert "9 of 12 reds: RuntimeError in f: no kernel for N tokens  [eplb 9]" in text
    assert "3 of 12 reds: y: N of N outside  [forward 2, property 1]" in text
    assert (
        text.count("alone:") == 2
        and text.count("64 of 512 elements outside, counted over all tokens") == 1
    )
    assert "  also eplb/n1, eplb/n2, eplb/n3 and 5 more\n" in text
    assert text.count("left out:") == 1 and "left out: the pictures of 10 of 12 reds\n" in text
    assert "  `--pictures all` shows all, `megamoe check --backend k.py:K --case ID" in text


def test_of_several_reds_a_picture_shows_the_first_wrong_stage() -> None:
    findings = [Finding("l2_acts", 512, 64), Finding("y", 512, 9)]
    one = of_findings("forward/a", "forward", findings, ("bitwise",)).to_dict()
    cases = [one, red("eplb/a")]
    text = view(cases)
    assert "l2_acts: 64 of 512 elements outside" in text and "y: 9 of 512 elements" not in text
    assert "left out: all but the first wrong stage in each picture\n" in text
    assert "y: 9 of 512 elements" in view([one]) and "left out" not in view([one])
    assert "y: 9 of 512 elements" in view(cases, reds.ALL_PICTURES)


def test_all_pictures_leave_nothing_out() -> None:
    text = view([red(f"eplb/n{i}", reason=REASON) for i in range(9)], reds.ALL_PICTURES)
    assert text.count("alone:") == 9 and "left out" not in text and "also" not in text


def test_pictures_are_limited_and_no_symptom_is_lost() -> None:
    cases = [red(f"eplb/{x}", reason=f"lost {x}") for x in "abc"]
    text = view(cases, pictures=2)
    assert text.count("alone:") == 2 and "1 of 3 reds: lost c" in text and "\n  eplb/c\n" in text
    assert "left out: the pictures of 1 of 3 reds\n  `--pictures all` shows all" in text
    assert "--pictures" not in view(cases, pictures=0), "merge has no such option"


def test_nothing_is_said_where_nothing_was_left_out() -> None:
    assert "left out" not in view([red("eplb/a")])
    assert view([{"id": "eplb/a", "kind": "eplb", "status": "pass", "reason": ""}]) == ""


def test_one_red_is_its_picture_alone() -> None:
    assert view([red("eplb/a")]).startswith("\n  ERROR eplb/a: the backend raised")


def test_a_map_that_was_not_computed_is_said_in_the_same_line() -> None:
    text = view([fail("forward/a", 64), fail("forward/b", 64, shortened=True)], pictures=1)
    assert "left out: the pictures of 1 of 2 reds, the maps of 1 red in a report\n" in text


def law(name: str) -> dict[str, Any]:
    finding = Finding("y", 512, 5, text="batch-invariance: token 3 alone changes 5 of 512 outputs")
    return of_findings(name, "property", [finding], ("law",)).to_dict()


@pytest.mark.parametrize(
    ("cases", "line"),
    [
        ([], ""),
        ([fail("forward/a", 1)], "next: megamoe explain forward/a --backend k.py:K --device cuda"),
        ([red("forward/a")], "next: megamoe reduce forward/a --backend k.py:K --device cuda"),
        ([red("forward/a", reason="the backend raised NameError: x (k.py, line 3, in forward)")],
         "next: mend k.py, line 3, in forward, then: megamoe check --backend k.py:K "
         "--case forward/a --device cuda"),
        ([red("forward/a", reason="the backend raised TypeError: x (s.py, line 9, in _invoke)")],
         "next: mend the arguments of the backend's method, then: megamoe check --backend k.py:K "
         "--case forward/a --device cuda"),
        ([red("forward/a", reason="the backend raised RuntimeError: x (k.py, line 3, in f)")],
         "next: megamoe reduce forward/a --backend k.py:K --device cuda"),
        ([red("forward/a", reason="the backend ended its process (SIGSEGV)")],
         "next: megamoe reduce forward/a --backend k.py:K --device cuda"),
        ([red("forward/a", reason="no result within 120 s")],
         "next: megamoe reduce forward/a --backend k.py:K --device cuda"),
        ([red("forward/a", reason="no result within 120 s"),
          red("forward/b", reason="no result within 10 s")],
         "next: megamoe reduce forward/a --backend k.py:K --timeout 10 --device cuda"),
        ([red("property/a", reason="no result within 9 s for all calls of the case")],
         "next: mend this, then: megamoe check --backend k.py:K --case property/a --device cuda"),
        ([red("property/a", reason="no result within 9 s; in law capacity: more rows")],
         "next: mend this, then: megamoe check --backend k.py:K --case property/a --device cuda"),
        ([red("forward/a", reason="y has dtype float32, expected bfloat16"), law("property/a")],
         "next: for 1 of 2 reds (y has dtype float32, expected bfloat16): mend this, then: megamoe "
         "check --backend k.py:K --case forward/a --device cuda\n"
         "next: for 1 of 2 reds (batch-invariance: token N alone changes N of N outputs): mend "
         "this, then: megamoe check --backend k.py:K --case property/a --device cuda"),
        ([fail("eplb/a", 1), fail("eplb/b", 1)], "next: megamoe show eplb/a"),
        ([fail("eplb/a", 1), fail("forward/b", 1)],
         "next: megamoe explain forward/b --backend k.py:K --device cuda"),
        ([red("forward/a"), red("forward/b"), fail("forward/c", 1)],
         "next: for 1 of 3 reds (y: N of N outside): megamoe explain forward/c --backend k.py:K "
         "--device cuda\n"
         "next: for 2 of 3 reds (RuntimeError in f: no kernel for N tokens): megamoe reduce "
         "forward/a --backend k.py:K --device cuda"),
        ([fail("eplb/a", 1), red("forward/a", reason=REASON.replace("tokens", "tokens of " * 20))],
         "next: for 1 of 2 reds (RuntimeError in f: no kernel for N tokens of tokens of tokens of "
         "tokens of tokens of tokens of ...): megamoe reduce forward/a --backend k.py:K "
         "--device cuda\n"
         "next: for 1 of 2 reds (y: N of N outside): megamoe show eplb/a"),
        ([law("property/a")],
         "next: mend this, then: megamoe check --backend k.py:K --case property/a --device cuda"),
        ([red("property/a", reason=f"{REASON}; in law padding-rows: 7 padding rows of NaN")],
         "next: mend what raises at k.py, line 7, in f, then: megamoe check --backend k.py:K "
         "--case property/a --device cuda"),
        ([red("property/a")], "next: megamoe reduce property/a --backend k.py:K --device cuda"),
        ([red("property/a", reason="the backend raised NameError: x (k.py, line 3, in f); in law "
              "torch-defaults")],
         "next: mend k.py, line 3, in f, then: megamoe check --backend k.py:K --case property/a "
         "--device cuda"),
        ([law("property/a"), fail("eplb/a", 1)],
         "next: mend this (batch-invariance: token 3 alone changes 5 of 512 outputs), then: "
         "megamoe check --backend k.py:K --case property/a --device cuda"),
        ([red("forward/a", reason="no result within 120 s, last seen in k.py, line 9"),
          law("property/a")],
         "next: for 1 of 2 reds (no result within N s, last seen in k.py, line N): megamoe reduce "
         "forward/a --backend k.py:K --device cuda\n"
         "next: for 1 of 2 reds (batch-invariance: token N alone changes N of N outputs): mend "
         "this, then: megamoe check --backend k.py:K --case property/a --device cuda"),
        ([fail("staging/a", 1)],
         "next: megamoe explain staging/a --backend k.py:K --device cuda"),
        ([red("staging/a")],
         "next: mend what raises at k.py, line 7, in f, then: megamoe check --backend k.py:K "
         "--case staging/a --device cuda"),
        ([of_findings("forward/a", "forward", [Finding("inputs", 1, text="the backend wrote into "
                      "input topk_ids; 1 element, the first at [0]")], ("inputs",)).to_dict()],
         "next: mend this, then: megamoe check --backend k.py:K --case forward/a --device cuda"),
        ([fail("property/a", 1)],
         "next: megamoe explain property/a --backend k.py:K --device cuda"),
    ],
)  # fmt: skip
def test_the_next_command_can_follow_the_red(cases: list[dict[str, Any]], line: str) -> None:
    console = Console(file=io.StringIO(), width=150)
    report = {"backend": "k.py:K", "options": " --device cuda", "cases": cases}
    next_command.show_next(next_command.lines_of(report, (), {}), console)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == (f"{line}\n" if line else "")


def test_the_next_command_takes_the_red_that_tells_causes_apart() -> None:
    names = ["requantise-amax-infinite", "directed-product-order",
             "token-block-edge-t1", "token-block-edge-t9", "clamp-10-bell-misapplied",
             "bell-h256-i128-drifts", "nvfp4-bell-data-drifts"]  # fmt: skip
    cases = [case for case in load_cases(golden_root()) if case.name in names]
    reds_of_run = [fail(f"forward/{name}", 1) for name in names]

    def choice(reported: list[dict[str, Any]]) -> str:
        console = Console(file=io.StringIO(), width=150)
        report = {"backend": "k.py:K", "options": "", "cases": reported}
        next_command.show_next(next_command.lines_of(report, cases, {}), console)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue().split(" --")[0].strip()

    console = Console(file=io.StringIO(), width=150)
    reds.show({"backend": "k.py:K", "options": "", "cases": reds_of_run}, console, cases=cases)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().count(f"  {TO_CATCH}: ") == 1, "of one symptom, once"
    assert choice(reds_of_run) == "next: megamoe explain forward/bell-h256-i128-drifts"
    assert choice(reds_of_run[:2]) == "next: megamoe explain forward/directed-product-order"
    assert choice(reds_of_run[2:4]) == "next: megamoe explain forward/token-block-edge-t9"
    assert choice(reds_of_run[6:]) == "next: megamoe reduce forward/nvfp4-bell-data-drifts"


def test_a_green_of_few_cases_names_all_quick_cases() -> None:
    passed = {"id": "forward/a", "kind": "forward", "status": "pass", "reason": ""}
    report = {"backend": "k.py:K", "options": " --device cuda", "case": "forward/a"}
    line = "next: all quick cases: megamoe check --backend k.py:K --device cuda"
    assert next_command.lines_of({**report, "cases": [passed]}, (), {}) == [line]
    many = [passed] * (next_command.FEW + 1)
    assert next_command.lines_of({**report, "cases": many}, (), {}) == []
    assert next_command.lines_of({**report, "case": None, "cases": [passed]}, (), {}) == []
    skipped = {**passed, "status": "skip"}
    assert next_command.lines_of({**report, "cases": [skipped]}, (), {}) == [], "nothing is green"


def test_the_picture_is_of_the_case_that_the_next_command_names() -> None:
    names = ["token-block-edge-t1", "bell-h256-i128-drifts"]
    cases = [case for case in load_cases(golden_root()) if case.name in names]

    def pictured(shortened: bool) -> bool:
        reds_of_run = [fail(f"forward/{name}", 1) for name in names]
        reds_of_run[1]["shortened"] = shortened
        console = Console(file=io.StringIO(), width=150)
        report = {"backend": "k.py:K", "options": "", "cases": reds_of_run}
        reds.show(report, console, cases=cases)
        assert isinstance(console.file, io.StringIO)
        return "FAIL forward/bell-h256-i128-drifts" in console.file.getvalue()

    assert pictured(False)
    assert not pictured(True), "a case without a map has a poor picture"


def test_wrong_outputs_of_each_step_have_a_line() -> None:
    """Two stages of one step are one; of four sorts the three most frequent have a line."""

    def wrong(stage: str, name: str) -> dict[str, Any]:
        finding = Finding(stage, 512, 9, rows={0: 9})
        return of_findings(name, name.partition("/")[0], [finding], ("staged",)).to_dict()

    stages = [*["y"] * 4, *["l2_acts"] * 3, "l2_acts_sf", "x_sf", "x_sf"]
    cases = [wrong(stage, f"forward/{k}") for k, stage in enumerate(stages)]
    cases.append(wrong("topk_idx", "staging/a"))
    report = {"backend": "K", "options": "", "cases": cases}
    assert next_command.lines_of(report, (), {}) == [
        "next: for 4 of 11 reds (y: N of N outside): megamoe explain forward/0 --backend K",
        "next: for 3 of 11 reds (l2_acts: N of N outside): megamoe explain forward/4 --backend K",
        "next: for 2 of 11 reds (x_sf: N of N outside): megamoe explain forward/8 --backend K",
    ]


def test_a_problem_without_tokens_is_not_reduced() -> None:
    """Where a case with tokens has the same symptom, that one is reduced."""
    names = ["forward/expert-block-edge-t0", "forward/token-block-edge-t9"]
    cases = [case for case in load_cases(golden_root()) if case.id in names]
    report = {"backend": "k.py:K", "options": "", "cases": [red(name) for name in names]}
    assert next_command.lines_of(report, cases, {}) == [
        f"next: megamoe reduce {names[1]} --backend k.py:K"
    ]
    alone = {**report, "cases": report["cases"][:1]}
    assert next_command.lines_of(alone, cases, {}) == [
        "next: mend what raises at k.py, line 7, in f, then: megamoe check --backend k.py:K --case "
        f"{names[0]}"
    ]


def test_the_next_command_takes_wrong_tokens_that_show_a_pattern() -> None:
    """At a tile edge one wrong token, or a stretch of them, fits causes by chance."""
    every = {case.id: case for case in load_cases(golden_root())}

    def choice(**tokens: list[int]) -> str:
        by_id = {f"forward/token-block-edge-{name}": rows for name, rows in tokens.items()}
        findings = [Finding("y", 512, len(rows), rows=dict.fromkeys(rows, 1)) for rows in
                    by_id.values()]  # fmt: skip
        cases = [of_findings(name, "forward", [one], ("bitwise",)).to_dict()
                 for name, one in zip(by_id, findings, strict=True)]  # fmt: skip
        report = {"backend": "k.py:K", "cases": cases}
        (line,) = next_command.lines_of(report, [every[name] for name in by_id], {})
        return line.split("-edge-")[1].split()[0]

    assert choice(t15=[11], t31=[11, 18, 29]) == "t31"
    assert choice(t15=[12, 13, 14], t31=[11, 18, 29]) == "t31"
    assert choice(t15=[3, 11, 12], t31=[11, 18, 29]) == "t15"
    assert choice(t15=[*range(15)], t31=[11, 18, 29]) == "t15", "all are wrong: no place decides"
    assert choice(t15=[11], t31=[18]) == "t15"


def test_the_next_command_takes_a_red_with_enough_wrong_elements() -> None:
    """One wrong element fits too many causes, however well its data tell them apart."""
    names = ["forward/bell-h256-i128-drifts", "forward/token-block-edge-t9"]
    cases = [case for case in load_cases(golden_root()) if case.id in names]

    def choice(*counts: int) -> str:
        rows = [dict.fromkeys(range(min(n, 4)), 1) for n in counts]
        reds_of_run = [
            of_findings(name, "forward", [Finding("y", 512, n, rows=of)], ("bitwise",)).to_dict()
            for name, n, of in zip(names, counts, rows, strict=True)
        ]
        report = {"backend": "k.py:K", "cases": reds_of_run}
        return next_command.lines_of(report, cases, {})[-1].split()[3]

    assert choice(next_command.ENOUGH, 9) == names[0]
    assert choice(next_command.ENOUGH - 1, 9) == names[1]
    assert choice(1, 1) == names[0], "where none has enough, the data decide"


def test_a_red_over_ranks_is_tried_on_one_rank_and_then_without_ranks() -> None:
    report = {"backend": "k.py:K", "cases": [fail("ep/a", 1), fail("ep/b", 1)]}

    def next_lines(options: str, *callables: str) -> list[str]:
        return next_command.lines_of(
            {**report, "options": options, "callables": callables}, (), {}
        )  # fmt: skip

    over = next_lines(" --device cuda --ep 2", "forward")
    assert over[-1] == "next: megamoe check --backend k.py:K --case ep/a --ep 1 --device cuda"
    assert over[0].startswith("if this passes, the fault is between ranks")
    assert (
        next_lines(" --ep 1", "forward")[-1]
        == "next: megamoe check --backend k.py:K --kind forward"
    )
    assert next_lines(" --ep 1", "forward_group") == ["next: megamoe show ep/a"]
    assert next_lines(" --ep 16")[-1].endswith(" --ep 1")


def test_where_most_reds_pass_alone_that_comes_first_and_symptoms_are_lines() -> None:
    """A row count that is not reset: one fault, hundreds of reds, a dozen of symptoms."""
    cases = [fail(f"forward/n{i}", 64 + i) for i in range(9)]
    cases += [red(f"eplb/{x}", reason=f"lost {x}") for x in "abcdefg"]
    report = {"backend": "k.py:K", "cases": cases}

    def show_with(alone: dict[str, str], pictures: int = 20) -> tuple[list[str], bool]:
        console = Console(file=io.StringIO(), width=150)
        folded = reds.show(report, console, pictures, (), alone)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue().splitlines(), folded

    lines, folded = show_with({"forward/n1": "pass", "eplb/a": "fail"})
    assert folded and len(lines) < 15
    assert lines[0] == (
        "16 reds; 1 of 2 that ran again, each alone in a fresh process, passed: "
        + next_command.OUTLIVES
    )
    assert lines[1].startswith("That can be the cause of most. They show 8 symptoms")
    assert "    9  y: N of N outside  [forward 9]" in lines
    assert "       forward/n1 passes alone" in lines
    assert "       eplb/a is red alone too: no earlier case is needed" in lines
    assert "    3  reds of 3 further symptoms" in lines
    assert any("`--pictures all` shows all" in line for line in lines)
    both = {"forward/n1": "pass", "forward/n2": "pass"}
    assert show_with(both)[0][0].startswith("16 reds; all 2 that ran again, each alone in a fre")
    one = show_with({"forward/n1": "pass"})[0][0]
    assert one.startswith("16 reds; the one that ran again, alone in a fresh process, passed: ")
    for alone in ({}, {"forward/n1": "fail"}, {"forward/n1": "fail", "eplb/a": "pass"}):
        assert not show_with(alone)[1], "most of them are red alone, for all that is known"
    assert not show_with({"forward/n1": "pass"}, reds.ALL_PICTURES)[1]
    report["cases"] = cases[:3]
    assert not show_with({"forward/n1": "pass"})[1], "three reds fit a screen"
    report["cases"] = [*cases[:9], law("property/a")]
    lines, _ = show_with({"forward/n1": "pass", "property/a": "fail"})
    assert lines[1].startswith("That can be the cause of all. They show 2 symptoms")
    several = "is red alone too: its law makes several calls, and one call can spoil another"
    assert f"       property/a {several}" in lines


# --- what is kept ---------------------------------------------------------------------------------


class _FailingRunner:
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
    run, runner = run_of(cases), _FailingRunner()
    for case in cases:
        runner.brief = run.order(case).brief
        run.on_result(case, judge(runner, case))  # type: ignore[arg-type]
    report = {"cases": [v.to_dict() for v in run.all("")]}
    results.describe(report, cases, run.details)
    assert [c.get("shortened", False) for c in report["cases"]] == [False, False, True]
    assert [c["details"] for c in report["cases"]] == [("a map",), ("a map",), []]


def test_an_error_takes_no_map_from_a_later_fail() -> None:
    cases = [case for case in load_cases(golden_root()) if case.kind == "forward"][:3]
    run = run_of(cases)
    for case in cases[:2]:
        run.on_result(case, ValueError("lost"))
    assert run.brief() is False


# --- what is not judged ---------------------------------------------------------------------------


def summary(verdicts: list[Verdict]) -> str:
    console = Console(file=io.StringIO(), width=150)
    print_summary(results.build(Settings(), Identity("b", "fp32", ()), verdicts), console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def lacking(name: str, what: str) -> Verdict:
    return Verdict(f"eplb/{name}", "eplb", "not-provided", f"the backend has no {what}")


def test_the_end_says_why_cases_were_not_judged() -> None:
    text = summary([
        Verdict("eplb/p", "eplb", "pass"), lacking("a", "run"), lacking("b", "eplb_map"),
        lacking("c", "eplb_map"), Verdict("layout/a", "layout", "skip", "the backend declined: no"),
    ])  # fmt: skip
    assert "\n3 not provided; the backend lacks:\n  eplb_map (2)\n  run (1)\n" in text
    assert "\n1 skipped: the backend raised NotImplementedError: no\n" in text
    assert "not-provided" not in text and " skip " not in text
    partial_text = summary([Verdict("eplb/p", "eplb", "not-run", "not run: SIGINT")])
    assert "1 not run: SIGINT\n" in partial_text
    assert text.endswith(
        "GREEN: the one judged case passed; 4 of 5 not judged (3 not provided, 1 skipped)\n"
    )


def test_many_reasons_are_counted_and_those_of_two_sorts_stand_apart() -> None:
    verdicts = [lacking(str(i), f"feature {i}") for i in range(14)]
    assert "  2 other reasons (--json FILE has them)\n" in summary(verdicts)
    assert "other" not in summary(verdicts[:13]), "a line for one reason is no gain"
    verdicts = [lacking("a", "run"), Verdict("eplb/b", "eplb", "not-provided", "no GPU here")]
    text = "1 not provided: the backend lacks run\n1 more not provided: no GPU here\n"
    assert text in summary(verdicts), "what is not the backend's is not said of it"


def test_one_case_needs_no_table() -> None:
    one, two = (Verdict(f"eplb/{x}", "eplb", "pass") for x in "ab")
    assert "kind" not in summary([one]) and "kind" in summary([one, two])


def test_the_table_has_the_columns_that_are_needed() -> None:
    one, two = (Verdict(f"eplb/{x}", "eplb", "pass") for x in "ab")
    text = summary([one, two])
    assert (
        text.startswith("backend eager, tier quick\n") and "all" not in text.partition("GREEN")[0]
    )
    assert "fail" in text and "error" not in text and "not provided" not in text
    both = summary([one, Verdict("staging/a", "staging", "skip", "no")])
    assert "skipped" in both and "│ all" in both
