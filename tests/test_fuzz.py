"""``megamoe fuzz``: the same problems everywhere, what they reach, and that faults are found."""

from __future__ import annotations

import io
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from megamoe.backends import eager as eager_module
from megamoe.backends.eager import EagerBackend
from megamoe.cases import kind_of
from megamoe.cases.recipes import forward_problem
from megamoe.cases.stored import load
from megamoe.commands import main as cli
from megamoe.fuzz import Options, draw, run
from megamoe.fuzz.die import Die
from megamoe.fuzz.failure import shrink, store
from megamoe.fuzz.rare import RARE, classes_of
from megamoe.fuzz.step import GoldenOfOne, Result, judge_problem
from megamoe.fuzz.tally import Tally
from megamoe.golden import digest_of
from megamoe.judge import Verdict
from megamoe.oracle.folding import leaves_bf16
from megamoe.spec.contract import NEWEST, REVISIONS, contract
from megamoe.suite.at_hand import judge
from megamoe.suite.next_command import OUTLIVES
from megamoe.suite.settings import Settings
from megamoe.suite.stops import Stop, release
from tests.helpers.local import Local

DIGESTS = {
    0: "15269f3ea35fa5e9",  # nvfp4
    3: "0ad10c2074d7050a",  # small activations
    4: "5f514339d3f7dd67",  # levels
    6: "7e63e34652b06d1a",  # ties
    12: "f715afd90793978d",  # two octaves
    17: "053d4754164dc177",  # wide scales
    20: "d2a704750509a1dc",  # least scales of w13
    51: "85a2f69f93b96561",  # points, 129 tokens
    87: "028a4d14a074b6e5",  # NaN scales
    371: "6b5c6232da3f2a48",  # no tokens
}
"""Of problems of seed 1."""


def golden_of(number, revision=NEWEST.revision):
    case = draw(1, number)
    accumulator = EagerBackend.accumulator
    return GoldenOfOne(forward_problem(case), accumulator, REVISIONS[revision], case.calibrated)


def result_of(backend, case, wide=True):
    return judge_problem(wide, SimpleNamespace(session=Local(backend), timeout=60.0), case)


def asks(case):
    return kind_of("forward").features(case)


def tally():
    return Tally(Console(file=io.StringIO(), width=200))


# --- the problems -----------------------------------------------------------------------------


def test_a_die_is_a_function_of_seed_number_and_word():
    die = Die(3, 5)
    assert [die.below(word, 1000) for word in ("a", "b", "a")] == [857, 511, 857]
    assert len({die.key("a"), die.key("b"), Die(4, 5).key("a"), Die(3, 6).key("a")}) == 4
    counts = np.bincount([Die(0, n).by_weight("w", [(1, 0), (3, 1)]) for n in range(400)])
    assert 60 < counts[0] < 140
    assert {Die(0, n).within("x", -2, 1) for n in range(60)} == {-2, -1, 0, 1}


@pytest.mark.parametrize(("number", "digest"), DIGESTS.items())
def test_a_number_is_the_same_problem_everywhere(number, digest):
    """Who moves these moves what a seed means: the command of an old failure repeats another."""
    assert digest_of(forward_problem(draw(1, number)).arguments)[:16] == digest


def test_every_drawn_problem_can_be_made():
    """Recipes refuse what they do not know."""
    for number in range(1000, 1080):
        case = draw(7, number)
        assert (case.number, case.id) == (number, f"forward/fuzz-7-{number}")
        problem = forward_problem(case)
        assert problem.act.fault() == ""
        assert problem.topk_ids.shape == (case.params["tokens"], case.params["top_k"])


def test_only_data_of_the_calibrated_kinds_count_as_calibrated():
    """The statistic is for what `tools/calibrate.py` simulated: nothing rare lies in it."""
    kinds = {"two octaves", "eight octaves", "outliers", "precise, uniform"}
    every = [draw(2, n) for n in range(400)]
    some = [d for d in every if d.calibrated]
    assert {d.profile for d in some} == kinds and len(some) > 20
    for d in some:
        plain = {"patch", "weights", "octaves", "scaling"}
        assert not plain & {*d.params["hidden_recipe"], *d.params["routing_recipe"]}
        assert asks(d) == ()


