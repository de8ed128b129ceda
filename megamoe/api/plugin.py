"""A pytest fixture: ``pytest_plugins = ["megamoe.api.plugin"]`` in a ``conftest.py``."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megamoe.api.judging import Judgement
from megamoe.api.testing import judge_forward


@pytest.fixture(scope="session")
def megamoe_judge() -> Callable[..., Judgement]:
    """:func:`megamoe.api.testing.judge_forward`: calls a forward, and fails the test if wrong."""
    return judge_forward
