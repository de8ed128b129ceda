"""The pytest side of the suite: options, items, and a worker for the backend.

Options have the prefix ``--megamoe-``; each may also be given in the environment, as
``MEGAMOE_BACKEND`` for ``--megamoe-backend``. A ``-k`` with ``*``, ``?``, a comma or ``!`` is a
pattern of cases, as ``--megamoe-case``; pytest's own expressions have none of these.
The backend runs in a worker, as everywhere, so what
it does costs its case and not the run. With pytest-xdist and ``-p megamoe.suite.plugin`` all
processes share the workers of the controlling one; ``--megamoe-workers`` says how many there are.
Without ``-p`` the controlling process does not know this plugin, and each process has its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import pytest

from megamoe.cases.pattern import MARKS
from megamoe.spec.contract import contract
from megamoe.suite.judges import threads_of
from megamoe.suite.settings import Settings
from megamoe.worker.choice import AUTO
from megamoe.worker.client import Worker
from megamoe.worker.pool import Address, Pool, Shared
from megamoe.worker.session import WorkerError

if TYPE_CHECKING:
    from megamoe.suite.runner import Runner

SETTINGS = pytest.StashKey[Settings]()
UNDER = pytest.StashKey[str]()
"""Of a process that judges or has the pool: the contract, and why that one."""
POOL = pytest.StashKey[Pool]()
ADDRESS: Final = "megamoe_address"
"""Of the pool, among what pytest-xdist hands to its workers."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """One option for each field of :class:`Settings`."""
    group = parser.getgroup("megamoe", "judging a kernel against the goldens")
    for name in (*Settings.__dataclass_fields__, "workers"):
        option = f"--megamoe-{name.replace('_', '-')}"
        group.addoption(option, dest=f"megamoe_{name}", default=None, metavar="X")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Take a pattern of cases from pytest's own ``-k``, whose expressions cannot be one."""
    word = str(config.getoption("keyword", "") or "")
    if not any(mark in word for mark in MARKS):
        return
    if config.getoption("megamoe_case", None):
        raise pytest.UsageError("-k and --megamoe-case are both patterns of cases; give one")
    config.option.megamoe_case, config.option.keyword = word, ""
    config.option.megamoe_cases_only = True  # options reach the workers of pytest-xdist


def settings(config: pytest.Config) -> Settings:
    """The run's settings, read once."""
    if SETTINGS not in config.stash:
        config.stash[SETTINGS] = Settings.read(
            lambda name: config.getoption(f"megamoe_{name}", None)
        )
    return config.stash[SETTINGS]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One item a case, the longest first."""
    if "megamoe_case" in metafunc.fixturenames:
        options = settings(metafunc.config)
        cases = options.cases(None if options.contract == AUTO else options.contract)
        metafunc.parametrize("megamoe_case", cases, ids=[c.id for c in cases])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A case has its own time limit, which ends the backend and not the judge. Where ``-k`` was a
    pattern of cases, nothing else runs."""
    cases = [item for item in items if "megamoe_case" in getattr(item, "fixturenames", ())]
    for item in cases:
        item.add_marker(pytest.mark.timeout(0))
    if getattr(config.option, "megamoe_cases_only", False):
        config.hook.pytest_deselected(items=[item for item in items if item not in cases])
        items[:] = cases


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """In the controlling process of pytest-xdist, for each of its workers."""
    config = node.config
    if POOL not in config.stash:
        options = settings(config)
        judges = len(config.getoption("tx", None) or [1])
        default = judges if options.device == "cpu" else 1
        count = config.getoption("megamoe_workers", None) or str(default)
        if not count.isdecimal() or not int(count):
            raise pytest.UsageError(f"--megamoe-workers {count}: give a number from 1 on")
        workers = int(count)
        try:
            config.stash[POOL] = Pool(options.launch(threads_of(max(judges, workers))), workers)
        except ValueError as error:  # a backend that cannot be loaded, in one line
            raise pytest.UsageError(str(error)) from error
    address = config.stash[POOL].address
    config.stash[UNDER] = address.identity.contract_line
    node.workerinput[ADDRESS] = address.packed()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say which contract was judged under, and why."""
    if UNDER in config.stash:
        terminalreporter.write_line(config.stash[UNDER])


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the backends."""
    if POOL in config.stash:
        config.stash[POOL].close()


@pytest.fixture(scope="session")
def megamoe_runner(request: pytest.FixtureRequest) -> Iterator[Runner]:
    """The backend's session and the goldens, opened once a process."""
    config = request.config
    options = settings(config)
    worker_input: dict[str, Any] = getattr(config, "workerinput", {})
    threads = threads_of(int(worker_input["workercount"])) if worker_input else 0
    if ADDRESS in worker_input:
        session: Worker | Shared = Shared(Address.unpacked(worker_input[ADDRESS]))
    else:
        session = Worker(options.launch(threads))
    try:
        try:
            identity = session.identity
        except WorkerError as error:  # not once a case: nothing can be judged
            pytest.exit(str(error), returncode=pytest.ExitCode.USAGE_ERROR)
        config.stash[UNDER] = identity.contract_line
        # Torch takes seconds; the controlling process of pytest-xdist, and one whose backend cannot
        # be loaded, do without.
        import torch

        from megamoe.golden import Store, make, recorded
        from megamoe.suite.runner import Runner

        if threads:
            torch.set_num_threads(threads)
        record = recorded.find(options.root, identity.name, identity.facts)
        store = Store(options.root, make, contract(identity.contract))
        yield Runner(session, store, record, options.timeout)
    finally:
        session.close()


@pytest.fixture
def megamoe_settings(request: pytest.FixtureRequest) -> Settings:
    """The run's settings."""
    return settings(request.config)


__all__ = ["settings"]
