"""What a run prints while it lasts: first lines, reds, progress; and the order of its cases."""

from __future__ import annotations

import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from rich.console import Console

from megamoe.cases import Case, form_of, golden_root, load_cases, needs
from megamoe.cases.shards import durations, small_first
from megamoe.commands import shared
from megamoe.judge import Verdict
from megamoe.suite import check
from megamoe.suite.pace import Pace
from megamoe.suite.progress import LINE_LIMIT, Progress
from megamoe.suite.settings import Settings
from megamoe.worker.session import Identity


@pytest.mark.parametrize(
    ("verbose", "lines"),
    [
        (True, ["[1/3] pass eplb/p 0.0 s", "[2/3] skipped eplb/s 0.0 s  why",
                "[3/3] error eplb/a 0.0 s  lost"]),
        (False, ["[3/3] error eplb/a 0.0 s  lost"]),
    ],
)  # fmt: skip
def test_lines_of_a_run_that_nobody_watches(verbose: bool, lines: list[str]) -> None:
    console = Console(file=io.StringIO(), width=150)
    progress = Progress(3, console, Settings(), {}, verbose=verbose)
    verdicts = [("p", "pass", ""), ("s", "skip", "why"), ("a", "error", "case eplb/a: lost")]
    for name, status, reason in verdicts:
        progress.on_verdict(Verdict(f"eplb/{name}", "eplb", status, reason))
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines() == lines


def test_what_a_backend_lacks_takes_no_number_of_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """N is known at the start and stays, also for what only the case itself says: a law that needs
    CUDA, ranks, or a call that is to be refused."""
    every = load_cases()

    def first(**criteria: str) -> Case:
        return next(c for c in every if criteria.items() <= {"kind": c.kind, **c.params}.items())

    asks = next(c for c in every if "shared-expert" in form_of(c.kind).features(c))
    law = next(c for c in every if (c.kind, c.params.get("law")) == ("property", "busy-stream"))
    lacks = [first(kind="layout"), first(kind="ep"), law, asks, first(action="staging-shapes")]
    eplb, forward = first(kind="eplb"), first(kind="forward")
    console = Console(file=io.StringIO(), width=150)
    progress = Progress(7, console, Settings(), {}, verbose=True)
    offers = Identity("b", "fp32", ("eplb_map", "forward", "run"))
    progress.expect([*lacks, eplb, forward], offers)
    monkeypatch.setattr("megamoe.cases.kind.has_gpu", lambda: False)
    assert [needs.lacking(case, offers) for case in lacks] == [
        "the backend has no transform_weights",
        "the run has no team of ranks; use --ep N, or torchrun",
        "law busy-stream needs a CUDA device, and the machine has none",
        "the backend has no feature shared-expert", "the backend has no prepare",
    ]  # fmt: skip
    progress.on_verdict(Verdict(eplb.id, "eplb", "pass"))
    for case in lacks:
        progress.on_verdict(Verdict(case.id, case.kind, "not-provided", "lacks it"))
    progress.on_verdict(Verdict(forward.id, "forward", "pass"))
    assert isinstance(console.file, io.StringIO)
    scope, contract, *lines = console.file.getvalue().splitlines()
    assert scope == "7 cases of the quick tier" and contract.endswith("; 5 cases not provided")
    assert [line.split()[0] for line in lines] == ["[1/2]", "[2/2]"]


def test_a_run_that_nobody_watches_says_now_and_then_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr("megamoe.suite.progress.time", SimpleNamespace(monotonic=lambda: now[0]))

    def lines(quiet: bool) -> list[str]:
        now[0] = 0.0
        console = Console(file=io.StringIO(), width=150)
        progress = Progress(9, console, Settings(), {}, quiet)
        progress.backlog = 9.0
        for i, second in enumerate((29, 31, 59, 62)):
            now[0] = second
            progress.on_verdict(Verdict(f"eplb/{i}", "eplb", "pass", seconds=15.0))
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue().splitlines()

    assert lines(quiet=True) == []
    # Seven and five cases are left, of nearly 15 s each, as those that have run.
    assert lines(quiet=False) == [
        "[2/9] 0 reds, about 2 min left", "[4/9] 0 reds, about 74 s left",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "seconds",
    [
        pytest.param(lambda duration: duration, id="as recorded"),
        pytest.param(lambda duration: duration + 0.4, id="each call starts anew"),
        pytest.param(lambda duration: duration * 5, id="slow"),
        pytest.param(lambda duration: duration * 0.2 + 0.03, id="fast"),
    ],
)
def test_the_time_left_is_that_of_this_backend(seconds: Callable[[float], float]) -> None:
    """By the recorded durations of all cases, in the order of a run, on two workers."""
    by_id = durations(golden_root())
    order = [by_id[case.id] for case in small_first(load_cases(), by_id)
             if case.id in by_id]  # fmt: skip
    free, runs = [0.0, 0.0], []
    for duration in order:
        start = min(free)
        free[free.index(start)] = start + seconds(duration)
        runs.append((start, start + seconds(duration), duration))
    for share in (0.25, 0.5, 0.75):
        now, pace = share * max(free), Pace()
        for _, end, duration in runs:
            if end <= now:
                pace.add(duration, seconds(duration))
        waiting = [duration for start, _, duration in runs if start > now]
        running = [(duration, now - start) for start, end, duration in runs if start <= now < end]
        estimate = pace.eta(len(waiting), sum(waiting), running, 2)
        assert estimate == pytest.approx(max(free) - now, rel=0.25)


