"""What a step is called, end to end: same bits, within the class, other contract, outside.

One kernel computes June's contract, one September's, on cases whose goldens the two do not share.
"""

import json
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from megamoe.backends.eager import EagerBackend
from megamoe.cases import golden_root, load_cases
from megamoe.commands.main import main
from megamoe.compare import classes, judged
from megamoe.golden import Store, make, regenerate
from megamoe.judge import judge_forward
from megamoe.kinds import forward
from megamoe.spec.contract import REVISIONS
from megamoe.spec.problem import Problem
from tests.helpers import history

pytestmark = pytest.mark.usefixtures("warm")
CASE = "forward/requantise-tiny-1e-24"
CASES = f"{CASE},forward/requantise-amax-infinite"
SHARED = "forward/requantise-large-1e12"
"""June and September have one golden here, and a proof: no bit may be another."""
FREE = "forward/cancelling-duplicate-slots-bell"
"""They have one here, with room for the last place of the largest ``y``."""

KERNEL = """
import torch
from megamoe.backends.eager import create

REVISION = {revision!r}
EDIT = {edit!r}

class Kernel:
    name, accumulator = "toy", "sm90-e4m3"

    def __init__(self, contract={default!r}):
        {declared}
        self.made = create("cpu", REVISION or contract)

    def forward(self, problem):
        out = self.made.forward(problem)
        for name, step in EDIT.items():
            flat = out[name].view(-1).view(torch.int16 if name == "y" else torch.uint8)
            at = flat.abs().argmax() if name == "y" else 0
            flat[at] += step
        return out
"""
"""``REVISION``: what it computes, whatever it is asked for; None: what it is asked for. ``EDIT``:
what is added to the bits of one element of a stage."""
NUDGE, WRONG = {"y": 1}, {"y": 300}


def kernel(revision, edit=None, declared=(), default="2026-11"):
    statement = f"self.contracts = {tuple(declared)}" if declared else "pass"
    return KERNEL.format(revision=revision, edit=edit or {}, declared=statement, default=default)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGAMOE_CACHE", str(tmp_path / "cache"))


def of(case):
    return next(c for c in load_cases() if c.id == case)


def test_the_cases_are_what_these_tests_need():
    """Two contracts, two goldens and two results, or one golden."""
    for name in CASES.split(","):
        case = of(name)
        assert len({Store(golden_root(), make, REVISIONS[r]).key(case)
                    for r in ("2026-06", "2026-09")}) == 2  # fmt: skip
        problem = Problem(**regenerate(case))
        sf = [EagerBackend(REVISIONS[r]).forward(problem)["l2_acts_sf"]
              for r in ("2026-06", "2026-09")]  # fmt: skip
        assert not sf[0].equal(sf[1])
    september = Store(golden_root(), make, REVISIONS["2026-09"])
    assert [september.key(of(name)) for name in (SHARED, FREE)] == [SHARED, FREE]


# --- ab -----------------------------------------------------------------------------------------


@pytest.fixture
def ab(tmp_path, capsys):
    """Compare two kernels; the report's cases, the exit status, and what was printed."""

    def run(left, right, case=CASE, *options):
        out = tmp_path / "ab.json"
        for name, text in (("left", left), ("right", right)):
            (tmp_path / f"{name}.py").write_text(text)
        backends = [f"--{name}-backend={tmp_path / name}.py:Kernel" for name in ("left", "right")]
        code = main(["ab", "this", "this", *backends, "--case", case, "--json", str(out), *options])
        report = json.loads(out.read_text())
        return report["cases"], code, capsys.readouterr().out

    return run


def test_ab_of_the_same_bits(ab):
    (case,), code, _ = ab(kernel("2026-06"), kernel("2026-06", declared=["2026-06"]))
    assert (case["class"], case["status"], code) == (classes.SAME, "identical", 0)


def test_ab_of_bits_within_the_class(ab):
    (case,), code, out = ab(kernel("2026-09"), kernel("2026-09", NUDGE), FREE)
    assert (case["class"], case["first_stage"], code) == (classes.WITHIN, "y", 1)
    assert case["right_under"] == {"left": [*REVISIONS], "right": [*REVISIONS]}
    assert "(right too)" in out and "(1 right too)" in out


