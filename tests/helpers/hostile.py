"""Hostile backends, and strange ones that are right: one act each, and the verdict it must get.

This file is the backend that runs in the worker, and the table that the tests read. The backend is
``eager`` until the file that ``HOSTILE_ACT`` names holds an act's name; then it does that act.
"""

from __future__ import annotations

import ctypes
import faulthandler
import locale
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from megamoe.backends import load_backend

EAGER = load_backend("eager")
METHODS = {
    "staging": "prepare", "eplb": "eplb_map", "layout": "transform_weights",
    "forward": "forward", "property": "forward", "errors": "prepare",
}  # fmt: skip
STATE = SimpleNamespace(
    calls=0, alive=0, buffer=None, name="hostile", accumulator="fp32", sources="a" * 64
)
"""What the backend keeps between calls."""


@dataclass(frozen=True)
class Act:
    """What a backend does in one case, and what must be said of it."""

    name: str
    family: str
    case: str
    status: str
    reason: str
    """Words of the verdict's reason."""
    run: Callable[..., Any]
    """``run(right, *arguments)``; ``right`` is eager's callable of the same name."""
    timeout: float = 60.0
    fresh: bool = False
    """Must be the first call of its process."""
    pause: float = 0.0
    """Seconds until the innocent case, for what happens between calls."""
    costly: bool = False
    """The process is of no use afterwards, and a new one takes seconds."""


ACTS: dict[str, Act] = {}


def act(family: str, status: str, reason: str = "", case: str = "forward/f", **more: Any) -> Any:
    """Put a function into the table under its own name."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = f"{family}-{function.__name__}".replace("_", "-")
        assert name not in ACTS
        ACTS[name] = Act(name, family, case, status, reason, function, **more)
        return function

    return register


class Backend:
    """Eager, but for the act that was asked for."""

    def __init__(self) -> None:
        self.request = Path(os.environ["HOSTILE_ACT"])

    @property
    def name(self) -> str:
        return STATE.name() if callable(STATE.name) else STATE.name

    @property
    def accumulator(self) -> str:
        return STATE.accumulator

    def fingerprint(self) -> dict[str, Any]:
        return {"sources": STATE.sources, "options": "", "binaries": {}}

    def forward(self, problem: Any) -> Any:
        return self._do("forward", problem)

    def prepare(self, *arguments: Any) -> Any:
        return self._do("prepare", *arguments)

    def eplb_map(self, *arguments: Any) -> Any:
        return self._do("eplb_map", *arguments)

    def transform_weights(self, *arguments: Any) -> Any:
        return self._do("transform_weights", *arguments)

    def _do(self, method: str, *arguments: Any) -> Any:
        right = getattr(EAGER, method)
        entry = ACTS.get(self.request.read_text())
        if entry is None or METHODS[entry.case.partition("/")[0]] != method:
            return right(*arguments)
        return entry.run(right, *arguments)


def y_of(right: Any, problem: Any) -> torch.Tensor:
    """Eager's y alone."""
    return right(problem)["y"].clone()


# --- death ----------------------------------------------------------------------------------------

PROCESS_END = "the backend ended its process ("
death = {"family": "death", "status": "error", "costly": True}


@act(**death, reason=f"{PROCESS_END}exit status 0)")
def exit_0(right, problem):
    os._exit(0)


@act(**death, reason=f"{PROCESS_END}exit status 1)")
def exit_1(right, problem):
    os._exit(1)


@act(**death, reason=f"{PROCESS_END}exit status 255)", case="staging/s")
def exit_255(right, *arguments):
    os._exit(255)


@act(**death, reason=f"{PROCESS_END}SIGKILL, out of memory?)", case="eplb/e")
def kills_itself(right, *arguments):
    os.kill(os.getpid(), signal.SIGKILL)


@act(**death, reason=f"{PROCESS_END}SIGABRT", case="layout/l")
def aborts(right, *arguments):
    os.abort()


@act(**death, reason=f"{PROCESS_END}SIGKILL")
def kills_its_process_group(right, problem):
    os.killpg(0, signal.SIGKILL)


@act(**death, reason=f"{PROCESS_END}SIGTERM)")
def terminates_its_session(right, problem):
    os.kill(0, signal.SIGTERM)
    time.sleep(60)


