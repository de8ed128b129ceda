"""Time the module over the GPUs of one machine: the forward, its dispatch and return, the link.

    torchrun --standalone --nproc-per-node N tools/bench_ep.py [--share flash pro] [--tokens T ...]

Each rank holds one share's experts of its own, so N ranks have N times as many, and routing is
uniform over all of them. Rank 0 prints a line for each share and token count, in microseconds: the
median over ``--repeats`` of the slowest rank's time. ``dispatch`` and ``return`` lie between the
marks of :class:`megamoe.layer.expert_parallel.ExpertParallel`, and include the wait for the other
rank. ``link`` is ``all_to_all_single`` of as many bytes alone, there and back. ``one rank`` is the
forward of the same tokens on one GPU without a group, with the share's experts only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from megamoe.backends import load_backend
from megamoe.bench.floor import SHARES, Share
from megamoe.layer.expert_parallel import ExpertParallel
from megamoe.layer.experts import DeepseekV4MegaMoEExperts
from megamoe.layer.messages import all_to_all

FLUSH_BYTES = 1 << 28
WARM = 3
"""Repeats that do not count."""
COLUMNS = ("share", "T", "forward", "header", "dispatch", "experts", "return", "combine",
           "link there", "link back", "one rank", "MB there", "MB back")  # fmt: skip


def module(share: Share, tokens: int, group: object, ranks: int) -> DeepseekV4MegaMoEExperts:
    """A module with random weights of ordinary size."""
    made = DeepseekV4MegaMoEExperts(
        tokens, group=group, num_experts=share.experts * ranks, num_local_experts=share.experts,
        experts_start_idx=share.experts * (dist.get_rank() if group is not None else 0),
        top_k=share.top_k, hidden_size=share.hidden, intermediate_size=share.intermediate,
        prefix="experts", backend=load_backend("triton", torch.device("cuda")),
    )  # fmt: skip
    for name, parameter in list(made.named_parameters()):
        low, high = (118, 124) if name.endswith("_scale") else (0, 256)
        data = torch.randint(low, high, parameter.shape, dtype=torch.uint8, device="cuda")
        parameter.data = data
    made.finalize_weights(written=True)
    return made


def timed(step: Callable[[], object], repeats: int) -> list[float]:
    """Microseconds of each repeat, all ranks at the start together, caches flushed."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    took = []
    for turn in range(repeats + WARM):
        flush.zero_()
        dist.barrier()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        if turn >= WARM:
            took.append(begin.elapsed_time(end) * 1e3)
    return took


def slowest(took: list[float]) -> float:
    """The median of the slowest rank's times."""
    all_of = torch.tensor(took, device="cuda")
    dist.all_reduce(all_of, op=dist.ReduceOp.MAX)
    return median(all_of.tolist())


def inputs(share: Share, tokens: int, experts: int) -> tuple[torch.Tensor, ...]:
    """Hidden states, routing weights and ids of this rank, uniform over ``experts``."""
    device = torch.device("cuda")
    generator = torch.Generator(device=device).manual_seed(97 * tokens + dist.get_rank())
    hidden = torch.randn(tokens, share.hidden, generator=generator, device=device).bfloat16()
    weights = torch.rand(tokens, share.top_k, generator=generator, device=device)
    order = torch.rand(tokens, experts, generator=generator, device=device)
    return hidden, weights, order.argsort(1)[:, : share.top_k].contiguous()


def over_group(share: Share, tokens: int, repeats: int) -> dict[str, object]:
    """The forward, its stages, and the link, over all ranks."""
    ranks = dist.get_world_size()
    given = inputs(share, tokens, share.experts * ranks)
    layer = module(share, tokens, dist.group.WORLD, ranks)
    spans = layer.backend
    assert isinstance(spans, ExpertParallel)
    marks: list[tuple[str, torch.cuda.Event]] = []

    def mark(stage: str) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        marks.append((stage, event))

    def forward() -> None:
        layer(*given, activation_clamp=10.0)

    def marked() -> None:
        forward()
        mark("end")

    out: dict[str, object] = {"forward": slowest(timed(forward, repeats))}
    spans.at = mark
    timed(marked, repeats)
    stages: dict[str, list[float]] = {}
    for (stage, begin), (_, end) in pairwise(marks):
        if stage != "end":
            stages.setdefault(stage, []).append(begin.elapsed_time(end) * 1e3)
    out |= {stage: slowest(took[WARM:]) for stage, took in stages.items()}
    spans.at = lambda stage: None
    before = dict(spans.bytes_sent)
    forward()
    for stage, column in (("dispatch", "there"), ("return", "back")):
        most = torch.tensor([spans.bytes_sent[stage] - before[stage]], device="cuda")
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        out[f"MB {column}"] = int(most) / 1e6
        out[f"link {column}"] = link(int(most), repeats)
    return out


def link(sent: int, repeats: int) -> float:
    """Microseconds of one exchange in which each rank sends as many bytes, evenly to all others."""
    ranks = dist.get_world_size()
    if ranks == 1:
        return 0.0
    counts = [max(1, sent // (ranks - 1) // 16)] * ranks
    counts[dist.get_rank()] = 0
    data = torch.zeros(sum(counts), 16, dtype=torch.uint8, device="cuda")
    return slowest(timed(lambda: all_to_all(data, counts, counts, dist.group.WORLD), repeats))


def alone(share: Share, tokens: int, repeats: int) -> float:
    """The forward of one GPU, with the share's experts only."""
    given, layer = inputs(share, tokens, share.experts), module(share, tokens, None, 1)
    return slowest(timed(lambda: layer(*given, activation_clamp=10.0), repeats))


def row(name: str, share: Share, tokens: int, repeats: int) -> dict[str, object]:
    """One line of the table."""
    out = {"share": name, "T": tokens, **over_group(share, tokens, repeats)}
    torch.cuda.empty_cache()
    return out | {"one rank": alone(share, tokens, repeats)}


def main() -> int:
    """The table on rank 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--share", nargs="+", choices=sorted(SHARES), default=["flash", "pro"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 64, 512, 2048, 8192])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    rows = []
    first = dist.get_rank() == 0
    if first:
        print(
            f"{dist.get_world_size()} x {torch.cuda.get_device_name()}, torch {torch.__version__}"
        )
        print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for name in a.share:
        for tokens in a.tokens:
            rows.append(row(name, SHARES[name], tokens, a.repeats))
            torch.cuda.empty_cache()
            if first:
                cells = [rows[-1].get(c, "") for c in COLUMNS]
                text = [f"{c:.2f}" if isinstance(c, float) and c < 10 else f"{c:.0f}"
                        if isinstance(c, float) else str(c) for c in cells]  # fmt: skip
                print("| " + " | ".join(text) + " |", flush=True)
                if a.json:
                    a.json.write_text(json.dumps(rows, indent=1) + "\n")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
