"""A red among others that is green alone: what a run says of it, and the case before it."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from megamoe.cases import Case, load_cases, shards
from megamoe.cases.pattern import in_order
from megamoe.commands import main as cli
from megamoe.commands import reduce_after, work
from megamoe.judge import Place, Verdict, of_findings
from megamoe.judge.judgements import of_rows
from megamoe.reduce import before, suspects
from megamoe.suite import alone, earlier, next_command
from tests.helpers import command
from tests.helpers.golden import make_golden

pytestmark = pytest.mark.usefixtures("warm")

LAYER = """
breaks = "something"
tier = "quick"
hidden = 128
intermediate = 128
experts = 2
top_k = 2
family = "envelope"
"""
CASES = f"""
[[case]]
kind = "forward"
name = "t{{tokens}}"
{LAYER}
[case.matrix]
tokens = [3, 4, 5]
"""
LAW = f"""
[[case]]
kind = "property"
name = "modes"
{LAYER}
law = "grad-mode"
tokens = 4
"""
KERNEL = """
import os

import torch

from megamoe.backends import load_backend

class Keeps:
    name = "keeps"
    accumulator = "fp32"
    before = 0

    def forward(self, problem):
        before, self.before = self.before, problem.num_tokens
        y = load_backend("eager").forward(problem)["y"]
        return y * 2 if (before, problem.num_tokens) == (3, 5) else y

class Marks(Keeps):  # t3 spoils the process, t5 shows it and heals it for good

    def forward(self, problem):
        self.before = self.before or problem.num_tokens == 3
        y = load_backend("eager").forward(problem)["y"]
        if problem.num_tokens == 5:
            self.before, y = -1, y * 2 if self.before == 1 else y
        return y

class First(Keeps):  # a cache that t3 and t5 share keeps what the first of them left

    def forward(self, problem):
        y = load_backend("eager").forward(problem)["y"]
        if problem.num_tokens == 4:
            return y
        self.before = self.before or problem.num_tokens
        return y * 2 if (self.before, problem.num_tokens) == (3, 5) else y

class Counts(Keeps):  # t5 needs both others since its last run

    def forward(self, problem):
        self.before += problem.num_tokens
        y = load_backend("eager").forward(problem)["y"]
        if problem.num_tokens == 5:
            y, self.before = y * 2 if self.before == 12 else y, 0
        return y

class Crashes(Keeps):
    def forward(self, problem):
        return os.abort() if problem.num_tokens == 4 else super().forward(problem)

class KeepsMemory(Keeps):  # memory that is made in inference mode cannot be written outside of it
    rows = None

    def forward(self, problem):
        if self.rows is None or len(self.rows) < problem.num_tokens:
            self.rows = torch.zeros(problem.num_tokens, device="cpu")
        self.rows.zero_()
        return load_backend("eager").forward(problem)["y"]

class Wrong(Keeps):
    def forward(self, problem):
        y = load_backend("eager").forward(problem)["y"]
        return y * 2 if problem.num_tokens == 5 else y
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = make_golden(tmp_path_factory.mktemp("golden"), CASES)
    (folder / "k.py").write_text(KERNEL)
    return folder


def megamoe(root: Any, verb: str, kernel: str, *arguments: str) -> Any:
    backend = f"{root}/k.py:{kernel}"
    return command.megamoe(verb, *arguments, "--backend", backend, "--golden", str(root))


def turns_of(file: Any) -> dict[str, Any]:
    """When each case of a report ran."""
    return {
        case["id"]: earlier.turn_of(case) for case in json.loads(Path(file).read_text())["cases"]
    }


def test_a_red_that_passes_alone_is_said_to(root: Any, tmp_path: Any) -> None:
    file = tmp_path / "r.json"
    names = ("--case", "t3,t5,t4", "--in-order", "--json", str(file))
    ran = megamoe(root, "check", "Keeps", *names)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "RED: 1 of 3 judged cases did not pass" in ran.stdout
    line = "forward/t5 passes alone, in a fresh process: something outlives a call ("
    assert f"\n{line}" in ran.stdout
    assert "\nforward/t5 ran in worker process 1, after 1 case: forward/t3\n" in ran.stdout
    assert "\nnext: megamoe reduce forward/t5 --after --first forward/t3 --backend " in ran.stdout
    assert turns_of(file) == {
        "forward/t3": (1, 1, 1),
        "forward/t5": (1, 2, 2),
        "forward/t4": (1, 3, 3),
    }