# --- what they reach --------------------------------------------------------------------------

CLASSES = {
    (916, "2026-11"): [
        "scale byte of w13: 0",
        "scale byte of w13: 1",
        "hidden states: NaN",
        "hidden states: subnormal",
        "activations: not finite",
        "requantised codes: subnormal",
        "requantised codes: NaN",
        "requantised scale: up to 105",
        "routing: a masked slot",
        "top-k: 2",
        "rows of an expert: 1",
        "clamp: none",
        "fast_math: off",
        "output: NaN",
        "feature: shared-output",
    ],
    (538, "2026-11"): [
        "requantised codes: 448",
        "requantised scale: above 200",
        "routing: all tokens to one expert",
        "routing weight: not finite",
        "routing weight: negative",
        "top-k: 1",
        "clamp: small, to 1/2",
        "output: infinity",
    ],
    (689, "2026-11"): [
        "hidden states: infinity",
        "hidden states: -0",
        "hidden states: a group of zeros",
        "routing: one expert twice in a token",
        "routing weight: not finite, masked",
        "top-k: 4",
        "feature: situ",
    ],
    (105, "2026-11"): [
        "hidden states: a group below the staging floor",
        "top-k: 16",
        "clamp: 0",
        "feature: swiglu-alpha-beta",
        "feature: shared-expert",
    ],
    (666, "sgl"): [
        "scale byte of w2: 0",
        "scale byte of w2: 1",
        "rows of an expert: 129",
        "output: subnormal",
        "feature: fp8-combine",
    ],
    (1283, "2026-11"): [
        "activations: subnormal",
        "routing: a token without a slot",
        "routing weight: subnormal",
        "top-k: 3",
    ],
    (444, "2026-11"): ["routing weight: 0", "rows of an expert: 16", "feature: swiglustep"],
    (1121, "2026-11"): ["scale byte of w2: 254", "scale byte of w2: 255, NaN", "top-k: 6"],
    (10, "sgl"): ["top-k: 8", "feature: swiglu-oai"],
    (95, "2026-11"): ["scale byte of w13: 254", "top-k: 13"],
    (159, "2026-11"): ["requantised codes: a tie", "top-k: 7"],
    (602, "2026-11"): ["top-k: 14", "tokens: 0"],
    (1379, "2026-11"): ["top-k: 5", "rows of an expert: 15"],
    (0, "2026-11"): ["feature: nvfp4"],
    (11, "2026-11"): ["top-k: 10"],
    (21, "2026-11"): ["rows of an expert: 128"],
    (50, "2026-11"): ["top-k: 11"],
    (63, "2026-11"): ["top-k: 9"],
    (80, "2026-11"): ["rows of an expert: 17"],
    (125, "2026-11"): ["rows of an expert: 127"],
    (144, "2026-11"): ["scale byte of w13: 255, NaN"],
    (277, "2026-11"): ["top-k: 12"],
    (456, "2026-11"): ["top-k: 15"],
}
"""Number of seed 1 and contract -> classes of :data:`RARE`; together all of them."""


@pytest.mark.parametrize(("at", "classes"), CLASSES.items())
def test_a_problem_reaches_its_classes(at, classes):
    names = [f"{rare.dimension}: {rare.name}" for rare in RARE]
    assert set(classes) <= {names[i] for i in classes_of(golden_of(*at).instance)}


def test_every_class_is_reached_above():
    names = [name for classes in CLASSES.values() for name in classes]
    assert sorted(names) == sorted(f"{rare.dimension}: {rare.name}" for rare in RARE)


# --- judging ----------------------------------------------------------------------------------