@act(**death, reason=f"{PROCESS_END}SIGSEGV")
def reads_a_null_pointer(right, problem):
    ctypes.string_at(0)


# From Python 3.12 on the interpreter counts calls of C too, and raises.
@act(
    **death,
    reason=f"{PROCESS_END}SIGSEGV"
    if sys.version_info < (3, 12)
    else "the backend raised RecursionError",
)
def overflows_the_c_stack(right, problem):
    sys.setrecursionlimit(10**9)
    nest: list[Any] = []
    for _ in range(10**6):
        nest = [nest]
    repr(nest)


@act(**death, reason=f"{PROCESS_END}exit status 3)")
def exits_in_a_thread(right, problem):
    threading.Timer(0.1, os._exit, (3,)).start()
    time.sleep(60)


@act("death", "pass", costly=True, pause=1.0)
def exits_after_its_answer(right, problem):
    threading.Timer(0.5, os._exit, (3,)).start()
    return right(problem)


@act(**death, reason=f"{PROCESS_END}exit status 4)", case="property/repeat")
def exits_at_the_second_call(right, problem):
    STATE.alive += 1
    return os._exit(4) if STATE.alive == 2 else right(problem)


@act(**death, reason="the backend ended its keeper")
def kills_its_keeper(right, problem):
    subprocess.Popen(["sleep", "600"], start_new_session=True)
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)


@act(**death, reason=f"{PROCESS_END}exit status 5)")
def exits_when_asked_for_its_name(right, problem):
    STATE.name = lambda: os._exit(5)
    return right(problem)


@act(**death, reason=f"{PROCESS_END}exit status 6; last words: ?[31mI had to? go)")
def leaves_last_words(right, problem):
    os.write(2, b"\x1b[31mI had to\x07 go\n\n")
    os._exit(6)


@act("death", "error", "the backend raised SystemExit: 0 (hostile.py, line ")
def sys_exit(right, problem):
    sys.exit(0)


@act("death", "error", "the backend raised KeyboardInterrupt (hostile.py, line ")
def keyboard_interrupt(right, problem):
    raise KeyboardInterrupt


@act("death", "error", "the backend raised GeneratorExit", case="eplb/e")
def generator_exit(right, *arguments):
    raise GeneratorExit


@act("death", "error", "the backend raised MemoryError (hostile.py, line ")
def memory_error(right, problem):
    bytearray(2**60)


@act("death", "error", "the backend raised RecursionError: maximum recursion depth exceeded")
def recursion_error(right, problem):
    recursion_error(right, problem)


# --- hangs ----------------------------------------------------------------------------------------

HANGS = "no result within 1 s, its process was ended, last seen in "
hang = {"family": "hang", "status": "error", "costly": True, "timeout": 1.0}


def forever() -> None:
    """A loop that only SIGKILL ends."""
    while True:
        pass


@act(**hang, reason=f'{HANGS}File "')
def loops_in_python(right, problem):
    forever()


@act(**hang, reason=f'{HANGS}File "')
def loops_in_c(right, problem):
    return sum(range(10**13))


@act(**hang, reason=HANGS, case="layout/l")
def sleeps_and_ignores_the_alarm(right, *arguments):
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    time.sleep(10**6)


@act(**hang, reason=HANGS)
def crashes_once_its_time_is_up(right, problem):
    """As the watchdog's look at the stack of a running thread can make any process do."""
    time.sleep(1.2)
    os.kill(os.getpid(), signal.SIGSEGV)


@act(**hang, reason=HANGS, case="eplb/e")
def loops_with_all_signals_blocked(right, *arguments):
    signal.pthread_sigmask(signal.SIG_SETMASK, range(1, signal.NSIG))
    forever()


@act(**hang, reason=f"{HANGS}code that leaves no trace")
def loops_without_the_watchdog(right, problem):
    faulthandler.cancel_dump_traceback_later()
    faulthandler.disable()
    forever()


@act(**hang, reason=HANGS)
def puts_another_watchdog(right, problem):
    faulthandler.dump_traceback_later(10**5, exit=True)
    faulthandler.cancel_dump_traceback_later = lambda: None
    forever()


@act(**hang, reason=HANGS, case="staging/s")
def waits_for_its_own_lock(right, *arguments):
    lock = threading.Lock()
    with lock, lock:
        pass


