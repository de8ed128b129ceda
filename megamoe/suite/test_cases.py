"""The items of the suite: one for each case, parametrised by :mod:`megamoe.suite.plugin`."""

import json
from collections.abc import Callable

import pytest

from megamoe.cases import Case
from megamoe.judge import BAD, Verdict, picture
from megamoe.suite.child import ChildRunner
from megamoe.suite.plugin import DETAILS, PROPERTY
from megamoe.suite.run import Runner, place
from megamoe.suite.settings import Settings


def test_case(
    megamoe_case: Case,
    megamoe_runner: Runner | ChildRunner,
    megamoe_settings: Settings,
    record_property: Callable[[str, object], None],
) -> None:
    """The backend's outputs are what the case's golden allows."""
    try:
        verdict = megamoe_runner.run(megamoe_case)
    except pytest.fail.Exception as timeout:  # raised by pytest-timeout, wherever it was
        verdict = Verdict(
            megamoe_case.id,
            megamoe_case.kind,
            "error",
            f"case {megamoe_case.id}: no result within {megamoe_settings.timeout:g} s, last seen "
            f"in {place(timeout)}; give it more with --timeout",
            seconds=megamoe_settings.timeout,
        )
    record_property(PROPERTY, json.dumps(verdict.to_dict()))
    if verdict.status in BAD and megamoe_runner.details:
        record_property(DETAILS, json.dumps(megamoe_runner.details))
    if verdict.status in BAD:
        chosen = megamoe_settings
        pytest.fail(picture(verdict, chosen.backend, chosen.again()), pytrace=False)
    if verdict.status != "pass":
        pytest.skip(f"{verdict.status}: {verdict.reason}")
