"""Backends that die, hang, write where they must not, and say what is not so.

``helpers/hostile.py`` has the acts, each with the verdict it must get. After every act an innocent
case is judged by the same worker, and must pass. The acts share a few workers, since each new
process imports torch; so all that are asked for run first, and each test looks at one of them.
Acts that end with their process, or try to outlive it, have processes as users have them. For those
that are seen in what an answer says, the next process is a fork (``helpers/warm.py``).
"""

import os
import queue
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megamoe.cases import load_cases
from megamoe.golden import Store, make
from megamoe.judge import Verdict
from megamoe.suite.runner import Runner
from megamoe.worker.client import Worker
from megamoe.worker.session import Launch, WorkerError
from tests.helpers import hostile
from tests.helpers.golden import make_golden
from tests.helpers.hostile import ACTS, Act
from tests.helpers.warm import warmed
from tools.stops import abandoned_folders, alive, folders

SIZES = """
hidden = 128
intermediate = 128
experts = 8
top_k = 2
family = "envelope"
tokens = 2
"""
CASES = f"""
[defaults]
breaks = "something"
tier = "quick"
[[case]]
kind = "staging"
name = "s"
hidden = 128
experts = 2
top_k = 2
tokens = 2
[[case]]
kind = "eplb"
name = "e"
top_k = 2
tokens = 3
logical = 4
physical = 4
[[case]]
kind = "layout"
name = "l"
hidden = 128
intermediate = 128
experts = 2
[[case]]
kind = "forward"
name = "f"
{SIZES}
[[case]]
kind = "forward"
name = "innocent"
{SIZES}
[[case]]
kind = "errors"
name = "over"
action = "over-capacity"
args = {{ tokens = 385, max_num_tokens = 384 }}
raises = "ValueError"
message = "DeepSeek V4 MegaMoE got 385 tokens, but the symmetric buffer was sized for 384."
""" + "".join(
    f'[[case]]\nkind = "property"\nname = "{name}"\nlaw = "{law}"\n{SIZES}\n'
    for name, law in (
        ("repeat", "repeat"), ("capacity", "capacity"), ("stale", "stale-buffer"),
        ("masked", "masked-slots"), ("permuted", "token-permutation"),
    )
)  # fmt: skip
STATIONS = 3
"""Workers at a time."""
NO_EXIT_FAMILIES = ("state", "identity", "megamoe")
"""Families of acts that leave the end of the process to the judge."""
OURS = str(Path(hostile.__file__).parents[2])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_golden(tmp_path_factory.mktemp("golden"), CASES)


def launch(spec: str, mark: str, seconds: float = 120.0, **variables: str) -> Launch:
    """A worker whose processes can be found by ``mark``."""
    environment = {**os.environ, "MARK": mark, "OMP_NUM_THREADS": "1", **variables}
    return Launch(spec, environment=environment, seconds=seconds, cwd=OURS, threads=1)


@pytest.fixture(scope="module")
def outcomes(request, root, tmp_path_factory, template):
    """Every act that this session asks for, done; by name."""
    acts = {
        item.callspec.params["act"]
        for item in request.session.items
        if item.path == request.path and "act" in getattr(item, "callspec", Nothing).params
    }
    waiting: dict[bool, queue.SimpleQueue[Act]] = {n: queue.SimpleQueue() for n in (False, True)}
    # What costs a process comes first, so that no station is left with many of them.
    for act in sorted(acts, key=lambda act: (not act.fresh, act.timeout, not act.costly)):
        waiting[act.costly and act.family in NO_EXIT_FAMILIES].put(act)
    mark, before, by_name = uuid.uuid4().hex, folders(os.getpid()), {}
    cases = {case.id: case for case in load_cases(root)}

    def station(number: int) -> None:
        warm = not number
        control = tmp_path_factory.mktemp("station") / "act"
        control.write_text("")
        spec = f"{hostile.__file__}:Backend"
        own = {"HOSTILE_ACT": str(control)} | ({"WARM": "1"} if warm else {})
        with Worker(launch(spec, mark, **own)) as worker:
            while True:
                try:
                    act = waiting[warm].get_nowait()
                except queue.Empty:
                    return
                by_name[act.name] = one(worker, control, act)

    def one(worker: Worker, control: Path, act: Act) -> tuple[Verdict, Verdict]:
        store = Store(root, make)
        if act.fresh:
            worker.end()
        control.write_text(act.name)
        verdict = Runner(worker, store, None, act.timeout).run(cases[act.case])
        control.write_text("")
        time.sleep(act.pause)
        innocent = Runner(worker, store, None).run(cases["forward/innocent"])
        return verdict, innocent

    with warmed(template, "WARM"), ThreadPoolExecutor(STATIONS) as pool:
        for future in [pool.submit(station, number) for number in range(STATIONS)]:
            future.result()
    by_name["left"] = (alive(f"MARK={mark}"), abandoned_folders(os.getpid(), before=before))
    return by_name