def test_a_class_of_one_point_is_judged_bit_by_bit_and_another_by_its_envelope():
    point, free = (next(n for n in range(60) if golden_of(n).zero_freedom is p and
                        not asks(draw(1, n))) for p in (True, False))  # fmt: skip
    results = [result_of(EagerBackend(), draw(1, number)) for number in (point, free)]
    assert [(r.verdict.status, r.is_point, r.verdict.how) for r in results] == [
        ("pass", True, ("bitwise",)), ("pass", False, ("bitwise", "staged")),
    ]  # fmt: skip


class OnlyY(EagerBackend):
    def forward(self, problem):
        return super().forward(problem)["y"]


def test_the_statistic_is_asked_where_it_is_calibrated_and_nowhere_else():
    for calibrated in (True, False):
        number = next(
            n for n in range(200)
            if draw(1, n).calibrated is calibrated and draw(1, n).params["tokens"]
            and not asks(draw(1, n)) and not golden_of(n).zero_freedom
        )  # fmt: skip
        verdict = result_of(OnlyY(), draw(1, number)).verdict
        assert (verdict.status, "statistic" in verdict.how) == ("pass", calibrated)


def leaves(number):
    facts = golden_of(number).instance
    return leaves_bf16(facts.problem, facts.golden.codes, facts.golden.sf)


def test_operands_that_are_no_bfloat16_are_judged_on_demand():
    number = next(n for n in range(100) if draw(1, n).profile == "greatest scales of w13"
                  and not asks(draw(1, n)))  # fmt: skip
    assert leaves(number)
    assert result_of(EagerBackend(), draw(1, number), wide=False) == Result(None)
    assert result_of(EagerBackend(), draw(1, number)).verdict.status == "pass"
    backend = EagerBackend()
    backend.accumulator = "sm100-mxf8f6f4"  # whose operands reach the unit as they are
    assert result_of(backend, draw(1, number), wide=False).verdict is not None
    assert not leaves(12)


def test_a_backend_that_folds_scales_is_judged_where_all_operands_are_bfloat16():
    backend = EagerBackend()
    backend.folds_scales = True
    assert not leaves(12)
    assert result_of(backend, draw(1, 12), wide=False).verdict.status == "pass"
    number = next(n for n in range(100) if draw(1, n).profile == "greatest scales of w13"
                  and not asks(draw(1, n)))  # fmt: skip
    assert result_of(backend, draw(1, number), wide=True) == Result(None)


@pytest.mark.parametrize(("feature", "revision"), [("fp8-combine", "sgl"), ("nvfp4", "2026-11")])
@pytest.mark.parametrize("backend", [EagerBackend, OnlyY])
def test_no_tokens_are_judged_with_every_format(feature, revision, backend):
    """The oracle and the statistic could not take an array of no rows."""
    number = next(n for n in range(400) if asks(draw(1, n)) == (feature,))
    problem = forward_problem(draw(1, number)).at_rows(torch.zeros(0, dtype=torch.long))
    session = Local(backend(contract(revision)), contract=revision)
    verdict, _ = judge(problem, session, "none")
    assert verdict.status == "pass", verdict.reason


def test_what_megamoe_itself_raises_is_an_error_and_no_silence(monkeypatch):
    def broken(facts):
        raise KeyError("gone")

    monkeypatch.setattr("megamoe.fuzz.step.classes_of", broken)
    verdict = result_of(EagerBackend(), draw(1, 12)).verdict
    assert verdict.status == "error" and "megamoe itself raised KeyError: 'gone'" in verdict.reason


# --- faults that the recipes of the cases do not show -------------------------------------------

RIGHT_CAST = eager_module.e4m3_codes


def half_away(values, contract):
    """The cast with ties away from zero: a little above a midpoint is no tie."""
    return RIGHT_CAST(values * (1 + 2.0**-20), contract)


class HalfAway(EagerBackend):
    name = "half-away"

    def forward(self, problem):
        eager_module.e4m3_codes = half_away
        try:
            return super().forward(problem)
        finally:
            eager_module.e4m3_codes = RIGHT_CAST