def test_ab_of_another_contract(ab):
    """Both sides say what they compute, and are right by that."""
    cases, code, out = ab(
        kernel("2026-06", declared=["2026-06"]), kernel("2026-09", declared=["2026-09"]), CASES
    )
    assert len(cases) == 2 and code == 1
    for case in cases:
        assert case["class"] == classes.CONTRACT
        assert (case["verdict_left"], case["verdict_right"]) == ("pass", "pass")
        assert "2026-06" in case["right_under"]["left"]
        assert case["right_under"]["right"] == ["2026-09", "2026-11"]
        assert all(stage["outside_right"] == 0 for stage in case["stages"].values())
    message = "(right under 2026-06, sgl before, under 2026-09, 2026-11 now)"
    assert message in out
    assert "2 of 2 cases moved (2 right under another contract), first at l2_acts_sf" in out


@pytest.mark.parametrize(
    ("revision", "verdicts"), [("2026-06", ("pass", "fail")), ("2026-09", ("fail", "pass"))]
)
def test_ab_of_another_contract_that_nobody_declares(ab, revision, verdicts):
    """One side is outside what is asked for; the step is no fault all the same."""
    (case,), _, _ = ab(kernel("2026-06"), kernel("2026-09"), CASE, "--contract", revision)
    assert case["class"] == classes.CONTRACT
    assert (case["verdict_left"], case["verdict_right"]) == verdicts
    outside = [case["stages"]["l2_acts_sf"][f"outside_{side}"] for side in ("left", "right")]
    assert [n > 0 for n in outside] == [v == "fail" for v in verdicts]


def test_ab_of_a_fault(ab):
    cases, _, out = ab(kernel("2026-06"), kernel("2026-09", WRONG), f"{CASE},{SHARED}")
    by_id = {case["id"]: case for case in cases}
    assert {case["class"] for case in cases} == {classes.OUTSIDE}
    assert all(case["right_under"]["right"] == [] for case in cases)
    assert by_id[SHARED]["right_under"]["left"] == [*REVISIONS]
    assert "(2 right under no contract)" in out


@pytest.mark.parametrize("revision", ["2026-06", "2026-11"])
def test_ab_asks_each_golden_once_of_each_side(ab, monkeypatch, revision):
    """A fail too: its own contract's verdict is not made again to name the others."""
    goldens = []

    def count(actual, golden, *rest):
        goldens.append(golden)
        return judge_forward(actual, golden, *rest)

    for module in (judged, forward):
        monkeypatch.setattr(module, "judge_forward", count)
    (case,), _, _ = ab(kernel("2026-06"), kernel("2026-09"), CASE, "--contract", revision)
    assert case["class"] == classes.CONTRACT
    stores = {Store(golden_root(), make, c).key(of(CASE)) for c in REVISIONS.values()}
    assert (len(stores), len(goldens)) == (2, 4)


