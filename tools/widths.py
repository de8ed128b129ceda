"""Widths of the certified intervals, for one row of each model of the shape table.

    python tools/widths.py [--model NAME ...] [--octaves N] [--seed S]

For each accumulator class: the share of bf16 gates and ups and of FP8 codes that are undecided;
the median and 90th percentile of the width of a slot row and of y, in bf16 ULP; the median width
of y in percent of y's standard deviation; and the staged width of y, given the codes.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace

import numpy as np
import torch

from megamoe import oracle
from megamoe.backends import simulate
from megamoe.oracle.linear import Rows
from megamoe.oracle.mlp import linear
from megamoe.spec.accumulators import accumulator
from megamoe.spec.contract import BASE
from megamoe.spec.formats import F64, U16, bf16_decode, bf16_key, bf16_round
from megamoe.spec.models import MODELS, Model
from megamoe.spec.problem import Problem

CLASSES = ("fp32", "fp32-ordered", "sm90-e4m3", "sm90-e4m3-k32", "sm100-mxf8f6f4")
HEADER = (
    "| model | class | gates, ups undecided | codes undecided (widest) | slot ULP median, p90 "
    "| y ULP median, p90 | y of spread | staged y ULP median, p90, decided |"
)


def ulps(low: U16, high: U16) -> F64:
    """Width of intervals in bf16 values."""
    return (bf16_key(high) - bf16_key(low)).astype(np.float64)


def row_of(model: Model, octaves: int, seed: int) -> Problem:
    """One token of the model, with only as many experts as it is routed to."""
    return simulate.problem(
        seed,
        hidden=model.hidden_size,
        intermediate=model.intermediate_size,
        top_k=model.top_k,
        experts=model.top_k,
        tokens=1,
        clamp="none" if model.clamp is None else model.clamp,
        hidden_recipe={"kind": "bell", "spread": octaves},
        weights_recipe={
            "w13_scale": [120 - octaves, octaves],
            "w2_scale": [121 - octaves, octaves],
        },
        routing_recipe={"scaling": model.routed_scaling},
    )


def lines(model: Model, octaves: int, seed: int) -> list[str]:
    """One line of the table for each class."""
    problem = row_of(model, octaves, seed)
    first = problem.topk_ids.clone()
    first[:, 1:] = -1
    golden = oracle.forward(problem, CLASSES, contract=BASE)
    one_slot = oracle.forward(replace(problem, topk_ids=first), CLASSES, contract=BASE)
    hidden = problem.hidden_states.view(torch.int16).numpy().view(np.uint16)
    expert = int(first[0, 0])
    sums = linear(
        Rows.of(*simulate.stage(hidden)),
        problem.w13_weight[expert].numpy(),
        problem.w13_weight_scale[expert].numpy(),
        [accumulator(name) for name in CLASSES],
    )
    spread = float(bf16_decode(golden.y).std())
    out = []
    for name in CLASSES:
        envelope = golden.envelopes[name]
        gates = ulps(*(bf16_round(end) for end in sums[name]))
        code_low, code_high = envelope.code_interval(golden.sf)
        codes = (code_high - code_low).astype(np.float64)
        slot = one_slot.envelopes[name]
        slots, y = ulps(slot.y_lo, slot.y_hi), ulps(envelope.y_lo, envelope.y_hi)
        staged_ends = oracle.combine_interval(problem, golden.codes, golden.sf, name, BASE)
        staged_ulps = ulps(*staged_ends)
        width = bf16_decode(envelope.y_hi) - bf16_decode(envelope.y_lo)
        out.append(
            f"| {model.name} | {name} | {(gates > 0).mean():.2%} "
            f"| {(codes > 0).mean():.2%} ({codes.max():.0f}) "
            f"| {np.median(slots):.0f}, {np.percentile(slots, 90):.0f} "
            f"| {np.median(y):.0f}, {np.percentile(y, 90):.0f} "
            f"| {np.median(width) / spread:.2%} "
            f"| {np.median(staged_ulps):.0f}, {np.percentile(staged_ulps, 90):.0f}, "
            f"{(staged_ulps == 0).mean():.1%} |"
        )
    return out


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", action="append", choices=list(MODELS))
    parser.add_argument("--octaves", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"Group scales over {args.octaves} octaves in each operand, seed {args.seed}.\n")
    print(HEADER)
    print("|---" * (HEADER.count("|") - 1) + "|")
    start = time.time()
    for name in args.model or MODELS:
        for line in lines(MODELS[name], args.octaves, args.seed):
            print(line, flush=True)
        print(f"{name}: {time.time() - start:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
