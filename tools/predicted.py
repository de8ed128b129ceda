"""Compute recorded bits on the CPU: the tensor core's model, chained as this project's kernel adds.

    python tools/predicted.py golden/recorded/triton/MACHINE.json [--case GLOB] [--most N]

Each forward case of the file whose products number at most ``--most`` is computed by the model
``hopper-triton`` of :mod:`megamoe.predict` under the contract of the file, all rows. The digests of
codes, scale bytes and y are compared with the recorded ones. Prints a line for each case with
another digest or no prediction, and the counts. Exit 1 if y of any case differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch

from megamoe.cases import load_cases
from megamoe.cases.recipes import forward_problem
from megamoe.golden import recorded
from megamoe.predict import HOPPER_TRITON, predict
from megamoe.spec.contract import contract


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--case", default="*")
    parser.add_argument("--most", type=float, default=3e8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = json.loads(args.file.read_text("utf-8"))
    by_id, rules = data["cases"], contract(data["contract"])
    start, count = time.process_time(), Counter[str]()
    for case in load_cases():
        if case.id not in by_id or not fnmatchcase(case.id, args.case):
            continue
        p = case.params
        if 3 * p["hidden"] * p["intermediate"] * p["tokens"] * p["top_k"] > args.most:
            count["not tried"] += 1
            continue
        problem = forward_problem(case)
        try:
            with np.errstate(all="ignore"):
                stages = predict(problem, HOPPER_TRITON, rules).stages
        except ValueError as fault:
            count["not predicted"] += 1
            print(f"{case.id}: {fault}", flush=True)
            continue
        digests = recorded.digests(stages, problem.topk_ids.numpy())
        other = [name for name, one in digests.items() if by_id[case.id]["stages"][name] != one]
        count["y differs" if "y" in other else "codes alone differ" if other else "equal"] += 1
        if other:
            print(f"{case.id}: {', '.join(other)} differ", flush=True)
    took = time.process_time() - start
    print(f"{took:.0f} s: " + ", ".join(f"{n} {what}" for what, n in count.items()))
    return 1 if count["y differs"] else 0


if __name__ == "__main__":
    sys.exit(main())