@act(**hang, reason=HANGS)
def stops_itself(right, problem):
    os.kill(os.getpid(), signal.SIGSTOP)


@act(**hang, reason=HANGS)
def waits_for_a_child_that_waits(right, problem):
    subprocess.run(["sleep", "600"], check=False)


@act(**hang, reason=HANGS)
def hangs_when_asked_for_its_name(right, problem):
    STATE.name = forever
    return right(problem)


@act(**hang, reason=HANGS)
def returns_what_hangs_when_read(right, problem):
    class Endless(Mapping):
        __getitem__ = __len__ = lambda *_: 1

        def __iter__(self):
            while True:
                yield "y"

    return Endless()


# --- descriptors ----------------------------------------------------------------------------------

STANDARD = "the backend left another "
descriptor = {"family": "descriptors", "status": "error", "costly": True}


def pipes(flag: int) -> list[int]:
    """Descriptors from 3 on that are a pipe's end: of reading (0) or of writing (1)."""
    descriptors = []
    for path in Path("/proc/self/fd").iterdir():
        number = int(path.name)
        with suppress(OSError):
            text = Path(f"/proc/self/fdinfo/{number}").read_text()
            mode = int(text.split("flags:")[1].split()[0], 8) & 3
            link = str(path.readlink())
            if number > 2 and link.startswith("pipe:") and mode == flag:
                descriptors.append(number)
    return descriptors


@act(**descriptor, reason=PROCESS_END)
def closes_all_but_the_standard_files(right, problem):
    os.closerange(3, 4096)
    return right(problem)


@act(**descriptor, reason=STANDARD)
def closes_the_channel_of_requests(right, problem):
    for number in pipes(0):
        os.close(number)
    return right(problem)


@act(**descriptor, reason=PROCESS_END)
def closes_the_channel_of_answers(right, problem):
    for number in pipes(1):
        os.close(number)
    return right(problem)


@act(**descriptor, reason=STANDARD)
def closes_standard_input(right, problem):
    os.close(0)
    return right(problem)


@act(**descriptor, reason=STANDARD, case="staging/s")
def closes_standard_output(right, *arguments):
    sys.stdout.close()
    return right(*arguments)


@act(**descriptor, reason=STANDARD)
def closes_standard_error(right, problem):
    os.close(2)
    return right(problem)


@act(**descriptor, reason=STANDARD, case="layout/l")
def turns_standard_output_away(right, *arguments):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return right(*arguments)


@act("descriptors", "pass")
def opens_files_and_forgets_them(right, problem):
    STATE.files = [os.open(os.devnull, os.O_RDONLY) for _ in range(20)]
    return right(problem)


# --- the state of the process ---------------------------------------------------------------------

state = {"family": "state", "status": "error", "costly": True}


@act(**state, reason="another working directory")
def changes_directory(right, problem):
    os.chdir("/")
    return right(problem)


@act(**state, reason="another state of the process (FileNotFoundError")
def stands_in_a_removed_directory(right, problem):
    folder = tempfile.mkdtemp()
    os.chdir(folder)
    Path(folder).rmdir()
    return right(problem)


@act(**state, reason="another variable PATH; a call must leave its process as it was")
def changes_a_variable(right, problem):
    os.environ["PATH"] = "/nowhere"
    return right(problem)


@act(**state, reason="another variable HOSTILE_ACT", case="eplb/e")
def deletes_a_variable(right, *arguments):
    del os.environ["HOSTILE_ACT"]
    return right(*arguments)


LATE: list[bool] = []


@act(**state, reason="another variable MEGAMOE_GOLDEN", case="property/repeat")
def adds_a_variable_late(right, problem):
    """In a later call than the first of its process, whose variables are its set-up."""
    if LATE:
        os.environ["MEGAMOE_GOLDEN"] = "/nowhere"
    LATE.append(True)
    return right(problem)


@act(**state, reason="default dtype of torch (torch.float32, now torch.float64)", case="staging/s")
def sets_the_default_dtype(right, *arguments):
    right(*arguments)
    torch.set_default_dtype(torch.float64)


@act(**state, reason="default device of torch (cpu, now meta)")
def sets_the_default_device(right, problem):
    result = right(problem)
    torch.set_default_device("meta")
    return result


