"""The worker as one file, told by hand what ``docs/protocol.md`` says; judges that share one."""

import gc
import json
import os
import subprocess
import sys
from types import SimpleNamespace
from uuid import uuid4

import pytest
import torch

from megamoe.cases import golden_root, load_cases
from megamoe.cases.recipes import forward_problem
from megamoe.commands.main import main
from megamoe.spec.problem import Problem
from megamoe.suite.judges import Desk, JudgeEnd, Judges, Order
from megamoe.worker import serve
from megamoe.worker.client import Worker
from megamoe.worker.files import write
from megamoe.worker.pool import Pool
from megamoe.worker.seats import Seats
from megamoe.worker.session import MODULES, Launch, WorkerError
from tools.stops import alive

KERNEL = """
import torch

class Kernel:
    name, accumulator = "kernel", "fp32"

    def eplb_map(self, ids, load, table, counts, record):
        print("some words")
        load += 1
        return ids * 2
"""


def test_one_file_in_a_folder_of_its_own_answers_by_the_protocol(tmp_path, capsys):
    (tmp_path / "kernel.py").write_text(KERNEL)
    worker = tmp_path / "worker.py"
    assert main(["worker", "--out", str(worker)]) == 0
    inputs = {
        "ids": torch.tensor([[1, 2]]), "load": torch.zeros(3, dtype=torch.int32),
        "table": torch.zeros(3, 1), "counts": torch.ones(3), "record": torch.tensor(True),
    }  # fmt: skip
    file = write(tmp_path, inputs, {})
    hello = {
        "backend": f"{tmp_path}/kernel.py:Kernel", "device": "cpu", "threads": 1, "front": [],
        "back": [], "seconds": 60, "trace": str(tmp_path / "trace"),
    }  # fmt: skip
    act = {"id": "a0", "call": "refuse", "inputs": {}, "seconds": 60}
    request = {
        "id": "a1", "call": "eplb_map", "inputs": {str(file.path): file.places}, "used": {},
        "arguments": list(inputs), "out": str(tmp_path / "out"), "limit": 1 << 20, "seconds": 60,
    }  # fmt: skip
    ran = subprocess.run(
        [sys.executable, "-I", str(worker)], text=True, capture_output=True, timeout=120,
        input="".join(f"{json.dumps(line)}\n" for line in (hello, act, request)), cwd=tmp_path,
        check=False,
    )  # fmt: skip
    lines = [x for x in ran.stdout.splitlines() if x.startswith("@megamoe ")]
    ready, refusal, reply = (json.loads(line.removeprefix("@megamoe ")) for line in lines)
    assert ready["protocol"] == 1 and ready["ready"]["callables"] == ["eplb_map"], ran.stderr
    assert "the judge names no module for acts" in refusal["missing"]
    assert reply["id"] == "a1" and reply["form"] == "tensor" and reply["lost"] == ""
    assert reply["shown"] == {"0": ["int64", [1, 2], [2, 1]]}
    kind, shape, offset = reply["places"]["out.0"]
    data = (tmp_path / "out").read_bytes()[offset : offset + 16]
    assert (kind, shape) == ("int64", [1, 2])
    assert torch.frombuffer(bytearray(data), dtype=torch.int64).tolist() == [2, 4]
    assert file.changes() == ["load"] and file.tensor("load").tolist() == [1, 1, 1]
    assert "some words" in ran.stderr and "some words" not in ran.stdout


def test_what_the_judge_names_no_module_for_is_an_error_or_done_without():
    with pytest.raises(serve.BackendError, match=r"must be installed.* path/to/file.py:OBJECT"):
        serve.load("eager", "cpu", {})
    assert serve.load("eager", "cpu", MODULES).name == "eager"
    whole = forward_problem(next(c for c in load_cases() if c.kind == "forward"))
    problem, plain = (serve.problem_of(vars(whole), modules) for modules in (MODULES, {}))
    assert (type(problem), type(plain)) == (Problem, SimpleNamespace)
    for size in ("num_tokens", "hidden_size", "num_experts", "intermediate_size", "top_k"):
        assert getattr(plain, size) == getattr(problem, size)


def test_the_file_must_be_python(capsys):
    assert main(["worker", "--out", "worker.txt"]) == 2
    assert "name a file that ends in .py" in capsys.readouterr().err


def ends(runner, case):
    """A judge's step that takes its process along, as being out of memory does."""
    import os

    os._exit(9)


def who(runner, case):
    """And whether its process looks for garbage, but not in what was imported; and its limit."""
    collects = gc.isenabled() and gc.get_freeze_count() > 100_000
    limit = runner.timeout, runner.has_learned
    return runner.session.identity.name, runner.session.folder, collects, limit


