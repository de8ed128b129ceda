"""Judge simulated correct kernels: every result must lie in its certified interval.

    python tools/soundness.py [--outputs N] [--models N] [--seed S] [--jobs N]

Runs the simulated kernels of ``megamoe.backends.simulate`` over ordinary and hostile data until
``--outputs`` results are judged in all and ``--models`` of each mmasim model (linear sums not
counted), and prints how many were judged and how many lay outside, by kernel family and by
judgement. Exit 1 if any lay outside. ``--jobs``: as many processes, each with its own seed from
``--seed`` on and its share of both numbers.

Judgements: *linear* sums against the class's fp32 interval (before any rounding hides them);
*codes* (with their exponents) given the exponents chosen; *staged* y given the codes; *y* end to
end.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from megamoe import oracle
from megamoe.backends import simulate
from megamoe.backends.simulate import Kernel, Simulation
from megamoe.oracle.linear import Rows
from megamoe.oracle.mlp import linear
from megamoe.spec.accumulators import ACCUMULATORS, accumulator
from megamoe.spec.contract import BASE
from megamoe.spec.formats import bf16_key, e4m3_key
from megamoe.spec.problem import Problem

JUDGEMENTS = ("linear", "codes", "staged", "y")
Tally = Counter[tuple[str, str, str]]
"""Counts by kernel family, judgement, and "judged" or "outside"."""

DATA: dict[str, dict[str, Any]] = {
    "bell": {"hidden_recipe": {"kind": "bell", "spread": 2}},
    "outliers": {"hidden_recipe": {"kind": "bell", "spread": 4, "outlier_every": 64}},
    "wide scales": {
        "hidden_recipe": {"kind": "bell", "spread": 20},
        "weights_recipe": {"w13_scale": [104, 24], "w2_scale": [106, 24]},
        "clamp": "none",
    },
    "tiny": {
        "hidden_recipe": {"kind": "bell", "log2_scale": -60, "spread": 30},
        "weights_recipe": {"w13_scale": [110, 20], "w2_scale": [1, 24]},
        "clamp": "none",
    },
    "sub-fp32": {
        "hidden_recipe": {"kind": "bell", "spread": 2},
        "weights_recipe": {"w13_scale": [118, 2], "w2_scale": [0, 12]},
    },
    "sparse": {"weights_recipe": {"w13": "sparse", "w2": "sparse"}},
    "uniform, precise": {"weights_recipe": {"w13": "uniform", "w2": "uniform"}, "fast_math": False},
    "negative gates": {"weights_recipe": {"w13_scale": [122, 3]}, "clamp": 0.5},
    "cancellation": {},
    "cancellation, precise": {"fast_math": False, "hidden_recipe": {"kind": "bell", "spread": 12}},
}


def make(name: str, seed: int, **shape: int) -> Problem:
    """A problem of the named kind of data."""
    problem = simulate.problem(seed, **DATA[name], **shape)
    if name.startswith("cancellation"):
        _cancel(problem, seed)
    return problem


def _cancel(problem: Problem, seed: int) -> None:
    """The second half of K repeats the first with the opposite sign, but for a few weights."""
    half = problem.hidden_size // 2
    problem.hidden_states[:, half:] = problem.hidden_states[:, :half]
    rng = np.random.default_rng(seed)
    for weight, scale in (
        (problem.w13_weight, problem.w13_weight_scale),
        (problem.w2_weight, problem.w2_weight_scale),
    ):
        middle, groups = weight.shape[-1] // 2, scale.shape[-1] // 2
        weight[..., middle:] = weight[..., :middle] ^ 0x88
        scale[..., groups:] = scale[..., :groups]
        few = torch.from_numpy(rng.random(tuple(weight.shape)) < 0.01)
        weight[few] ^= 0x21


def judge(
    problem: Problem, kernel: Kernel, output: Simulation, golden: oracle.ForwardGolden
) -> Tally:
    """Judged and outside, of one simulated forward."""
    envelope = golden.envelopes[kernel.accumulator]
    family = family_of(kernel)
    out: Tally = Counter()

    def record(judgement: str, outside: Any) -> None:
        out[family, judgement, "judged"] += outside.size
        out[family, judgement, "outside"] += int(outside.sum())

    live = (problem.topk_ids.numpy() >= 0)[..., None]
    low, high = envelope.code_interval(output.sf)
    key = e4m3_key(output.codes)
    bad_sf = (output.sf < envelope.sf_lo) | (output.sf > envelope.sf_hi)
    record("codes", ((key < low) | (key > high) | bad_sf.repeat(32, axis=-1)) & live)
    interval = oracle.combine_interval(problem, output.codes, output.sf, kernel.accumulator, BASE)
    for judgement, ends in (("staged", interval), ("y", (envelope.y_lo, envelope.y_hi))):
        y, y_lo, y_hi = (bf16_key(bits) for bits in (output.y, *ends))
        record(judgement, (y < y_lo) | (y > y_hi))
    return out


def judge_linear(problem: Problem, kernel: Kernel, seed: int, rows: int, outputs: int) -> Tally:
    """Sums of linear 1 of one expert against the class's interval of fp32 values."""
    rng = np.random.default_rng(seed)
    hidden = problem.hidden_states.view(torch.int16).numpy().view(np.uint16)[:rows]
    x, x_sf = simulate.stage(hidden)
    expert = int(problem.topk_ids.max())
    packed = problem.w13_weight[expert, :outputs].numpy()
    sf = problem.w13_weight_scale[expert, :outputs].numpy()
    sums = kernel.linear(x, x_sf, packed, sf, rng)
    low, high = linear(Rows.of(x, x_sf), packed, sf, [accumulator(kernel.accumulator)])[
        kernel.accumulator
    ]
    outside = ~((sums >= low) & (sums <= high))
    family = family_of(kernel)
    tally: Tally = Counter()
    tally[family, "linear", "judged"] = outside.size
    tally[family, "linear", "outside"] = int(outside.sum())
    return tally


