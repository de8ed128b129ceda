"""Fixtures that several files of tests share."""

import pytest

from tests.helpers.warm import Template, warmed


@pytest.fixture(scope="session")
def template():
    """A process that has imported torch; it starts for the first test that asks."""
    found = Template()
    yield found
    found.close()


@pytest.fixture(scope="module")
def warm(template):
    """Workers are forks of the template. Not for tests of how a process starts or ends."""
    with warmed(template):
        yield template
