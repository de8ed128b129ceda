"""``megamoe bisect``: who moved the bits, in few builds, and nothing of the checkout touched."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from megamoe.cases import load_cases
from megamoe.commands import bisect as commands
from megamoe.commands.main import main
from megamoe.compare import disk, job, question, rejudge, stages, state, walk
from megamoe.compare.bisect import run
from megamoe.compare.job import Job, Range
from megamoe.compare.sides import parse
from megamoe.suite.settings import Settings
from megamoe.worker import exchange, serve, single
from megamoe.worker.exchange import NoRoom
from tests.helpers import history
from tests.helpers.history import BROKEN, BUILD, CODE, NOISE, STAGED, Y
from tests.helpers.schemas import valid
from tests.test_ab import POOR, make_wheel

pytestmark = pytest.mark.usefixtures("warm")

CASE = "forward/combine-in-bf16"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGAMOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def bisect(*options, capsys):
    """Exit code, report (None where there is none), stdout, stderr."""
    out = Path(os.environ["MEGAMOE_CACHE"]).parent / "bisect.json"
    out.unlink(missing_ok=True)
    code = main(["bisect", "--json", str(out), *map(str, options)])
    output = capsys.readouterr()
    report = json.loads(out.read_text()) if out.exists() else None
    if report is not None:
        valid("bisect", report)
    return code, report, output.out, output.err


def limit(candidates):
    """The number of builds that is asked for."""
    return math.floor(math.log2(candidates) + 2)


def test_short_forms_of_a_list():
    assert commands._spread("torch==2.11,2.12") == ["torch==2.11", "torch==2.12"]
    assert commands._spread("flake:dg=path:a,path:b") == ["flake:dg=path:a", "flake:dg=path:b"]
    assert commands._spread("main~3") == ["main~3"]


# --- the walk alone ---------------------------------------------------------------------------


def test_a_list_is_halved_and_the_first_bad_one_found_wherever_it_is():
    for n in range(2, 40):
        revs = [str(i) for i in range(n)]
        for first in range(1, n):
            probes = []

            def probe(rev, first=first, probes=probes):
                probes.append(rev)
                return "bad" if int(rev) >= first else "good"

            assert walk.over_list(revs, probe) == walk.Outcome(str(first))
            assert len(probes) <= math.ceil(math.log2(n - 1))


def test_what_cannot_be_run_is_walked_around_or_named_among_the_suspects():
    revs = [str(i) for i in range(9)]

    def probe(rev):
        return "skip" if rev in "45" else "bad" if int(rev) >= 7 else "good"

    assert walk.over_list(revs, probe).first_bad == "7"

    def blind(rev):
        return "flaky" if rev in "56" else "bad" if int(rev) >= 6 else "good"

    assert walk.over_list(revs, blind) == walk.Outcome(None, ("5", "6", "7"))


@pytest.fixture
def numbers(tmp_path):
    """Eighty commits; a file says which one it is."""
    home = tmp_path / "numbers"
    states = [(f"value {i}", {"value": f"{i}\n"}) for i in range(80)]
    return home, history.commit_all(home, states)


def run_numbers(numbers, command, *options, capsys, good=0, bad=79):
    home, commits = numbers
    return bisect("--repo", home, "--good", commits[good], "--bad", commits[bad], "--run", command,
                  *options, capsys=capsys)  # fmt: skip


def test_a_command_decides_as_in_git_bisect_run(numbers, capsys):
    _, commits = numbers
    code, report, out, _ = run_numbers(
        numbers, 'v=$(cat value); [ $v = 39 ] && exit 125; [ "$v" -lt 41 ]', capsys=capsys
    )
    assert code == 0
    assert (report["first_bad"], report["last_good"]) == (commits[41], commits[40])
    assert report["subject"] == "value 41"
    assert report["builds"] <= limit(79) + 1  # one of them was a skip
    verdicts = {s["subject"]: s["verdict"] for s in report["steps"]}
    assert all(s["subject"] == f"value {s['position']}" for s in report["steps"])
    assert verdicts["value 39"] == "skip"
    assert list(verdicts)[:2] == ["value 79", "value 0"]  # the bad end is looked at first
    assert report["headline"] in out


def test_neighbours_need_no_walk(numbers, capsys):
    _, commits = numbers
    _, report, _, _ = run_numbers(numbers, "[ $(cat value) -lt 5 ]", good=4, bad=5, capsys=capsys)
    assert (report["first_bad"], report["builds"]) == (commits[5], 2)


def test_suspects_are_named_where_skips_hide_the_first_bad_one(numbers, capsys):
    _, commits = numbers
    code, report, _, _ = run_numbers(
        numbers, 'v=$(cat value); [ $v = 6 ] && exit 125; [ "$v" -lt 6 ]', good=4, bad=9,
        capsys=capsys,
    )  # fmt: skip
    assert code == 1
    assert report["first_bad"] is None
    assert set(report["suspects"]) == {commits[6], commits[7]}
    assert "one of 2" in report["headline"]


def test_a_flaky_step_is_repeated_reported_and_not_blamed(numbers, tmp_path, capsys):
    flip = tmp_path / "flip"
    flaky = f"[ -e {flip} ] && rm {flip} || {{ touch {flip}; exit 1; }}"
    command = f'v=$(cat value); if [ $v = 39 ]; then {flaky}; else [ "$v" -lt 50 ]; fi'
    _, report, _, _ = run_numbers(numbers, command, capsys=capsys)
    step = next(s for s in report["steps"] if s["subject"] == "value 39")
    assert (step["verdict"], step["reason"]) == ("flaky", "exit status 1, 0, 1, 0")
    assert report["subject"] == "value 50"


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "options", "says"),
    [
        ("false", {}, "the good end {0} (value 0) is bad: exit 1; look earlier for a good one"),
        ("true", {}, "the bad end {79} (value 79) is good; is the failure gone?"),
        ("exit 125", {}, "the bad end {79} (value 79) cannot be run: exit 125"),
        ("false", {"good": 9, "bad": 9}, "good and bad are the same commit"),
        ("false", {"good": 9, "bad": 4}, "bad is an ancestor of good; were --good and --bad exch"),
        ("kill -9 $$", {}, "the bad end {79} (value 79) cannot be run: the command was ended by"),
    ],
)
def test_ends_that_do_not_allow_a_bisect_are_one_line(numbers, command, options, says, capsys):
    _, commits = numbers
    code, report, _, err = run_numbers(numbers, command, capsys=capsys, **options)
    assert (code, report) == (2, None)
    for i in (0, 79):
        says = says.replace(f"{{{i}}}", commits[i][:12])
    assert f"megamoe: error: {says}" in err


def test_misuse_is_one_line(capsys, tmp_path):
    history.commit_all(tmp_path / "home", [("first", {"file": "text"})])
    for options, says in (
        (["--good", "HEAD"], "say where to look"),
        (["--over", "this", "--good", "HEAD", "--bad", "HEAD"], "say where to look"),
        (["--over", "this", "this"], "the list names something twice"),
        (["--good", "HEAD", "--bad", "nowhere"], "'git:nowhere' is no revision of"),
        (["--over", "a==1,2", "--only", "x"], "--only is for commits"),
        (["--over", "a==1,2", "--judge", "--run", "true"], "give one"),
    ):
        where = ["--repo", str(tmp_path / "home")]
        code, _, _, err = bisect("--case", CASE, *options, *where, capsys=capsys)
        assert code == 2
        assert says in err
        assert err.count("\n") == 1


def test_only_may_leave_nothing(numbers, capsys):
    code, _, _, err = run_numbers(
        numbers, "[ $(cat value) = 0 ]", "--only", "elsewhere", capsys=capsys
    )
    assert code == 2
    assert "no commit between them touches elsewhere" in err


# --- the checkout -----------------------------------------------------------------------------


def everything(home):
    return {
        "head": history.git(home, "symbolic-ref", "HEAD"),
        "status": history.git(home, "status", "--porcelain"),
        "refs": history.git(home, "for-each-ref"),
        "worktrees": history.git(home, "worktree", "list"),
        "files": {p.name: p.read_text() for p in home.iterdir() if p.is_file()},
    }


def test_a_dirty_checkout_stays_as_it_was_and_its_changes_play_no_part(numbers, capsys):
    home, _ = numbers
    (home / "value").write_text("not committed\n")
    (home / "untracked").write_text("mine\n")
    (home / ".git/hooks").mkdir(exist_ok=True)  # git without its templates makes none
    (home / ".git/hooks/post-checkout").write_text("#!/bin/sh\ntouch hooked\n")
    (home / ".git/hooks/post-checkout").chmod(0o755)
    before = everything(home)
    litter = "echo x >>value; echo y >>product"
    code, report, _, err = run_numbers(
        numbers,
        "[ ! -e hooked ] && [ $(wc -l <product) = 1 ] && [ $(head -1 value) -lt 33 ]",
        "--build",
        litter,
        capsys=capsys,
    )
    assert (code, report["subject"]) == (0, "value 33")
    assert everything(home) == before
    assert "uncommitted changes" in err


def test_a_build_that_fails_is_skipped_and_its_last_line_kept(numbers, capsys):
    build = '[ $(cat value) != 39 ] || { echo "kernel.cu(7): error: no" >&2; exit 3; }'
    _, report, _, _ = run_numbers(
        numbers, "[ $(cat value) -lt 70 ]", "--build", build, capsys=capsys
    )
    step = next(s for s in report["steps"] if s["subject"] == "value 39")
    assert step["verdict"] == "skip"
    assert step["reason"].startswith("does not build (exit 3): kernel.cu(7): error: no")
    assert report["subject"] == "value 70"


# --- kills, resuming, full disks --------------------------------------------------------------


def start(numbers, command, folder):
    home, commits = numbers
    code = "import sys; from megamoe.commands.main import main; sys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", code, "bisect", "--repo", home, "--good", commits[0], "--bad",
         commits[79], "--run", command, "--repeat", "1", "--state", folder],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
    )  # fmt: skip


def steps_of(folder):
    path = folder / "state.json"
    return json.loads(path.read_text())["steps"] if path.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_kill_loses_nothing_and_the_same_command_goes_on(numbers, tmp_path, how):
    home, commits = numbers
    folder, count = tmp_path / "state", tmp_path / "count"
    command = f"echo >>{count}; [ $(wc -l <{count}) != 5 ] || sleep 2; [ $(cat value) -lt 17 ]"
    before = everything(home)
    first = start(numbers, command, folder)
    while not count.exists() or len(count.read_text()) < 5:
        time.sleep(0.02)
    first.send_signal(how)
    first.wait()
    step_count = len(steps_of(folder))
    assert step_count == 4
    if how == signal.SIGKILL:  # the command has outlived the kill, and keeps the state locked
        with pytest.raises(ValueError, match="in use by another bisect"), disk.lock(folder):
            pass
    if how == signal.SIGTERM:
        assert everything(home) == before  # at once, where there was a moment to tidy up
    for _ in range(20):
        second = start(numbers, command, folder)
        out, err = second.communicate()
        if "in use by another bisect" not in err:
            break
        time.sleep(0.2)
    assert second.returncode == 0, err
    assert f"resumed: {step_count} steps known from" in err
    assert f"first bad {commits[17][:12]} (value 17)" in out
    assert everything(home) == before
    assert len(count.read_text()) <= len(steps_of(folder)) + 1  # only the killed step ran twice


def test_two_at_a_time_is_refused(numbers, tmp_path, capsys):
    folder = tmp_path / "state"
    with disk.lock(folder):
        code, _, _, err = run_numbers(numbers, "true", "--state", folder, capsys=capsys)
    assert code == 2
    assert "in use by another bisect" in err


def test_a_state_of_another_question_or_a_damaged_one_is_refused(tmp_path):
    folder = tmp_path / "state"
    state.State(folder, {"revs": ["a"]}).save()
    with pytest.raises(ValueError, match="of another question"):
        state.State.open(folder, {"revs": ["b"]}, fresh=False)
    (folder / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot be read .*--fresh"):
        state.State.open(folder, {"revs": ["a"]}, fresh=False)
    assert state.State.open(folder, {"revs": ["b"]}, fresh=True).steps == []


def test_a_state_of_an_earlier_way_to_ask_is_of_another_question(tmp_path):
    side = parse("this")
    test = question.Test([], tmp_path, "eager")
    request = job.request_of(Job(Range(side, side, (side,)), test))
    earlier = {name: value for name, value in request.items() if name != "protocol"}
    state.State(tmp_path, earlier).save()
    with pytest.raises(ValueError, match="of another question"):
        state.State.open(tmp_path, request, fresh=False)
    assert state.key(request) != state.key(earlier)


def test_no_room_for_inputs_or_bits_ends_the_bisect_and_blames_no_step(
    tmp_path, monkeypatch, capsys
):
    """First where the inputs are exchanged, then where bits are kept."""
    home = tmp_path / "toy"
    commits = history.write(home, 3, {2: Y}, code_every=1)

    def no_room(*_):
        raise NoRoom("no room in /x for 1 MiB of inputs; make room")

    def full(path, *_):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    for module, name, error in ((exchange, "write", no_room), (stages, "write_atomically", full)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, error)
            code, _, _, err = kernel_bisect(home, commits[0], "main", "--repeat", 1, capsys=capsys)
        assert code == 2
        assert "the disk is full" in err
        assert "nothing is lost" in err
    code, report, _, _ = kernel_bisect(home, commits[0], "main", "--repeat", 1, capsys=capsys)
    assert (code, report["first_bad"]) == (0, commits[2])


def test_a_full_disk_ends_the_bisect_and_blames_no_step(numbers, monkeypatch, capsys):
    """First while the state is written, then by what a build says; then there is room again."""
    home, _ = numbers
    before = everything(home)
    real, calls = state.write_atomically, []

    def full(path, content):
        calls.append(path)
        if len(calls) > 5:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, content)

    monkeypatch.setattr(state, "write_atomically", full)
    command = "[ $(cat value) -lt 17 ]"
    code, _, _, err = run_numbers(numbers, command, capsys=capsys)
    assert code == 2
    assert "the disk is full" in err
    assert everything(home) == before
    monkeypatch.setattr(state, "write_atomically", real)
    code, report, _, err = run_numbers(numbers, command, capsys=capsys)
    assert (code, report["subject"]) == (0, "value 17")
    assert "resumed: " in err
    build = "[ $(cat value) = 79 ] || { echo write: No space left on device; exit 1; }"
    code, _, _, err = run_numbers(numbers, command, "--build", build, capsys=capsys)
    assert code == 2
    assert "the disk is full" in err


def test_too_little_room_is_said_before_a_step(numbers, monkeypatch, capsys):
    usage = shutil.disk_usage("/")._replace(free=1 << 20)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage)
    code, _, _, err = run_numbers(numbers, "true", capsys=capsys)
    assert code == 2
    assert "1 MiB free" in err


# --- bits -------------------------------------------------------------------------------------


def kernel_bisect(home, good, bad, *options, capsys):
    return bisect("--repo", home, "--good", good, "--bad", bad, "--backend", "kernel.py:Kernel",
                  "--build", BUILD, "--case", CASE, *options, capsys=capsys)  # fmt: skip


def replay(archive, side, folder):
    """What a stranger sees who follows the archive's README."""
    with tarfile.open(archive) as inside:
        inside.extractall(folder, filter="data")
    home = folder / "bisect"
    assert "git clone two.bundle tree" in (home / "README.md").read_text()
    history.git(home, "clone", "--quiet", "two.bundle", "tree")
    history.git(home / "tree", "checkout", "--quiet", side)
    process = subprocess.run(
        [sys.executable, "../replay.py", "--path", "."], cwd=home / "tree", text=True,
        capture_output=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    return process.returncode, process.stdout


@pytest.mark.slow
def test_a_change_seen_in_the_codes_only_is_found_and_can_be_replayed(
    tmp_path, monkeypatch, capsys
):
    home = tmp_path / "toy"
    commits = history.write(home, 5, {3: CODE}, code_every=1)
    monkeypatch.chdir(home)  # a bad kernel.py lies here, and the replay must not run it
    code, report, _, _ = kernel_bisect(
        home, commits[0], "main", "--repeat", 1, "--archive", tmp_path / "a.tar.gz", capsys=capsys
    )
    assert code == 0
    assert (report["first_bad"], report["last_good"]) == (commits[3], commits[2])
    assert report["first_stage"] == "l2_acts"
    (case,) = report["cases"]
    assert case["stages"]["y"]["moved"] == 0
    assert case["stages"]["l2_acts"]["moved"] == 1
    worst = report["worst"]
    assert (worst["case"], worst["token"], worst["slot"], worst["channel"]) == (CASE, 0, 0, 0)
    assert worst["ulps"] == 1
    code, output = replay(report["archive"], "good", tmp_path / "one")
    assert (code, "the GOOD bits" in output) == (0, True), output
    code, output = replay(report["archive"], "bad", tmp_path / "two")
    assert (code, "the BAD bits; not as good: l2_acts" in output) == (1, True), output


LAYER = """
from megamoe.backends.eager import EagerBackend
from {place} import NUMBER

class Kernel(EagerBackend):
    name = "toy"

    def forward(self, problem):
        out = super().forward(problem)
        out["y"][0, 0] += NUMBER
        return out
"""


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["ragmoe/__init__.py", "kernel.py", "{away}/apart"])
def test_a_replay_runs_the_tree_that_is_checked_out(spec, tmp_path, monkeypatch, capsys):
    """A package in the trees, and a file and a package outside that import one from the trees. The
    archive has all of what lies outside, so its place may be gone."""
    package = {"ragmoe/__init__.py": "from .layer import Kernel\n",
               "ragmoe/layer.py": LAYER.format(place=".number")}  # fmt: skip
    home, away = tmp_path / "toy", tmp_path / "away"
    trees = [(f"{n}", {**package, "ragmoe/number.py": f"NUMBER = {n}\n"}) for n in (0, 1)]
    good, bad = history.commit_all(home, trees)
    (away / "apart").mkdir(parents=True)
    (away / "kernel.py").write_text("from ragmoe import Kernel\n")
    (away / "apart" / "__init__.py").write_text("from .inner import Kernel\n")
    (away / "apart" / "inner.py").write_text(LAYER.format(place="ragmoe.number"))
    monkeypatch.chdir(away if spec == "kernel.py" else home)
    code, report, _, err = bisect(
        "--repo", home, "--good", good, "--bad", bad, "--repeat", 1,
        "--backend", f"{spec.format(away=away)}:Kernel", "--case", CASE,
        "--archive", tmp_path / "a.tar.gz", capsys=capsys,
    )  # fmt: skip
    assert code == 0, err
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(away)
    for side, status in (("good", 0), ("bad", 1)):
        code, output = replay(report["archive"], side, tmp_path / side)
        assert (code, f"the {side.upper()} bits" in output) == (status, True), output