class MaskedWeight(EagerBackend):
    """Takes a masked slot's part as 0 times its weight."""

    name = "masked-weight"

    def forward(self, problem):
        out = super().forward(problem)
        part = torch.where(problem.topk_ids < 0, 0 * problem.topk_weights, 0.0)
        return {**out, "y": out["y"] + part.sum(1, keepdim=True).bfloat16()}


class Row129(EagerBackend):
    """Whatever an expert has beyond 128 rows has another sign."""

    name = "row-129"

    def forward(self, problem):
        out = super().forward(problem)
        for expert in problem.topk_ids.unique().tolist():
            rows = (problem.topk_ids == expert).any(1).nonzero().flatten()
            if expert >= 0:
                out["y"][rows[128:]] *= -1
        return out


FIRST_NUMBERS = {HalfAway: (6, "ties"), MaskedWeight: (12, "two octaves"), Row129: (51, "points")}


@pytest.mark.slow
def test_three_faults_are_found_among_60_problems_and_reduced(tmp_path):
    """Each by the first number that shows it."""
    rest, numbers = {*FIRST_NUMBERS}, {}
    for number in range(60):
        case = draw(1, number)
        if "combine_dtype" in case.params:
            continue  # no feature of the newest contract
        for kind in sorted(rest, key=lambda k: k.name):
            verdict = result_of(kind(), case).verdict
            if verdict.status != "pass":
                numbers[kind] = number, case.profile
                rest.discard(kind)
    assert numbers == FIRST_NUMBERS
    for kind, (number, _) in FIRST_NUMBERS.items():
        session, case = Local(kind()), draw(1, number)
        out = tmp_path / f"{kind.name}.safetensors"
        verdict = Verdict(case.id, "forward", "fail", "as found")
        seconds = 4.0 if kind is Row129 else 60.0  # of 129 rows nothing can go, and a try is slow
        whole = store(case, verdict, out, 1, session.identity)
        small = shrink(whole, session, seconds, 60.0, lambda line: None)
        assert small.note == "" and small.verdict.status == "fail"
        record = load(out)
        assert record.about["fuzz"] == {"seed": 1, "number": number, "profile": case.profile}
        assert record.problem.num_tokens == (129 if kind is Row129 else 1)
        assert judge(record.problem, Local(EagerBackend()))[0].status == "pass"


# --- runs -------------------------------------------------------------------------------------


def red(number):
    case = draw(1, number)
    return case, Verdict(case.id, "forward", "fail", f"number {number}")


def test_the_red_of_the_lowest_number_is_the_first(tmp_path):
    """Whichever judge was the quickest."""
    outcome = run.Outcome(tally())
    for number in (9, 4, 6):
        outcome.tally.add(red(number)[0], Result(red(number)[1]))
    request = Options(1, 1.0, out=str(tmp_path / "red.safetensors"))
    run._keep(outcome, request, Local(EagerBackend()).identity, lambda n: f"again {n}")
    assert outcome.first == red(4)
    assert load(outcome.remains.path).about["fuzz"]["number"] == 4
    lines = outcome.tally.console.file.getvalue().splitlines()
    assert lines[0].startswith("3 judged in ") and lines[0].endswith("; 3 red")
    assert lines[3:] == [
        "alone: again 4",
        "red too, judged at the same time: problem 6, again 6",
        "red too, judged at the same time: problem 9, again 9",
    ]


