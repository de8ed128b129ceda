"""``megamoe oracle``: write a case's inputs and every oracle stage."""

from __future__ import annotations

import argparse
from pathlib import Path

from megamoe.cases import load_cases
from megamoe.cases.pattern import one_of
from megamoe.commands.shared import contract_of, root_of
from megamoe.suite import dump


def run(a: argparse.Namespace) -> int:
    """Write the file, and name what it holds."""
    case = one_of(load_cases(root_of(a)), a.case)
    names = dump.write_case(case, Path(a.out), contract_of(a))
    print(f"{a.out}: {', '.join(names)}")
    return 0
