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
    while (processes := _processes(mark.encode())) and time.monotonic() < until:
        time.sleep(0.02)
    return processes


def abandoned_folders(
    pid: int, seconds: float = PATIENCE, before: Set[str] = frozenset()
) -> set[str]:
    """The folders of workers that process ``pid`` left behind, after some patience, without those
    ``before``."""
    until = time.monotonic() + seconds
    while (leftovers := folders(pid) - before) and time.monotonic() < until:
        time.sleep(0.05)
    return leftovers


def folders(pid: int) -> set[str]:
    """The folders of workers that process ``pid`` started. Their names hold its number, so those of
    another run, which may be about to remove them, do not count."""
    places = {Path("/dev/shm"), Path(tempfile.gettempdir())}
    return {str(path) for place in places for path in place.glob(f"megamoe-{pid}-*")}


def _processes(variable: bytes) -> list[str]:
    lines = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if variable in (entry / "environ").read_bytes().split(b"\0"):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                lines.append(f"{entry.name}: {command}")
        except OSError:  # it has ended, or is another user's
            continue
    return lines


def run(
    arguments: Sequence[str], folder: Path, number: signal.Signals | None = None,
    after: float = 0.0, wait_for: str = "",
) -> Run:  # fmt: skip
    """One ``megamoe check``, stopped ``after`` seconds, or once it has printed ``wait_for``."""
    folder = Path(tempfile.mkdtemp(dir=folder))
    mark = uuid.uuid4().hex
    files = {name: folder / f"{mark}.{name}" for name in ("json", "xml")}
    argv = [sys.executable, "-m", "megamoe", "check", *arguments,
            "--json", str(files["json"]), "--junit", str(files["xml"])]  # fmt: skip
    # A folder of its own, so that files of another program are not blamed on this run; with a short
    # path, since it holds sockets.
    own = Path(tempfile.mkdtemp(prefix="run-"))
    environment = {**os.environ, MARK: mark, "PYTHONUNBUFFERED": "1", "TMPDIR": str(own)}
    start = time.monotonic()
    with (folder / f"{mark}.out").open("w+") as out:
        process = subprocess.Popen(
            argv, stdout=out, stderr=out, env=environment, preexec_fn=_heed_signals
        )
        text = ""
        while process.poll() is None:
            text = (folder / f"{mark}.out").read_text(errors="replace")
            if number is not None and (
                wait_for in text if wait_for else time.monotonic() - start >= after
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
    result = Run(number, round(time.monotonic() - start, 2), code, "")
    if text.startswith("it did not end"):
        result.wrong.append(text)
    result.output = (folder / f"{mark}.out").read_text(errors="replace")
    result.wrong += [f"process left: {line}" for line in alive(f"{MARK}={mark}")]
    result.wrong += [f"folder left: {path}" for path in abandoned_folders(process.pid)]
    result.wrong += [f"left in its TMPDIR: {path.name}" for path in own.iterdir()]
    result.wrong += _look(result, files["json"], files["xml"])
    for path in (folder, own):
        shutil.rmtree(path)
    return result


def _heed_signals() -> None:
    """In the run: a shell has a program in the background ignore SIGINT, and that is inherited."""
    for number in SIGNALS:
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)


def _look(result: Run, report: Path, junit: Path) -> list[str]:
    """The faults of the exit status and of the reports."""
    wrong = []
    for path in report.parent.glob(".megamoe-*"):
        wrong.append(f"half a file left: {path.name}")
    try:
        if report.exists():
            cases = json.loads(report.read_text())["cases"]
            result.statuses = Counter(case["status"] for case in cases)
        if junit.exists():
            ElementTree.parse(junit)
    except (ValueError, ElementTree.ParseError) as error:
        wrong.append(f"a report is not whole: {error}")
    if result.number is None:
        return wrong
    codes = {128 + result.number, -result.number}
    if result.code not in {0, *codes}:
        wrong.append(f"exit status {result.code} after {result.number.name}")
    count = sum(line.startswith("[") for line in result.output.splitlines())
    if result.code > 0 and count and not (report.exists() and junit.exists()):
        wrong.append(f"{count} cases were judged, but a report is missing")
    if result.code > 0 and "stopped" not in result.output:
        wrong.append("it does not say that it was stopped")
    if "Traceback" in result.output and result.code not in (-signal.SIGINT,):
        at = result.output.index("Traceback")
        wrong.append(f"a traceback was printed: {result.output[at - 200 : at + 1500]!r}")
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
            results = pool.map(lambda pair: run(arguments, folder, *pair), plan)
            for (number, _), result in zip(plan, results, strict=True):
                report = "none" if result.statuses is None else "whole"
                report += ", some not run" if result.statuses and result.statuses["not-run"] else ""
                rows[number.name, result.outcome, report] += 1
                for text in result.wrong:
                    wrong.append(f"{number.name} after {result.after:.2f} s: {text}")
                    print(wrong[-1], flush=True)
                if sum(rows.values()) % 20 == 0:
                    print(f"{sum(rows.values())} of {a.count}", flush=True)
    print(f"{'signal':<9} {'how it ended':<19} {'report':<21} runs")
    for (signal_name, outcome, report), count in sorted(rows.items()):
        print(f"{signal_name:<9} {outcome:<19} {report:<21} {count:>4}")
    print(f"{sum(rows.values())} runs stopped; {len(wrong)} things were wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
