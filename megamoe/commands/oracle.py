"""``megamoe oracle``: write a case's inputs and every oracle stage."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megamoe.cases import Case, load_cases
from megamoe.commands import UsageError
from megamoe.commands.options import add_contract
from megamoe.commands.shared import contract_of, root_of
from megamoe.suite import dump


def add(commands: Any, command: Any) -> None:
    """The parser of ``oracle``."""
    o = command(commands, "oracle", "write a case's inputs and every oracle stage", run)
    o.add_argument("--case", required=True, metavar="ID")
    o.add_argument("--out", required=True, metavar="FILE.safetensors")
    add_contract(o)


def run(a: argparse.Namespace) -> int:
    """Write the file, and name what it holds."""
    case = _one_case(load_cases(root_of(a)), a.case)
    names = dump.write_case(case, Path(a.out), contract_of(a))
    print(f"{a.out}: {', '.join(names)}")
    return 0


def _one_case(cases: list[Case], name: str) -> Case:
    found = [case for case in cases if case.id == name]
    if not found:
        raise UsageError(f"unknown case {name!r}; `megamoe list` shows all")
    return found[0]
