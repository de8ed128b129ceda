"""Workers that are forks of one process that has imported torch: for tests in which a process's
start is not what is tested.

To import torch takes two seconds of a processor, and the tests start hundreds of workers. With
:func:`warmed`, a keeper that is told to start ``PYTHON serve.py`` starts a *relay* in its place: a
small process that hands its descriptors, folder and environment to the *template* and ends as the
fork ends. The fork runs the same ``serve.py`` in the same interpreter with the same inputs.

What differs, so that tests of these things must not use it: a fork is no child of its keeper; all
forks of a template share what a process draws at its start (the seed of hashes, addresses); and
variables that a library reads while it is loaded are the template's.
"""

from __future__ import annotations

import array
import ctypes
import json
import os
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

PR_SET_PDEATHSIG: Final = 1
WORDS: Final = 1 << 20
"""Bytes of one request at most: an environment, mostly."""


# --- the test's side ------------------------------------------------------------------------------


class Template:
    """The process that workers are forks of. It ends with the one that made it."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="warm-")
        self.address = str(Path(self._folder.name) / "socket")
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment["OPENBLAS_NUM_THREADS"] = "1"  # numpy must start no thread before the fork
        self._process = subprocess.Popen(
            [sys.executable, __file__, "template", self.address], env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n", "the template did not start"
        self.forks = 0

    @classmethod
    def at(cls, address: str) -> Template:
        """The template of another process, for a program that a test starts."""
        instance = cls.__new__(cls)
        instance.address, instance.forks = address, 0
        return instance

    def start(self, order: dict[str, Any], serve: str) -> dict[str, Any]:
        """The order to a keeper, with a relay in place of a new interpreter."""
        if order["argv"] != [sys.executable, serve]:
            return order  # words before the interpreter, or another one
        self.forks += 1
        relay = [sys.executable, "-I", "-S", __file__, "relay", self.address, serve]
        return {**order, "argv": relay}

    def close(self) -> None:
        """End it, and its forks with it."""
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._folder.cleanup()


@contextmanager
def warmed(template: Template, mark: str = "") -> Iterator[Template]:
    """Until it is left, this process's workers are forks of ``template``.

    ``mark``: a variable; those whose environment lacks it start as ever.
    """
    from megamoe.worker.link import Link
    from megamoe.worker.process import HERE

    plain, serve = Link.tell, str(HERE / "serve.py")

    def tell(link: Link, order: Any) -> None:
        if "start" in order and (not mark or mark in order["start"]["env"]):
            order = {**order, "start": template.start(order["start"], serve)}
        plain(link, order)

    Link.tell = tell  # type: ignore[method-assign]
    try:
        yield template
    finally:
        Link.tell = plain  # type: ignore[method-assign]


# --- the relay ------------------------------------------------------------------------------------


def relay(address: str, serve: str) -> None:
    """Hand over what this process was given, wait for the fork's end, and end alike."""
    request = json.dumps({"serve": serve, "cwd": str(Path.cwd()), "env": dict(os.environ)}).encode()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as line:
        line.connect(address)
        rights = array.array("i", [0, 1, 2])
        line.sendmsg([request], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        for descriptor in (0, 1, 2):
            os.close(descriptor)
        status = int(line.recv(64) or b"99")
    if status < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.kill(os.getpid(), -status)
    os._exit(status)


# --- the template ---------------------------------------------------------------------------------


def template(address: str) -> None:
    """Import torch once; fork for each relay, and tell it how the fork ended."""
    _die_with_the_parent()
    import gc

    gc.disable()
    import torch  # noqa: F401

    gc.freeze()
    gc.enable()
    assert len([*Path("/proc/self/task").iterdir()]) == 1, "a process with threads must not fork"
    relays: dict[int, socket.socket] = {}
    """To each fork, its relay."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        door.bind(address)
        door.listen(64)
        os.write(1, b"ready\n")
        while True:
            ready, _, _ = select.select([door, *relays.values()], [], [], 0.01 if relays else None)
            if door in ready:
                line, _ = door.accept()
                pid = _forked(line)
                if pid:
                    relays[pid] = line
            for pid, line in [*relays.items()]:
                if line in ready:  # the relay was killed
                    _end(pid)
                dead, status = os.waitpid(pid, os.WNOHANG)
                if dead:
                    with suppress(ProcessLookupError):  # what it started
                        os.killpg(pid, signal.SIGKILL)
                    with relays.pop(pid), suppress(OSError):
                        line.send(str(os.waitstatus_to_exitcode(status)).encode())


def _forked(line: socket.socket) -> int:
    """The process of a fork for the relay at the other end; 0 where that has ended already."""
    request, rights, _, _ = line.recvmsg(WORDS, socket.CMSG_SPACE(12))
    descriptors = array.array("i", rights[0][2][:12]) if rights else []
    if len(descriptors) != 3:
        line.close()
        return 0
    pid = os.fork()
    if not pid:
        try:
            _work(json.loads(request), descriptors)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    for descriptor in descriptors:
        os.close(descriptor)
    return pid


def _work(request: dict[str, Any], descriptors: Sequence[int]) -> None:
    """In the fork: what a new interpreter would have been given, and then its program."""
    os.setsid()
    _die_with_the_parent()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
    os.closerange(3, 4096)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    tempfile.tempdir = None
    path = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    sys.path[:1] = [str(Path(request["serve"]).parent), *path]
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    sys.argv = [request["serve"]]
    runpy.run_path(request["serve"], run_name="__main__")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _end(pid: int) -> None:
    """Kill a fork and what it started in its session; it may have no session of its own yet."""
    for kill in (os.killpg, os.kill):
        with suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)


def _die_with_the_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def main() -> None:
    {"relay": relay, "template": template}[sys.argv[1]](*sys.argv[2:])


if __name__ == "__main__":
    main()