@pytest.mark.parametrize(
    ("turn", "names", "line"),
    [
        ((2, [1, 9]), [], "worker process 2, as its first case"),
        ((2, [3, 4]), ["begins", "long"], "worker process 2, after 2 cases: begins, long"),
        ((2, [12, 12]), ["begins", "long", "last", "amid"],
         "worker process 2, after 4 cases, the last of them long, last, amid"),
        ((4, [1, 1]), [], "worker process 4, as its first case"),
        ((0, [0, 0]), [], ""),
        ((None, "12"), [], ""),
    ],
)  # fmt: skip
def test_what_ran_before_a_case_are_those_of_its_process_that_began_before_its_last_call(
    turn: tuple[Any, Any], names: list[str], line: str
) -> None:
    turns = {"begins": (2, [2, 2]), "last": (2, [10, 10]), "amid": (2, [11, 13]),
             "elsewhere": (1, [1, 1]), "long": (2, [3, 20]), "uncalled": (None, None)}  # fmt: skip
    cases = [{"id": name, "process": p, "calls": c} for name, (p, c) in turns.items()]
    case = {"id": "this", "process": turn[0], "calls": turn[1]}
    if turn[1] == [1, 9]:
        cases = cases[1:3]
    assert earlier.earlier(case, [*cases, case]) == names
    assert earlier.line_of(case, [*cases, case]) == line


def test_the_calls_of_a_law_of_modes_are_the_first_of_a_process_and_the_last(tmp_path: Any) -> None:
    """Calls that went before would have made the memory, and hide the fault; calls that come after
    would be red by it."""
    root = make_golden(tmp_path, CASES + LAW)
    (root / "k.py").write_text(KERNEL)
    file = str(tmp_path / "r.json")
    names = ("--case", "t5,modes,t3,t4", "--in-order", "--json", file)
    ran = megamoe(root, "check", "KeepsMemory", *names)
    modes = {"property/modes": (1, 2, 2), "forward/t3": (1, 3, 3)}
    assert modes.items() <= turns_of(file).items(), "no call of a mode is one of this process"
    assert "RED: 1 of 4 judged cases did not pass" in ran.stdout, ran.stdout + ran.stderr
    assert "RuntimeError: under no mode after inference mode: RuntimeError: Inplace" in ran.stdout
    line = next(n for n, x in enumerate(KERNEL.splitlines(), 1) if "self.rows.zero_()" in x)
    mend = (
        f"\nnext: mend what raises at k.py, line {line}, in forward, then: megamoe check --backend"
    )
    assert mend in ran.stdout and "passes alone" not in ran.stdout


@pytest.mark.parametrize("kernel", ["Keeps", "Marks"])
def test_the_case_before_is_found_just_before_and_further_back(root: Any, kernel: str) -> None:
    """``Keeps`` looks at the call just before; ``Marks`` is spoiled once, and healed by its red."""
    ran = megamoe(root, "reduce", kernel, "forward/t5", "--after")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "\nforward/t5 is red after forward/t3; it passes alone: something outl" in ran.stdout
    assert " --case forward/t3,forward/t5 --in-order --golden " in ran.stdout