def test_judges_share_the_workers_and_one_that_ends_costs_its_case_alone(tmp_path):
    (tmp_path / "kernel.py").write_text(KERNEL)
    cases = [c for c in load_cases() if c.kind == "eplb"][:4]
    results = {}

    def order(case):
        return Order(timeout=3.0 if case is cases[0] else None)

    with Pool(Launch(f"{tmp_path}/kernel.py:Kernel"), 1) as pool:
        for step in (who, ends):
            desk = Desk(pool.address, golden_root(), 10.0, step, 1)
            with Judges(2, desk) as judges:
                judges.run(
                    cases, lambda case: None, lambda case, r: results.update({case.id: r}), order
                )
            if step is who:
                here = "kernel", pool.address.folder, True
                assert results.pop(cases[0].id) == (*here, (3.0, True)), "learned from other cases"
                assert set(results.values()) == {(*here, (10.0, False))}
    assert set(results) == {c.id for c in cases}
    assert all(isinstance(r, JudgeEnd) and "exit status 9" in str(r) for r in results.values())


def test_all_calls_of_a_case_go_to_one_worker():
    """A law compares calls, and looks for what one leaves behind for the next."""
    seats = Seats(["A", "B"])

    def worker(judge, case):
        with seats.worker(judge, case) as place:
            return place

    with seats.worker(1, "a") as mine:
        assert worker(2, "b") != mine, "one that is idle"
    assert worker(2, "c") != mine, "one to which no other judge comes back"
    assert worker(1, "a") == mine
    with seats.worker(2, "c"):
        assert worker(1, "d") == mine
    seats.leave(2)


def test_a_pool_of_a_backend_that_is_none_is_one_line(tmp_path):
    (tmp_path / "kernel.py").write_text("class Kernel:\n    name = 'k'\n    accumulator = 'fp33'\n")
    with pytest.raises(
        WorkerError, match=r"kernel.py:Kernel: `accumulator` of Kernel is 'fp33'; did you"
    ):
        Pool(Launch(f"{tmp_path}/kernel.py:Kernel"), 2)


def test_a_method_that_cannot_be_called_as_megamoe_calls_it_is_one_line(tmp_path):
    """A helper named ``run`` is the commonest: megamoe takes it for the interface of a kernel."""
    method = "    def {}: pass\n"
    own = method.format("forward(self, problem, extra=None)") + method.format("prepare(self, *all)")
    (tmp_path / "kernel.py").write_text(
        f"class Kernel:\n    name, accumulator = 'k', 'fp32'\n{own}"
        f"class Runs(Kernel):\n{method.format('run(self, p)')}"
        f"class Fused(Kernel):\n{method.format('run(self, *all, activation_clamp, **more)')}"
    )
    says = (
        "backend {}:Runs: Runs.run takes (p), and megamoe calls it as run(y, weights, buffer, "
        "num_tokens, *, activation_clamp, fast_math): too many positional arguments; give it these "
        "arguments, or another name if it is a method of your own"
    )
    spec = f"{tmp_path}/kernel.py"
    with pytest.raises(WorkerError) as caught, Worker(Launch(f"{spec}:Runs")) as worker:
        _ = worker.identity
    assert str(caught.value) == says.format(spec)
    for name in ("Kernel", "Fused"):
        with Worker(Launch(f"{spec}:{name}")) as worker:
            assert worker.identity.name == "k"


LAST_WORDS = """
import atexit
from pathlib import Path

class Kernel:
    name, accumulator = "kernel", "fp32"

    def __init__(self):
        atexit.register(lambda: Path(__file__).with_name("ended").touch())

    def eplb_map(self, *given):
        return given[0]
"""


@pytest.mark.parametrize(("seconds", "waits"), [("", False), ("20", True)])
def test_a_worker_is_killed_unless_a_tool_waits_for_its_end(tmp_path, monkeypatch, seconds, waits):
    """As ``make sanitize`` does: compute-sanitizer sums up when a process ends."""
    (tmp_path / "kernel.py").write_text(LAST_WORDS)
    monkeypatch.setenv("MEGAMOE_LINGER", seconds)
    with Worker(Launch(f"{tmp_path}/kernel.py:Kernel")) as worker:
        assert worker.identity.name == "kernel"
    assert (tmp_path / "ended").exists() == waits


MISSED = """
import ctypes, sys, time
from pathlib import Path
from megamoe.worker import keeper

ctypes.CDLL(None).prctl(keeper.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
look, missed = keeper._descendants, [0] * 3
keeper._descendants = lambda root: [] if missed and not missed.pop() else look(root)
kept = keeper.Keeper(Path(sys.argv[1]))
argv = ["sh", "-c", "setsid sh -c 'echo; exec sleep 600' & wait"]
kept._start({"argv": argv, "cwd": "/", "env": {"MARK": sys.argv[2], "PATH": sys.argv[3]}})
kept.worker.stdout.readline()
kept._kill()
assert not missed
"""


def test_a_process_that_a_look_at_proc_misses_is_killed_at_the_next(tmp_path):
    """A process that starts while ``/proc`` is read is in no list; the kernel still knows it."""
    argv = [sys.executable, "-c", MISSED, str(tmp_path), mark := uuid4().hex, os.environ["PATH"]]
    ran = subprocess.run(argv, input="", capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert alive(f"MARK={mark}", seconds=0) == []
