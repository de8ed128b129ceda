"""Compare the bit models with MMA-Sim over many outputs, word for word.

    PYTHONPATH=. python tools/witness.py [--outputs N] [--seed S]

The operands are those of ``tests/test_units.py``: any bits of the format (NaN, infinities and
subnormals among them), values near each other that cancel, sparse ones, and subnormal ones; half of
the chains have scale bytes anywhere in the range. ``--outputs`` is the number for each model.
Prints a line a model and the words that differ. Exit 1 if one does.
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib import import_module
from typing import Any

import numpy as np
import torch
from mmasim.arithmetic.fdpa import MMA_T_FDPA

from megamoe.oracle import units

CHECKS: Any = import_module("tests.test_units")
"""Its operands and kernels; tests have no types."""
BATCH = 20_000


def steps(name: str, rng: np.random.Generator) -> tuple[int, int]:
    """Outputs of two steps on a running sum, and how many differ."""
    unit, dtype, rounding, smallest = CHECKS.DENSE[name]
    model = MMA_T_FDPA(unit.align_bits, rounding, unit.step, unit.floor, name, name)
    a, b = CHECKS.operands(rng, dtype, BATCH), CHECKS.operands(rng, dtype, BATCH)
    c = np.ldexp(rng.uniform(-1, 1, BATCH), rng.integers(-30, 30))
    c = units.narrowed(np.where(rng.random(BATCH) < 0.3, 0, c), unit.result_bits)
    expected = model.dpa(a, b, torch.from_numpy(c).float()).numpy().view(np.uint32)
    actual = units.dense(unit, a.double().numpy(), b.double().numpy(), c, smallest)
    return BATCH, int((units.words(actual) != expected).sum())


def chains(name: str, rng: np.random.Generator) -> tuple[int, int]:
    """Outputs of chains of scaled blocks, and how many differ; none where there is no operand."""
    both = CHECKS.chained(*CHECKS.KERNELS[name], CHECKS.draw(rng, 8, 256))
    return (0, 0) if both is None else (both[0].size, int((~CHECKS.same(*both)).sum()))


def main() -> int:
    """The command line; 0 if no word differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--outputs", type=int, default=2_000_000, help="for each model")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    differ = 0
    print("| model | outputs | differ | processor time |\n|---|---|---|---|")
    for name in (*CHECKS.DENSE, *CHECKS.KERNELS):
        rng, outputs, wrong = np.random.default_rng(args.seed), 0, 0
        start = time.process_time()
        draw_one = steps if name in CHECKS.DENSE else chains
        with np.errstate(all="ignore"):
            while outputs < args.outputs:
                more, unlike = draw_one(name, rng)
                outputs, wrong = outputs + more, wrong + unlike
        what = "step of " if name in CHECKS.DENSE else "chain of "
        spent = time.process_time() - start
        print(f"| {what}{name} | {outputs} | {wrong} | {spent:.0f} s |", flush=True)
        differ += wrong
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())
