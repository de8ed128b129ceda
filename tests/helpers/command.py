"""The command ``megamoe`` in a test's own process, which has imported torch already."""

from __future__ import annotations

import subprocess
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import pytest

from megamoe.commands.main import main


def megamoe(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What a new process would return and print. Its workers get the environment, without CI."""
    settings = {"OMP_NUM_THREADS": "1", "COLUMNS": "200", **environment}
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(StringIO()) as out,
        redirect_stderr(StringIO()) as err,
    ):
        patch.delenv("CI", raising=False)
        for name, value in settings.items():
            patch.setenv(name, value)
        code = main([*arguments])
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())