def test_ab_of_two_environments_that_differ_in_a_package(tmp_path, capsys):
    """The kernel follows the package of its environment."""
    (tmp_path / "kernel.py").write_text("import numerics\n" + kernel("2026-06").replace(
        "REVISION = '2026-06'", "REVISION = numerics.REVISION"))  # fmt: skip
    pythons = []
    for name, revision in (("june", "2026-06"), ("september", "2026-09")):
        home = tmp_path / name
        home.mkdir()
        (home / "numerics.py").write_text(f"REVISION = {revision!r}\n")
        python = home / "python"
        python.write_text(f'#!/bin/sh\nexport PYTHONPATH={home}\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
        pythons.append(str(python))
    code = main(["ab", *pythons, f"--backend={tmp_path}/kernel.py:Kernel", "--case", CASE])
    assert code == 1
    assert "the one case moved (1 right under another contract)" in capsys.readouterr().out


# --- bisect -------------------------------------------------------------------------------------


@pytest.fixture
def bisect(tmp_path, capsys):
    """Bisect commits that hold these kernels, the first one good; report, and what was printed."""

    def run(*kernels, case=CASE, options=()):
        home, out = tmp_path / "home", tmp_path / "bisect.json"
        states = [(f"kernel {i}", {"kernel.py": text + f"# {i}\n"})
                  for i, text in enumerate(kernels)]  # fmt: skip
        commits = history.commit_all(home, states)
        code = main(["bisect", "--repo", str(home), "--good", commits[0], "--bad", commits[-1],
                     "--backend", "kernel.py:Kernel", "--case", case, "--json", str(out),
                     "--archive", str(tmp_path / "found.tar.gz"), *options])  # fmt: skip
        report = json.loads(out.read_text())
        steps = {s["subject"]: s for s in report["steps"]}
        return code, report, steps, capsys.readouterr()

    return run


def test_bisect_finds_the_step_to_another_contract_and_says_so(bisect):
    june, september = kernel("2026-06"), kernel("2026-09")
    code, report, steps, output = bisect(june, june, september, september, case=CASES)
    assert (code, report["subject"], report["class"]) == (0, "kernel 2", classes.CONTRACT)
    assert steps["kernel 2"]["class"] == classes.CONTRACT
    message = "right under 2026-06, sgl before, under 2026-09, 2026-11 now"
    assert steps["kernel 2"]["classes"] == dict.fromkeys(CASES.split(","), message)
    assert f"({message}); and 1 more case" in steps["kernel 2"]["reason"]
    assert steps["kernel 3"]["reason"].endswith(
        "than the good end's in 2 cases (right under another contract)"
    )
    assert steps["kernel 1"]["class"] == classes.SAME
    assert "; its bits are right under another contract; first at " in report["headline"]
    assert report["headline"] in output.out


def test_bisect_names_the_worst_of_a_step(bisect):
    """Another contract and then a fault: the bad end is outside, the first bad one is not."""
    june, september = kernel("2026-06"), kernel("2026-09")
    _, report, steps, _ = bisect(june, september, september, kernel("2026-09", WRONG))
    assert (report["subject"], report["class"]) == ("kernel 1", classes.CONTRACT)
    assert steps["kernel 3"]["class"] == classes.OUTSIDE
    assert steps["kernel 3"]["classes"] == {CASE: "right under no contract"}


def test_bisect_of_bits_within_the_class(bisect):
    _, report, steps, _ = bisect(kernel("2026-09"), kernel("2026-09", NUDGE), case=FREE)
    assert report["class"] == steps["kernel 1"]["class"] == classes.WITHIN
    assert steps["kernel 1"]["classes"] == {FREE: "right too"}
    assert "; its bits are right too; first at " in report["headline"]


def test_bisect_by_verdict_says_under_what_a_fail_is_right(bisect):
    """Judged under June, the step to September is bad; a fault is right under nothing."""
    june, september = kernel("2026-06"), kernel("2026-09")
    options = ("--judge", "--contract", "2026-06")
    _, report, steps, _ = bisect(june, september, kernel("2026-09", WRONG), options=options)
    assert report["subject"] == "kernel 1"
    right = "; right under 2026-09, 2026-11 (requant_scale bits, requant_exponent_min 105)"
    assert steps["kernel 1"]["reason"].endswith(right)
    assert "right under" not in steps["kernel 2"]["reason"]


def test_an_archive_replays_under_the_contract_that_was_chosen(bisect, tmp_path):
    """The factory's default is June; of what it names September is the newest, on both sides."""
    both = {"declared": ["2026-06", "2026-09"], "default": "2026-06"}
    _, report, _, output = bisect(kernel(None, **both), kernel(None, WRONG, **both))
    assert report["class"] == classes.OUTSIDE
    assert "contract 2026-09 (the newest of those that the backend names" in output.err
    with tarfile.open(tmp_path / "found.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for number, whose in ((0, "GOOD"), (1, "BAD")):
        edit = {} if not number else WRONG
        (tmp_path / "bisect/kernel.py").write_text(kernel(None, edit, **both))
        ran = subprocess.run([sys.executable, "replay.py"], cwd=tmp_path / "bisect", text=True,
                             capture_output=True, env=environment, check=False)  # fmt: skip
        assert (ran.returncode, whose in ran.stdout) == (number, True), ran.stdout + ran.stderr


def test_bytes_beyond_the_batch_are_right_under_no_contract():
    """As a bisect asks, which has the bits only."""
    case = of("staging/scale-words-mispacked-h128")
    inputs = regenerate(case)
    bits = make(case, inputs, (), contract=REVISIONS["2026-06"]).tensors
    judge = judged.Judge(golden_root())
    for beyond, right in ((0, True), (3, False)):
        outputs = {**bits, "beyond": np.array([0, beyond])}
        assert ("2026-06" in judge.right_under(case, inputs, outputs, "fp32")) is right


# --- the words alone ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "name"),
    [
        (["2026-06"], ["2026-06"], classes.WITHIN),
        (["2026-06", "sgl"], ["2026-09", "sgl"], classes.WITHIN),
        (["2026-06", "sgl"], ["2026-09", "2026-11"], classes.CONTRACT),
        ([], ["2026-09"], classes.WITHIN),
        (["2026-06"], [], classes.OUTSIDE),
        ([], [], classes.OUTSIDE),
    ],
)
def test_the_class_of_a_step(before, after, name):
    assert classes.of_step(before, after) == name
    assert classes.describe(name, before, after).startswith("right ")


def test_the_worst_of_several():
    assert classes.worst([]) == classes.SAME
    for i in range(len(classes.CLASSES)):
        assert classes.worst(classes.CLASSES[: i + 1]) == classes.CLASSES[i]
        assert classes.worst(classes.CLASSES[i::-1]) == classes.CLASSES[i]
