"""Judge simulated members of the classes of the dialects on their stored cases.

    python tools/dialect_members.py [--format F] [--case GLOB] [--products N]

A member sums in an order and with a rounding of its class, and errs in silu by what its
instructions are allowed (the least, the most, or mixed). Where the contract allows a product and a
sum in place of an fma, there is a member of each. Each meets each case of up to ``--products``
products under each contract that knows it, and the judge compares its y with the golden. Prints a
line for each class. Exit 1 if anything lay outside.
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
from megamoe.backends import eager_w4a16, simulate
from megamoe.backends.eager_combine import combine, fma
from megamoe.cases import golden_root, load_cases
from megamoe.golden import Store, digest_of, make, regenerate
from megamoe.judge import judge_forward
from megamoe.oracle.units import HOPPER_8BIT, HOPPER_16BIT, aligned, fused
from megamoe.spec.dialects import DIALECTS, Dialect
from megamoe.spec.formats import BLOCK, F32, F64, GROUP, e4m3_decode
from megamoe.spec.forms import bits
from megamoe.spec.problem import Problem

Run = Callable[[F64, F64, np.random.Generator], F64]
"""``(n, R)`` and ``(n, N)`` operands of a run to its sum ``(R, N)``, an fp32 number."""
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
            gate, up = clamped(sums, p)
            gated = simulate.silu(gate, p.fast_math, self.silu, rng)
            with np.errstate(invalid="ignore", under="ignore"):
                acts = (gated * up) * p.topk_weights[token, slot, None].numpy()
            operand = eager.requantise(torch.from_numpy(acts), contract)
            slots[token, slot] = self.linear(*operand, *w2, rng).to(torch.bfloat16)
        return combine(slots, live, p.topk_weights, contract)


def adder(order: str, rounding: str) -> Run:
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


@dataclass(frozen=True)
class Bf16Member:
    """A way to sum products of bfloat16 and MXFP4, to combine rows and to err in silu."""

    accumulator: str
    run: Run
    fused: bool
    silu: str

    def linear(self, rows: torch.Tensor, weights: F64, rng: np.random.Generator) -> torch.Tensor:
        """As :func:`megamoe.backends.eager_w4a16.linear`, some outputs at a time."""
        x, step = rows.double().numpy().T, max(1, simulate.PRODUCTS // max(1, rows.numel()))
        parts = [self.run(x, weights[at : at + step].T, rng) for at in range(0, len(weights), step)]
        return torch.from_numpy(np.concatenate(parts, axis=1)).float()

    def forward(self, p: Problem, contract: Dialect, seed: int) -> torch.Tensor:
        """``y`` (T, H) bfloat16."""
        del contract
        rng = np.random.default_rng(seed)
        live, weights = p.topk_ids >= 0, p.topk_weights
        slots = torch.zeros(*p.topk_ids.shape, p.hidden_size, dtype=torch.bfloat16)
        for e in p.topk_ids[live].unique().tolist():
            token, slot = (p.topk_ids == e).nonzero(as_tuple=True)
            w13 = eager_w4a16.decoded(p.w13_weight[e], p.w13_weight_scale[e]).numpy()
            w2 = eager_w4a16.decoded(p.w2_weight[e], p.w2_weight_scale[e]).numpy()
            sums = self.linear(p.hidden_states[token], w13, rng).to(torch.bfloat16).float()
            gate, up = clamped(sums, p)
            gated = simulate.silu(gate, p.fast_math, self.silu, rng)
            with np.errstate(invalid="ignore", under="ignore"):
                acts = torch.from_numpy(gated * up).to(torch.bfloat16)
            slots[token, slot] = self.linear(acts, w2, rng).to(torch.bfloat16)
        total = torch.zeros(len(slots), p.hidden_size)
        for k in range(slots.shape[1]):
            row, weight = slots[:, k].float(), weights[:, k, None]
            update = fma(row, weight, total) if self.fused else total + row * weight
            total = torch.where(live[:, k, None], update, total)
        return total.to(torch.bfloat16)


def clamped(sums: torch.Tensor, p: Problem) -> tuple[F32, F32]:
    """Gate and up of linear 1's sums; NaN becomes the upper bound."""
    gate, up = (half.numpy() for half in sums.chunk(2, dim=-1))
    if p.activation_clamp is None:
        return gate, up
    bound = np.float32(p.activation_clamp)
    gate = np.where(np.isnan(gate), bound, np.minimum(gate, bound))
    return gate, np.where(np.isnan(up), bound, np.clip(up, -bound, bound))


