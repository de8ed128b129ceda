"""Undetected faults: the largest fault in y that stays green, by class and model.

    python tools/unseen.py [--model NAME ...] [--seed S]

One token of each model at its real sizes, with ordinary data. The reference y is changed by a
factor 1 + d, up or down, in one output; in the whole row; or in what one expert adds to it. Printed
is the largest d that is green, of 2^-14 to 4 in quarters of an octave: judged by y alone (interval
and statistic), and by y with the right codes beside it (staged). For one output it is the median
and the 90th percentile over the row.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from widths import row_of

from megamoe import oracle
from megamoe.judge.statistic import check
from megamoe.oracle.combine import Combine
from megamoe.spec.accumulators import ACCUMULATORS
from megamoe.spec.contract import BASE
from megamoe.spec.formats import F64, U16, bf16_decode, bf16_key, bf16_round
from megamoe.spec.models import MODELS, Model

CLASSES = [name for name in ACCUMULATORS if name != "exact"]
FAULTS = np.exp2(np.arange(-56, 9) / 4)
HEADER = (
    "| model | class | y alone: one output | row | expert | with codes: one output | row | expert |"
)


def largest(green: Callable[[float], np.ndarray]) -> F64:
    """The largest fault, up or down, that is green; 0 if none is. ``green`` gives an array."""
    best = np.zeros_like(green(0.0), np.float64)
    for size in FAULTS:
        best = np.where(green(size) | green(-size), size, best)
    return best


def lines(model: Model, seed: int) -> list[str]:
    """One line of the table for each class."""
    problem = row_of(model, 2, seed)
    ids, weights = problem.topk_ids.numpy(), problem.topk_weights.numpy()
    trace: dict[str, np.ndarray] = {}
    golden = oracle.forward(problem, CLASSES, contract=BASE, trace=trace)
    y, slots = bf16_decode(golden.y).astype(np.float64), trace["slot_rows"]
    rows = bf16_decode(slots).astype(np.float64)

    def one_expert(fault: float) -> U16:
        """The first slot's row is wrong by a factor."""
        variant = slots.copy()
        variant[:, 0] = bf16_round(rows[:, 0] * (1 + fault))
        return Combine(ids >= 0, weights, BASE).point(variant)

    out = []
    for name in CLASSES:
        envelope = golden.envelopes[name]
        cells = []
        interval = oracle.combine_interval(problem, golden.codes, golden.sf, name, BASE)
        for ends, alone in (((envelope.y_lo, envelope.y_hi), True), (interval, False)):
            low, high = (bf16_key(end) for end in ends)

            def inside(words: U16, low: np.ndarray = low, high: np.ndarray = high) -> np.ndarray:
                return np.asarray((bf16_key(words) >= low) & (bf16_key(words) <= high))

            def whole(words: U16, alone: bool = alone, name: str = name) -> np.ndarray:
                statistic = not alone or not check(
                    words, golden.y, ids, problem.intermediate_size, name
                )
                return np.array(bool(inside(words).all()) and statistic)

            output = largest(lambda d: inside(bf16_round(y * (1 + d))))
            row = largest(lambda d: whole(bf16_round(y * (1 + d))))
            expert = largest(lambda d: whole(one_expert(d)))
            cells.append(f"{np.median(output):.2g}, {np.percentile(output, 90):.2g}")
            cells += [f"{row:.2g}", f"{expert:.2g}"]
        out.append(f"| {model.name} | {name} | {' | '.join(cells)} |")
    return out


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", action="append", choices=list(MODELS))
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(HEADER)
    print("|---" * (HEADER.count("|") - 1) + "|")
    start = time.time()
    for name in args.model or MODELS:
        for line in lines(MODELS[name], args.seed):
            print(line, flush=True)
        print(f"{name}: {time.time() - start:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
