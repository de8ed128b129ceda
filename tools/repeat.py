"""Does a backend return the same bits again? Two processes, two thread counts, one comparison.

    python tools/repeat.py [--backend B] [--tier T] [--case GLOB] [--threads N M] [--device D]

Runs ``forward`` of every chosen case in one process for each number of threads, one process after
the other, and compares the sha256 of each tensor that was returned. Prints a table of the tensors
that agree, and names those that differ. Exit 0: every case ran in both and all agree; 1: one
differs, or a case did not run; 2: usage, or nothing to run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

import megamoe
from megamoe.backends import load_backend
from megamoe.cases import golden_root, load_cases, select
from megamoe.cases.kind import lacks_cuda
from megamoe.golden import regenerate
from megamoe.judge.outputs import forward_bits
from megamoe.printable import quantity
from megamoe.spec.contract import REVISIONS
from megamoe.spec.problem import Problem

POOLS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""Thread pools that are sized when their library is loaded."""

Digests = dict[str, dict[str, str]]
"""Case id -> tensor -> sha256; if the backend raised, "error" -> its message."""


def digests(backend_spec: str, device: str, ids: Sequence[str]) -> Digests:
    """The outputs of the backend for each case, as digests."""
    backend = load_backend(backend_spec, device)
    cases = {case.id: case for case in load_cases()}
    by_case: Digests = {}
    for case_id in ids:
        problem = Problem(**regenerate(cases[case_id]))
        try:
            inputs = problem if device == "cpu" else problem.to(device)
            outputs = forward_bits(backend.forward(inputs), problem)
        except Exception as error:
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"
            by_case[case_id] = {"error": text}
            continue
        by_case[case_id] = {
            name: hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
            for name, array in outputs.items()
        }
    return by_case


def in_process(backend: str, device: str, ids: Sequence[str], threads: int) -> Digests:
    """:func:`digests` in a process of its own, whose pools have ``threads`` threads."""
    environment = {**os.environ, **dict.fromkeys(POOLS, str(threads))}
    # golden_root() follows the environment; a worker must read the very same cases.
    environment["MEGAMOE_GOLDEN"] = str(golden_root())
    # The very same package, too, however this process came by it.
    path = [str(Path(megamoe.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    work = {"backend": backend, "device": device, "ids": list(ids), "threads": threads}
    process = subprocess.run(
        [sys.executable, __file__, "--worker"],
        input=json.dumps(work),
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result: Digests = json.loads(process.stdout.splitlines()[-1])
    return result


def compare(first: Mapping[str, dict[str, str]], second: Mapping[str, dict[str, str]]) -> list[str]:
    """One line for each case that did not run in both, and each tensor that differs."""
    lines = []
    for case_id in sorted({*first, *second}):
        one, other = first.get(case_id, {}), second.get(case_id, {})
        errors = [row["error"] for row in (one, other) if "error" in row]
        if errors:
            lines.append(f"{case_id}: did not run: {errors[0]}")
            continue
        lines += [
            f"{case_id}: {name} differs"
            for name in sorted({*one, *other})
            if one.get(name) != other.get(name)
        ]
    return lines


def worker() -> int:
    """Work from stdin, digests to stdout."""
    work = json.load(sys.stdin)
    torch.set_num_threads(work["threads"])
    print(json.dumps(digests(work["backend"], work["device"], work["ids"])))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tier", choices=("quick", "full"), default="quick")
    parser.add_argument("--case", metavar="GLOB")
    parser.add_argument("--threads", type=int, nargs=2, default=(1, 2), metavar=("N", "M"))
    args = parser.parse_args(argv)
    if args.worker:
        return worker()
    try:
        selection = select(load_cases(), "forward", args.tier, args.case)
        selection = [case for case in selection if {*REVISIONS} & {*case.revisions}]  # no dialects
        cases = [case for case in selection if not lacks_cuda(case, args.device)]
        if not hasattr(load_backend(args.backend, args.device), "forward"):
            raise ValueError(f"{args.backend} has no forward; there is nothing to repeat")
        if not cases:
            raise ValueError("no forward case is chosen; `megamoe list --kind forward` shows all")
    except ValueError as error:
        print(f"repeat: error: {error}", file=sys.stderr)
        return 2
    ids = [case.id for case in cases]
    first, second = (in_process(args.backend, args.device, ids, n) for n in args.threads)
    differ = compare(first, second)
    tensors = Counter(name for row in first.values() for name in row if name != "error")
    equal = Counter(
        name for case_id, row in first.items() for name, digest in row.items()
        if name != "error" and second.get(case_id, {}).get(name) == digest
    )  # fmt: skip
    print("| tensor | cases | same bits |\n|---|---|---|")
    for name, count in sorted(tensors.items()):
        print(f"| {name} | {count} | {equal[name]} |")
    print(
        f"\n{args.backend}, {quantity(len(ids), 'case')}, "
        f"{args.threads[0]} and {args.threads[1]} threads: "
        + ("the same bits" if not differ else f"{len(differ)} differences")
    )
    print("\n".join(differ), end="\n" if differ else "")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