def test_a_file_of_an_earlier_run_stays_as_it_was(tmp_path, monkeypatch):
    """The same seed and number with another backend, as a rule."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fuzz-1-4.safetensors").write_text("of an earlier run")
    outcome = run.Outcome(tally())
    outcome.tally.add(red(4)[0], Result(red(4)[1]))
    file = run._keep(outcome, Options(1, 1.0), Local(EagerBackend()).identity, str)
    assert str(file.path) == "fuzz-1-4-2.safetensors" and file.path.exists()
    assert (tmp_path / "fuzz-1-4.safetensors").read_text() == "of an earlier run"
    text = outcome.tally.console.file.getvalue()
    assert text.endswith("\nunchanged: fuzz-1-4.safetensors, from earlier runs\n")


def test_a_run_that_is_stopped_keeps_the_red_that_a_judge_found_before(monkeypatch, tmp_path):
    """Another judge was still at work: nothing had been written."""

    class Bench:
        def run(self, problems, on_start, on_result):
            on_result(red(4)[0], Result(red(4)[1]))
            raise Stop("SIGTERM", 143)

    pool = SimpleNamespace(address=SimpleNamespace(identity=Local(EagerBackend()).identity))
    monkeypatch.setattr(run, "Pool", lambda *arguments: nullcontext(pool))
    monkeypatch.setattr(run, "Judges", lambda *arguments: nullcontext(Bench()))
    monkeypatch.setattr(run, "get_ready", lambda: None)
    request = Options(1, 9.0, out=str(tmp_path / "red.safetensors"))
    try:
        outcome = run.fuzz(Settings(), request, 2, 2, tally().console)
    finally:
        release()
    assert (outcome.stop_reason, outcome.first) == ("SIGTERM", red(4))
    assert load(outcome.remains.path).about["fuzz"]["number"] == 4


def test_no_problem_begins_after_a_red_nor_after_the_seconds():
    identity = Local(EagerBackend()).identity
    counts, now = tally(), run._problems(Options(1, 60.0), identity, tally())
    numbers = [next(now).number for _ in range(3)]
    assert numbers == sorted(numbers)
    problems = run._problems(Options(1, 60.0), identity, counts)
    assert next(problems).number == numbers[0]
    counts.reds[0] = red(0)
    assert next(problems, None) is None
    assert [*run._problems(Options(1, 1e-9, None), identity, tally())] == []
    assert [d.number for d in run._problems(Options(1, 1e-9, only=33), identity, tally())] == [33]
    assert [d.number for d in run._problems(Options(1, 60.0, 3), identity, tally())] == [
        n for n in range(3) if "combine_dtype" not in draw(1, n).params
    ]  # fmt: skip


def test_a_feature_that_is_lacking_is_passed_over_and_counted():
    class Plain(EagerBackend):
        features = ()

    counts = tally()
    some = [*run._problems(Options(1, 60.0, 120), Local(Plain()).identity, counts)]
    assert all(asks(d) == () for d in some)
    assert len(some) + sum(counts.skips.values()) == 120
    assert any("does not compute" in why for why in counts.skips)
    assert any("no rule for feature fp8-combine" in why for why in counts.skips)


def test_the_summary_counts_classes_judgements_and_what_was_passed_over():
    counts = tally()
    ok = Verdict("forward/x", "forward", "pass", how=("bitwise", "staged"))
    where = next(i for i, r in enumerate(RARE) if r[:2] == ("top-k", "7"))
    counts.add(draw(1, 0), Result(ok, True, (where,)))
    counts.add(draw(1, 1), Result(ok, False, (where,)))
    counts.add(draw(1, 2), Result(None))
    counts.add(draw(1, 3), Result(Verdict("forward/y", "forward", "skip", "not this one")))
    counts.summary()
    text = counts.console.file.getvalue()
    for part in ("7: 2 ", "1 problems of zero freedom, 1 with an envelope", "bitwise 2, staged 2",
                 "passed over, 1: not this one", "passed over, 1: an operand",
                 "2 judged in", "50% zero freedom; 0 red"):  # fmt: skip
        assert part in text


def test_a_red_that_passes_in_a_fresh_process_stays_whole_and_says_so(tmp_path):
    """An earlier problem has spoiled the process: a file of one problem cannot show that."""
    session, (case, verdict) = Local(EagerBackend()), red(4)
    whole = store(case, verdict, tmp_path / "red.safetensors", 1, session.identity)
    content = whole.path.read_bytes()
    result = shrink(whole, session, 9.0, 60.0, lambda line: None)
    assert result.passes and result.note == (
        f"it is the whole problem, which passes in a fresh process: {OUTLIVES}"
    )
    assert result.path.read_bytes() == content


@pytest.mark.slow
def test_a_red_after_other_problems_is_tried_alone_and_sent_to_check(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "k.py").write_text(STALE)
    command = "megamoe fuzz --backend k.py:Stale"
    assert cli.main([*command.split()[1:], "--jobs", "1", "--workers", "1", "--problems", "9"]) == 1
    lines = capsys.readouterr().out.splitlines()
    number = int(next(line for line in lines if line.startswith("alone: ")).split()[-1])
    assert lines[-3].startswith(f"fuzz-0-{number}.safetensors: it is the whole problem, which pa")
    assert lines[-2].endswith(f"{command} --seed 0 --problems {number + 1} --jobs 1 --workers 1")
    assert lines[-1] == "next: megamoe check --backend k.py:Stale"
    assert cli.main(["replay", f"fuzz-0-{number}.safetensors", "--backend", "k.py:Stale"]) == 0


STALE = """
from megamoe.backends.eager import EagerBackend
class Stale(EagerBackend):
    calls = 0
    def forward(self, p):
        out = super().forward(p)
        self.calls += 1
        return {**out, "y": out["y"] * 2 if self.calls > 1 else out["y"]}
