"""The pytest side of the suite: options, items, time limits.

Options have the prefix ``--megamoe-``; each may also be given in the environment, as
``MEGAMOE_BACKEND`` for ``--megamoe-backend``.

A case has two time limits. The soft one interrupts Python code (pytest-timeout) and the case is an
``error``. Code that is stuck in C does not hear it; then, in a worker of pytest-xdist, a watchdog
ends the process, pytest-xdist starts another one, and the run goes on.
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

from megamoe.backends import load_backend
from megamoe.cases import Case
from megamoe.golden import Store, make
from megamoe.suite.run import Runner
from megamoe.suite.settings import Settings

SETTINGS = pytest.StashKey[Settings]()
PROPERTY = "megamoe"
"""Name of the user property that carries a verdict, as JSON."""


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


@pytest.fixture(scope="session")
def megamoe_runner(request: pytest.FixtureRequest) -> Runner:
    """Backend and goldens, loaded once a process."""
    chosen = settings(request.config)
    backend = load_backend(chosen.backend, chosen.device)
    return Runner(backend, Store(chosen.root, make), chosen.device)


@pytest.fixture
def megamoe_settings(request: pytest.FixtureRequest) -> Settings:
    """The run's settings."""
    return settings(request.config)


__all__ = ["PROPERTY", "Case", "hard_limit", "settings", "trace_file"]
