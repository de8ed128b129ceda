"""Stop `megamoe check` at random moments and look for remains: there must be none.

    python tools/stops.py --count 200 --case 'eplb/*' --jobs 3

Each run gets SIGINT, SIGTERM or SIGKILL, in turn, at a moment between its start and its end. After
it there must be no process of the run, no folder of megamoe's, and no report that is not whole; and
the exit status must say what happened.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
PATIENCE: Final = 10.0
"""Seconds for processes that end by themselves after the run."""
MARK: Final = "STOPTEST"
"""A variable that every process of a run inherits."""


@dataclass
class Run:
    """The behaviour and the files of one stopped run."""

    number: signal.Signals | None
    after: float
    code: int
    output: str
    statuses: Counter[str] | None = None
    """The cases in the JSON report; None if there is no report."""
    wrong: list[str] = field(default_factory=list)

    @property
    def outcome(self) -> str:
        """The end of the run, in words for a table."""
        if self.number is not None and self.code == -self.number:
            return f"ended by {self.number.name}"
        return f"exit {self.code}"


def alive(mark: str, seconds: float = PATIENCE) -> list[str]:
    """Processes with the variable ``mark`` (NAME=VALUE), after some patience."""
    until = time.monotonic() + seconds
    while (found := _processes(mark.encode())) and time.monotonic() < until:
        time.sleep(0.02)
    return found


def abandoned(before: Set[str], seconds: float = PATIENCE) -> set[str]:
    """Folders of megamoe's that no process uses, after some patience, without those ``before``."""
    until = time.monotonic() + seconds
    found = folders() - before
    while found and time.monotonic() < until:
        time.sleep(0.05)
        found &= folders()
    return found


def folders() -> set[str]:
    """Folders of megamoe's that no process uses now."""
    places = {Path("/dev/shm"), Path(tempfile.gettempdir())}
    found = {str(path) for place in places for path in place.glob("megamoe-*")}
    return {path for path in found if not _processes(f"TMPDIR={path}/tmp".encode())}


def _processes(variable: bytes) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if variable in (entry / "environ").read_bytes().split(b"\0"):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                found.append(f"{entry.name}: {command}")
        except OSError:  # it has ended, or is another user's
            continue
    return found


def run(
    arguments: Sequence[str], folder: Path, number: signal.Signals | None = None,
    after: float = 0.0, wait_for: str = "",
) -> Run:  # fmt: skip
    """One ``megamoe check``, stopped ``after`` seconds, or once it has printed ``wait_for``."""
    folder = Path(tempfile.mkdtemp(dir=folder))
    mark, before = uuid.uuid4().hex, folders()
    made = {name: folder / f"{mark}.{name}" for name in ("json", "xml")}
    argv = [sys.executable, "-m", "megamoe", "check", *arguments,
            "--json", str(made["json"]), "--junit", str(made["xml"])]  # fmt: skip
    # A folder of its own, so that files of another program are not blamed on this run; with a short
    # path, since it holds sockets.
    own = Path(tempfile.mkdtemp(prefix="run-"))
    environment = {**os.environ, MARK: mark, "PYTHONUNBUFFERED": "1", "TMPDIR": str(own)}
    started = time.monotonic()
    with (folder / f"{mark}.out").open("w+") as out:
        process = subprocess.Popen(
            argv, stdout=out, stderr=out, env=environment, preexec_fn=_heed_signals
        )
        text = ""
        while process.poll() is None:
            text = (folder / f"{mark}.out").read_text(errors="replace")
            if number is not None and (
                wait_for in text if wait_for else time.monotonic() - started >= after
            ):
                process.send_signal(number)
                break
            time.sleep(0.01)
        try:
            code = process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
            text = "it did not end within 60 s"
    done = Run(number, round(time.monotonic() - started, 2), code, "")
    if text.startswith("it did not end"):
        done.wrong.append(text)
    done.output = (folder / f"{mark}.out").read_text(errors="replace")
    done.wrong += [f"process left: {line}" for line in alive(f"{MARK}={mark}")]
    done.wrong += [f"folder left: {path}" for path in abandoned(before)]
    done.wrong += [f"left in its TMPDIR: {path.name}" for path in own.iterdir()]
    done.wrong += _look(done, made["json"], made["xml"])
    for path in (folder, own):
        shutil.rmtree(path)
    return done


def _heed_signals() -> None:
    """In the run: a shell has a program in the background ignore SIGINT, and that is inherited."""
    for number in SIGNALS:
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)


def _look(done: Run, made: Path, junit: Path) -> list[str]:
    """The faults of the exit status and of the reports."""
    wrong = []
    for path in made.parent.glob(".megamoe-*"):
        wrong.append(f"half a file left: {path.name}")
    try:
        if made.exists():
            cases = json.loads(made.read_text())["cases"]
            done.statuses = Counter(case["status"] for case in cases)
        if junit.exists():
            ElementTree.parse(junit)
    except (ValueError, ElementTree.ParseError) as error:
        wrong.append(f"a report is not whole: {error}")
    if done.number is None:
        return wrong
    stopped = {128 + done.number, -done.number}
    if done.code not in {0, *stopped}:
        wrong.append(f"exit status {done.code} after {done.number.name}")
    judged = sum(line.startswith("[") for line in done.output.splitlines())
    if done.code > 0 and judged and not (made.exists() and junit.exists()):
        wrong.append(f"{judged} cases were judged, but a report is missing")
    if done.code > 0 and "stopped" not in done.output:
        wrong.append("it does not say that it was stopped")
    if "Traceback" in done.output and done.code not in (-signal.SIGINT,):
        at = done.output.index("Traceback")
        wrong.append(f"a traceback was printed: {done.output[at - 200 : at + 1500]!r}")
    return wrong


def main() -> int:
    """Stop ``--count`` runs; exit status 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--case", default="eplb/*")
    parser.add_argument("--golden")
    parser.add_argument("-n", default="1", help="judging processes of each run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    a = parser.parse_args()
    arguments = ["--backend", a.backend, "--case", a.case, "-n", a.n]
    arguments += ["--golden", a.golden] if a.golden else []
    moments = random.Random(a.seed)
    rows: Counter[tuple[str, str, str]] = Counter()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(prefix="stops-") as name:
        folder = Path(name)
        whole = run(arguments, folder)
        print(f"a run that is not stopped: exit {whole.code}, {whole.after:.1f} s", flush=True)
        wrong += whole.wrong
        longest = 1.05 * whole.after * max(1, a.jobs / 2)  # together they are slower
        plan = [(SIGNALS[i % len(SIGNALS)], moments.uniform(0.0, longest)) for i in range(a.count)]
        with ThreadPoolExecutor(a.jobs) as pool:
            stopped = pool.map(lambda pair: run(arguments, folder, *pair), plan)
            for (number, _), done in zip(plan, stopped, strict=True):
                report = "none" if done.statuses is None else "whole"
                report += ", some not run" if done.statuses and done.statuses["not-run"] else ""
                rows[number.name, done.outcome, report] += 1
                for text in done.wrong:
                    wrong.append(f"{number.name} after {done.after:.2f} s: {text}")
                    print(wrong[-1], flush=True)
                if sum(rows.values()) % 20 == 0:
                    print(f"{sum(rows.values())} of {a.count}", flush=True)
    print(f"{'signal':<9} {'how it ended':<19} {'report':<21} runs")
    for (sent, outcome, report), count in sorted(rows.items()):
        print(f"{sent:<9} {outcome:<19} {report:<21} {count:>4}")
    print(f"{sum(rows.values())} runs stopped; {len(wrong)} things were wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