def test_the_time_left_is_at_least_that_of_the_longest_case() -> None:
    assert Pace().eta(4, 2.0, [(9.0, 1.0)], 5) == pytest.approx(8.0)
    assert Pace().eta(1, 2.0, [], 8) == pytest.approx(2.0), "one case has one worker"


def test_a_bar_that_no_terminal_shows_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shared, "LINE_SECONDS", -1.0)
    console = Console(file=io.StringIO(), width=150)
    with shared.progress("coverage", 2, console) as on_result:
        for case in load_cases()[:2]:
            on_result(case, "")
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert lines == ["coverage: 1 of 2 cases", "coverage: 2 of 2 cases"]


def on_the_way(verdicts: list[Verdict], **options: Any) -> list[str]:
    console = Console(file=io.StringIO(), width=150)
    with Progress(len(verdicts), console, Settings(), {}, **options) as progress:
        for verdict in verdicts:
            progress.on_verdict(verdict)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_on_the_way_each_symptom_has_one_line() -> None:
    errors = [Verdict(f"eplb/{i}", "eplb", "error", f"lost {i}") for i in range(5)]
    lines = on_the_way([*errors, Verdict("eplb/x", "eplb", "error", "hangs")])
    assert [line.split(" ", 1)[0] for line in lines] == ["[1/6]", "further", "[6/6]"]
    assert lines[1].startswith("further reds of listed symptoms: see the end")
    assert len(on_the_way(errors, verbose=True)) == 5


def test_on_the_way_there_are_few_lines_even_of_many_symptoms() -> None:
    lines = on_the_way([Verdict(f"eplb/{x}", "eplb", "error", x * 9) for x in "ghijklmnopqrstu"])
    assert len(lines) == LINE_LIMIT + 1


def test_one_red_alone_has_its_picture_only() -> None:
    assert on_the_way([Verdict("eplb/a", "eplb", "error", "lost")]) == []


# --- the order and the first line -----------------------------------------------------------------


def test_small_cases_of_every_kind_run_first_and_then_the_longest() -> None:
    cases = {c.id: c for c in load_cases()}
    kinds = {k: [c.id for c in cases.values() if c.kind == k][:3] for k in ("eplb", "forward")}
    (e1, e2, e3), (f1, f2, f3) = kinds["eplb"], kinds["forward"]
    seconds = {e1: 0.1, e2: 0.2, e3: 0.3, f1: 0.4, f2: 7.0, f3: 9.0}
    ordered = small_first([cases[name] for name in (f2, e3, f1, e2, f3, e1)], seconds)
    assert [case.id for case in ordered] == [e1, f1, e2, e3, f3, f2]


def test_check_judges_in_this_order(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[Case] = []

    class Fake:
        """A pool and judges that note what they are asked."""

        address = SimpleNamespace(
            identity=Identity("b", "fp32", ("eplb_map",), facts={"processor": "x"})
        )
        sources: ClassVar[dict[str, str]] = {}

        def __init__(self, *arguments: Any) -> None: ...
        def __enter__(self) -> Fake:
            return self

        def __exit__(self, *exc_info: object) -> None: ...
        def run(self, cases: list[Case], *arguments: Any) -> None:
            order.extend(cases)

    for name in ("Pool", "Judges"):
        monkeypatch.setattr(check, name, Fake)
    monkeypatch.setattr(check, "get_ready", lambda: None)
    check.check(Settings(), 1, 1, Console(file=io.StringIO()))
    assert order == small_first(order, durations(golden_root()))
    assert len({case.kind for case in order[:10]}) > 5, "each kind has its turn"


def test_the_first_line_says_which_tier_and_why() -> None:
    every = load_cases()
    quick, full = ([c for c in every if c.tier == tier] for tier in ("quick", "full"))
    cases = [*quick[:2], *full[:7]]
    scope = "9 cases of the full tier"
    assert Settings(case="x").scope(cases) == f"{scope} (a pattern was given; --tier quick: 2)"
    assert Settings(failed="r").scope(cases) == f"{scope} (--failed was given; --tier quick: 2)"
    assert Settings(case="x", tier="full").scope(cases) == scope
    assert Settings(case="x").scope(quick[:2]) == "2 cases"
    assert Settings(shard="1/2").scope(cases) == "9 cases of the quick tier, shard 1/2"