def family_of(kernel: Kernel) -> str:
    """The name under which a kernel is counted."""
    return kernel.name if kernel.name.startswith("mmasim") else kernel.name.partition("/")[0]


def rounds(seed: int, small: bool) -> Iterator[tuple[str, Problem, list[Kernel], str]]:
    """Problems without end, each with the kernels to try on it and the judgement."""
    everything = simulate.kernels()
    models = [k for k in everything if k.name.startswith("mmasim")]
    fast = [k for k in everything if k.name.startswith("b")] * 2
    sums = [k for k in everything if k.name.startswith(("plain", "ordered"))]
    shapes = [
        {"hidden": 128, "intermediate": 128, "top_k": 2, "tokens": 16},
        {"hidden": 512, "intermediate": 256, "top_k": 3, "tokens": 8},
        {"hidden": 256, "intermediate": 384, "top_k": 4, "tokens": 16},
    ]
    modes = ("mixed", "low", "high")
    for i in itertools.count():
        rng = np.random.default_rng([seed, i])
        if not small:
            if i < 2:  # one row at the real sizes of DeepSeek-V4-Flash and -Pro
                hidden, inter = ((4096, 2048), (7168, 3072))[(seed + i) % 2]
                problem = make(
                    "bell", seed, hidden=hidden, intermediate=inter, experts=6, top_k=6, tokens=1
                )
                some = [models[(seed + i) % len(models)], *fast]
                yield f"bell, H {hidden}, I {inter}", problem, some, "forward"
            name = list(DATA)[(seed + i) % len(DATA)]
            depth = (4096, 7168, 2048)[(seed + i) % 3]
            problem = make(name, seed * 1000 + i, hidden=depth, intermediate=512, tokens=8)
            picks = [sums[int(k)] for k in rng.choice(len(sums), 3, replace=False)]
            yield (
                f"{name}, K {depth}",
                problem,
                [*picks, models[(seed + i) % len(models)]],
                "linear",
            )
        for name in DATA:
            shape = dict(shapes[int(rng.integers(len(shapes)))])
            if small:
                shape["tokens"] = 4
            problem = make(name, seed * 1000 + i, **shape)
            few = [sums[int(k)] for k in rng.choice(len(sums), 1 if small else 3, replace=False)]
            trials = [*few, *models, *(fast[:2] if small else fast)]
            picks = [replace(k, silu=str(rng.choice(modes))) for k in trials]
            yield name, problem, picks, "forward"


