"""The pytest side of the suite: options, items, time limits.

Options have the prefix ``--megamoe-``; each may also be given in the environment, as
``MEGAMOE_BACKEND`` for ``--megamoe-backend``.

A case has two time limits. The soft one interrupts Python code (pytest-timeout) and the case is an
``error``. Code that is stuck in C does not hear it; then, in a worker of pytest-xdist, a watchdog
ends the process, pytest-xdist starts another one, and the run goes on. A process that a case has
spoiled (a sticky CUDA error) is ended after that case in the same way. Without pytest-xdist the
cases are judged in a child process, which is replaced; with ``--pdb`` in pytest's own.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megamoe.cases import Case
from megamoe.suite.child import START_SECONDS, ChildRunner, open_runner
from megamoe.suite.run import Runner
from megamoe.suite.settings import Settings

SETTINGS = pytest.StashKey[Settings]()
RUNNER = pytest.StashKey[Runner]()
EXIT_LOST = 70
"""Of a worker that ends itself because a case has spoiled it."""
PROPERTY = "megamoe"
"""Name of the user property that carries a verdict, as JSON."""
DETAILS = "megamoe-details"
"""The same for what a report draws of a failure (:mod:`megamoe.suite.detail`)."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """One option for each field of :class:`Settings`."""
    group = parser.getgroup("megamoe", "judging a kernel against the goldens")
    for name in Settings.__dataclass_fields__:
        group.addoption(f"--megamoe-{name}", dest=f"megamoe_{name}", default=None, metavar="X")


def settings(config: pytest.Config) -> Settings:
    """The run's settings, read once."""
    if SETTINGS not in config.stash:
        config.stash[SETTINGS] = Settings.read(
            lambda name: config.getoption(f"megamoe_{name}", None)
        )
    return config.stash[SETTINGS]


def pytest_configure(config: pytest.Config) -> None:
    """Share the cores among the workers: a thread pool in each would fight over them."""
    given = getattr(config, "workerinput", None)
    if given is not None:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(given["workercount"])))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One item a case, the longest first."""
    if "megamoe_case" in metafunc.fixturenames:
        cases = settings(metafunc.config).cases()
        metafunc.parametrize("megamoe_case", cases, ids=[c.id for c in cases])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The soft time limit of every case."""
    seconds = settings(config).timeout
    if not hasattr(config, "workerinput") and not config.getoption("usepdb", False):
        seconds = hard_limit(seconds) + START_SECONDS  # the child watches itself
    for item in items:
        if "megamoe_case" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(seconds, method="signal"))


def hard_limit(soft: float) -> float:
    """Seconds after which the process is ended: some time for the soft limit to be heard."""
    return soft + min(10.0, 1.0 + soft / 2)


def trace_file(run: str, worker: str) -> Path:
    """Where a worker's watchdog leaves its stack."""
    return Path(tempfile.gettempdir()) / f"megamoe-{run}-{worker}.trace"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """The hard time limit, where losing this process does not end the run."""
    given: dict[str, Any] | None = getattr(item.config, "workerinput", None)
    if given is None or "megamoe_case" not in getattr(item, "fixturenames", ()):
        return (yield)
    path = trace_file(given["testrunuid"], given["workerid"])
    with path.open("w") as file:
        limit = hard_limit(settings(item.config).timeout)
        faulthandler.dump_traceback_later(limit, exit=True, file=file)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()
            path.unlink(missing_ok=True)
            gc.collect()  # a real model's weights must not wait for the next case's
            runner = item.config.stash.get(RUNNER, None)
            if runner is not None and runner.lost:
                # The verdict has been sent. Ending here, before the item counts as done, makes
                # pytest-xdist blame this case, which has its verdict, and not the next.
                os._exit(EXIT_LOST)


@pytest.fixture(scope="session")
def megamoe_runner(request: pytest.FixtureRequest) -> Iterator[Runner | ChildRunner]:
    """Backend and goldens, loaded once a process."""
    config = request.config
    if hasattr(config, "workerinput") or config.getoption("usepdb", False):
        config.stash[RUNNER] = open_runner(settings(config))
        yield config.stash[RUNNER]
        return
    child = ChildRunner(settings(config))
    yield child
    child.close()


@pytest.fixture
def megamoe_settings(request: pytest.FixtureRequest) -> Settings:
    """The run's settings."""
    return settings(request.config)


__all__ = ["DETAILS", "PROPERTY", "Case", "hard_limit", "settings", "trace_file"]
