"""The larger case that ``megamoe explain`` names: one that has what the red one has."""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
import pytest

from megamoe.backends.eager import EagerBackend
from megamoe.cases import Case, load_cases
from megamoe.commands import explain_larger, show
from megamoe.commands.explain_larger import smaller
from megamoe.judge import Verdict
from megamoe.suite.routed import Routed
from megamoe.suite.similar import larger, of_tiles
from megamoe.suite.telling import smallest, telling
from tests.helpers.local import Local


def by_name(*names: str) -> list[Case]:
    return [case for case in load_cases() if case.kind == "forward" and case.name in names]


def test_a_case_of_several_tokens_and_slots_tells_more():
    cases = by_name("bell-h256-i128-drifts", "token-block-edge-t1", "token-block-edge-t9")
    assert {case.name: telling(case) for case in cases} == {
        "bell-h256-i128-drifts": 2, "token-block-edge-t1": 0, "token-block-edge-t9": 1,
    }  # fmt: skip
    best = smallest(cases)
    assert best is not None and best.name == "bell-h256-i128-drifts"
    assert smallest([]) is None


def test_rows_of_one_expert_tell_more_where_some_of_them_are_wrong():
    """More than a lattice of few values; if all tokens are wrong, an expert may be the cause."""
    skewed, rows, best = (
        by_name(name)[0] for name in ("skewed-routing-overflows-one-expert-t40",
                                      "bell-one-expert-t65-bad-row-hidden", "bell-h256-i128-drifts")
    )  # fmt: skip
    halves = {rows.id: [at for at in range(65) if at % 16 >= 8], skewed.id: [9, 25, 32, 39]}
    assert smallest([skewed, rows], halves) is rows
    assert smallest([skewed, rows], {**halves, rows.id: range(65)}) is skewed
    assert smallest([skewed, rows], {**halves, rows.id: [9]}) is skewed
    assert smallest([best, rows], halves) is best


def test_the_larger_case_asks_for_the_same_features():
    one, other = by_name("token-block-edge-t1")[0], by_name("situ-2-8-fast")[0]
    everything = load_cases()
    best = larger(one, everything)[0]
    assert telling(best) == 2 and best.params["clamp"] == 10
    assert all(case.params["activation"] == "situ" for case in larger(other, everything))
    assert larger(one, [one]) == []
    many = by_name("skewed-routing-overflows-one-expert-t200")[0]
    assert all(case.params["tokens"] >= 200 for case in larger(many, everything))


KERNEL = """
from dataclasses import replace

from megamoe.backends import load_backend

class Everywhere:
    name = "everywhere"
    accumulator = "fp32"

    def forward(self, problem):
        ids = problem.topk_ids
        lost = replace(problem, topk_ids=ids.masked_fill(ids == 2, -1))
        return load_backend("eager").forward(lost)["y"]

class Here(Everywhere):
    def forward(self, problem):
        right = load_backend("eager").forward(problem)["y"]
        return super().forward(problem) if problem.num_tokens == 15 else right
"""


NOTHING = {"actual": None, "seconds": 0.5}
"""What ``explain`` says where it finds no cause and no place."""
CLEAR = {"exact": [{}], "decisions": 9}


@pytest.mark.parametrize(
    ("backend", "says"),
    [
        ("Everywhere", "a larger case is red too, and tells more: `megamoe explain forward/"),
        ("Here", "larger cases pass: forward/"),
        (None, "try a larger case, if it is red too: forward/"),
    ],
)
def test_a_larger_case_is_judged_before_it_is_named(warm, tmp_path, backend, says):
    """A green case explains nothing."""
    (tmp_path / "k.py").write_text(KERNEL)
    spec = backend and f"{tmp_path}/k.py:{backend}"
    (case,) = by_name("token-block-edge-t15")
    line = explain_larger.line(argparse.Namespace(backend=spec), case, NOTHING)
    assert line.startswith(says), line
    if backend == "Everywhere":
        assert line.endswith(f" --backend {spec}`")
    if backend == "Here":
        assert line.count("forward/") == explain_larger.MAX_CASES


