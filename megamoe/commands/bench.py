"""``megamoe bench``: time a backend beside the floor and beside peers; or the model of scale."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import torch

from megamoe import bench
from megamoe.backends import load_backend
from megamoe.bench import scale
from megamoe.bench.floor import SHARES
from megamoe.bench.peers import PEERS
from megamoe.commands import UsageError, bench_ep
from megamoe.console import Console
from megamoe.spec.models import MODELS
from megamoe.spec.problem import provides


def run(a: argparse.Namespace) -> int:
    """Time, or read what was timed; a table, and a plot where one is asked for."""
    if a.scale:
        return _scale(a)
    if bench_ep.is_over_ranks(a):
        return bench_ep.run(a)
    if a.device == "cpu":
        raise UsageError("--device cpu goes with --ep; without ranks bench times a GPU")
    a.backend = a.backend or "triton"
    if a.dry_run:
        for share in a.share:
            for tokens in a.tokens:
                print(f"{SHARES[share].name} T={tokens}: {', '.join([a.backend, *a.peers])}")
        return 0
    if a.source and a.json:
        raise UsageError("--from times nothing, so there is no --json to write")
    if a.plot:
        bench.check_drawable()
    rows = bench.load(Path(a.source)) if a.source else _measure(a)
    Console().print(bench.table(rows))
    if a.plot:
        bench.plot(rows, Path(a.plot))
    failures = [row for row in rows if row.best is None and row.what not in PEERS]
    return 1 if failures and not a.source else 0


def _scale(a: argparse.Namespace) -> int:
    """The model of scale: a table for each machine."""
    for option in ("json", "plot", "source", "dry_run"):
        if getattr(a, option):
            name = {"source": "from"}.get(option, option.replace("_", "-"))
            raise UsageError(f"--scale times nothing, so there is nothing for --{name} to do")
    console = Console()
    for machine in scale.MACHINES:
        estimates = [
            scale.estimate(MODELS[SHARES[share].name.lower()], tokens, ranks, machine)
            for share in a.share for tokens in a.tokens for ranks in scale.EP_SIZES
        ]  # fmt: skip
        console.print(scale.table(machine, estimates))
        console.print(f"{machine.name}: {machine.source}")
    return 0


def _measure(a: argparse.Namespace) -> list[bench.Row]:
    """The rows of a run; each is said and saved as soon as there is one."""
    _check_device("cuda")
    backend = load_backend(a.backend, "cuda")
    if not provides(backend, "run"):
        raise UsageError(f"backend {a.backend} has no `run`; bench times what has one")
    provenance = bench.provenance(shlex.join(["megamoe", *sys.argv[1:]]), backend)
    rows: list[bench.Row] = []
    for row in bench.measure(backend, a.share, a.tokens, a.peers, a.repeats):
        rows.append(row)
        print(row.line(), file=sys.stderr, flush=True)
        if a.json:
            bench.save(rows, Path(a.json), provenance)
    return rows


def _check_device(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device here; use --device cpu")