def run(
    outputs: int, each_model: int, seed: int, *, small: bool = False, out: Any = None
) -> tuple[Tally, list[str]]:
    """Judge until enough; returns the tally and one line for each kernel that fell outside."""
    tally: Tally = Counter()
    wrong: list[str] = []
    families = {family_of(k) for k in simulate.kernels() if k.name.startswith("mmasim")}
    start = time.time()
    for name, problem, kernels, what in rounds(seed, small):
        whole = what == "forward"
        golden = oracle.forward(problem, ENVELOPES, contract=BASE) if whole else None
        for number, kernel in enumerate(kernels):
            try:
                if golden is not None:
                    output = simulate.forward(problem, kernel, seed + number)
                    part = judge(problem, kernel, output, golden)
                else:
                    part = judge_linear(problem, kernel, seed + number, 8, 1024)
            except simulate.NotAMemberError:  # on these operands
                tally[family_of(kernel), "y", "not a member"] += 1
                continue
            tally += part
            outside = {k[1]: n for k, n in part.items() if k[2] == "outside" and n}
            if outside:
                wrong.append(f"{kernel.name} silu {kernel.silu} on {name}: outside {outside}")
                print(wrong[-1], file=sys.stderr, flush=True)
        total = sum(n for key, n in tally.items() if key[2] == "judged")
        if out is not None:
            out.write(f"{time.time() - start:7.0f} s  {total:>10} judged  after {name}\n")
            if name == list(DATA)[-1]:
                out.write(table(tally) + "\n")
            out.flush()
        models = min(
            sum(tally[family, j, "judged"] for j in JUDGEMENTS if j != "linear")
            for family in families
        )
        if total >= outputs and models >= each_model:
            break
    return tally, wrong


ENVELOPES = tuple(name for name in ACCUMULATORS if name != "exact")


def table(tally: Tally) -> str:
    """Markdown: judged (outside) by family and judgement."""
    lines = ["| simulated kernel | " + " | ".join(JUDGEMENTS) + " | all | outside |"]
    lines.append("|---" * (len(JUDGEMENTS) + 3) + "|")
    for family in [*sorted({k[0] for k in tally}), "all"]:
        rows = [k for k in tally if family in (k[0], "all")]

        def count(judgement: str, what: str, rows: list[tuple[str, str, str]] = rows) -> int:
            return sum(tally[k] for k in rows if k[2] == what and judgement in (k[1], "all"))

        cells = [str(count(j, "judged")) for j in (*JUDGEMENTS, "all")]
        lines.append(f"| {family} | {' | '.join(cells)} | {count('all', 'outside')} |")
    return "\n".join(lines)


def main() -> int:
    """The command line; 0 if nothing lay outside."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--outputs", type=int, default=10_000_000)
    parser.add_argument("--models", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.time()
    tally: Tally = Counter()
    wrong: list[str] = []
    share = -(-args.outputs // args.jobs), -(-args.models // args.jobs)
    with ProcessPoolExecutor(args.jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        seeds = range(args.seed, args.seed + args.jobs)
        for part, lines in pool.map(partial(_share, *share), seeds):
            tally += part
            wrong += lines
            print(f"{time.time() - start:.0f} s: a share came to its end", file=sys.stderr)
    options = f"--outputs {args.outputs} --models {args.models} --seed {args.seed}"
    print(f"tools/soundness.py {options} --jobs {args.jobs}")
    print(f"{time.time() - start:.0f} s in {args.jobs} processes\n")
    print(table(tally))
    for line in wrong:
        print(line)
    return 1 if wrong else 0


def _share(outputs: int, models: int, seed: int) -> tuple[Tally, list[str]]:
    return run(outputs, models, seed)


if __name__ == "__main__":
    sys.exit(main())