@act(**state, reason="thread count of torch")
def sets_the_thread_count(right, problem):
    torch.set_num_threads(torch.get_num_threads() + 1)
    return right(problem)


@act(**state, reason="grad mode of torch")
def sets_the_grad_mode(right, problem):
    torch.set_grad_enabled(False)
    return right(problem)


@act(**state, reason="locale")
def sets_the_locale(right, problem):
    locale.setlocale(locale.LC_ALL, "C" if locale.setlocale(locale.LC_ALL) != "C" else "C.UTF-8")
    return right(problem)


@act(**state, reason="flushing of subnormals")
def flushes_subnormals(right, problem):
    torch.set_flush_denormal(True)
    return right(problem)


@act(**state, reason="rounding mode")
def rounds_up(right, problem):
    result = right(problem)
    ctypes.CDLL("libm.so.6").fesetround(0x800)
    return result


@act(**state, reason="deterministic mode")
def sets_the_deterministic_mode(right, problem):
    torch.use_deterministic_algorithms(True, warn_only=True)
    return right(problem)


@act(**state, reason="precision of float32 products")
def sets_the_precision_of_products(right, problem):
    torch.set_float32_matmul_precision("medium")
    return right(problem)


@act(**state, reason="another timer")
def leaves_an_alarm(right, problem):
    signal.setitimer(signal.ITIMER_REAL, 30)
    return right(problem)


@act(**state, reason="another timer", case="layout/l")
def leaves_a_profiling_timer(right, *arguments):
    signal.setitimer(signal.ITIMER_PROF, 30)
    return right(*arguments)


@act(**state, reason="another resource limits")
def limits_the_size_of_files(right, problem):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    return right(problem)


@act(**state, reason="function of torch ([], now ['zeros'])")
def replaces_a_function_of_torch(right, problem):
    result = right(problem)
    torch.zeros = torch.ones
    return result


@act(**state, reason="function of torch ([], now ['contiguous', 'cpu'])", case="eplb/e")
def replaces_methods_of_tensors(right, *arguments):
    result = right(*arguments)
    torch.Tensor.cpu = torch.Tensor.contiguous = lambda t: torch.zeros(t.shape, dtype=t.dtype)
    return result


# --- what it prints -------------------------------------------------------------------------------

MANY = b"x" * (1 << 20)
FORGED = b"\n".join(b'@megamoe {"id": %d, "declined": "no"}' % n for n in range(1000))


@act("output", "pass")
def prints_200_mib_on_standard_output(right, problem):
    for _ in range(200):
        os.write(1, MANY)
    return right(problem)


@act("output", "pass", case="staging/s")
def prints_200_mib_on_standard_error(right, *arguments):
    for _ in range(200):
        os.write(2, MANY)
    return right(*arguments)


@act("output", "pass")
def prints_lines_of_the_protocol(right, problem):
    print(FORGED.decode(), flush=True)
    return right(problem)


@act("output", "pass")
def forges_answers_in_the_channel(right, problem):
    for number in pipes(1):
        os.write(number, b"\n" + FORGED + b"\n")
    return right(problem)


@act("output", "pass")
def writes_into_every_descriptor(right, problem):
    for number in range(3, 21):
        with suppress(OSError):
            os.write(number, b"@megamoe {")
    return right(problem)


@act("output", "pass", case="eplb/e")
def floods_the_channel(right, *arguments):
    for number in pipes(1):
        for _ in range(20):
            os.write(number, MANY)
    return right(*arguments)


# --- files and processes --------------------------------------------------------------------------


def folder() -> Path:
    """Where the judge puts the inputs; a backend is not told, but can find out."""
    return Path(os.environ["TMPDIR"]).parent


def input_files() -> list[Path]:
    """Files of inputs."""
    return [path for path in folder().iterdir() if path.is_file() and path.name != "trace"]


@act("files", "pass")
def leaves_temporary_files(right, problem):
    Path(tempfile.mkdtemp(), "large").write_bytes(MANY)
    os.write(tempfile.mkstemp()[0], MANY)
    return right(problem)


@act("files", "pass")
def writes_beside_the_inputs(right, problem):
    (folder() / "1-2").mkdir(exist_ok=True)
    (folder() / "1-2" / "mine").write_bytes(MANY)
    return right(problem)


