"""Calibrate the statistic for backends that return y only: writes megamoe/judge/statistic.json.

    python tools/calibrate.py [--rows N] [--seed S] [--jobs N] [--group NAME ...]

Simulated correct kernels run over several kinds of data; the deviation of their y from the oracle
is measured in tiles, rows and the rows of an expert. The tail of each statistic is fitted by
peaks over threshold: beyond u, the *square* of the statistic is taken as exponential. (A unit's
squared deviation is a sum of few independent contributions, the flipped FP8 codes, each bounded:
its tail falls at least as fast as exponentially.) Several u are kept and the largest level wins,
so that a rare large kind of deviation is not averaged away by a common small one; the mean excess
is its upper 99.9% confidence bound; every kind of data is fitted on its own and the worst counts.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megamoe import oracle
from megamoe.backends import simulate
from megamoe.backends.simulate import Kernel
from megamoe.judge.statistic import ROWS_OF_EXPERT, Energies
from megamoe.spec.contract import BASE
from megamoe.spec.formats import F64, GROUP

OUT = Path(__file__).resolve().parent.parent / "megamoe" / "judge" / "statistic.json"
SAFETY = 1.25
HIDDEN = 2048
STRATA = {128: (128, 1), 512: (256, 2), 2048: (512, 4), 8192: (2048, 4)}
"""Terms: (intermediate, top-k)."""
DATA: dict[str, dict[str, Any]] = {
    "two octaves": {},
    "eight octaves": {
        "hidden_recipe": {"kind": "bell", "spread": 8},
        "weights_recipe": {"w13_scale": [110, 8], "w2_scale": [118, 8]},
    },
    "outliers": {
        "hidden_recipe": {"kind": "bell", "spread": 4, "outlier_every": 64},
        "weights_recipe": {"w13_scale": [112, 4], "w2_scale": [118, 4]},
    },
    "precise, uniform": {
        "hidden_recipe": {"kind": "bell", "spread": 12},
        "weights_recipe": {"w13": "uniform", "w2": "uniform", "w13_scale": [106, 12]},
        "fast_math": False,
        "clamp": "none",
    },
}
SLOW_TERMS = 2048
SHARES = {"fp32": 1, "sm90-e4m3": 2, "sm90-e4m3-k32": 2}
"""Group to the fraction (1/n) of the rows: the instruction models are slow."""
LADDER = (40, 160, 640)
"""Numbers of exceedances of the starts of the tail."""


def kernels(group: str, terms: int = 0) -> list[tuple[Kernel, int]]:
    """Kernels of a group, with the fraction (1/n) of the rows that they are tried on.

    The slow ones are left out where a row has more than ``SLOW_TERMS`` terms.
    """
    if group == "sm90-e4m3":
        return [(simulate.hopper_e4m3(), 1)] if terms <= SLOW_TERMS else []
    if group == "sm90-e4m3-k32":
        outside = (simulate.hopper_e4m3_outside(GROUP, r, group) for r in ("nearest", "mixed"))
        return [(kernel, 1) for kernel in outside] if terms <= SLOW_TERMS else []
    bulk = [simulate.blas(), simulate.blockwise("zero"), simulate.blockwise("mixed")]
    slow = [
        simulate.plain("random", "zero"), simulate.plain("splits", "mixed"),
        simulate.plain("tree", "nearest"), simulate.hopper_bf16(), simulate.blackwell_mxf8f6f4(),
    ]  # fmt: skip
    return [(k, 1) for k in bulk] + [(k, 64) for k in slow if terms <= SLOW_TERMS]


def fit(values: list[F64]) -> dict[str, Any]:
    """Tail of one statistic from its sample."""
    squares = np.sort(np.concatenate([np.ravel(v) for v in values]) ** 2)[::-1]
    tail = []
    for count in LADDER:
        if count < len(squares) // 4 and squares[count - 1] > 0:
            u = float(squares[count])
            beta = float((squares[:count] - u).mean()) * (1 + 3.1 / np.sqrt(count))
            tail.append([u, beta, count / len(squares)])
    nonzero = int((squares > 0).sum())
    if nonzero and not tail:  # too few for a start above zero: all of them
        beta = float(squares[:nonzero].mean()) * (1 + 3.1 / np.sqrt(nonzero))
        tail.append([0.0, beta, nonzero / len(squares)])
    return {"largest": float(np.sqrt(squares[0])), "sample": len(squares), "tail": tail}


def sample(group: str, inter: int, top_k: int, data: str, rows: int, seed: int) -> dict[str, Any]:
    """Fits by unit and statistic of one group, number of terms and kind of data."""
    rng = np.random.default_rng([seed, inter, top_k])
    rows = max(8, rows // SHARES[group])
    samples: dict[str, dict[str, list[F64]]] = {}
    options = DATA[data]
    problem = simulate.problem(
        seed, hidden=HIDDEN, intermediate=inter, top_k=top_k, experts=top_k, tokens=rows, **options
    )
    reference = oracle.forward(problem, [], contract=BASE).y
    for kernel, fraction in kernels(group, inter * top_k):
        count = max(1, rows // fraction)
        part = simulate.head(problem, count)
        output = simulate.forward(part, kernel, seed)
        tiles = Energies.of(output.y, reference[:count])
        row = tiles.rows()
        by_unit = {"tile": tiles, "row": row}
        for n in ROWS_OF_EXPERT[1:]:
            if count >= n:
                groups = np.stack([rng.choice(count, n, replace=False) for _ in range(count)])
                by_unit[f"expert-{n}"] = Energies(
                    row.square[groups].sum(1),
                    row.along[groups].sum(1),
                    row.reference[groups].sum(1),
                )
        for unit, energies in by_unit.items():
            for name, values in energies.statistics().items():
                samples.setdefault(unit, {}).setdefault(name, []).append(values)
    return {u: {name: fit(v) for name, v in by.items()} for u, by in samples.items()}


def part(group: str, terms: int, data: str, rows: int, seed: int) -> dict[str, Any]:
    """Fits of one group, number of terms and kind of data."""
    torch.set_num_threads(1)
    start = time.time()
    fits = sample(group, *STRATA[terms], data, min(rows, rows * 1024 // terms), seed)
    largest = {unit: by["size"]["largest"] for unit, by in fits.items()}
    took = f"{time.time() - start:.0f} s"
    print(f"{group} {terms} {data}: {took} {largest}", file=sys.stderr, flush=True)
    return fits


def calibrate(rows: int, seed: int, jobs: int, names: list[str]) -> dict[str, Any]:
    """Fits of the groups ``names``, by group, number of terms, unit and statistic."""
    work = [(g, n, d) for n in reversed(STRATA) for g in names for d in DATA if kernels(g, n)]
    groups: dict[str, Any] = {}
    with ProcessPoolExecutor(jobs) as pool:
        futures = [(g, n, d, pool.submit(part, g, n, d, rows, seed)) for g, n, d in work]
        for group, terms, data, future in futures:
            fits = groups.setdefault(group, {}).setdefault(str(terms), {})
            for unit, by in future.result().items():
                for name, one in by.items():
                    fits.setdefault(unit, {}).setdefault(name, []).append({"data": data, **one})
    return groups


def main() -> int:
    """The command line. The file keeps the groups that are not wanted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--group", action="append", choices=list(SHARES))
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = args.group or list(SHARES)
    groups = calibrate(args.rows, args.seed, args.jobs, names)
    options = "".join(f" --group {name}" for name in args.group or [])
    provenance = {
        group: {
            "command": f"tools/calibrate.py --rows {args.rows} --seed {args.seed}{options}",
            "versions": {
                "python": platform.python_version(), "numpy": np.__version__,
                "torch": torch.__version__, "mmasim": metadata.version("mmasim"),
            },
            "kernels": [kernel.name for kernel, _ in kernels(group)],
        }
        for group in names
    }  # fmt: skip
    before = json.loads(args.out.read_text("utf-8")) if args.out.exists() else {}
    document = {
        "provenance": before.get("provenance", {}) | provenance,
        "data": DATA,
        "hidden": HIDDEN,
        "safety": SAFETY,
        "pooled": len(kernels("fp32")),
        "groups": before.get("groups", {}) | groups,
    }
    args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