def test_a_replay_without_a_tree_says_what_is_missing(tmp_path, capsys, monkeypatch):
    (tmp_path / "serve.py").write_text(single.source())
    about = {"backend": "k.py:K", "copy": "", "device": "cpu", "modules": {}, "cases": []}
    (tmp_path / "cases.json").write_text(json.dumps(about))
    # It is a process of its own, and sets these two for itself.
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", sys.dont_write_bytecode)
    assert rejudge.main(tmp_path, []) == 2
    assert capsys.readouterr().out == (
        "cannot replay: no k.py in this folder; check out one of the two trees and name its folder "
        "with --path, as README.md says\n"
    )


def test_a_replay_fills_blank_tensors_as_the_worker_does():
    assert rejudge.POISON == serve.POISON


KINDS = """
import os
import torch

EXTRA = int(os.environ["EXTRA"])

class Kernel:
    name, accumulator = "toy", "exact"

    def forward(self, p):
        y = torch.zeros(p.num_tokens, p.hidden_size, dtype=torch.bfloat16)
        codes = torch.arange(p.num_tokens * p.top_k * p.intermediate_size) % 7 + EXTRA
        codes = codes.view(p.num_tokens, p.top_k, p.intermediate_size).to(torch.uint8)
        codes[p.topk_ids < 0] = int.from_bytes(os.urandom(1), "little")
        y[0, 0] = p.w13_weight[p.topk_ids.max()].long().sum() % 251
        return {"y": y, "l2_acts": codes}

    def prepare(self, hidden, weights, ids, x, x_sf, topk_idx, topk_weights):
        for tensor in (x.view(torch.uint8), x_sf, topk_idx, topk_weights):
            tensor[: len(ids) + EXTRA] = 0

    def eplb_map(self, ids, load, *rest):
        load[0] += 1 + EXTRA
        return ids.clone()

    def transform_weights(self, *given):
        return tuple(tensor + EXTRA for tensor in given)
"""