@act("files", "error", "the backend removed a file of its inputs or outputs")
def deletes_its_inputs(right, problem):
    result = right(problem)
    for path in input_files():
        path.unlink()
    return result


@act("files", "error", "the backend cut off a file of its inputs or outputs", case="layout/l")
def cuts_its_inputs_off(right, *arguments):
    result = tuple(t.clone() for t in right(*arguments))
    for path in input_files():
        os.truncate(path, 1)
    return result


@act("files", "error", "the backend removed a file of its inputs or outputs")
def puts_a_fifo_in_place_of_its_inputs(right, problem):
    result = right(problem)
    for path in input_files():
        path.unlink()
        os.mkfifo(path)
    return result


@act("files", "error", "the backend removed a file of its inputs or outputs", costly=True)
def deletes_the_whole_folder(right, problem):
    result = right(problem)
    shutil.rmtree(folder())
    return result


@act("files", "pass")
def leaves_a_child(right, problem):
    subprocess.Popen(["sleep", "600"])
    return right(problem)


@act("files", "pass")
def leaves_a_child_that_ignores_signals(right, problem):
    code = "import signal, time; [signal.signal(s, signal.SIG_IGN) for s in (1, 2, 15)]"
    subprocess.Popen([sys.executable, "-c", f"{code}; time.sleep(600)"], start_new_session=True)
    return right(problem)


@act("files", "pass")
def leaves_a_grandchild_of_another_session(right, problem):
    code = "import os, time; os.fork() and os._exit(0); os.setsid(); os.fork() and os._exit(0)"
    argv = [sys.executable, "-c", f"{code}; os.closerange(0, 64); time.sleep(600)"]
    subprocess.run(argv, check=True)
    return right(problem)


@act("files", "pass")
def leaves_a_fork_of_itself(right, problem):
    if not os.fork():
        time.sleep(600)
        os._exit(0)
    return right(problem)


# --- inputs that are written ----------------------------------------------------------------------

WROTE = "the backend wrote into input "
POSITIONS = {
    "prepare": ("hidden_states", "topk_weights", "topk_ids"),
    "eplb_map": ("topk_ids", "", "logical_to_physical_map", "logical_replica_count"),
    "transform_weights": ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale"),
}
FIELDS = ("hidden_states", "topk_ids", "topk_weights", *POSITIONS["transform_weights"])


def flip(tensor: torch.Tensor) -> None:
    """Change the last byte only."""
    tensor.view(-1).view(torch.uint8)[-1] ^= 1


def _writers() -> None:
    """An act for every input of every kind."""
    for field in FIELDS:

        def forward(right, problem, field=field):
            result = right(problem)
            flip(getattr(problem, field))
            return result

        forward.__name__ = f"of_forward_{field}"
        act("inputs", "fail", f"{WROTE}{field}")(forward)
    for case in ("staging/s", "eplb/e", "layout/l"):
        method = METHODS[case.partition("/")[0]]
        for position, field in enumerate(POSITIONS[method]):
            if not field:  # the load, which the call must write
                continue

            def call(right, *arguments, position=position):
                result = right(*arguments)
                result = tuple(t.clone() for t in result) if isinstance(result, tuple) else result
                flip(arguments[position])
                return result

            call.__name__ = f"of_{method}_{field}"
            act("inputs", "fail", f"{WROTE}{field}", case)(call)


_writers()


@act("inputs", "fail", f"{WROTE}w2_weight")
def zeroes_w2_and_returns_zeros_with_the_right_codes(right, problem):
    result = dict(right(problem))
    problem.w2_weight.zero_()
    return {**result, "y": torch.zeros_like(result["y"])}


@act("inputs", "fail", f"{WROTE}w13_weight, w2_weight")
def writes_weights_of_experts_without_tokens(right, problem):
    result = right(problem)
    unused = set(range(problem.num_experts)) - set(problem.topk_ids.flatten().tolist())
    problem.w13_weight[min(unused)] = 1
    problem.w2_weight[max(unused)][-1, -1] = 1
    return result


@act("inputs", "fail", f"{WROTE}hidden_states", "property/permuted")
def writes_in_a_law(right, problem):
    result = right(problem)
    flip(problem.hidden_states)
    return result