def test_several_that_are_red_only_together_are_said_to_be(
    root: Any, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(work, "EVERY", 0.0)  # a line before each earlier case
    argv = ["reduce", "t5", "--after", "--backend", f"{root}/k.py:Counts", "--golden", str(root)]
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    assert " s: process 3, earlier case 1 of 2\n" in err
    assert "; red after 2 together\n" in err
    assert (
        "forward/t5 passes alone; the search for an earlier case takes at most about 100 s" in out
    )
    together = "2 cases together and after none of them alone: forward/t3, forward/t4; it passes"
    assert f"\nforward/t5 is red after {together} alone: " in out
    assert cli.main([*argv, "--seconds", "0.001"]) == 2
    err = capsys.readouterr().err
    assert "was not red in 2 processes with 0 earlier cases; the time is over" in err
    assert cli.main([*argv, "--among", "t4"]) == 2
    assert "; without --among it is tried after others" in capsys.readouterr().err
    for option in ("--among", "--first"):
        assert cli.main([*argv[:2], *argv[3:], option, "t4"]) == 2
        assert f"{option}: it is of --after" in capsys.readouterr().err


def test_the_cases_of_first_are_tried_first(root: Any) -> None:
    ran = megamoe(root, "reduce", "Keeps", "forward/t5", "--after", "--first", "t4,t3")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "\ntrying it after 2 cases of --first\n" in ran.stdout and "itself" not in ran.stdout
    assert "\nforward/t5 is red after forward/t3; it passes alone: something outl" in ran.stdout


@pytest.mark.parametrize("first", ["t4,t3", "t3,t4"])
def test_a_cache_that_keeps_its_first_entry_is_found(root: Any, first: str) -> None:
    """Once the case has run after t4, its own entry is in the cache: it is green there for good."""
    ran = megamoe(root, "reduce", "First", "forward/t5", "--after", "--first", first)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "itself" not in ran.stdout, "the cases of --first are enough"
    assert "\nforward/t5 is red after forward/t3; it passes alone: something outl" in ran.stdout


class Tries(before.Search):
    """A search whose case is red after the case ``culprit``, and whose time is over after some
    tries."""

    culprit, most = "", 99

    def _try(self, earlier: Sequence[Case]) -> tuple[Any, Verdict]:
        self.tries += 1
        if self.tries > self.most:
            self._until = 0.0
            self._in_time()
        is_red = any(one.id == self.culprit for one in earlier)
        has = SimpleNamespace(device="cpu", provides=lambda name: name == "forward")
        return has, verdict("t5", "fail" if is_red else "pass")


def test_a_search_without_time_says_that_fewer_cases_may_be_enough() -> None:
    case, *some = [one for one in load_cases() if one.kind == "forward"][:9]

    def find(most: int) -> before.After:
        search = Tries(Any, Any, case, 9.0, 9.0, lambda line: None)
        search.culprit, search.most = some[5].id, most
        return search.find([], some)

    assert find(99).earlier == [some[5]] and find(99).is_least
    assert find(4).earlier == some[4:8] and not find(4).is_least  # alone, all, two halves
    with pytest.raises(ValueError, match="is over and not all was tried: `--seconds 27` goes fur"):
        find(1)
    staged = next(one for one in load_cases() if one.kind == "staging")
    with pytest.raises(ValueError, match=r"--among: staging/.* cannot run, for the backend has no"):
        Tries(Any, Any, case, 9.0, 9.0, lambda line: None).find([], [staged])
    lines = reduce_after.lines_of(find(4), case, "k.py:K", 9.0, " --device cuda")
    assert lines[1] == "the time is over (9 s): fewer than these 4 may be enough"
    assert lines[2].startswith(f"{case.id} is red after 4 cases together; it passes alone: ")
    names = ",".join(one.id for one in some[4:8])
    assert lines[-1] == (
        f"next: megamoe reduce {case.id} --after --among {names} --seconds 27 --backend k.py:K "
        "--device cuda"
    )
    assert "next: " not in "".join(reduce_after.lines_of(find(99), case, "k.py:K", 9.0, ""))


def test_what_was_found_is_named_and_many_are_counted() -> None:
    """The command after it names all of them, and shows what ran with others."""
    some = load_cases()[:9]
    digests = of_rows("y", np.zeros((9, 4), np.uint16), [1], Place(("row",)))
    red = of_findings("forward/a", "forward", [digests], ("bitwise",))

    def what(earlier: list[Case]) -> str:
        return reduce_after.after_what(before.After(earlier, red), some[0])

    assert what(some[:1]) == "itself, in its second run" and what(some[1:2]) == some[1].id
    assert what(some[1:8]) == (
        "7 cases together and after none of them alone, as where a count grows and is not reset"
    )
    many = before.After(some * 9, red, is_least=False)
    lines = reduce_after.lines_of(many, some[0], "k.py:K", 9.0, "")
    assert lines[3] == "  y: 1 of 9 rows have other bits, the first is 1"
    assert lines[4:] == [
        f"next: megamoe reduce {some[0].id} --after --seconds 27 --backend k.py:K"
    ], "no command of thousands of characters"
    lines = reduce_after.lines_of(before.After(some[:1], red), some[1], "k.py:K", 9.0, "")
    assert lines[2].endswith("the first is 1; run the reproduce line to see the elements")


def test_the_first_to_be_tried_are_as_large_and_of_the_same_sizes() -> None:
    every = {case.id: case for case in load_cases()}
    case = every["forward/many-rows-masked-slots-and-an-empty-expert"]
    others = [one for one in every.values() if one.kind in ("forward", "property")]
    first = suspects.likely(case, others, {})
    assert len(first) == suspects.LIKELY
    assert every["property/padding-rows-broken-with-masked-and-skewed-slots"] in first
    assert all(suspects._values(one) >= suspects._values(case) for one in first[:8])


def test_the_cases_just_before_it_in_a_run_are_tried_early() -> None:
    """In a run of them, these ran next to it; the cases of one kind keep their order."""
    some = [one for one in load_cases() if one.kind == "forward"][:30]
    order = shards.small_first(some, {})
    before_it = order[19 - suspects.NEAREST : 19]
    others = [one for one in some if one.id != order[19].id]
    assert suspects.nearest(order[19], others, {}) == before_it[::-1]
    assert suspects.nearest(order[0], order[1:], {}) == []


def test_after_needs_a_case_that_passes_alone_and_one_that_breaks_it(root: Any) -> None:
    ran = megamoe(root, "reduce", "Wrong", "t5", "--after")
    assert ran.returncode == 2 and "forward/t5 is red alone too, so no earlier case" in ran.stderr
    ran = megamoe(root, "reduce", "Keeps", "t4", "--after")
    assert ran.returncode == 2
    assert "forward/t4 passes alone, and was not red in " in ran.stderr


def test_a_red_that_is_red_alone_is_not_said_to_pass(root: Any) -> None:
    ran = megamoe(root, "check", "Wrong")
    assert ran.returncode == 1 and "passes alone" not in ran.stdout
    assert "\nnext: megamoe explain forward/t5 --backend " in ran.stdout


def test_a_case_that_passes_says_what_to_do_if_it_was_red_among_others(root: Any) -> None:
    more = f"megamoe reduce forward/t5 --after --backend {root}/k.py:Keeps --golden {root}`"
    ran = megamoe(root, "explain", "Keeps", "t5")
    assert ran.returncode == 0 and ran.stdout.startswith("PASS forward/t5: ")
    assert "if `check` called it red among others, something outlives a call" in ran.stdout
    assert more in ran.stdout
    ran = megamoe(root, "reduce", "Keeps", "t5")
    assert ran.returncode == 2 and "nothing to reduce; forward/t5 may be mended: `" in ran.stderr
    assert f"--golden {root}` judges it; if `check` called it red among others" in ran.stderr
    assert more in ran.stderr


def test_a_crash_has_a_place_and_is_sent_to_run_alone_only_if_it_did_not(
    root: Any, tmp_path: Any
) -> None:
    line = next(n for n, x in enumerate(KERNEL.splitlines(), 1) if "os.abort" in x)
    place = f'(SIGABRT), last seen in File "{root}/k.py", line {line} in forward'
    file = str(tmp_path / "r.json")
    ran = megamoe(root, "check", "Crashes", "--case", "t3,t4,t5", "--in-order", "--json", file)
    assert f"{place}; run it alone\n" in ran.stdout, ran.stdout
    turns = {"forward/t3": (1, 1, 1), "forward/t4": (1, 2, 2), "forward/t5": (2, 1, 1)}
    assert turns_of(file) == turns, "another process takes its place"
    assert "passes alone" not in ran.stdout
    ran = megamoe(root, "check", "Crashes", "--case", "t4")
    assert f"{place}\n" in ran.stdout
    assert "\nnext: megamoe reduce forward/t4 --backend " in ran.stdout


# --- which reds run again -------------------------------------------------------------------------


def verdict(
    name: str, status: str, reason: str = "y: 1 of 2 outside", seconds: float = 1
) -> Verdict:
    return Verdict(f"forward/{name}", "forward", status, reason, seconds=seconds)


@pytest.mark.parametrize(
    ("verdicts", "again"),
    [
        ([verdict("t5", "fail"), verdict("t3", "pass")], ["forward/t5"]),
        ([verdict("t5", "fail", seconds=3), verdict("t3", "fail"), verdict("t4", "pass")],
         ["forward/t3"]),
        ([verdict("t5", "fail"), verdict("t3", "error", "the backend ended its process (SIGSEGV)"),
          verdict("t4", "pass")], ["forward/t5", "forward/t3"]),
        ([verdict("t5", "fail"), verdict("t3", "fail")], []),
        ([verdict("t5", "fail", seconds=30), verdict("t3", "pass")], []),
        ([verdict("t5", "error", "no result within 9 s"), verdict("t3", "pass")], []),
        ([verdict("t5", "error", "the backend raised NameError: x (k.py, line 3, in forward)"),
          verdict("t3", "pass")], []),
    ],
    ids=["one", "the fastest", "of each symptom", "all are red", "slow", "a hang", "its own line"],
)  # fmt: skip
def test_one_red_of_a_symptom_runs_again_if_that_can_tell(
    root: Any, verdicts: list[Verdict], again: list[str]
) -> None:
    assert [case.id for case in alone.worth(verdicts, load_cases(root))] == again


def test_of_two_cases_the_one_that_passed_is_the_earlier_case() -> None:
    """The run that `reduce --after` names must not send back to it."""
    cases = [verdict("a", "pass").to_dict(), verdict("b", "fail").to_dict()]
    (line,) = next_command.lines_of({"backend": "K", "cases": cases}, (), {"forward/b": "pass"})
    again = "megamoe check --backend K --case forward/a,forward/b --in-order"
    assert line == f"next: mend what forward/a leaves behind, then: {again}"
    # Unless it ran in another process, where it can leave nothing behind for this one.
    turns = [{"process": number, "calls": [1, 1]} for number in (1, 2)]
    cases = [case | turn for case, turn in zip(cases, turns, strict=True)]
    lines = next_command.lines_of({"backend": "K", "cases": cases}, (), {"forward/b": "pass"})
    assert lines == ["forward/b ran in worker process 2, as its first case",
                     "next: megamoe reduce forward/b --after --backend K"]  # fmt: skip


def test_the_smallest_red_of_a_symptom_runs_again_too_where_one_passes_alone(
    root: Any, monkeypatch: Any
) -> None:
    """``reduce --after`` calls it many times, so the next command names it."""
    cases = load_cases(root)
    t3 = verdict("t3", "pass")
    bell, plain = verdict("t5", "fail", seconds=1), verdict("t4", "fail", seconds=2)
    for statuses, names in ((["pass", "pass"], ["t5", "t4"]), (["fail"], ["t5"])):
        replies = iter(statuses)
        monkeypatch.setattr(alone, "_status", lambda *arguments, replies=replies: next(replies))
        ran = alone.again(Any, root, 9.0, [t3, plain, bell], cases)
        assert ran == dict(zip([f"forward/{name}" for name in names], statuses, strict=True))
    report = {"backend": "k.py:K", "cases": [bell.to_dict(), plain.to_dict()]}
    both = {"forward/t5": "pass", "forward/t4": "pass"}
    assert next_command.lines_of(report, cases, both) == [
        "next: megamoe reduce forward/t4 --after --backend k.py:K"
    ]
    assert " reduce forward/t5 --after " in next_command.lines_of(
        report, cases, {"forward/t5": "pass", "forward/t4": "fail"}
    )[0]  # fmt: skip


def test_the_next_command_of_a_red_that_passes_alone_is_for_the_case_before() -> None:
    cases = [verdict("a", "fail").to_dict(), verdict("b", "error", "lost").to_dict()]

    def output_of(statuses: dict[str, str]) -> str:
        console = Console(file=io.StringIO(), width=150)
        report = {"backend": "k.py:K", "options": "", "cases": cases}
        lines = next_command.lines_of(report, (), statuses)
        next_command.show_next(lines, console, statuses)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    second = output_of({"forward/a": "fail", "forward/b": "pass"})
    assert second.startswith("forward/b passes alone, in a fresh process: something outlives")
    assert "(lost): megamoe reduce forward/b --after --backend k.py:K\n" in second
    assert "(y: N of N outside): megamoe show forward/a\n" in second, "that one is red alone too"
    both = {"forward/a": "pass", "forward/b": "pass"}
    assert output_of(both).count("next: ") == 1, "one thing outlives a call: look for it first"
    assert "next: megamoe reduce forward/a --after --backend k.py:K\n" in output_of(
        {"forward/a": "pass"}
    )


def test_earlier_reds_of_the_same_line_are_tried_first_and_the_line_is_named(root: Any) -> None:
    """What made one raise is likely to have made the other raise. The report is in the order of
    names, ``cases`` in that of the run."""
    reason = "the backend raised ValueError: {} (k.py, line 3, in f)"
    cases = [
        verdict("t3", "error", reason.format("a")).to_dict(),
        verdict("t4", "error", reason.format("b")).to_dict(),
        verdict("t5", "error", reason.format("c")).to_dict(),
    ]
    order = [case for name in ("t5", "t4", "t3") for case in load_cases(root) if case.name == name]
    report = {"backend": "k.py:K", "cases": cases}
    beside, line = next_command.lines_of(report, order, {"forward/t4": "pass"})
    uses = "what that line uses may be what outlives a call"
    assert beside == f"3 reds raised ValueError at k.py, line 3, in f: {uses}"
    assert line == "next: megamoe reduce forward/t4 --after --first forward/t5 --backend k.py:K"


def test_in_order_is_the_order_of_the_names(root: Any) -> None:
    cases = load_cases(root)
    assert [case.name for case in in_order(cases, "t5, forward/t4")] == ["t5", "t4"]
    for pattern, says in ((None, "--in-order needs the cases by name"), ("t*", "one case is need")):
        with pytest.raises(ValueError, match=says):
            in_order(cases, pattern)