class Nothing:
    params = ()


def cheap_and_costly(acts):
    return [
        pytest.param(act, id=act.name, marks=[pytest.mark.slow] if act.costly else [])
        for act in acts
    ]


@pytest.mark.parametrize("act", cheap_and_costly(ACTS.values()))
def test_each_act_gets_its_verdict_and_no_other_case_does(outcomes, act):
    verdict, innocent = outcomes[act.name]
    status, reason = verdict.status, verdict.reason
    assert status == act.status, reason
    assert act.reason in reason
    assert reason.isprintable() and len(reason) < 1200
    assert bool(reason) == (status != "pass")
    assert (innocent.status, innocent.reason) == ("pass", "")


def test_no_process_and_no_folder_outlives_the_workers(outcomes):
    assert outcomes["left"] == ([], set())


def test_the_page_counts_them():
    page = (Path(__file__).parents[1] / "docs/backends.md").read_text()
    assert f"have {len(ACTS)} accidents of calls and {len(LOADS)} of loading, each" in page


# --- backends that cannot be loaded ---------------------------------------------------------------

START = "import os, sys, time, threading, signal, atexit\n"
CLASS = "class Backend:\n    name = 'b'\n    accumulator = 'fp32'\n    def forward(self, p): pass\n"
FULL = START + CLASS
EXIT = "backend {spec}: the backend ended its process (exit status "
EXCEPTION = "backend {spec}: loading it raised "
SLOW = "backend {spec}: not loaded within 4 s, last seen in "
LOADS = {
    "exits with 0 at import": (START + "os._exit(0)", EXIT + "0) while it was loaded"),
    "exits with 1 in its constructor": (FULL + "    def __init__(self): os._exit(1)", EXIT + "1)"),
    "exits when asked for its name": (
        START + "class Backend:\n    def __getattr__(self, n): os._exit(255)", EXIT + "255)"),
    "exits in a thread": (
        START + "threading.Timer(0.1, os._exit, (9,)).start(); time.sleep(60)", EXIT + "9)"),
    "is killed at import": (
        START + "os.kill(os.getpid(), 9)",
        "backend {spec}: the backend ended its process (SIGKILL, out of memory?)"),
    "sys.exit at import": (START + "sys.exit(0)", EXCEPTION + "SystemExit: 0 (b.py, line 2"),
    "sys.exit in its constructor": (
        FULL + "    def __init__(self): sys.exit(0)", EXCEPTION + "SystemExit: 0"),
    "KeyboardInterrupt at import": (
        START + "raise KeyboardInterrupt", EXCEPTION + "KeyboardInterrupt (b.py, line 2"),
    "looks whether garbage is collected": (
        START + "import gc\nraise ValueError(gc.isenabled())", EXCEPTION + "ValueError: True ("),
    "syntax error": ("class Backend(:", EXCEPTION + "SyntaxError: "),
    "hangs at import": (START + "while True: pass", SLOW),
    "hangs in C": (START + "sum(range(10**13))", SLOW),
    "hangs in its constructor": (FULL + "    def __init__(self): time.sleep(1e6)", SLOW),
    "hangs in its fingerprint": (FULL + "    def fingerprint(self): time.sleep(1e6)", SLOW),
    "hangs in its name": (
        START + "class Backend:\n    @property\n    def name(self): time.sleep(1e6)", SLOW),
    "hangs at its end": (
        START + "atexit.register(time.sleep, 1e6)\nraise ValueError('no')",
        EXCEPTION + "ValueError: no (b.py, line 3"),
    "no such object": (START, "backend {spec}: b.py has no 'Backend'; it has nothing that "),
    "no accumulator": (
        "class Backend:\n    name = 'b'\n    def forward(self, p): pass",
        "backend {spec}: Backend has no `accumulator`; write accumulator = "),
    "an unknown accumulator": (
        FULL.replace("fp32", "fp99"),
        "backend {spec}: `accumulator` of Backend is 'fp99'; write accumulator = "),
    "a number for a name": (
        FULL.replace("'b'", "7"), "backend {spec}: `name` of Backend is 7; write name = "),
    "an empty name": (FULL.replace("'b'", "''"), "backend {spec}: `name` of Backend is ''; write"),
    "nothing to call": (
        FULL.replace("forward", "backward"), "backend {spec}: Backend has nothing to judge; "),
    "a fingerprint that raises": (
        FULL + "    def fingerprint(self): 1 / 0",
        "backend {spec}: fingerprint() raised ZeroDivisionError: division by zero"),
    "a fingerprint of another form": (
        FULL + "    def fingerprint(self): return {'sources': 1}",
        "backend {spec}: fingerprint() must return sources and options as strings"),
    "closes its descriptors": (START + "os.closerange(3, 4096)\n" + CLASS, EXIT),
    "a line of the protocol at import": (
        START + """os.write(1, b'@megamoe {"protocol": 1, "ready": {}}\\n')\nsys.exit(3)""",
        EXCEPTION + "SystemExit: 3"),
    "leaves a child and raises": (
        START + "import subprocess\nsubprocess.Popen(['sleep', '600'])\nraise ValueError('no')",
        EXCEPTION + "ValueError: no"),
}  # fmt: skip


