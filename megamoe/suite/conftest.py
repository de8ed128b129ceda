"""Loads the plugin for ``pytest --pyargs megamoe.suite``, where nobody asked for it by ``-p``."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Register :mod:`megamoe.suite.plugin`, unless it is there already."""
    config.pluginmanager.import_plugin("megamoe.suite.plugin")
