"""``megamoe capture``: run a Python script, and record its call of the experts."""

from __future__ import annotations

import argparse
from pathlib import Path

from megamoe.cases.checkpoint import Checkpoint
from megamoe.cases.stored import load, used_experts
from megamoe.commands.shared import weights_differ
from megamoe.layer.capture import run_script
from megamoe.printable import quantity


def run(a: argparse.Namespace) -> int:
    """Run the script, and say what was recorded."""
    if a.calls < 1 or a.skip < 0:
        raise ValueError("--calls: give a number from 1 on; --skip: from 0 on")
    if a.checkpoint is not None:
        Checkpoint(Path(a.checkpoint))  # a wrong folder is said before an engine starts
    paths = run_script(Path(a.script), a.arguments, Path(a.out), a.calls, a.skip)
    wrong = 0
    for path in paths:
        record = load(path)
        p = record.problem
        experts = quantity(len(used_experts(p)), "expert")
        print(f"{path}: {quantity(p.num_tokens, 'token')}, {experts} used, top-{p.top_k}, "
              f"H {p.hidden_size}, I {p.intermediate_size}")  # fmt: skip
        if a.checkpoint is not None:
            wrong += weights_differ(path, record, Path(a.checkpoint), a.verbose) is not None
    return 1 if wrong else 0
