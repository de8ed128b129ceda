"""A step that a command of the user makes good or bad, as in ``git bisect run``."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any, Final

from megamoe.compare import disk
from megamoe.compare.processes import clean_environment, wait_and_end
from megamoe.compare.question import EXTRA_RUNS, Test, Unclear
from megamoe.compare.sides import Ready

SKIP: Final = 125
"""Exit status of a command that cannot tell, as in ``git bisect run``."""


def by_command(test: Test, runtime: Ready, folder: Path) -> dict[str, Any]:
    """``verdict`` and ``reason`` of a step, by the exit status of ``test.command``; its log lies in
    ``folder``. :class:`Unclear` if the command hangs or a signal ends it."""
    codes: list[int] = []
    target = test.repeat
    while len(codes) < target:
        codes.append(_exit_of(test, runtime, folder))
        if len(set(map(_of_code, codes))) > 1:
            target = test.repeat + EXTRA_RUNS
    verdicts = Counter(_of_code(code) for code in codes)
    if len(verdicts) > 1:
        return {"verdict": "flaky", "reason": f"exit status {', '.join(map(str, codes))}"}
    verdict = _of_code(codes[0])
    return {"verdict": verdict, "reason": "" if verdict == "good" else f"exit {codes[0]}"}


def _exit_of(test: Test, runtime: Ready, folder: Path) -> int:
    log = folder / "logs" / "command.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = clean_environment()
    environment["PYTHONPATH"] = os.pathsep.join(runtime.front)
    environment["MEGAMOE_PYTHON"] = runtime.argv[-1]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*runtime.argv[:-1], "sh", "-c", test.command],
            cwd=runtime.cwd, env=environment, stdout=out, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=disk.open_locks(),
        )  # fmt: skip
        code = wait_and_end(process, test.timeout)
    if code is None:
        raise Unclear(f"the command took more than {test.timeout:g} s")
    if code:
        disk.blame("", log)
    if code < 0 or code > 127:
        raise Unclear(f"the command was ended by signal {-code if code < 0 else code - 128}")
    return code


def _of_code(code: int) -> str:
    return {0: "good", SKIP: "skip"}.get(code, "bad")
