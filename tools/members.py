"""Judge simulated members of every class on every stored forward case.

    python tools/members.py [--case GLOB] [--jobs N] [--products N] [--sample N] [--parts FILE]

Each simulated kernel of ``megamoe.backends.simulate`` and each subject of ``tools/claims.py``
meets each forward case of the first contract, and the judge compares it with the golden twice: with
its codes, and y alone. A case of up to ``--products`` products is computed whole. Of a larger case
each kernel computes a sample of about ``--sample`` products, another one for each case and kernel:
some groups of 32 intermediate channels, the reference's codes elsewhere, and some channels of y
(``megamoe/backends/simulated_sample.py``).

``--parts`` keeps each finished case in a file: the limits, then JSON lines. A later run with the
same limits takes those cases from it, so that an interrupted run goes on where it stopped.

Prints a line for each class: what was judged, what of it in samples, what lay outside, and how
often a kernel was no member on the operands of a case. Codes that a sample has from the reference
are not counted. Exit 1 if anything lay outside; the line on it counts the channels of y within the
sample. Cases of no tokens are left out. So are cases with features, since the simulated kernels
know plain SwiGLU only. The statistic is not asked: it is not calibrated for kernels that round
every addition one way (docs/numerics.md, 7.4).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
import zlib
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megamoe.backends import simulate
from megamoe.backends.simulate import Kernel
from megamoe.backends.simulated_sample import Sample, sample_of
from megamoe.cases import Case, load_cases
from megamoe.cases.forms import features
from megamoe.cases.load import golden_root
from megamoe.cases.recipes import forward_problem
from megamoe.golden import GoldenError, Store, make, rows_of
from megamoe.judge import judge_forward
from megamoe.spec.accumulators import ACCUMULATORS
from megamoe.spec.contract import BASE, Contract
from megamoe.spec.formats import GROUP
from megamoe.spec.problem import Problem

Array = npt.NDArray[Any]
Stages = dict[str, Array]
OF_Y = ("y", "y_lo", "y_hi")
"""Tensors of a golden with an axis of output channels."""
PLACES = {
    "sf_at": ("sf_lo", "sf_hi"), "code_at": ("code_lo", "code_hi"),
    "open_at": ("open_low", "open_high"),
}  # fmt: skip
"""Tensors of flat indices into all groups or codes, and what stands at them."""
Tally = Counter[tuple[str, str]]
"""Counts by accumulator class and by subject."""
COLUMNS = (
    "kernels", "cases", "whole", "sampled", "outputs", "codes", "outputs of samples",
    "codes of samples", "outside", "no member",
)  # fmt: skip


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


@cache
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


@dataclass
class Golden:
    """What the judge asks of a golden; the tensors are all at hand."""

    tensors: Mapping[str, Array]
    """As :meth:`megamoe.oracle.ForwardGolden.to_tensors` has them."""
    zero_freedom: bool
    contract: Contract = BASE
    is_calibrated: bool = False

    @classmethod
    def of(cls, case: Case) -> Golden:
        """By the oracle, checked by what the store holds."""
        golden = Store(golden_root(), make, BASE).load(case)
        tensors = make(case, contract=BASE).tensors
        for name in golden.names():
            full = golden.full.get(name)
            same = full is not None and full.tobytes() == tensors[name].tobytes()  # NaN is one too
            if not (same or (full is None and golden.matches(name, tensors[name]))):
                raise GoldenError(f"case {case.id}: the oracle's {name} is not the stored golden's")
        return cls(tensors, golden.zero_freedom)

    def part(self, rows: Array, channels: Array) -> Golden:
        """The golden of some rows, ascending, with some channels of y."""
        out = {}
        for name, tensor in self.tensors.items():
            prefix, dot, what = name.rpartition(".")
            place = PLACES.get(what)
            if not dot or what in OF_Y:
                out[name] = tensor[rows][:, channels] if what in OF_Y else tensor[rows]
            elif place is not None:  # tensors of the elements that are named by a flat index
                reference = self.tensors["l2_acts_sf" if what != "code_at" else "l2_acts"]
                size = reference[0].size
                row = np.searchsorted(rows, tensor // size)
                mask = rows[np.minimum(row, len(rows) - 1)] == tensor // size
                out[name] = (row * size + tensor % size)[mask].astype(tensor.dtype)
                for other in place:
                    out[f"{prefix}.{other}"] = self.tensors[f"{prefix}.{other}"][mask]
        return Golden(out, self.zero_freedom)

    def names(self) -> list[str]:
        return [*self.tensors]

    def get(self, name: str) -> Array:
        return self.tensors[name]

    def matches(self, name: str, actual: Array, nan: Array) -> bool:
        return False

    def other_rows(self, name: str, actual: Array) -> None:
        return None


def of_sample(problem: Problem, sample: Sample) -> Problem:
    """The sample's rows, with the rows of w2 that make its channels."""
    rows = problem.at_rows(torch.from_numpy(sample.tokens))
    at = torch.from_numpy(sample.channels)
    w2, w2_sf = problem.w2_weight[:, at], problem.w2_weight_scale[:, at]
    return replace(rows, w2_weight=w2, w2_weight_scale=w2_sf)