STAND_IN = """
# What a worker asks of torch until it has a backend: torch itself takes seconds to import.
__version__ = "0"
device = str

class Tensor:
    detach = contiguous = cpu = view = copy_ = None

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return lambda *_: 0
"""


@pytest.fixture(scope="module")
def replies(tmp_path_factory, request):
    """Each of them, loaded: what was said, and what was left; two at a time."""
    names = {
        item.callspec.params["what"]
        for item in request.session.items
        if item.path == request.path and "what" in getattr(item, "callspec", Nothing).params
    }
    mark, before = uuid.uuid4().hex, folders(os.getpid())
    front = tmp_path_factory.mktemp("front")
    (front / "torch.py").write_text(STAND_IN)

    def one(what: str) -> tuple[str, str]:
        file = tmp_path_factory.mktemp("backend") / "b.py"
        file.write_text(LOADS[what][0])
        spec = f"{file}:Backend"
        hangs = LOADS[what][1] == SLOW
        with Worker(launch(spec, mark, 4.0 if hangs else 120.0, PYTHONPATH=str(front))) as worker:
            try:
                return spec, f"loaded: {worker.identity}"
            except WorkerError as error:
                return spec, str(error)

    with ThreadPoolExecutor(STATIONS) as pool:
        by_name = dict(zip(sorted(names), pool.map(one, sorted(names)), strict=True))
    return {
        **by_name,
        "left": (alive(f"MARK={mark}"), abandoned_folders(os.getpid(), before=before)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("what", LOADS)
def test_what_cannot_be_loaded_is_said_in_one_line(replies, what):
    spec, reply = replies[what]
    assert reply.startswith(LOADS[what][1].format(spec=spec)) and "\n" not in reply, reply


@pytest.mark.slow
def test_nothing_is_left_of_what_cannot_be_loaded(replies):
    assert replies["left"] == ([], set())