@act("inputs", "fail", f"{WROTE}topk_ids")
def writes_and_then_returns_nonsense(right, problem):
    problem.topk_ids.zero_()
    return "nonsense"


@act("inputs", "fail", f"{WROTE}topk_ids", "staging/s")
def writes_through_an_alias(right, hidden, weights, ids, *out):
    right(hidden, weights, ids, *out)
    ctypes.memset(ids.data_ptr(), 0x11, 1)


# --- outputs --------------------------------------------------------------------------------------

BAD = {"family": "outputs", "status": "error"}


@act(**BAD, reason="forward returned l2_acts without l2_acts_sf; return both or neither")
def codes_without_scales(right, problem):
    return {name: t for name, t in right(problem).items() if name != "l2_acts_sf"}


@act(**BAD, reason="forward returned l2_acts_sf without l2_acts; return both or neither")
def scales_without_codes(right, problem):
    return {name: t for name, t in right(problem).items() if name != "l2_acts"}


def one_buffer(y: torch.Tensor) -> torch.Tensor:
    """``y`` in the memory of the call before."""
    if STATE.buffer is None or STATE.buffer.shape[1] != y.shape[1] or len(STATE.buffer) < len(y):
        STATE.buffer = torch.zeros(max(64, len(y)), y.shape[1], dtype=y.dtype)
    view = STATE.buffer[: len(y)]
    view.copy_(y)
    return view


def another_order(right, problem):
    """Each call differs in a last bit, and each returns the same memory."""
    STATE.calls += 1
    y = y_of(right, problem)
    y.view(torch.int16)[0, 0] += STATE.calls % 3
    return one_buffer(y)


for _case, _law in (
    ("repeat", "repeat: a second run changes"), ("capacity", "capacity: 384 more rows"),
    ("stale", "stale-buffer: an earlier call"), ("masked", "masked-slots: "),
):  # fmt: skip

    def _turn(right, problem):
        return another_order(right, problem)

    _turn.__name__ = f"another_order_in_one_buffer_{_case}"
    act("outputs", "fail", _law, f"property/{_case}")(_turn)


@act("outputs", "fail", "outside")
def returns_its_input(right, problem):
    return problem.hidden_states


@act("outputs", "fail", "outside")
def is_a_little_wrong(right, problem):
    y = y_of(right, problem)
    y.view(torch.int16).add_(64)
    return y


@act(**BAD, reason="forward returned meta tensor; return y")
def returns_a_meta_tensor(right, problem):
    return y_of(right, problem).to("meta")


@act(**BAD, reason="y is sparse_coo tensor; expected a bfloat16 tensor (2, 128)")
def returns_a_sparse_tensor(right, problem):
    return {"y": y_of(right, problem).to_sparse()}


@act(**BAD, reason="ids has dtype bfloat16, expected int32", case="eplb/e")
def returns_another_dtype_of_ids(right, *arguments):
    return right(*arguments).to(torch.bfloat16)


@act(**BAD, reason="y has shape (1099511627776, 128), expected (2, 128)")
def returns_2_to_the_40_rows(right, problem):
    return y_of(right, problem)[:1].expand(2**40, -1)


@act(**BAD, reason="y has dtype float32, expected bfloat16")
def returns_float32(right, problem):
    return y_of(right, problem).float()


@act(**BAD, reason="y has shape (2, 64), expected (2, 128)")
def returns_half_the_channels(right, problem):
    return y_of(right, problem)[:, :64]


@act("outputs", "fail", "y is NaN everywhere")
def returns_nan(right, problem):
    return torch.full_like(y_of(right, problem), torch.nan)


@act(**BAD, reason="y is str; expected a bfloat16 tensor")
def returns_a_word_for_y(right, problem):
    return {"y": "y"}


@act(**BAD, reason="forward returned an unknown tensor")
def returns_1000_tensors(right, problem):
    return {**right(problem), **{f"t{i}": torch.zeros(1) for i in range(1000)}}


@act(**BAD, reason="forward returned generator; return y as a torch.Tensor, or a mapping with 'y'")
def returns_a_generator(right, problem):
    return (t for t in right(problem).values())


