"""Judge simulated members of the classes of ``fp8-block`` on its stored cases.

    python tools/dialect_members.py [--case GLOB] [--products N]

A member sums a run in an order and with a rounding of its class, adds the runs by an fma or by a
product and a sum, and errs in silu by what its instructions are allowed (the least, the most, or
mixed). Each meets each case of up to ``--products`` products under both contracts, and the judge
compares its y with the golden. Prints a line for each class. Exit 1 if anything lay outside.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product
from typing import Any

import numpy as np
import torch

from megamoe.backends import eager_fp8_block as eager
from megamoe.backends import simulate
from megamoe.backends.eager_combine import combine, fma
from megamoe.cases import golden_root, load_cases
from megamoe.golden import Store, digest_of, make, regenerate
from megamoe.judge import judge_forward
from megamoe.oracle.units import HOPPER_8BIT, aligned
from megamoe.spec.dialects import DIALECTS, Dialect
from megamoe.spec.formats import BLOCK, F64, e4m3_decode
from megamoe.spec.forms import bits
from megamoe.spec.problem import Problem

Run = Callable[[F64, F64, np.random.Generator], F64]
"""``(n, R)`` and ``(n, N)`` operands of a run to its sum ``(R, N)``, an fp32 number."""
FORMAT = "fp8-block"
NO_TERM = -60
"""The field of a zero: no sum with another reaches those of two numbers."""


@dataclass(frozen=True)
class Member:
    """A way to sum, to add runs and to err in silu."""

    accumulator: str
    run: Run
    fused: bool
    silu: str

    def linear(
        self, codes: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor,
        weight_scale: torch.Tensor, rng: np.random.Generator,
    ) -> torch.Tensor:  # fmt: skip
        """As :func:`megamoe.backends.eager_fp8_block.linear`."""
        size = codes.shape[1] // scale.shape[1]
        x, w = (np.asarray(e4m3_decode(t.numpy()), np.float64).T for t in (codes, weight))
        acc = torch.zeros(len(codes), len(weight))
        for at in range(scale.shape[1]):
            here = slice(at * size, (at + 1) * size)
            total = self.run(x[here], w[here], rng)
            own = weight_scale[:, at * size // BLOCK].repeat_interleave(BLOCK)
            factor, sums = scale[:, at, None] * own, torch.from_numpy(total).float()
            acc = fma(factor, sums, acc) if self.fused else acc + factor * sums
        return acc

    def forward(self, p: Problem, contract: Dialect, seed: int) -> torch.Tensor:
        """``y`` (T, H) bfloat16."""
        rng = np.random.default_rng(seed)
        codes, scale = eager.stage(p.hidden_states, contract)
        slots = torch.zeros(*p.topk_ids.shape, p.hidden_size, dtype=torch.bfloat16)
        live = p.topk_ids >= 0
        for e in p.topk_ids[live].unique().tolist():
            token, slot = (p.topk_ids == e).nonzero(as_tuple=True)
            w13 = p.w13_weight[e], p.w13_weight_scale[e]
            w2 = p.w2_weight[e], p.w2_weight_scale[e]
            sums = self.linear(codes[token], scale[token], *w13, rng)
            gate, up = self._halves(sums, p, contract)
            gated = simulate.silu(gate, p.fast_math, self.silu, rng)
            with np.errstate(invalid="ignore", under="ignore"):
                acts = (gated * up) * p.topk_weights[token, slot, None].numpy()
            made = eager.requantise(torch.from_numpy(acts), contract)
            slots[token, slot] = self.linear(*made, *w2, rng).to(torch.bfloat16)
        return combine(slots, live, p.topk_weights, contract)

    def _halves(self, sums: torch.Tensor, p: Problem, contract: Dialect) -> tuple[Any, Any]:
        gate, up = (half.numpy() for half in sums.chunk(2, dim=-1))
        if p.activation_clamp is None:
            return gate, up
        bound = np.float32(p.activation_clamp)
        gate = np.where(np.isnan(gate), bound, np.minimum(gate, bound))
        return gate, np.where(np.isnan(up), bound, np.clip(up, -bound, bound))


def added(order: str, rounding: str) -> Run:
    """Plain fp32 additions of the products."""
    return lambda x, w, rng: simulate.add_up(x[:, :, None] * w[:, None, :], order, rounding, rng)


def hopper(x: F64, w: F64, rng: np.random.Generator) -> F64:
    """Steps of 32 of Hopper's FP8 instruction, from zero."""
    del rng
    total = np.zeros((x.shape[1], w.shape[1]))
    fields = [np.where(v == 0, NO_TERM, np.maximum(np.frexp(v)[1] - 1, -6)) for v in (x, w)]
    for at in range(0, len(x), 32):
        part = slice(at, at + 32)
        top = (fields[0][part, :, None] + fields[1][part, None, :]).max(axis=0)
        field = np.where(top > NO_TERM // 2, top, HOPPER_8BIT.floor)
        terms = x[part, :, None] * w[part, None, :]
        total = aligned(HOPPER_8BIT, terms, field, total, np.zeros_like(total), axis=0)
    return total


def members() -> list[Member]:
    """All of them."""
    ways = [added(o, r) for o, r in product(("ascending", "random", "tree"), ("nearest", "zero"))]
    ways.append(added("by-sign", "up"))
    kinds = [*(("fp32-ordered", way) for way in ways), ("sm90-e4m3-k128", hopper)]
    errs = (True, False), ("low", "high", "mixed")
    return [Member(name, way, *err) for (name, way), err in product(kinds, product(*errs))]


def products_of(problem: Problem) -> int:
    """Products of both linears."""
    live = int((problem.topk_ids >= 0).sum())
    return 3 * live * problem.hidden_size * problem.intermediate_size


def main(argv: list[str] | None = None) -> int:
    """Exit 1 if anything lay outside."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", default="*", metavar="GLOB")
    parser.add_argument("--products", type=int, default=20_000_000)
    args = parser.parse_args(argv)
    count = {name: [0, 0, 0, 0] for name in dict.fromkeys(m.accumulator for m in members())}
    for case in load_cases():
        if case.params.get("weight_format") != FORMAT or not fnmatchcase(case.name, args.case):
            continue
        given = regenerate(case)
        problem = Problem(**given)
        if products_of(problem) > args.products:
            print(f"left out, too large: {case.id}")
            continue
        for revision, at in product(case.revisions, range(len(members()))):
            member, contract = members()[at], DIALECTS[revision]
            golden = Store(golden_root(), make, contract).load(case, digest_of(given))
            seed = zlib.crc32(f"{case.id} {revision} {at}".encode())
            y = bits(member.forward(problem, contract, seed))
            found = judge_forward({"y": y}, golden, member.accumulator, problem)
            outside = sum(finding.outside for finding in found.findings)
            if outside:
                print(f"outside: {case.id} under {revision}, member {at}: {outside}")
            row = count[member.accumulator]
            row[:] = [a + b for a, b in zip(row, (1, y.size, outside, bool(outside)), strict=True)]
    print("| class | forwards | outputs | outside | forwards with any |\n|---|---|---|---|---|")
    for name, row in count.items():
        print(f"| {name} | {' | '.join(map(str, row))} |")
    return int(any(row[2] for row in count.values()))


if __name__ == "__main__":
    sys.exit(main())