@pytest.mark.slow
def test_every_kind_is_kept_as_safetensors_and_replayed_without_megamoe(tmp_path):
    kernel = tmp_path / "serve.py"  # a name that the archive has a file of its own for
    kernel.write_text(KINDS)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(POOR)
    pythons = []
    for extra in (0, 1, 2):
        python = tmp_path / str(extra) / "python"
        python.parent.mkdir()
        python.write_text(
            f"#!/bin/sh\nexport PYTHONPATH={tmp_path}/site EXTRA={extra}\n"
            f'exec {sys.executable} "$@"\n'
        )
        python.chmod(0o755)
        pythons.append(str(python))
    names = (
        "staging/scale-words-mispacked-h128",
        "eplb/identity-map-int64",
        "layout/gate-up-interleave-or-scale-transpose-h128-i128",
        "forward/combine-adds-masked-rows",
        "forward/codes-rounded-twice-h128-i128",
    )
    root = Settings().root
    cases = [case for case in load_cases(root) if case.id in names]
    sides = tuple(map(parse, pythons[:2]))
    test = question.Test(cases, root, f"{kernel}:Kernel", repeat=1)
    bisection = Job(Range(sides[0], sides[1], sides), test, tmp_path / "state")
    report = run(bisection, lambda *_: None, lambda _: None)
    assert report["first_bad"] == pythons[1]
    first = {case["id"]: case["first_stage"] for case in report["cases"]}
    assert first == dict(zip(names, ("beyond", "load", "w13", "l2_acts", "l2_acts"), strict=True))
    files = (tmp_path / "state" / "outputs").glob(f"*/{names[0].replace('/', '--')}.safetensors")
    assert [int(load_file(path)["beyond"].sum()) > 0 for path in files].count(True) == 1
    with tarfile.open(report["archive"]) as inside:
        inside.extractall(tmp_path, filter="data")
    for extra, message in enumerate(("the GOOD bits", "the BAD bits", "neither side's bits")):
        process = subprocess.run(
            [pythons[extra], "replay.py"], cwd=tmp_path / "bisect", text=True, capture_output=True
        )
        assert (process.returncode, process.stdout.count(message)) == (extra, len(names)), process