@act(**BAD, reason="forward returned NoneType; return y as a torch.Tensor, or a mapping with 'y'")
def returns_nothing(right, problem):
    right(problem)


@act(**BAD, reason="transform_weights must return a tuple", case="layout/l")
def returns_three_of_four_weights(right, *arguments):
    return right(*arguments)[:3]


@act(**BAD, reason="the backend raised ValueError: items are out (hostile.py, line ")
def returns_a_mapping_whose_items_raise(right, problem):
    class Out(dict):
        def items(self):
            raise ValueError("items are out")

    return Out(right(problem))


@act(**BAD, reason="the backend raised NotImplementedError: no items (hostile.py, line ")
def returns_a_mapping_that_declines(right, problem):
    class Out(dict):
        def items(self):
            raise NotImplementedError("no items")

    return Out(right(problem))


@act("outputs", "fail", "outside")
def changes_what_it_returned(right, problem):
    y = y_of(right, problem)

    def spoil():
        for _ in range(200):
            y.fill_(7)
            time.sleep(0.001)

    threading.Thread(target=spoil, daemon=True).start()
    time.sleep(0.02)
    return y


# --- identity -------------------------------------------------------------------------------------

SAYS = "the backend now says "
identity = {"family": "identity", "status": "error", "costly": True}


@act(**identity, reason=f"{SAYS}name 'another', but said 'hostile' at the start")
def takes_another_name(right, problem):
    STATE.name = "another"
    return right(problem)


@act(**identity, reason=f"{SAYS}accumulator 'sm90-fp8-promoted'", case="staging/s")
def takes_another_accumulator_class(right, *arguments):
    STATE.accumulator = "sm90-fp8-promoted"
    return right(*arguments)


@act(**identity, reason=f"{SAYS}name ['12'], but said")
def takes_a_number_for_a_name(right, problem):
    STATE.name = 12
    return right(problem)


@act(**identity, reason=f"{SAYS}that it offers ['forward', 'prepare', 'eplb_map']")
def loses_a_callable(right, problem):
    Backend.transform_weights = None
    return right(problem)


@act(**identity, reason=f"{SAYS}that it offers")
def gains_a_callable(right, problem):
    Backend.run = lambda *_: None
    return right(problem)


@act(**identity, reason=f"{SAYS}another fingerprint: its sources changed while it ran")
def has_other_sources(right, problem):
    STATE.sources = "b" * 64
    return right(problem)


@act(**identity, reason="the backend's fingerprint() raised ZeroDivisionError")
def has_a_fingerprint_that_raises(right, problem):
    Backend.fingerprint = lambda _: 1 // 0
    return right(problem)


@act(**identity, reason="the backend's fingerprint() must return sources and options as strings")
def has_a_fingerprint_of_another_form(right, problem):
    STATE.sources = 12
    return right(problem)


# --- megamoe itself -------------------------------------------------------------------------------


def tampered(right, problem, module: str, name: str, value: Any) -> torch.Tensor:
    """A wrong y, and a function of megamoe that would say it is right."""
    setattr(sys.modules.get(module) or __import__(module, fromlist=["x"]), name, value)
    return torch.zeros_like(y_of(right, problem))


@act("megamoe", "fail", "outside")
def replaces_the_judge(right, problem):
    from megamoe.judge import Finding
    from megamoe.judge.judgements import Judgement

    judgement = Judgement([Finding("y", 1)], ("staged",))
    tampered(right, problem, "megamoe.judge", "judge_forward", lambda *_: judgement)
    module = "megamoe.kinds.forward"
    return tampered(right, problem, module, "judge_forward", lambda *_: judgement)


@act("megamoe", "fail", "outside")
def replaces_the_oracle(right, problem):
    zeros = problem.hidden_states * 0
    return tampered(right, problem, "megamoe.oracle", "combine_interval", lambda *_: (zeros, zeros))


@act("megamoe", "fail", "outside", costly=True)
def replaces_the_problem(right, problem):
    import megamoe.spec.problem

    class Smaller(megamoe.spec.problem.Problem):
        num_tokens = 0

    return tampered(right, problem, "megamoe.spec.problem", "Problem", Smaller)