def test_a_red_that_tells_no_more_is_not_named(warm, tmp_path, monkeypatch):
    (tmp_path / "k.py").write_text(KERNEL)
    (case,) = by_name("token-block-edge-t15")
    arguments = argparse.Namespace(backend=f"{tmp_path}/k.py:Everywhere")
    report = {**NOTHING, "batch": {"rules": ["expert 2"]}, "actual": {"explanations": [CLEAR]}}
    assert explain_larger.worth(report) == 4 and explain_larger.worth(NOTHING) == 0
    monkeypatch.setattr(explain_larger, "MAX_CASES", 1)
    monkeypatch.setattr(explain_larger, "_diagnosis", lambda subject, session: report)
    assert explain_larger.line(arguments, case, report).startswith(
        "no larger case tells more: red too, and tells no more: forward/"
    )
    long = {**NOTHING, "seconds": 100}
    line = explain_larger.line(arguments, case, long)
    late = "larger cases, not explained in time: red too, but there was no time to explain it: "
    assert line.startswith(f"{late}forward/"), "no verdict on what was not explained"


class Expert2Lost(EagerBackend):
    def forward(self, problem):
        ids = problem.topk_ids
        return super().forward(replace(problem, topk_ids=ids.masked_fill(ids == 2, -1)))


def test_further_reds_are_explained_until_one_tells_more(monkeypatch):
    """Also where this case has a cause, and several places; in the session that is there."""
    (case,) = by_name("bell-h256-i128-drifts")
    arguments = argparse.Namespace(backend="gone.py:Gone")
    tells = [several(), several(["expert 2"])]
    monkeypatch.setattr(explain_larger, "_diagnosis", lambda subject, session: tells.pop(0))
    second = next(one.id for one in of_tiles(case, load_cases())[1:] if not smaller(case, one))
    line = explain_larger.line(arguments, case, several(), Local(Expert2Lost()))
    assert line.startswith(f"a larger case is red too, and tells more: `megamoe explain {second} ")


def several(rules=("expert 2", "expert 3"), causes=1):
    """What ``explain`` says where that many causes fit."""
    step = {"exact": [{}] * causes, "decisions": 9}
    batch = {"rules": [*rules], "is_empty_tokens": False}
    return {**NOTHING, "actual": {"explanations": [step]}, "batch": batch}


@pytest.mark.parametrize("report", [several(), several([], 2)])
def test_several_causes_that_fit_are_told_apart_or_it_is_said_why_not(warm, monkeypatch, report):
    """By a larger case, also where the data of this one tell causes apart best."""
    (case,) = by_name("bell-h256-i128-drifts")
    assert telling(case) == 2 and explain_larger.is_short(case, report)
    assert not explain_larger.is_short(case, several([]))
    arguments = argparse.Namespace(backend=None)
    slow = {one.id: explain_larger.SECONDS for one in load_cases()}
    monkeypatch.setattr(explain_larger.shards, "durations", lambda root: slow)
    line = explain_larger.line(arguments, case, report)
    late = "larger cases, not explained in time: "
    assert line == f"{late}each is known to take 10 s or more, so none was judged"
    monkeypatch.setattr(explain_larger, "load_cases", lambda root: [case])
    line = explain_larger.line(arguments, case, report)
    none = "none has the features and the chosen values of this one"
    assert line == f"no larger case tells them apart: {none}"


def test_a_cause_in_some_slots_asks_for_a_case_that_says_in_which():
    """So does a step without a cause beside one that has a cause."""
    (case,) = by_name("bell-h256-i128-drifts")
    some = {"exact": [{"where": "in some slots only"}], "decisions": 9}
    unknown = {"exact": [], "decisions": 9}

    def is_short(*steps, rules=()):
        batch = {"rules": [*rules], "is_empty_tokens": False}
        report = {"actual": {"explanations": [*steps]}, "batch": batch}
        return explain_larger.is_short(case, report)

    assert is_short(some) and not is_short(some, rules=["experts 1 and later"])
    assert is_short(CLEAR, unknown) and not is_short(CLEAR)
    assert not is_short(unknown), "these data tell causes apart best"


def test_a_case_of_several_tiles_an_expert_tells_where():
    everything = load_cases()
    (case,) = by_name("bell-h256-i128-drifts")
    tiled_cases = of_tiles(case, everything)
    assert tiled_cases[0].name == "many-rows-masked-slots-and-an-empty-expert"
    assert of_tiles(tiled_cases[0], everything) == [], "it has such tiles itself"
    line = explain_larger.line(argparse.Namespace(backend=None), case, several())
    assert line == f"try a larger case, if it is red too: {tiled_cases[0].id}"
    line = explain_larger.line(argparse.Namespace(backend=None), case, several([], 2))
    assert tiled_cases[0].id not in line, "one place, several causes"