@pytest.mark.slow
def test_the_goldens_can_decide_instead(tmp_path, capsys):
    home = tmp_path / "toy"
    commits = history.write(home, 4, {2: Y}, code_every=1)
    options = ("--judge", "--repeat", 1)
    code, report, _, _ = kernel_bisect(home, commits[0], "main", *options, capsys=capsys)
    assert (code, report["first_bad"], report["first_stage"]) == (0, commits[2], "y")
    assert "y: 1 of 1024 outside" in report["steps"][0]["reason"]
    code, _, _, err = kernel_bisect(home, commits[2], "main", *options, capsys=capsys)
    assert code == 2
    assert "(kernel: revision 2) is bad: " in err
    assert "look earlier for a good one" in err


def test_ends_with_the_same_bits_leave_nothing_to_bisect(tmp_path, capsys):
    home = tmp_path / "toy"
    commits = history.write(home, 3, {}, code_every=1)
    code, _, _, err = kernel_bisect(home, commits[0], "main", "--repeat", 1, capsys=capsys)
    assert code == 2
    assert "both ends return the same bits in 1 case; " in err
    assert "take a case that is red now (`megamoe check --backend " in err


@pytest.mark.slow
def test_versions_of_a_package(tmp_path, monkeypatch, capsys):
    """Four wheels and one version that was never published; no network."""
    for version in ("1.0", "1.1", "1.4", "2.0"):
        text = f"EXTRA = {int(version >= '1.1')}\n"
        wheel = make_wheel(tmp_path, "toyround", version, text)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    kernel = tmp_path / "kernel.py"
    kernel.write_text(
        "import toyround\nfrom megamoe.backends.eager import EagerBackend\n"
        "class Kernel(EagerBackend):\n    name = 'toy'\n    def forward(self, p):\n"
        "        if p.top_k == 3:\n            raise ValueError('no top-3')\n"
        "        out = super().forward(p)\n        out['y'][0, 0] += toyround.EXTRA\n"
        "        return out\n"
    )
    common = ("--backend", f"{kernel}:Kernel", "--repeat", 1)
    common += ("--case", "forward/combine-[ir]*")  # one of the two has three slots
    code, report, out, err = bisect(
        "--over", "toyround==1.0,1.1,1.2,1.4,2.0", *common, capsys=capsys
    )
    assert code == 0
    assert (report["first_bad"], report["last_good"]) == ("toyround==1.1", "toyround==1.0")
    assert report["builds"] <= limit(4)
    assert [case["id"] for case in report["cases"]] == [CASE]
    assert "left out, since an end cannot run it: forward/combine-reversed" in err
    assert "first bad toyround==1.1, last good toyround==1.0" in out
    skipped = next(s for s in report["steps"] if s["rev"] == "toyround==1.2")
    assert (skipped["verdict"], skipped["position"]) == ("skip", 2)
    assert skipped["reason"].startswith("cannot install toyround==1.2: No matching distribution")
    code, _, _, err = bisect("--over", "toyround==1.0,1.1,9.9", *common, capsys=capsys)
    assert code == 2
    assert "the bad end toyround==9.9 cannot be run: cannot install toyround==9.9" in err
    assert err.strip().endswith("; without it: --over toyround==1.0 toyround==1.1")


@pytest.mark.slow
def test_three_planted_changes_two_broken_builds_and_a_flaky_commit_in_96(tmp_path, capsys):
    """Each is found from the one before it, with its stage, in at most log2(n) + 2 builds.

    What does not build and what is flaky lie where the walks come by.
    """
    home = tmp_path / "toy"
    planted = {30: STAGED, 39: BROKEN, 54: NOISE, 61: CODE, 78: BROKEN, 88: Y}
    commits = history.write(home, 96, planted)
    met = {}
    good = 0
    for first, stage in ((30, "x_sf"), (61, "l2_acts"), (88, "y")):
        code, report, _, _ = kernel_bisect(
            home, commits[good], "main", "--only", "kernel.py", capsys=capsys
        )
        assert code == 0, report
        assert report["first_bad"] == commits[first]
        assert report["first_stage"] == stage
        assert report["cases"][0]["stages"][stage]["moved"] == 1
        assert report["range"] == 95 - good
        assert report["builds"] <= limit(report["range"])
        met |= {s["subject"]: s["verdict"] for s in report["steps"]}
        good = first
    assert set(met.values()) == {"good", "bad", "skip", "flaky"}
