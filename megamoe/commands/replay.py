"""``megamoe replay``: judge a stored problem: a backend, or what was recorded."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megamoe.cases.stored import StoredProblem, load
from megamoe.cases.stored_names import title
from megamoe.commands.shared import (
    backend_of,
    contract_of,
    picture_of,
    replay_command,
    weights_differ,
)
from megamoe.golden import write_atomically
from megamoe.judge import Verdict
from megamoe.spec.accumulators import CLASSES
from megamoe.spec.contract import contract
from megamoe.suite.at_hand import judge, judge_output
from megamoe.worker.choice import AUTO


def run(a: argparse.Namespace) -> int:
    """Judge it, and show the picture of a red."""
    path = Path(a.file)
    record = load(path)
    if a.checkpoint is not None:
        wrong = weights_differ(path, record, Path(a.checkpoint), a.verbose)
        if wrong is not None:
            _write(a, wrong)
            return 1
    if a.backend:
        with backend_of(a) as (worker, settings):
            verdict, _ = judge(
                record.problem, worker, path.stem, timeout=settings.timeout, others=True
            )
        by = a.backend
    else:
        verdict, by = _judge_record(record, path, a), "what was recorded"
    again = replay_command(a.file, a.backend, a.device, a.contract)
    name = title(a.file, record.about)
    if verdict.status == "pass":
        print(f"PASS {name}: {by}, judged {', '.join(verdict.how)}, {verdict.seconds:.1f} s")
    else:
        print(picture_of(verdict, name, a.backend or "", again))
    _write(a, verdict)
    if verdict.status in ("skip", "not-provided"):
        return 2
    return 0 if verdict.status == "pass" else 1


def _write(a: argparse.Namespace, verdict: Verdict) -> None:
    if a.json:
        write_atomically(Path(a.json), (json.dumps(verdict.to_dict(), indent=1) + "\n").encode())


def _judge_record(record: StoredProblem, path: Path, a: argparse.Namespace) -> Verdict:
    if "y" not in record.outputs:
        raise ValueError(
            f"{path}: holds no output that was recorded; `megamoe replay "
            f"{path} --backend B` judges a backend's"
        )
    accumulator = a.accumulator or record.about.get("accumulator")
    if accumulator is None:
        raise ValueError(f"{path}: does not say the accumulator class of its output; give "
                         f"--accumulator, one of {', '.join(sorted(CLASSES))}")  # fmt: skip
    revision = contract_of(a)
    if a.contract in (None, AUTO) and "contract" in record.about:
        revision = contract(str(record.about["contract"]))
    return judge_output(
        record.problem, record.outputs, accumulator, revision, path.stem, others=True
    )
