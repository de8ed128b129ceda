"""``megamoe bench --ep N``: the layer over the ranks of a group, its stages, and the link alone."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist

from megamoe import bench
from megamoe.backends import load_backend
from megamoe.bench import ranks
from megamoe.bench.floor import SHARES
from megamoe.bench.peers import PEERS
from megamoe.commands import UsageError
from megamoe.layer.ranks import INTERFACE, engine, one_rank
from megamoe.printable import quantity
from megamoe.worker.team import Ranks

NOT_HERE: Final = {"plot": "--plot", "source": "--from"}


def is_over_ranks(a: argparse.Namespace) -> bool:
    """Whether the command is over ranks: by --ep, or since torchrun started this process."""
    return a.ep is not None or Ranks.of_torchrun(os.environ) is not None


def run(a: argparse.Namespace) -> int:
    """Start the ranks, or be one of them."""
    _check(a)
    a.backend = a.backend or ("eager" if a.device == "cpu" else "triton")
    team = Ranks.of_torchrun(os.environ)
    count = a.ep if team is None else team.of
    size = quantity(count, "rank")
    if a.ep not in (None, count):
        raise UsageError(f"--ep {a.ep}: torchrun started {size}; leave --ep out, or start {a.ep}")
    if a.dry_run:
        for share in a.share:
            for tokens in a.tokens:
                print(f"{SHARES[share].name} T={tokens} a rank, {size}: {a.backend}")
        return 0
    if team is None and count > 1:
        return _launch(count, sys.argv[1:])
    device = _device(a.device)
    if team is None:
        one_rank(device)
    else:
        _join(engine(str(device)))
    try:
        _measure(a, ranks.World(dist.group.WORLD, device))
    finally:
        dist.destroy_process_group()
    return 0


def _check(a: argparse.Namespace) -> None:
    for name, option in NOT_HERE.items():
        if getattr(a, name):
            raise UsageError(f"{option} does not go with --ep, whose rows are of another kind")
    if a.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device here; use --device cpu")
    if sorted(a.peers) not in ([], sorted(PEERS)):
        raise UsageError("--peers does not go with --ep: no peer runs over ranks")


def _device(kind: str) -> torch.device:
    """This rank's own GPU, or one that it shares; or the CPU."""
    if kind == "cpu":
        return torch.device("cpu")
    at = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    torch.cuda.set_device(at)
    return torch.device("cuda", at)


def _join(backend: str) -> None:
    """The group of torchrun's environment; ``ValueError`` where the ranks do not meet."""
    try:
        dist.init_process_group(backend)
    except RuntimeError as error:
        words = " ".join(str(error).split())[:200]
        raise ValueError(f"the ranks did not find one another: {words}; {INTERFACE}") from error


def _launch(count: int, arguments: Sequence[str]) -> int:
    """``count`` processes of this command by torchrun; its exit status."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this machine
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    try:
        torchrun.run(torchrun.parse_args(
            ["--standalone", "--nproc-per-node", str(count), "-m", "megamoe", *arguments]
        ))  # fmt: skip
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(
            f"megamoe: error: rank {rank} of {count} ended with exit status {failure.exitcode}; "
            "its own error is above", file=sys.stderr,
        )  # fmt: skip
        return 2 if failure.exitcode == 2 else 1
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    return 0


def _measure(a: argparse.Namespace, world: ranks.World) -> None:
    """The table and the file of rank 0; each row is said and saved as soon as there is one."""
    backend = load_backend(a.backend, world.device)
    speaks, rows = world.rank == 0, list[ranks.RankRow]()
    provenance = bench.provenance(shlex.join(["megamoe", *sys.argv[1:]]), backend)
    speeds = ranks.machine(world.device)
    provenance |= {
        "timing": "median over the repeats of the slowest rank's time",
        "ranks": world.size, "process_group": dist.get_backend(world.group),
        "rank_floor": {"machine": speeds.name, "source": speeds.source},
    }  # fmt: skip
    if speaks:
        what = torch.cuda.get_device_name(world.device) if a.device == "cuda" else "CPU"
        print(f"{world.size} ranks, {provenance['process_group']}, {what}; {a.backend}, medians of "
              f"{a.repeats} in microseconds")  # fmt: skip
        print(f"floor: arithmetic of published speeds, {speeds.name}; not measured")
        print(ranks.head(), flush=True)
    for row in ranks.measure(world, backend, a.share, a.tokens, a.repeats):
        rows.append(row)
        if speaks:
            print(row.line(), flush=True)
            if a.json:
                bench.save(rows, Path(a.json), provenance)