def test_plain_data_stand_for_chosen_values_that_no_larger_case_has():
    (case,) = by_name("directed-product-order")
    assert larger(case, load_cases()) == []
    arguments = argparse.Namespace(backend=None)
    line = explain_larger.line(arguments, case, several([], 2))
    assert line == "try a larger case, if it is red too: forward/precise-silu-bell-clamp-none"
    none = "no larger case tells more: none has the features and the chosen values of this one"
    assert explain_larger.line(arguments, case, NOTHING) == none


def test_larger_cases_that_are_not_judged_are_said_with_the_reason(warm, tmp_path, monkeypatch):
    (case,) = by_name("token-block-edge-t15")
    arguments = argparse.Namespace(backend="eager", contract=None)
    monkeypatch.setattr(explain_larger, "MAX_CASES", 1)
    monkeypatch.setattr(explain_larger.Runner, "run", lambda self, one: Verdict(one.id, "", "skip"))
    line = explain_larger.line(arguments, case, several())
    assert line.startswith("no larger case was explained: skipped: forward/")
    no_backend = argparse.Namespace(backend=f"{tmp_path}/gone.py:Gone")
    line = explain_larger.line(no_backend, case, several())
    says = "no larger case was explained: the backend gave no output: forward/"
    assert line.startswith(says)


def test_a_larger_case_has_what_the_red_one_has():
    """A fault of masked slots, or of a full last tile, passes a case without these."""
    everything = load_cases()
    (case,) = by_name("many-rows-masked-slots-and-an-empty-expert")
    plain, masked = by_name("rows-of-a-large-batch-wrong-t1024", "masked-slot-computed-6")
    lacks = explain_larger.lacks(case, [plain, masked])
    assert lacks[plain.id][:2] == ["masked slots", "a token without a live slot"]
    assert lacks[masked.id] == [
        "a token without a live slot", "an expert whose last tile of 16 rows is full", "I 256",
        "H 256 together with I 256",
    ]  # fmt: skip
    line = explain_larger.line(argparse.Namespace(backend=None), case, NOTHING)
    best = next(one for one in everything if one.id in line)
    assert explain_larger.lacks(case, [best])[best.id] == []


def test_no_larger_case_is_tried_for_rows_that_nobody_may_have_written():
    (case,) = by_name("many-rows-masked-slots-and-an-empty-expert")
    step, batch = {"exact": [], "decisions": 9}, {"rules": ["a"], "is_empty_tokens": False}
    report = {"actual": {"explanations": [step]}, "batch": batch}
    assert explain_larger.is_short(case, report)
    assert not explain_larger.is_short(
        case, {**report, "batch": {**batch, "is_empty_tokens": True}}
    )


def test_cases_that_pass_are_said_to_lack_what_none_of_them_has():
    (case,) = by_name("many-rows-masked-slots-and-an-empty-expert")
    plain, masked = by_name("rows-of-a-large-batch-wrong-t1024", "masked-slot-computed-6")
    lacking = explain_larger.lacks(case, [plain, masked])
    note = explain_larger.without(lacking, [plain])
    assert note.startswith("; it does not have what this case has: masked slots, ")
    tile = "an expert whose last tile of 16 rows is full"
    note = explain_larger.without(lacking, [plain, masked])
    assert note == (
        f"; none of them has what this case has: a token without a live slot, {tile}, I 256"
    )
    assert explain_larger.without({case.id: []}, [case]) == ""


def test_passes_of_a_smaller_h_or_i_say_nothing_of_a_fault_that_needs_these(monkeypatch):
    """A fault of the last tile of I 640 passes at I 128: that pass is named only beside none of
    I 640 or more, and then the line says so."""
    (case,) = by_name("few-rows-h768-i640-tail-of-steps-lost-t3")
    low, narrow, wide = (
        replace(case, id=f"forward/h{h}-i{i}", params={**case.params, **sizes(h, i)})
        for h, i in ((640, 1280), (768, 128), (768, 1280))
    )
    assert smaller(case, low) == ["H 768", "H 768 together with I 640"]

    def line(*passes):
        monkeypatch.setattr(explain_larger, "larger", lambda case, every: [*passes])
        monkeypatch.setattr(explain_larger, "_judge", lambda *_: (None, {"green": [*passes]}))
        return explain_larger.line(argparse.Namespace(backend="eager"), case, NOTHING)

    assert line(narrow, wide) == f"a larger case passes: {wide.id}"
    pass_alone = f"a larger case passes: {narrow.id}; it does not have what this case has: I 640"
    assert line(narrow) == pass_alone
    assert line(narrow, low) == (
        f"larger cases pass: {narrow.id}, {low.id}; none of them has what this case has: "
        "H 768 together with I 640"
    )


