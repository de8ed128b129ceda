"""Commands that create a side, and their end: nothing that they started is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from megamoe.compare import disk


class CannotStart(ValueError):
    """A side that cannot be created or run: one line with the reason."""


def build(
    argv: Sequence[str], cwd: Path, environment: dict[str, str], log: Path, limit: float
) -> None:
    """Run a command that creates a side; :class:`CannotStart` with its last line if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        code = _run_group(argv, cwd, environment, out, limit)
    if code != 0:
        last = last_line(log)
        disk.blame(last, log)
        how = f"took more than {limit:g} s" if code is None else f"exit {code}"
        raise CannotStart(f"does not build ({how}): {last or 'it said nothing'} [{log}]")


def _run_group(
    argv: Sequence[str], cwd: Path, environment: dict[str, str], out: Any, limit: float
) -> int | None:
    """Exit code, or None where it took too long; nothing it started is left behind."""
    # The process inherits the lock of the state: a process that survives a kill still holds it.
    process = subprocess.Popen(
        argv, cwd=cwd, env=environment, stdout=out, stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=disk.open_locks(),
    )  # fmt: skip
    return wait_and_end(process, limit)


def wait_and_end(process: subprocess.Popen[Any], limit: float) -> int | None:
    """Exit code, or None where it took more than ``limit`` seconds; then end its whole session."""
    until = time.monotonic() + limit
    in_time = True
    try:
        # Looked at, not taken: until then nobody else can have its number.
        while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            in_time = time.monotonic() < until
            if not in_time:
                break
            time.sleep(0.02)
    finally:
        end_group(process)
    return process.returncode if in_time else None


def end_group(process: subprocess.Popen[Any]) -> None:
    """Kill the process and those that it started in its session, unless it was waited for."""
    if process.returncode is None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def clean_environment() -> dict[str, str]:
    """The environment without variables that would lead a side, or git, back to this process's
    files."""
    leads = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "PYTHONPATH", "PYTHONHOME",
             "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")  # fmt: skip
    rest = {name: value for name, value in os.environ.items() if name not in leads}
    return {**rest, "PYTHONDONTWRITEBYTECODE": "1"}


def last_line(log: Path) -> str:
    """The last line of a log that begins with ``error:``, else the last that is not empty."""
    lines = [x.strip() for x in log.read_text(errors="replace").splitlines() if x.strip()]
    errors = [x for x in lines if x.startswith("error:")]
    return (errors or lines)[-1][:300] if lines else ""
