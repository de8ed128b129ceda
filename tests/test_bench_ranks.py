"""``megamoe bench --ep``: its rows over ranks that are threads, its file, its refusals.

Times are never asserted. ``tests/test_ep.py`` runs it over two processes.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megamoe.backends.eager import EagerBackend
from megamoe.bench import SHARES, Share, ranks, scale
from megamoe.commands import bench_ep
from megamoe.commands.main import main
from megamoe.layer import expert_parallel
from megamoe.spec.models import MODELS, Model
from tests.helpers import thread_ranks
from tests.helpers.schemas import valid

TINY = Model("tiny", 128, 128, 4, 2, 1.0, 10.0, "invented")
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(SHARES, "tiny", Share("Tiny", 128, 128, 4, 2))
    monkeypatch.setitem(MODELS, "tiny", TINY)
    monkeypatch.setattr("megamoe.commands.parsers.bench.SHARES", ("tiny",))
    for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


class Threads(ranks.World):
    """The ranks of :mod:`tests.helpers.thread_ranks`."""

    def __init__(self, group):
        super().__init__(group, CPU)

    def meet(self):
        self.group.world.barrier.wait(thread_ranks.PATIENCE)

    def most(self, values):
        rows = torch.tensor([[*values]] * self.size, dtype=torch.float64)
        each = [1] * self.size
        came = thread_ranks.all_to_all(rows, each, each, self.group)
        return came.amax(0).tolist()

    def exchange(self, rows, counts):
        # A rank may send a row more than another, where bytes do not divide: equal parts here.
        assert counts[self.rank] == 0 and sum(counts) == len(rows)
        self.byte_counts.append(16 * len(rows))

    @property
    def byte_counts(self):
        return self.__dict__.setdefault("_byte_counts", [])


def over(count, tokens, backend):
    """The rows of each rank, and its world."""

    def call(group):
        world = Threads(group)
        return list(ranks.measure(world, backend(), ["tiny"], tokens, 2)), world

    out = thread_ranks.over_ranks(count, call)
    for one in out:
        if isinstance(one, Exception):
            raise one
    return out


def test_a_row_has_every_stage_the_bytes_that_were_sent_and_the_link_of_as_many(monkeypatch):
    monkeypatch.setattr(expert_parallel, "all_to_all", thread_ranks.all_to_all)
    results = over(2, [1, 40], EagerBackend)
    (rows, world), (others, _) = results
    assert rows == others, "all ranks say the same: the slowest counts"
    model = replace(TINY, num_experts=8)
    for row, tokens in zip(rows, (1, 40), strict=True):
        assert (row.share, row.tokens, row.ranks, row.experts) == ("Tiny", tokens, 2, 4)
        assert list(row.stages) == [*ranks.STAGES] and min(row.stages.values()) > 0
        assert max(row.stages.values()) < 1e6 and row.forward > 0 and row.one_rank > 0
        ids = [ranks._inputs(w, SHARES["tiny"], tokens, 8)[2] for _, w in results]
        traffic = scale.traffic(model, ids, 2)
        assert row.bytes == {k: max(s[k] for s in traffic) for k in ("dispatch", "return")}
        assert row.floor == scale.estimate(model, tokens, 2, scale.MACHINES[0]).floor
    link = [row.bytes[k] // 16 * 16 for row in rows for k in ("dispatch", "return")]
    assert world.byte_counts == [n for n in link for _ in range(2 + world.warm)]


def test_a_kernel_with_messages_of_its_own_has_a_row_without_stages():
    class Own(EagerBackend):
        name = "own"

        def forward_group(self, p, group):
            return p.hidden_states

    (row,), _ = over(2, [3], Own)[1]
    assert (row.what, row.stages, row.bytes, row.link) == ("own", {}, {}, {})
    assert row.line().count("|") == ranks.head().splitlines()[0].count("|")
    assert row.line().startswith("| Tiny | 3 | ") and " |  |  |  |  |  |  |  |  | " in row.line()


@pytest.mark.parametrize(("backend", "device_ids"), [("nccl", [1]), ("gloo", None)])
def test_a_barrier_of_nccl_is_told_the_gpu_of_its_rank(backend, device_ids, monkeypatch):
    """torch would guess it, and warn that the guess can hang. gloo has no GPU to be told."""
    calls = []
    monkeypatch.setattr(dist, "get_backend", lambda group: backend)
    monkeypatch.setattr(dist, "barrier", lambda *args, **options: calls.append((args, options)))
    group = thread_ranks.Group(thread_ranks.World(2), 1)
    ranks.World(group, torch.device("cuda", 1)).meet()
    assert calls == [((group,), {"device_ids": device_ids})]


def test_the_table_over_two_gpus_is_that_of_its_raw_rows():
    raw = json.loads((ROOT / "docs/performance/h200-ep2.json").read_text())
    valid("bench", raw)
    page = (ROOT / "docs/performance.md").read_text().partition("## Over two GPUs")[2]
    lines = [line for line in page.splitlines() if line.startswith(("| flash", "| pro"))]
    for row, line in zip(raw["rows"], lines[: len(raw["rows"])], strict=True):
        times = [row["forward"], *row["stages"].values(), *row["link"].values(),
                 row["one_rank"], row["floor"]]  # fmt: skip
        cells = [f"{t:.0f}" for t in times] + [ranks._cell(n / 1e6) for n in row["bytes"].values()]
        share = row["share"].rpartition("-")[2].lower()
        assert line == f"| {share} | {row['tokens']} | {' | '.join(cells)} |"


def test_the_verb_writes_a_row_at_once_and_leaves_no_process_group(tmp_path, capsys, monkeypatch):
    file = tmp_path / "ep.json"
    command = ["bench", "--ep", "1", "--device", "cpu", "--share", "tiny", "--repeats", "1"]
    monkeypatch.setattr("sys.argv", ["megamoe", *command])
    assert main([*command, "--tokens", "2", "5", "--json", str(file)]) == 0
    assert not dist.is_initialized()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1 ranks, gloo, CPU; eager") and "not measured" in lines[1]
    assert [line.split(" | ")[:2] for line in lines[4:]] == [["| Tiny", "2"], ["| Tiny", "5"]]
    report = json.loads(file.read_text())
    valid("bench", report)
    assert (report["ranks"], report["process_group"]) == (1, "gloo")
    assert report["command"].startswith("megamoe bench --ep 1") and "torch" in report["versions"]
    assert [row["bytes"] for row in report["rows"]] == [{"dispatch": 0, "return": 0}] * 2
    assert main(["bench", "--from", str(file)]) == 2
    assert "those of --ep" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ep", "2", "--device", "cpu", "--plot", "x.svg"], "--plot does not go with --ep"),
        (["--ep", "2", "--device", "cpu", "--peers", "torch-grouped-mm"], "no peer runs over"),
        (["--ep", "0"], "'0' is not a number from 1 on"),
        (["--device", "cpu"], "--device cpu goes with --ep"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(options, message, capsys):
    try:
        assert main(["bench", *options]) == 2
    except SystemExit as end:
        assert end.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_number_of_ranks_other_than_torchrun_s_is_refused(monkeypatch, capsys):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert main(["bench", "--ep", "2", "--device", "cpu"]) == 2
    assert "--ep 2: torchrun started 4 ranks" in capsys.readouterr().err
    assert main(["bench", "--device", "cpu", "--dry-run", "--share", "tiny", "--tokens", "7"]) == 0
    assert capsys.readouterr().out == "Tiny T=7 a rank, 4 ranks: eager\n"


def test_several_ranks_are_started_by_torchrun_and_a_failed_one_is_named(monkeypatch, capsys):
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    calls = []
    monkeypatch.setattr(torchrun, "run", calls.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert bench_ep._launch(3, ["bench", "--ep", "3"]) == 0
    assert (calls[0].nproc_per_node, calls[0].standalone) == ("3", True)
    command = [calls[0].training_script, *calls[0].training_script_args]
    assert command == ["megamoe", "bench", "--ep", "3"] and calls[0].module

    def fails(_):
        failure = SimpleNamespace(exitcode=1, timestamp=0, message="", local_rank=2)
        raise ChildFailedError("megamoe", {2: failure})

    monkeypatch.setattr(torchrun, "run", fails)
    monkeypatch.setattr(ChildFailedError, "format_msg", lambda self: "")
    assert bench_ep._launch(3, []) == 1
    assert "rank 2 of 3 ended with exit status 1" in capsys.readouterr().err
