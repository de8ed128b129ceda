"""A fork of ``helpers/warm.py`` is, for its judge, the process that it stands for."""

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megamoe.worker.client import Worker
from megamoe.worker.session import Launch, WorkerError
from tests.conftest import LONG, dealt
from tests.helpers.warm import Template, warmed

FORM = "class B:\n    name = 'b'\n    accumulator = 'fp32'\n    def forward(self, p): pass\n"


@pytest.fixture
def says(warm, tmp_path):
    """What a judge is told of a backend that is such a file, with further settings."""

    def ask(text, **settings):
        file = tmp_path / "b.py"
        file.write_text(text)
        with Worker(Launch(f"{file}:B", threads=1, **settings)) as worker:
            try:
                return worker.identity.name
            except WorkerError as error:
                return str(error).partition(": ")[2]

    return ask


@pytest.mark.parametrize(
    ("act", "message"),
    [
        ("os._exit(7)", "(exit status 7) while"),
        ("os._exit(0)", "(exit status 0) while"),
        ("os.kill(os.getpid(), 11)", "(SIGSEGV) while"),
        ("os.kill(os.getpid(), 9)", "(SIGKILL, out of memory?) while"),
        ("os.write(2, b'no room\\n'); os._exit(3)", "(exit status 3; last words: no room) while"),
    ],
)
def test_it_ends_as_it_would(says, act, message):
    assert message in says(f"import os\n{act}\n")


def test_it_has_the_environment_the_folder_and_the_import_path_that_were_asked_for(says, tmp_path):
    (tmp_path / "path").mkdir()
    (tmp_path / "path/neighbour.py").write_text("HERE = 'a neighbour'\n")
    text = """import os, sys, tempfile
import neighbour
raise ValueError([neighbour.HERE, os.environ["MARK"], os.getcwd() == os.environ["WHERE"],
                  tempfile.gettempdir() == os.environ["TMPDIR"], "PATH" in os.environ,
                  sys.stdin.read()])
"""
    environment = {"MARK": "m", "WHERE": str(tmp_path), "PYTHONPATH": str(tmp_path / "path")}
    message = says(text, environment=environment, cwd=str(tmp_path))
    assert "ValueError: ['a neighbour', 'm', True, True, False, '']" in message


def test_it_is_judged_and_counted(says, warm):
    before = warm.forks
    assert says(FORM) == "b"
    assert warm.forks == before + 1


def test_another_interpreter_is_left_as_it_is(says, warm):
    before = warm.forks
    assert "cannot be started" in says(FORM, argv=("/no/such/python",))
    assert "exit status 5" in says(FORM, argv=(sys.executable, "-c", "raise SystemExit(5)"))
    assert warm.forks == before


def test_it_and_its_children_end_with_their_keeper_s_word(says, tmp_path):
    pids = tmp_path / "pids"
    text = f"""import os, subprocess, time
child = subprocess.Popen(["sleep", "600"])
open({str(pids)!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
time.sleep(600)
"""
    assert "not loaded within 1 s" in says(text, seconds=1.0)
    wait_for_the_end(pids.read_text().split())


def test_no_fork_outlives_its_template(tmp_path):
    pids = tmp_path / "pids"
    file = tmp_path / "b.py"
    file.write_text(
        f"import os, time\nopen({str(pids)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)\n"
    )
    own = Template()
    with warmed(own), Worker(Launch(f"{file}:B", threads=1)):
        until = time.monotonic() + 60
        while not (pids.exists() and pids.read_text()) and time.monotonic() < until:
            time.sleep(0.02)
        own.close()
        wait_for_the_end(pids.read_text().split())


@pytest.mark.parametrize("count", [2, 3])
def test_long_files_are_dealt_in_whole_and_first(count):
    names = ["a", *LONG[:5], "b", "c"]
    items = [SimpleNamespace(path=Path(f"test_{n}.py"), at=at) for n in names for at in range(40)]
    order = dealt(items, count)
    assert sorted(map(id, order)) == sorted(map(id, items))
    size = -(-len(items) // count)
    firsts = [order[size * part].path.stem for part in range(count)]
    assert firsts == [f"test_{name}" for name in LONG[:count]]
    for name in LONG[:5]:
        mine = [place for place, item in enumerate(order) if item.path.stem == f"test_{name}"]
        assert mine == list(range(mine[0], mine[0] + 40))


def wait_for_the_end(pids):
    assert pids
    until = time.monotonic() + 10
    while any(running(pid) for pid in pids):
        assert time.monotonic() < until, pids
        time.sleep(0.02)


def running(pid):
    """Whether the process is, and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False