@act("megamoe", "fail", WROTE, case="layout/l", costly=True)
def replaces_the_comparison_of_inputs(right, *arguments):
    import megamoe.worker.files

    megamoe.worker.files.TensorFile.changes = lambda _: []
    result = tuple(t.clone() for t in right(*arguments))
    flip(arguments[0])
    return result


# --- strange, and right ---------------------------------------------------------------------------


@act("right", "pass")
def prints_a_little(right, problem):
    print("working", file=sys.stderr)
    print("working", end="")
    return right(problem)


@act("right", "pass", case="property/permuted")
def returns_one_buffer(right, problem):
    return one_buffer(y_of(right, problem))


@act("right", "pass", case="property/repeat")
def returns_one_buffer_again(right, problem):
    return {"y": one_buffer(y_of(right, problem))}


@act("right", "pass")
def returns_a_mapping_of_its_own(right, problem):
    class Out(Mapping):
        def __init__(self, tensors):
            self.tensors = tensors

        def __getitem__(self, name):
            return self.tensors[name]

        def __iter__(self):
            return iter(self.tensors)

        def __len__(self):
            return len(self.tensors)

    return Out(right(problem))


@act("right", "pass", case="eplb/e")
def works_in_a_thread(right, *arguments):
    STATE.pool = ThreadPoolExecutor(2)  # its threads stay
    return STATE.pool.submit(right, *arguments).result()


@act("right", "pass")
def changes_the_state_and_puts_it_back(right, problem):
    threads, here = torch.get_num_threads(), Path.cwd()
    torch.set_num_threads(threads + 1)
    torch.set_default_dtype(torch.float64)
    os.chdir("/")
    os.environ["SOMETHING"] = "1"
    try:
        with torch.no_grad():
            return right(problem)
    finally:
        del os.environ["SOMETHING"]
        os.chdir(here)
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(threads)


@act("right", "pass")
def catches_signals(right, problem):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
    os.kill(os.getpid(), signal.SIGTERM)
    return right(problem)


@act("right", "pass")
def blocks_signals(right, problem):
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    return right(problem)


@act("right", "pass", fresh=True)
def adds_a_variable_at_the_first_call(right, problem):
    os.environ["KERNEL_CACHE"] = "/nowhere"
    return right(problem)


@act("right", "pass", case="layout/l")
def runs_a_program_that_ends(right, *arguments):
    subprocess.run(["true"], check=True)
    return right(*arguments)


@act("right", "pass")
def forks_a_child_that_ends(right, problem):
    child = os.fork()
    if not child:
        os._exit(7)
    os.waitpid(child, 0)
    return right(problem)


@act("right", "pass")
def returns_y_transposed_in_memory(right, problem):
    return y_of(right, problem).t().contiguous().t()


@act("right", "pass")
def returns_every_second_row_of_a_larger_y(right, problem):
    y = y_of(right, problem)
    larger = torch.full((2 * len(y), 2 * y.shape[1]), 3, dtype=y.dtype)
    larger[::2, 1::2] = y
    return larger[::2, 1::2]


@act("right", "pass")
def returns_what_requires_grad(right, problem):
    return y_of(right, problem).requires_grad_()


@act("right", "pass")
def returns_a_parameter(right, problem):
    return torch.nn.Parameter(y_of(right, problem))


@act("right", "pass")
def returns_a_subclass_of_tensor(right, problem):
    class TensorSubclass(torch.Tensor):
        pass

    return y_of(right, problem).as_subclass(TensorSubclass)


@act("right", "pass")
def returns_a_lazy_negation(right, problem):
    return torch._neg_view(-y_of(right, problem))


@act("right", "pass")
def returns_inference_tensors(right, problem):
    with torch.inference_mode():
        return {name: t + 0 for name, t in right(problem).items()}


@act("right", "pass")
def writes_an_input_and_puts_it_back(right, problem):
    original = problem.topk_weights.clone()
    problem.topk_weights.mul_(2)
    result = right(replace(problem, topk_weights=original))
    problem.topk_weights.copy_(original)
    return result


@act("right", "pass")
def is_given_its_inputs_again(right, problem):
    STATE.problem = problem  # keeps the memory of a file that the judge removes
    return right(problem)


@act("right", "skip", "the backend declined: NotImplementedError: only on other devices")
def declines(right, problem):
    raise NotImplementedError("only on other devices")
