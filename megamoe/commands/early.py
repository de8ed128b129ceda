"""What is wrong with a command line, before anything is imported that takes seconds.

Each check has the words of the place that would refuse the value later. That place keeps its own
check, since it has other callers.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Final

from megamoe.cases import load_entries, shards
from megamoe.cases.pattern import matching, one_of
from megamoe.commands import UsageError
from megamoe.spec.contract import contract
from megamoe.worker import known
from megamoe.worker.choice import AUTO

READ: Final = ("file", "result", "reports", "failed", "actual")
"""Arguments that name a file to read. A verb's default ``reads`` names further ones of its own."""


def check(a: argparse.Namespace) -> None:
    """``ValueError`` of one line for a name, a file or a pattern that nothing has."""
    given = {name: value for name, value in vars(a).items() if value is not None}
    for name in ("json", "junit"):
        if isinstance(given.get(name), str) and Path(given[name]).is_dir():
            raise UsageError(f"{given[name]} is a directory; name a file")
    for name in (*READ, *given.get("reads", ())):
        for path in _listed(given.get(name)):
            if not Path(path).exists():
                raise UsageError(f"{path}: no such file")
    python = given.get("interpreter")
    if python is not None and shutil.which(python) is None:
        raise UsageError(f"--python {python}: no program; name a Python interpreter")
    if given.get("contract", AUTO) != AUTO:
        contract(given["contract"])
    if "shard" in given:
        shards.parse(given["shard"])
    if given.get("backend_is") == "here" and "backend" in given:
        _backend(given["backend"], python is None)
    if "case_is" in given:
        _case(a, given)


def _listed(value: object) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list) else [str(value)] * bool(value)


def _backend(spec: str, is_this_python: bool) -> None:
    """A file that is not there, or a name that this Python does not know."""
    if known.is_file(spec):
        path = Path(known.file_of(spec)).expanduser().resolve()
        if not path.is_file():
            raise UsageError(f"backend {spec}: no Python file at {path}; check the path before "
                             "the :")  # fmt: skip
    elif is_this_python and spec != "auto" and spec not in known.available():
        raise UsageError(known.unknown(spec))


def _case(a: argparse.Namespace, given: dict[str, object]) -> None:
    root = Path(a.golden) if a.golden else None
    case = given.get("subject" if given["case_is"] == "subject" else "case")
    if case is None:
        return
    if given["case_is"] == "subject" and str(case).endswith(".safetensors"):
        if not Path(str(case)).exists():
            raise UsageError(f"{case}: no such file")
        return
    entries = load_entries(root)
    if given["case_is"] == "pattern":
        matching(entries, str(case))
        return
    one_of(entries, str(case))