def outside(
    stages: Stages, golden: Golden, name: str, problem: Problem, tokens: list[int] | None
) -> list[str]:
    """What the judge finds outside in the stages, and in y alone; ``tokens`` name the rows."""
    wrong = []
    for actual in (stages, {"y": stages["y"]}):
        result = judge_forward(actual, golden, name, problem, tokens)
        wrong += [
            f"{f.outside} of {f.total} of {f.stage}, {f.worst.line() if f.worst else f.text}"
            for f in result.findings
            if f.outside
        ]
    return wrong


def of_member(
    case: Case, problem: Problem, golden: Golden, kernel: Kernel, sample: int, part: Part
) -> Part:
    """One kernel on one case: all of it, or a sample of about ``sample`` products if not 0."""
    name = kernel.accumulator
    seed = zlib.crc32(f"{case.id} {kernel.name}".encode())
    stages: Stages
    rows = None if case.rows is None else list(case.rows)
    try:
        with np.errstate(all="ignore"):
            if sample:
                reference = golden.get("l2_acts"), golden.get("l2_acts_sf")
                some = sample_of(problem, kernel, seed, *reference, sample)
                rows = [rows[at] if rows else int(at) for at in some.tokens]
                codes = len(some.groups) * GROUP
                problem = of_sample(problem, some)
                golden = golden.part(some.tokens, some.channels)
                stages = {"y": some.y, "l2_acts": some.codes, "l2_acts_sf": some.sf}
            else:
                whole = simulate.forward(problem, kernel, seed)
                codes = whole.codes.size
                stages = {"y": whole.y, "l2_acts": whole.codes, "l2_acts_sf": whole.sf}
    except simulate.NotAMemberError:
        part.tally[name, "no member"] += 1
        return part
    wrong = outside(stages, golden, name, problem, rows)
    part.tally[name, "sampled" if sample else "whole"] += 1
    of = " of samples" if sample else ""
    part.tally[name, f"outputs{of}"] += stages["y"].size
    part.tally[name, f"codes{of}"] += codes
    part.tally[name, "outside"] += bool(wrong)
    lines = tuple(f"{case.id}: {kernel.name} ({name}): {line}" for line in wrong)
    return Part(part.case, part.tally, part.kernels | {(name, kernel.name)}, part.wrong + lines)


def of_case(case: Case, products: int, sample: int) -> Part:
    """All kernels on one case."""
    torch.set_num_threads(1)
    problem = rows_of(forward_problem(case), case.rows)
    golden = Golden.of(case)
    size = sample if products_of(problem) > products else 0
    part = Part(case.id, Counter(), frozenset(), ())
    for kernel in members():
        part = of_member(case, problem, golden, kernel, size, part)
    return part


def table(parts: list[Part]) -> str:
    """Markdown: a line a class."""
    lines = ["| class | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    total: Counter[str] = Counter()
    for name in ACCUMULATORS:
        sums: Counter[str] = Counter()
        for part in parts:
            sums["cases"] += bool(part.tally[name, "whole"] + part.tally[name, "sampled"])
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
    parser.add_argument("--products", type=int, default=1_000_000)
    parser.add_argument("--sample", type=int, default=300_000)
    parser.add_argument("--parts", type=Path, help="keeps finished cases; a later run goes on")
    args = parser.parse_args()
    start = time.time()
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
    limits = f"--products {args.products} --sample {args.sample}"
    if args.parts and args.parts.exists():
        first, *lines = args.parts.read_text().splitlines() or [""]
        if first != limits:
            parser.error(f"{args.parts} is of {first!r}, not {limits!r}; name another file")
        names = {case.id for case in cases}
        parts = [part for part in map(Part.of_line, lines) if part.case in names]
    elif args.parts:
        args.parts.write_text(limits + "\n")
    ids = {part.case for part in parts}
    with ProcessPoolExecutor(args.jobs) as pool:
        work = [
            pool.submit(of_case, case, args.products, args.sample)
            for case in cases
            if case.id not in ids
        ]
        for future in as_completed(work):
            parts.append(future.result())
            if args.parts:
                with args.parts.open("a") as file:
                    file.write(parts[-1].line() + "\n")
            for line in parts[-1].wrong:
                print(line, file=sys.stderr)
            print(f"\r{len(parts)} of {len(cases)} cases", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print(f"tools/members.py {limits} --jobs {args.jobs}: {time.time() - start:.0f} s\n")
    print(table(parts))
    return 1 if any(part.wrong for part in parts) else 0


if __name__ == "__main__":
    sys.exit(main())