def by_blocks(order: str, rounding: str) -> Run:
    """Each block of 32 values of K on its own, then their sums in ascending order."""

    def run(x: F64, w: F64, rng: np.random.Generator) -> F64:
        way = adder(order, rounding)
        blocks = [
            way(x[at : at + GROUP], w[at : at + GROUP], rng) for at in range(0, len(x), GROUP)
        ]
        return simulate.add_up(np.stack(blocks), "ascending", rounding, rng)

    return run


def hopper_bf16(x: F64, w: F64, rng: np.random.Generator) -> F64:
    """Steps of 16 of Hopper's bfloat16 instruction, two for each scale factor, then an fp32 sum."""
    del rng
    fields = [np.where(v == 0, -4000, np.maximum(np.frexp(v)[1] - 1, -126)) for v in (x, w)]
    total = np.zeros((x.shape[1], w.shape[1]), np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        for at in range(0, len(x), GROUP):
            block = np.zeros(total.shape)
            for part in (slice(at, at + 16), slice(at + 16, at + GROUP)):
                terms = np.moveaxis(x[part, :, None] * w[part, None, :], 0, -1)
                field = np.moveaxis(fields[0][part, :, None] + fields[1][part, None, :], 0, -1)
                block = fused(HOPPER_16BIT, terms, field, block)
            total += block.astype(np.float32)
    return total.astype(np.float64)


def bf16_members() -> list[Bf16Member]:
    """All of ``w4a16``."""
    pairs = list(product(("ascending", "random", "tree"), ("nearest", "zero", "up")))
    kinds = [("fp32", adder(o, r)) for o, r in [*pairs, ("by-sign", "up"), ("splits", "nearest")]]
    kinds += [("fp32-ordered", by_blocks(o, r)) for o, r in [*pairs, ("by-sign", "down")]]
    kinds += [("fp32-ordered", hopper_bf16), ("fp32", hopper_bf16)]
    errs = (True, False), ("low", "high", "mixed")
    return [Bf16Member(name, way, *err) for (name, way), err in product(kinds, product(*errs))]


def members() -> list[Member]:
    """All of ``fp8-block``."""
    ways = [adder(o, r) for o, r in product(("ascending", "random", "tree"), ("nearest", "zero"))]
    ways.append(adder("by-sign", "up"))
    kinds = [*(("fp32-ordered", way) for way in ways), ("sm90-e4m3-k128", hopper)]
    errs = (True, False), ("low", "high", "mixed")
    return [Member(name, way, *err) for (name, way), err in product(kinds, product(*errs))]


OF_FORMAT: dict[str, Callable[[], list[Any]]] = {"fp8-block": members, "w4a16": bf16_members}


def products_of(problem: Problem) -> int:
    """Products of both linears."""
    live = int((problem.topk_ids >= 0).sum())
    return 3 * live * problem.hidden_size * problem.intermediate_size


def main(argv: list[str] | None = None) -> int:
    """Exit 1 if anything lay outside."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--format", default="fp8-block", choices=OF_FORMAT)
    parser.add_argument("--case", default="*", metavar="GLOB")
    parser.add_argument("--products", type=int, default=20_000_000)
    args = parser.parse_args(argv)
    every: list[Any] = OF_FORMAT[args.format]()
    count = {name: [0, 0, 0, 0] for name in dict.fromkeys(m.accumulator for m in every)}
    for case in load_cases():
        own = case.params.get("weight_format") == args.format
        if not own or not fnmatchcase(case.name, args.case):
            continue
        inputs = regenerate(case)
        problem = Problem(**inputs)
        if products_of(problem) > args.products:
            print(f"left out, too large: {case.id}")
            continue
        for revision, (at, member) in product(case.revisions, enumerate(every)):
            contract = DIALECTS[revision]
            golden = Store(golden_root(), make, contract).load(case, digest_of(inputs))
            seed = zlib.crc32(f"{case.id} {revision} {at}".encode())
            y = bits(member.forward(problem, contract, seed))
            judgement = judge_forward({"y": y}, golden, member.accumulator, problem)
            outside = sum(finding.outside for finding in judgement.findings)
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
