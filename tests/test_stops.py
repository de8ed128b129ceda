"""A run that is stopped says so, keeps what was judged, and leaves nothing behind."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console

from megamoe.cases.stored import load
from megamoe.commands.main import CLOSED_PIPE
from megamoe.judge import Verdict
from megamoe.suite import check as suite_check
from megamoe.suite import results
from megamoe.suite.judges import Judges
from megamoe.suite.settings import Settings
from megamoe.suite.stops import release
from megamoe.worker import exchange, files
from megamoe.worker.client import Worker
from megamoe.worker.session import Launch
from tests.test_hostile import root  # noqa: F401
from tools import stops

SLOW = """
import time
from megamoe.backends import load_backend

class Backend:
    name = "slow"
    accumulator = "fp32"
    eplb_map = staticmethod(load_backend("eager").eplb_map)

    def forward(self, problem):
        time.sleep(600)

    def prepare(self, *arguments):
        time.sleep(600)

    transform_weights = prepare
"""
"""Its first case, eplb/e, is quick; those that follow would take minutes."""
RUNS = []
"""The runs that the present test has started."""


@pytest.fixture
def slow(tmp_path):
    file = tmp_path / "slow.py"
    file.write_text(SLOW)
    return f"{file}:Backend"


@pytest.fixture
def mark(request):
    """A variable for every process of a run; afterwards none has it, and no folder of the runs is
    left."""
    RUNS.clear()
    value = f"{request.node.name}-{os.getpid()}"
    yield {stops.MARK: value}
    assert stops.alive(f"{stops.MARK}={value}") == []
    assert RUNS and [stops.abandoned_folders(run.pid) for run in RUNS] == [set()] * len(RUNS)


def megamoe(*arguments, cwd=None, **more):
    argv = [sys.executable, "-m", "megamoe", *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "200", "PYTHONPATH": str(Path.cwd()), **more}
    run = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=cwd,
        # A shell ignores SIGINT in what it runs in the background, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    RUNS.append(run)
    return run


def check(goldens, backend, folder, *more):
    report, junit = folder / "r.json", folder / "r.xml"
    return (
        "check", "-v", "--golden", goldens, "--backend", backend, "-n", "1", "--workers", "1",
        "--json", report, "--junit", junit, *more,
    )  # fmt: skip


def until(process, text):
    """Read its standard output up to the first line with ``text``."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError("".join(lines) + process.stderr.read())


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_run_and_keeps_what_was_judged(
    root, slow, tmp_path, mark, number, code  # noqa: F811
):  # fmt: skip
    process = megamoe(*check(root, slow, tmp_path), **mark)
    until(process, "] pass eplb/e")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    rest = "10" if "errors/over" not in out else "9"
    assert " passed in " in out and f"; the run was stopped, {rest} not run" in out
    assert f"\n{rest} not run: {number.name}\n" in out
    assert f"megamoe: error: stopped: {number.name}" in err and "Traceback" not in err
    data = json.loads((tmp_path / "r.json").read_text())
    status = {c["id"]: c["status"] for c in data["cases"]}
    assert status["eplb/e"] == "pass" and status["forward/f"] == "not-run"
    assert len(status) == 11 and data["stopped"] == number.name
    suites = ElementTree.parse(tmp_path / "r.xml").getroot()
    assert sum(int(s.get("skipped")) for s in suites) == int(rest)
    assert not list(tmp_path.glob(".megamoe-*"))


@pytest.mark.slow
def test_a_closed_pipe_stops_the_run_and_keeps_what_was_judged(
    root, slow, tmp_path, mark  # noqa: F811
):  # fmt: skip
    process = megamoe(*check(root, slow, tmp_path, "--timeout", "2"), **mark)
    until(process, "] pass eplb/e")
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == 141, err
    assert "megamoe: error: stopped: the output was closed" in err and "Traceback" not in err
    data = json.loads((tmp_path / "r.json").read_text())
    assert data["counts"]["not-run"] >= 7 and data["counts"]["pass"] >= 1


@pytest.mark.slow
def test_killed_at_once_it_leaves_nothing(root, slow, tmp_path, mark):  # noqa: F811
    process = megamoe(*check(root, slow, tmp_path), **mark)
    until(process, "] pass eplb/e")
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    assert not list(tmp_path.glob("r.*")) and not list(tmp_path.glob(".megamoe-*"))