def sizes(hidden, intermediate):
    return {"hidden": hidden, "intermediate": intermediate}


@pytest.mark.parametrize(
    ("outcomes", "opening"),
    [
        (["red too, and tells no more"], "no larger case tells more: "),
        (["red too, and tells no more", "not begun after 10 s"],
         "no larger case that was explained tells more: "),
        (["not begun after 10 s"], "larger cases, not explained in time: "),
        (["red too, but there was no time to explain it", "not provided", "green"],
         "larger cases, not explained in time: "),
        (["skipped"], "no larger case was explained: "),
    ],
)  # fmt: skip
def test_no_verdict_stands_before_cases_that_were_not_explained(monkeypatch, outcomes, opening):
    (case,) = by_name("token-block-edge-t15")
    what = {one: [case] for one in reversed(outcomes)}
    monkeypatch.setattr(explain_larger, "_judge", lambda *_: (None, what))
    line = explain_larger.line(argparse.Namespace(backend="eager"), case, NOTHING)
    assert line == opening + "; ".join(f"{one}: {case.id}" for one in outcomes)


def test_cases_of_few_rows_do_not_say_that_a_full_tile_decides():
    """A fault of rows from 8 on passes them too."""
    (combine,), (few,) = by_name("combine-as-a-tree"), by_name("bell-h256-i640-drifts")
    note = explain_larger.without(explain_larger.lacks(combine, [few]), [few])
    assert note == "; it does not have what this case has: an expert with more than 8 rows"


def test_rows_of_experts_say_what_a_routing_has():
    ids = np.array([[0, 1], [0, -1], [0, 1], [-1, -1]])
    skewed = Routed.of(np.repeat(ids, 8, 0), 4)
    assert skewed == Routed({0: 24, 1: 16}, 24, 64, 8) and skewed.tile == 16
    assert skewed.beyond(Routed.of(np.zeros((5, 1), np.int64), 4)) == [
        "masked slots", "a token without a live slot", "an expert with more than 8 rows",
        "an expert whose last tile of 16 rows is full",
    ]  # fmt: skip
    assert Routed({0: 9, 1: 1, 2: 1}, 0, 11, 0).is_skewed and not skewed.is_skewed


@pytest.mark.parametrize(
    ("rows", "experts", "text"),
    [
        ({0: 3, 2: 5}, 3, "0: 3, 1: 0, 2: 5"),
        ({9: 4, 3: 5}, 40, "3: 5, 9: 4; none of 38 other experts"),
        ({e: 9 + e % 7 for e in range(20)}, 40,
         "9 to 15 each of 20 of 40 experts; most of 6: 15, 13: 15, 5: 14"),
        ({}, 40, "none of 40 experts has a row"),
    ],
)  # fmt: skip
def test_rows_of_experts_fit_a_line(rows, experts, text):
    total = sum(rows.values())
    assert Routed(rows, 0, total, 0).lines(experts) == text
    masked = Routed(rows, 2, total + 2, 1).lines(experts)
    assert masked == f"{text}; 2 of {total + 2} slots are masked, 1 token without a live slot"


def test_the_larger_case_has_the_same_subject():
    """A fault of masked slots needs such slots, and one of chosen values these values."""
    everything = load_cases()
    masked, not_finite = by_name("masked-slots-bell", "masked-slot-weight-not-finite")
    best = larger(masked, everything)[0]
    assert not {"mask", "mask_every"}.isdisjoint(best.params["routing_recipe"])
    assert larger(not_finite, everything) == []


def test_show_prints_the_rows_of_one_case(capsys):
    arguments = argparse.Namespace(case="token-block-edge-t15", json=False, golden=None)
    assert show.run(arguments) == 0
    assert "\n  rows of experts    0: 5, 1: 6, 2: 8, 3: 6, 4: 5\n" in capsys.readouterr().out
