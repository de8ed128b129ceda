"""``megamoe reduce``: shrink a failing case to the smallest file that fails."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from megamoe.cases import Case
from megamoe.cases.stored import load, used_experts
from megamoe.commands.shared import (
    backend_of,
    forward_case,
    picture_of,
    replay_command,
    root_of,
)
from megamoe.golden import Store, make, regenerate
from megamoe.reduce import keep, reduce
from megamoe.spec.contract import contract
from megamoe.spec.problem import Problem


def run(a: argparse.Namespace) -> int:
    """Shrink it, write the file, and show that the file fails in the same way."""
    if not 0 < a.seconds < float("inf"):
        raise ValueError("--seconds: give a number above 0")
    out = Path(a.out)
    if out.suffix != ".safetensors" or out.is_dir():
        raise ValueError(f"--out {out}: name a file that ends in .safetensors")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"--out {out}: its directory does not exist")
    started = time.perf_counter()
    problem, case, about = _subject(a)
    again = replay_command(a.out, a.backend, a.device)
    with backend_of(a) as (worker, settings):
        golden = None
        if case is not None and case.rows is None:
            golden = Store(settings.root, make, contract(worker.identity.contract)).load(case)
        r = reduce(worker, problem, a.seconds, golden, print, settings.timeout)
        about["backend"] = a.backend
        verdict, size = keep(r, out, about, settings.timeout)
    print()
    print(picture_of(verdict, a.backend, again))
    experts = len(used_experts(r.problem))
    seconds = time.perf_counter() - started
    print(f"\n{out}: {size / 1024:.0f} KiB, {r.problem.num_tokens} tokens, {experts} "
          f"experts used, after {r.tries} tries in {seconds:.0f} s")  # fmt: skip
    print(f"reproduce: {again}")
    return 0


def _subject(a: argparse.Namespace) -> tuple[Problem, Case | None, dict[str, Any]]:
    """The problem, its case where it is of one, and its origin."""
    if Path(a.subject).suffix == ".safetensors":
        stored = load(Path(a.subject))
        return stored.problem, None, {**stored.about, "reduced_from": Path(a.subject).name}
    case = forward_case(root_of(a), a.subject)
    return Problem(**regenerate(case)), case, {"reduced_from": case.id}
