"""``megamoe check``: the suite run by pytest and pytest-xdist, with verdicts for output.

At least one worker process always does the judging, so that a backend which crashes or hangs
takes its case with it and nothing else.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from _pytest.terminal import TerminalReporter
from rich.console import Console

from megamoe import shards
from megamoe.backends import load_backend
from megamoe.cases import Case
from megamoe.contract import CURRENT
from megamoe.golden import GoldenError, Store, make, recorded
from megamoe.judge import Verdict
from megamoe.suite import plugin, report
from megamoe.suite.child import ENDED, last_seen
from megamoe.suite.progress import Progress
from megamoe.suite.settings import Settings


def check(settings: Settings, workers: int, console: Console) -> report.Report:
    """Judge ``settings.backend``; raises what the CLI says in one line (``ValueError``)."""
    backend = load_backend(settings.backend, settings.device)
    store = Store(settings.root, make)
    if store.manifest["contract"] != CURRENT.revision:
        raise GoldenError(
            f"the goldens are of contract {store.manifest['contract']}, this megamoe judges "
            f"{CURRENT.revision}; use matching versions of the two"
        )
    kept = recorded.find(settings.root, backend, settings.device)
    cases = settings.cases()
    seconds = shards.durations(settings.root)
    started = time.perf_counter()
    verdicts: list[Verdict] = []
    details: dict[str, Any] = {}
    if cases:
        with Progress(len(cases), console, settings, seconds) as progress:
            progress.workers = max(1, min(workers, len(cases)))
            progress.left = sum(seconds.get(c.id, shards.DEFAULT_SECONDS) for c in cases)
            collector = _Collector(cases, settings, progress)
            _pytest(settings, progress.workers, len(cases), collector)
            verdicts, details = collector.complete(), collector.details
    took = time.perf_counter() - started
    made = report.build(settings, backend.accumulator, verdicts, took)
    file = None if kept is None else str(kept.path.relative_to(settings.root))
    report.describe(made, cases, details)
    made["options"] = settings.again()
    manifest = (settings.root / "manifest.json").read_bytes()
    made["goldens"] = {"manifest_sha256": hashlib.sha256(manifest).hexdigest()}
    made["fingerprint"] = _fingerprint(backend)
    made["recorded"] = {"machine_class": recorded.machine_class(settings.device), "file": file}
    return made


def _fingerprint(backend: Any) -> dict[str, str] | None:
    """Sources and options; binaries are compiled in the workers, and differ with the cases."""
    try:
        found = recorded.fingerprint(backend)
    except Exception:  # the cases' verdicts say what is wrong with it; the run is not lost here
        return None
    return None if found is None else {name: found[name] for name in ("sources", "options")}


class _Collector:
    """A pytest plugin of the controlling process: reports in, verdicts out."""

    def __init__(self, cases: list[Case], settings: Settings, progress: Progress) -> None:
        self.cases = {case.id: case for case in cases}
        self.settings = settings
        self.progress = progress
        self.verdicts: dict[str, Verdict] = {}
        self.details: dict[str, Any] = {}
        self.since: dict[str, float] = {}
        self.run = ""
        self.output = io.StringIO()

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        """Pytest's own words go nowhere; what matters is in the verdicts."""
        config.pluginmanager.unregister(name="terminalreporter")
        config.pluginmanager.register(TerminalReporter(config, self.output), "terminalreporter")

    def pytest_configure_node(self, node: Any) -> None:
        self.run = node.workerinput["testrunuid"]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        case_id = _case_id(nodeid)
        self.since[case_id] = time.perf_counter()
        self.progress.started(case_id)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        case_id = _case_id(report.nodeid)
        properties = dict(report.user_properties)
        said = properties.get(plugin.PROPERTY)
        if report.when == "call" and said is not None:
            self.details[case_id] = json.loads(str(properties.get(plugin.DETAILS, "[]")))
            self._take(Verdict.from_dict(json.loads(str(said))))
        elif str(report.when) == "???":  # pytest-xdist's mark of a worker that died
            if case_id in self.verdicts:
                return  # a spoiled worker that ended itself after its verdict
            self._take(self._died(case_id, report))
        elif report.failed and case_id not in self.verdicts:
            lines = str(report.longrepr).strip().splitlines() or ["no message"]
            self._take(self._error(case_id, f"the suite failed: {lines[-1]}"))

    def _take(self, verdict: Verdict) -> None:
        if verdict.case_id in self.cases and verdict.case_id not in self.verdicts:
            self.verdicts[verdict.case_id] = verdict
            self.progress.judged(verdict)

    def _died(self, case_id: str, report: pytest.TestReport) -> Verdict:
        seconds = time.perf_counter() - self.since.get(case_id, time.perf_counter())
        worker = getattr(getattr(report, "node", None), "gateway", None)
        trace = plugin.trace_file(self.run, getattr(worker, "id", ""))
        stack = trace.read_text() if trace.is_file() else ""
        trace.unlink(missing_ok=True)
        if stack:
            limit = plugin.hard_limit(self.settings.timeout)
            text = (
                "stuck in code that cannot be interrupted, its worker was ended after "
                f"{limit:g} s, last seen in {last_seen(stack)}"
            )
        else:
            text = ENDED
        return self._error(case_id, text, seconds)

    def _error(self, case_id: str, text: str, seconds: float = 0.0) -> Verdict:
        kind = self.cases[case_id].kind if case_id in self.cases else case_id.partition("/")[0]
        return Verdict(case_id, kind, "error", f"case {case_id}: {text}", seconds=round(seconds, 3))

    def complete(self) -> list[Verdict]:
        """A verdict for every case: one that got lost is an error, never forgotten."""
        lines = self.output.getvalue().strip().splitlines()
        for case_id in self.cases:
            if case_id not in self.verdicts:
                last = lines[-1] if lines else "nothing"
                self._take(self._error(case_id, f"it never ran; pytest's last words: {last}"))
        return list(self.verdicts.values())


def _case_id(nodeid: str) -> str:
    return nodeid.partition("[")[2].removesuffix("]")


def _pytest(settings: Settings, workers: int, cases: int, collector: _Collector) -> None:
    folder = Path(__file__).resolve().parent
    arguments = [
        str(folder / "test_cases.py"),
        # Nobody's pytest.ini, cache or plugins: the same run everywhere.
        "-c", os.devnull, "--rootdir", str(folder), "-p", "no:cacheprovider", "-s",
        "-p", "xdist", "-p", "timeout", "-p", "megamoe.suite.plugin",
        # One case at a time, longest first: the heavy ones spread by themselves.
        "-n", str(workers), "--dist", "load", "--maxschedchunk", "1",
        "--max-worker-restart", str(cases),
    ]  # fmt: skip
    for name in Settings.__dataclass_fields__:
        value = getattr(settings, name)
        if value is not None:
            arguments += [f"--megamoe-{name}={value}"]
    with _environment(PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", PYTEST_ADDOPTS=""):
        pytest.main(arguments, plugins=[collector])


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
