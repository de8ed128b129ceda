"""Results for the report to show: a real run of a few cases with planted faults, A/B, bisection."""

from __future__ import annotations

import functools
import json
from typing import Any

import torch

from megamoe.backends import load_backend
from megamoe.cases import golden_root, load_cases
from megamoe.golden import Store, make
from megamoe.suite import results
from megamoe.suite.runner import Runner
from megamoe.suite.settings import Settings
from tests.helpers.local import Local

NASTY = "<script>alert('x')</script> & \"quoted\" \x1b[31m"
"""What no report may take for markup, nor for a terminal's command."""

POINT, STAGED = "forward/token-block-edge-t9", "forward/bell-h256-i128-drifts"
STAGING, EPLB = "staging/rows-lost-or-repeated-at-t95", "eplb/"
"""A zero-freedom case, one that is judged in stages, one of more rows than a map has lines, and
cases whose backend raises."""


class Faulty:
    """``eager`` with y too large in a stretch, a NaN, codes and a scale off, and eplb raising."""

    name = "faulty"
    accumulator = "fp32-ordered"
    transform_weights = None

    def __init__(self) -> None:
        self.eager = load_backend("eager")

    def forward(self, problem: Any) -> Any:
        out = dict(self.eager.forward(problem))
        y = out["y"].clone()
        y[2, 64:128] *= 1.01
        y[0, 0] = float("nan")
        codes = out["l2_acts"].view(torch.uint8).clone()
        codes[1, 0, 32:64] ^= 1
        return {**out, "y": y, "l2_acts": codes} if len(y) == 4 else {**out, "y": y}

    def prepare(self, *tensors: torch.Tensor) -> None:
        self.eager.prepare(*tensors)
        tensors[4][60, 0] += 1 << 8

    def eplb_map(self, *_: Any) -> None:
        raise RuntimeError(NASTY)


@functools.cache
def _run() -> str:
    ids = (POINT, STAGED, STAGING)
    cases = [c for c in load_cases() if c.id in ids]
    cases += [next(c for c in load_cases() if c.kind == kind) for kind in ("eplb", "layout")]
    cases += [next(c for c in load_cases() if c.kind == "errors")]
    runner = Runner(Local(Faulty()), Store(golden_root(), make))
    verdicts, details = [], {}
    for case in cases:
        verdicts.append(runner.run(case))
        details[case.id] = list(runner.details)
    report = results.build(Settings("path/to/faulty.py:Faulty"), runner.session.identity, verdicts)
    report["seconds"] = 3.2
    results.describe(report, cases, details)
    return json.dumps({**report, "options": " --golden 'my golden'", "fingerprint": None})


def run() -> dict[str, Any]:
    """As ``megamoe check --json`` writes it: 3 fails, an error, a pass and one not provided."""
    report: dict[str, Any] = json.loads(_run())
    return report


def ab() -> dict[str, Any]:
    """As ``megamoe ab --json`` writes it."""
    same = {"elements": 1024, "moved": 0, "max_ulps": 0, "outside_left": 0, "outside_right": 0}
    codes = {**same, "elements": 2048, "moved": 32, "max_ulps": 1}
    y = {**same, "moved": 553, "max_ulps": 3, "outside_right": 12}
    return {
        "kind": "ab",
        "schema": 1, "first_stage": "l2_acts", "not_compared": ["forward/d"],
        "left": {"text": "kernel==0.1.4", "python": "3.11.7", "contract_why": "its headers"},
        "right": {"text": NASTY, "python": "3.12.1"},
        "headline": "ab: 1 of 3 cases moved, first in l2_acts",
        "cases": [
            {"id": "forward/a", "status": "identical", "stages": {"y": same}, "first_stage": None},
            {"id": "forward/b", "status": "moved", "stages": {"l2_acts": codes, "y": y},
             "first_stage": "l2_acts", "verdict_left": "pass", "verdict_right": "fail"},
            {"id": "forward/c", "status": "error", "stages": {}, "reason": "right: it ended"},
        ],
    }  # fmt: skip


def bisect() -> dict[str, Any]:
    """As ``megamoe bisect --json`` writes it: 64 commits, the 41st is the first bad one."""
    walk = [(0, "good"), (63, "bad"), (31, "good"), (47, "bad"), (39, "skip"), (38, "good"),
            (43, "flaky"), (41, "bad"), (40, "good")]  # fmt: skip
    steps = [
        {"rev": f"{place:02d}{'a' * 38}", "subject": NASTY if place == 41 else f"commit {place}",
         "verdict": verdict, "reason": "does not build" if verdict == "skip" else "",
         "seconds": 2.5}
        for place, verdict in walk
    ]  # fmt: skip
    return {
        "kind": "bisect", "steps": steps,
        "first_bad": f"41{'a' * 38}", "last_good": f"40{'a' * 38}",
        "cases": ["forward/a"], "first_stage": "l2_acts", "schema": 1, "how": "bits", "range": 64,
        "worst": {"stage": "l2_acts", "token": 1, "channel": 32, "ulps": 1},
    }  # fmt: skip