"""
BAD = """
from megamoe.backends.eager import EagerBackend
class Bad(EagerBackend):
    name = "bad"
    def forward(self, p):
        out = super().forward(p)
        return {**out, "y": out["y"] * 2} if p.top_k > 1 and "y" in out else out
"""


@pytest.mark.slow
def test_the_command_finds_says_how_to_repeat_and_leaves_a_file(tmp_path, capsys):
    bad, out = tmp_path / "bad.py", tmp_path / "red.safetensors"
    bad.write_text(BAD)
    again = f"megamoe fuzz --backend {bad}:Bad --seed 1 --only "
    first = next(n for n in range(20) if draw(1, n).params["top_k"] > 1
                 and not {"weight_format", "combine_dtype"} & {*draw(1, n).params})  # fmt: skip
    arguments = [*again.split()[1:], str(first), "--out", str(out)]
    assert cli.main(arguments) == 1
    text = capsys.readouterr().out
    assert f"alone: {again}{first}" in text
    *_, last, after = text.splitlines()
    assert "problems that reached" not in text and "1 judged in " in text, "a red needs no table"
    assert last == f"reproduce: megamoe replay {out} --backend {bad}:Bad"
    assert after == f"next: megamoe explain {out} --backend {bad}:Bad"
    # The small file has too few values to tell a cause: it is read from the whole problem.
    causes = load(out).about["causes"]
    assert load(out).problem.num_tokens == 1 and causes[0].startswith("  cause: ")
    assert f" of problem {first} of seed 1:\n" + "\n".join(causes) + "\n\n" in text
    assert cli.main(["fuzz", "--backend", "eager", "--problems", "4", "--jobs", "2"]) == 0
    # One of the four asks a feature that the newest contract has no rule for.
    text = capsys.readouterr().out
    assert "3 judged" in text and "problems that reached" in text
    before = out.read_bytes()
    assert cli.main(arguments) == 2
    assert "the file exists already; name another" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_misuse_is_one_line(tmp_path, capsys):
    for more, says in (
        (["--seed", "-1"], "'-1' is not a number from 0 to 2**64 - 1"),
        (["--only", "x"], "'x' is not a number from 0"),
        (["--seconds", "0"], "'0' is not a number of seconds above 0"),
        (["--out", "a.txt"], "ends in .safetensors"),
        (["--out", f"{tmp_path}/gone/a.safetensors"], "there is no folder"),
    ):
        assert cli.main(["fuzz", "--backend", "eager", *more]) == 2
        message = capsys.readouterr().err
        assert says in message and message.count("\n") == 1


def test_no_problem_of_a_dialect_is_drawn(capsys):
    """The problems are MXFP4: a right kernel of the dialect would be red on them."""
    assert cli.main(["fuzz", "--backend", "eager", "--contract", "w4a16", "--problems", "2"]) == 2
    assert "fuzz draws no problems with weights of contract w4a16" in capsys.readouterr().err