@pytest.mark.slow
def test_stopped_while_the_backend_is_loaded_it_says_that_nothing_was_judged(
    root, tmp_path, mark  # noqa: F811
):  # fmt: skip
    file, sign = tmp_path / "b.py", tmp_path / "loading"
    file.write_text(f"import time\nopen({str(sign)!r}, 'w').close()\ntime.sleep(600)\n")
    process = megamoe(*check(root, f"{file}:Backend", tmp_path), **mark)
    while not sign.exists():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (143, "")
    assert err == "megamoe: stopped (SIGTERM); nothing was judged\n"
    assert not (tmp_path / "r.json").exists()


WRONG_THEN_SLOW = """
import time
import torch

class Backend:
    name, accumulator, calls = "slow", "fp32", 0

    def forward(self, problem):
        self.calls += 1
        if self.calls > 1:
            open(SIGN, "w").close()
            time.sleep(600)
        return {"y": torch.full_like(problem.hidden_states, 7)}
"""
"""Its first answer is wrong, and `fuzz` cannot reduce it: each later call would take minutes."""


@pytest.mark.slow
def test_fuzz_that_is_stopped_keeps_the_red_and_ends_its_workers(tmp_path, mark):
    file, sign, out = tmp_path / "b.py", tmp_path / "slow", tmp_path / "red.safetensors"
    file.write_text(f"SIGN = {str(sign)!r}\n{WRONG_THEN_SLOW}")
    process = megamoe("fuzz", "--backend", f"{file}:Backend", "--jobs", "1", "--workers", "1",
                      "--out", out, **mark)  # fmt: skip
    while not sign.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, err = process.communicate(timeout=60)
    assert process.returncode == 1 and err == "megamoe: error: stopped: SIGTERM\n"
    assert (
        f"{out}: it is the whole problem: the run was stopped\nreproduce: megamoe replay" in output
    )
    assert "; 1 red\n" in output and "fuzz" in load(out).about
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.py", "red.safetensors", "slow"]


@pytest.mark.slow
def test_a_verification_that_is_killed_leaves_no_process(root, mark):  # noqa: F811
    process = megamoe("golden", "verify", "--golden", root, "-j", "2", **mark)
    (name, value), until_then = next(iter(mark.items())), time.monotonic() + 60
    while len(stops.alive(f"{name}={value}", 0)) < 3 and time.monotonic() < until_then:
        time.sleep(0.02)
    assert len(stops.alive(f"{name}={value}", 0)) >= 3
    process.kill()
    process.wait()
    assert stops.alive(f"{name}={value}", 60) == []  # one that imports torch ends after it


@pytest.mark.slow
def test_a_report_that_cannot_be_written_is_named_and_the_table_is_shown(
    root, tmp_path, mark  # noqa: F811
):  # fmt: skip
    (tmp_path / "folder").mkdir()
    report = tmp_path / "folder/r.json"
    junit = tmp_path / "whole.xml"
    process = megamoe(
        "check", "--golden", root, "--backend", "eager", "-n", "1", "--kind", "eplb",
        "--json", report, "--junit", junit, **mark,
    )  # fmt: skip
    assert "1 case" in process.stdout.readline()  # the folder is looked at before that
    report.parent.rmdir()
    report.parent.write_text("no folder any more")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "GREEN: the one judged case passed" in out
    assert err.startswith(f"megamoe: error: {report} cannot be written: ")
    assert "Traceback" not in err and ElementTree.parse(junit) is not None


def test_a_full_disk_leaves_the_earlier_report_and_no_half_of_a_new_one(tmp_path, monkeypatch):
    report = tmp_path / "r.json"
    report.write_text("earlier")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    message = results.write(str(report), b"new")
    assert message == f"{report} cannot be written: No space left on device"
    assert report.read_text() == "earlier" and list(tmp_path.iterdir()) == [report]


def test_a_device_is_no_place_for_a_report():
    message = results.write("/dev/full/r.json", b"{}")
    assert message.startswith("/dev/full/r.json cannot be written: ")


