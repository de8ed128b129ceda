"""Compute recorded bits on the CPU: the tensor core's model, chained as this project's kernel adds.

    python tools/predicted.py golden/recorded/triton/MACHINE.json [--case GLOB] [--most N]

Each forward case of the file whose products number at most ``--most`` is computed stage by stage:
staging, linear 1 by :func:`megamoe.oracle.units.chain` of Hopper's 16-bit unit with folded scale
factors, SwiGLU with the oracle's reference silu, requantisation, linear 2 and the combine. The
digests of codes, scale bytes and y are compared with the recorded ones. Prints a line for each case
with another digest or no prediction, and the counts. Exit 1 if y of any case differs.
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
import numpy.typing as npt
import torch

from megamoe import oracle
from megamoe.cases import load_cases
from megamoe.cases.recipes import forward_problem
from megamoe.golden import recorded
from megamoe.oracle import swiglu
from megamoe.oracle.combine import Combine
from megamoe.oracle.groups import group_amax, scaled_codes
from megamoe.oracle.linear import Columns, Rows
from megamoe.oracle.mlp import bf16_halves
from megamoe.oracle.units import HOPPER_16BIT, INTERLEAVED, chain
from megamoe.spec.contract import BASE
from megamoe.spec.formats import F64, GROUP, U8, U16, bf16_round, unpack_sf
from megamoe.spec.forms import bits
from megamoe.spec.problem import Problem


def linear(codes: U8, sf: U8, packed: U8, weight_sf: U8) -> F64:
    """``(R, C)`` rows by ``(N, C/2)`` weights to ``(R, N)`` fp32 results."""
    rows, columns = Rows.of(codes, sf), Columns.of(packed, weight_sf)
    return chain(HOPPER_16BIT, rows, columns, folded=True, order=INTERLEAVED)


def predict(problem: Problem) -> dict[str, npt.NDArray[np.unsignedinteger]]:
    """y and the requantised activations of a plain SwiGLU layer.

    ``ValueError`` where an operand with its scale factor is no bfloat16 number.
    """
    ids, routing = problem.topk_ids.numpy(), problem.topk_weights.numpy().astype(np.float32)
    staged = oracle.staging(bits(problem.hidden_states), routing, ids, BASE)
    x, x_sf = staged["x"], staged["x_sf"]
    x_sf = unpack_sf(x_sf) if x_sf.dtype == np.int32 else x_sf
    tokens, slots = ids.shape
    codes = np.zeros((tokens, slots, problem.intermediate_size), np.uint8)
    sf = np.zeros((tokens, slots, problem.intermediate_size // GROUP), np.uint8)
    rows: U16 = np.zeros((tokens, slots, problem.hidden_size), np.uint16)
    weights = [
        tensor.numpy()
        for tensor in (
            problem.w13_weight, problem.w13_weight_scale, problem.w2_weight,
            problem.w2_weight_scale,
        )
    ]  # fmt: skip
    for expert in np.unique(ids[ids >= 0]):
        at = np.nonzero(ids == expert)
        w13, w13_sf, w2, w2_sf = (tensor[expert] for tensor in weights)
        gate, up = bf16_halves(linear(x[at[0]], x_sf[at[0]], w13, w13_sf), BASE)
        gate, up = swiglu.clamp_gate_up(gate, up, problem.act, BASE)
        with np.errstate(all="ignore"):
            values = swiglu.activation(gate, up, routing[at][:, None], problem.act, BASE)
            sf[at] = swiglu.requant_exponent(group_amax(values, BASE), BASE)
            codes[at] = scaled_codes(values, sf[at], BASE)
        rows[at] = bf16_round(linear(codes[at], sf[at], w2, w2_sf))
    y = Combine(ids >= 0, routing, BASE).point(rows)
    return {"y": y, "l2_acts": codes, "l2_acts_sf": sf}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--case", default="*")
    parser.add_argument("--most", type=float, default=3e8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    kept = json.loads(args.file.read_text("utf-8"))["cases"]
    started, count = time.time(), Counter[str]()
    for case in load_cases():
        if case.id not in kept or not fnmatchcase(case.id, args.case):
            continue
        p = case.params
        if 3 * p["hidden"] * p["intermediate"] * p["tokens"] * p["top_k"] > args.most:
            count["not tried"] += 1
            continue
        problem = forward_problem(case)
        try:
            shown = predict(problem)
        except ValueError as fault:
            count["not predicted"] += 1
            print(f"{case.id}: {fault}", flush=True)
            continue
        digests = recorded.digests(shown, problem.topk_ids.numpy())
        other = [name for name, one in digests.items() if kept[case.id]["stages"][name] != one]
        count["y differs" if "y" in other else "codes alone differ" if other else "equal"] += 1
        if other:
            print(f"{case.id}: {', '.join(other)} differ", flush=True)
    print(
        f"{time.time() - started:.0f} s: " + ", ".join(f"{n} {what}" for what, n in count.items())
    )
    return 1 if count["y differs"] else 0


if __name__ == "__main__":
    sys.exit(main())
