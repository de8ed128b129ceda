"""The items of the suite: one for each case, parametrised by :mod:`megamoe.suite.plugin`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from megamoe.cases import Case
from megamoe.judge import BAD, picture
from megamoe.suite.settings import Settings

if TYPE_CHECKING:
    from megamoe.suite.runner import Runner


def test_case(megamoe_case: Case, megamoe_runner: Runner, megamoe_settings: Settings) -> None:
    """The backend's outputs are what the case's golden allows."""
    revision = megamoe_runner.store.contract.revision
    if revision not in megamoe_case.revisions:
        pytest.skip(f"contract {revision} does not know what this case asks for")
    verdict = megamoe_runner.run(megamoe_case)
    if verdict.status in BAD:
        settings = megamoe_settings
        pytest.fail(picture(verdict, settings.backend, settings.again()), pytrace=False)
    if verdict.status != "pass":
        pytest.skip(f"{verdict.status}: {verdict.reason}")