def test_no_room_for_inputs_names_the_folder(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "pwrite", full)
    with pytest.raises(exchange.NoRoom, match=f"no room in {tmp_path} for 0 MiB of inputs; make"):
        files.write(tmp_path, {"x": torch.ones(4)}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_no_room_stops_the_run_and_keeps_what_was_judged(
    root, monkeypatch  # noqa: F811
):  # fmt: skip
    """The disk of exchanged files is full at the second case."""

    def bench(self, cases, on_start, on_result, brief):
        on_result(cases[0], (Verdict(cases[0].id, cases[0].kind, "pass"), []))
        raise exchange.NoRoom("no room in /x")

    monkeypatch.setattr(Judges, "run", bench)
    monkeypatch.setattr(Judges, "_hire", lambda self: None)
    console = Console(file=io.StringIO())
    settings = Settings("eager", golden=str(root))
    try:
        outcome = suite_check.check(settings, 1, 1, console)
    finally:
        release()
    assert (outcome.stop_reason, outcome.code) == ("no room in /x", 2)
    assert outcome.report["counts"]["not-run"] == 10


def test_list_into_a_closed_pipe_ends_without_a_word(root):  # noqa: F811
    process = megamoe("list", "--golden", root)
    process.stdout.close()
    assert (process.wait(60), process.stderr.read()) == (CLOSED_PIPE, "")


def test_a_folder_that_a_run_leaves_behind_is_seen_and_those_of_other_runs_are_not():
    with Worker(Launch("eager")) as worker:
        folder = str(worker.folder)
        assert folder in stops.abandoned_folders(os.getpid(), 0)
        assert folder not in stops.abandoned_folders(os.getppid(), 0)
    assert folder not in stops.abandoned_folders(os.getpid(), 0)


# --- the judge's own ------------------------------------------------------------------------------

HURTS = """
import os, shutil, signal, sys, atexit
from megamoe.backends import load_backend

class Backend:
    name = "hurts"
    accumulator = "fp32"
    prepare = staticmethod(load_backend("eager").prepare)

    def forward(self, problem):
        os.chdir("/")
        atexit.register(os._exit, 0)
        for name in ("r.json", "r.xml"):
            print(name, file=sys.__stdout__)
        sys.exit(0)

    def transform_weights(self, *arguments):
        os._exit(0)
"""


@pytest.mark.slow
def test_exit_status_reports_and_directory_are_the_judges(root, tmp_path, mark):  # noqa: F811
    """Relative names of reports mean the directory that the command was started in."""
    (tmp_path / "hurts.py").write_text(HURTS)
    process = megamoe(
        "check", "--golden", root, "--backend", "hurts.py:Backend", "-n", "1", "--workers", "1",
        "--json", "r.json", "--junit", "r.xml", cwd=tmp_path, **mark,
    )  # fmt: skip
    out, err = process.communicate(timeout=240)
    assert process.returncode == 1, out + err
    cases = {c["id"]: c for c in json.loads((tmp_path / "r.json").read_text())["cases"]}
    assert cases["staging/s"]["status"] == "pass"
    assert cases["eplb/e"]["status"] == "not-provided"
    assert "raised SystemExit: 0" in cases["forward/f"]["reason"]
    assert "ended its process (exit status 0)" in cases["layout/l"]["reason"]
    assert "RED: " in out and ElementTree.parse(tmp_path / "r.xml") is not None
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "__pycache__") == [
        "hurts.py", "r.json", "r.xml"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("text", ["import os; os._exit(0)", "import sys; sys.exit(0)"])
def test_a_backend_that_exits_at_import_is_no_green(root, tmp_path, mark, text):  # noqa: F811
    (tmp_path / "b.py").write_text(text)
    process = megamoe(*check(root, f"{tmp_path}/b.py:Backend", tmp_path), **mark)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert err.startswith(f"megamoe: error: backend {tmp_path}/b.py:Backend: ")
    assert err.count("\n") == 1 and not (tmp_path / "r.json").exists()


@pytest.mark.slow
def test_random_stops_leave_nothing(root, tmp_path):  # noqa: F811
    """A few of what ``tools/stops.py`` does by the hundred."""
    arguments = ["--golden", str(root), "--backend", "eager", "--kind", "eplb", "-n", "1"]
    for number, after in zip(stops.SIGNALS, (3.0, 2.0, 2.5), strict=True):
        assert stops.run(arguments, tmp_path, number, after).wrong == []


def test_a_fork_server_whose_starter_is_gone_before_it_looks_ends_and_leaves_no_folder(tmp_path):
    folder = tmp_path / "pymp-x"
    folder.mkdir()
    read, write = os.pipe()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "s"))
        argv = [sys.executable, "-c", "import megamoe.suite.mortal; import time; time.sleep(60)"]
        descriptors = (listener.fileno(), read)
        for writer_is_there in (True, False):
            if not writer_is_there:
                os.close(write)
            server = subprocess.Popen(argv, pass_fds=descriptors)
            if writer_is_there:
                with pytest.raises(subprocess.TimeoutExpired):
                    server.wait(1)
                assert folder.exists()
                server.kill()
                server.wait()
            else:
                assert server.wait(30) == 128 + signal.SIGTERM
                assert not folder.exists()
    os.close(read)
