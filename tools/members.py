"""Judge simulated members of every class on every stored forward case.

    python tools/members.py [--case GLOB] [--jobs N] [--products N] [--most N] [--parts FILE]

Each simulated kernel of ``megamoe.backends.simulate`` and each subject of ``tools/claims.py``
computes each forward case of the first contract, and the judge compares it with the golden twice:
with its codes, and y alone. Two limits keep the time bounded. A case of more than ``--products``
products a kernel is computed by one kernel of each class and family, other ones for each case. For
a case of more than ``--most`` products, only as many rows are computed and judged as stay below
that number, the first and the last among them; and where one row alone takes more, by one kernel of
each class.

``--parts`` keeps each finished case in a file: the limits, then JSON lines. A later run with the
same limits takes those cases from it, so that an interrupted run goes on where it stopped.

Prints a line for each class: what was judged, what lay outside, and how often a kernel was no
member on the operands of a case. Exit 1 if anything lay outside. Cases of no tokens are left out.
So are cases with features, since the simulated kernels know plain SwiGLU only. The statistic is
not asked: it is not calibrated for kernels that round every addition one way (docs/numerics.md,
7.4).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megamoe.backends import simulate
from megamoe.backends.simulate import Kernel
from megamoe.cases import Case, load_cases
from megamoe.cases.forms import features
from megamoe.cases.load import golden_root
from megamoe.cases.recipes import forward_problem
from megamoe.golden import Store, StoredGolden, make, rows_of
from megamoe.judge import judge_forward
from megamoe.spec.accumulators import ACCUMULATORS
from megamoe.spec.contract import BASE
from megamoe.spec.problem import Problem

Tally = Counter[tuple[str, str]]
"""Counts by accumulator class and by subject."""
COLUMNS = ("kernels", "cases", "forwards", "outputs", "codes", "outside", "no member")


@dataclass(frozen=True)
class Part:
    """The results of one case."""

    case: str
    tally: Tally
    kernels: frozenset[tuple[str, str]]
    """(class, name) of those that were judged."""
    wrong: tuple[str, ...]

    def line(self) -> str:
        """One line of ``--parts``."""
        tally = [[name, what, count] for (name, what), count in sorted(self.tally.items())]
        return json.dumps([self.case, tally, sorted(self.kernels), self.wrong])

    @classmethod
    def of_line(cls, line: str) -> Part:
        """What ``line`` wrote."""
        case, tally, kernels, wrong = json.loads(line)
        counts = Counter({(name, what): count for name, what, count in tally})
        return cls(case, counts, frozenset(map(tuple, kernels)), tuple(wrong))


def members() -> list[Kernel]:
    """Simulated kernels and the subjects of ``tools/claims.py``, each name once."""
    path = Path(__file__).with_name("claims.py")
    spec = importlib.util.spec_from_file_location("claims", path)
    assert spec is not None and spec.loader is not None
    claims: Any = importlib.util.module_from_spec(spec)
    sys.modules["claims"] = claims
    spec.loader.exec_module(claims)
    every = [*simulate.kernels(), *(subject.kernel for subject in claims.subjects())]
    return list({(kernel.accumulator, kernel.name): kernel for kernel in every}.values())


def products_of(problem: Problem) -> int:
    """Products of one forward."""
    live = int((problem.topk_ids >= 0).sum())
    return 3 * live * problem.hidden_size * problem.intermediate_size


def chosen(case: Case, cost: int, products: int, most: int) -> list[Kernel]:
    """The kernels that compute a case: all, or one of each class and family, or of each class."""
    every = members()
    if cost <= products:
        return every
    families: dict[tuple[str, str], list[Kernel]] = {}
    for kernel in every:
        family = kernel.name.partition("/")[0] if "/" in kernel.name and cost <= most else ""
        families.setdefault((kernel.accumulator, family), []).append(kernel)
    turn = zlib.crc32(case.id.encode())
    return [kernels[turn % len(kernels)] for kernels in families.values()]


def shortened(case: Case, problem: Problem, most: int) -> Case:
    """The case with no more rows than ``most`` products take."""
    rows = list(range(problem.num_tokens)) if case.rows is None else list(case.rows)
    keep = max(1, len(rows) * most // max(1, products_of(problem)))
    if keep >= len(rows):
        return case
    at = np.unique(np.linspace(0, len(rows) - 1, keep).astype(int))
    return replace(case, params={**case.params, "rows": [rows[i] for i in at]})


def judged(case: Case, problem: Problem, golden: StoredGolden, kernel: Kernel, part: Part) -> Part:
    """One forward, judged with its codes and without."""
    name = kernel.accumulator
    seed = zlib.crc32(f"{case.id} {kernel.name}".encode())
    try:
        with np.errstate(all="ignore"):
            got = simulate.forward(problem, kernel, seed)
    except simulate.NotAMemberError:
        part.tally[name, "no member"] += 1
        return part
    wrong = []
    shown: dict[str, npt.NDArray[Any]] = {"y": got.y, "l2_acts": got.codes, "l2_acts_sf": got.sf}
    for actual in (shown, {"y": got.y}):
        result = judge_forward(actual, golden, name, problem, case.rows)
        found = [f for f in result.findings if f.outside]
        wrong += [
            f"{case.id}: {kernel.name} ({name}): {f.outside} of {f.total} of {f.stage}, {f.worst}"
            for f in found
        ]
    part.tally[name, "forwards"] += 1
    part.tally[name, "outputs"] += got.y.size
    part.tally[name, "codes"] += got.codes.size
    part.tally[name, "outside"] += bool(wrong)
    return Part(part.case, part.tally, part.kernels | {(name, kernel.name)}, (*part.wrong, *wrong))


def of_case(case: Case, products: int, most: int) -> Part:
    """All chosen kernels on one case."""
    torch.set_num_threads(1)
    whole = forward_problem(case)
    short = shortened(case, rows_of(whole, case.rows), most)
    problem = rows_of(whole, short.rows)
    golden = Store(golden_root(), make, BASE).load(case)
    if short is not case:
        golden = replace(golden, case=short, full=make(short, contract=BASE).tensors, digests={})
    part = Part(case.id, Counter(), frozenset(), ())
    for kernel in chosen(case, products_of(problem), products, most):
        part = judged(short, problem, golden, kernel, part)
    return part


def table(parts: list[Part]) -> str:
    """Markdown: a line a class."""
    lines = ["| class | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    total: Counter[str] = Counter()
    for name in ACCUMULATORS:
        sums: Counter[str] = Counter()
        for part in parts:
            sums["cases"] += bool(part.tally[name, "forwards"])
            for what in COLUMNS[2:]:
                sums[what] += part.tally[name, what]
        sums["kernels"] = len({k for part in parts for k in part.kernels if k[0] == name})
        total += sums
        lines.append(f"| {name} | " + " | ".join(str(sums[c]) for c in COLUMNS) + " |")
    total["cases"] = len(parts)
    lines.append("| all | " + " | ".join(str(total[c]) for c in COLUMNS) + " |")
    return "\n".join(lines)


def main() -> int:
    """The command line; 0 if nothing lay outside."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--case", default="*")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--products", type=int, default=3_000_000)
    parser.add_argument("--most", type=int, default=20_000_000)
    parser.add_argument("--parts", type=Path, help="keeps finished cases; a later run goes on")
    args = parser.parse_args()
    started = time.time()
    cases = [
        case
        for case in load_cases()
        if case.kind == "forward"
        and case.params["tokens"]
        and not features(case)
        and fnmatchcase(case.id, args.case)
    ]
    if not cases:
        parser.error(f"no forward case without features has a name like {args.case!r}")
    cases.sort(key=lambda c: -c.params["hidden"] * c.params["intermediate"] * c.params["tokens"])
    parts: list[Part] = []
    limits = f"--products {args.products} --most {args.most}"
    if args.parts and args.parts.exists():
        first, *lines = args.parts.read_text().splitlines() or [""]
        if first != limits:
            parser.error(f"{args.parts} is of {first!r}, not {limits!r}; name another file")
        names = {case.id for case in cases}
        parts = [part for part in map(Part.of_line, lines) if part.case in names]
    elif args.parts:
        args.parts.write_text(limits + "\n")
    finished = {part.case for part in parts}
    with ProcessPoolExecutor(args.jobs) as pool:
        work = [
            pool.submit(of_case, case, args.products, args.most)
            for case in cases
            if case.id not in finished
        ]
        for done in as_completed(work):
            parts.append(done.result())
            if args.parts:
                with args.parts.open("a") as file:
                    file.write(parts[-1].line() + "\n")
            for line in parts[-1].wrong:
                print(line, file=sys.stderr)
            print(f"\r{len(parts)} of {len(cases)} cases", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print(f"tools/members.py {limits} --jobs {args.jobs}: {time.time() - started:.0f} s\n")
    print(table(parts))
    return 1 if any(part.wrong for part in parts) else 0


if __name__ == "__main__":
    sys.exit(main())
