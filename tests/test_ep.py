"""Kind ``ep`` over real process groups: a right backend is green, and no fault hangs a run."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megamoe.cases import load_cases
from megamoe.cases.needs import lacking
from megamoe.kinds import ep
from megamoe.worker import team
from megamoe.worker.session import Identity
from megamoe.worker.team import Ranks
from tests.helpers.command import megamoe

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "docs" / "examples"
CASES = {c.name: c for c in load_cases() if c.kind == "ep"}
FILE = """
import os, signal, time
from megamoe.backends.eager import EagerBackend

IS_BAD = os.environ.get("RANK") == "1"


class Dies(EagerBackend):
    name = "dies"

    def slot_rows(self, *given):
        if IS_BAD:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().slot_rows(*given)


class Waits(EagerBackend):
    name = "waits"

    def slot_rows(self, *given):
        if IS_BAD:
            time.sleep(600)
        return super().slot_rows(*given)


class Raises(EagerBackend):
    name = "raises"

    def slot_rows(self, *given):
        if IS_BAD:
            raise RuntimeError("planted")
        return super().slot_rows(*given)


class LosesARow(EagerBackend):
    name = "loses-a-row"

    def slot_rows(self, *given):
        rows = super().slot_rows(*given)
        if IS_BAD and len(rows):
            rows[-1] = 0
        return rows
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """The file of the backends above."""
    file = tmp_path_factory.mktemp("kernels") / "kernels.py"
    file.write_text(FILE)
    return file


def reported(report: Path) -> dict:
    return {c["id"]: c for c in json.loads(report.read_text())["cases"]}


def check(tmp_path: Path, backend: str, *options: str) -> tuple:
    """Exit status, report and output of ``megamoe check``; the ranks are forks."""
    report = tmp_path / "report.json"
    process = megamoe("check", "--backend", backend, "--json", str(report), *options)
    return process.returncode, reported(report), process.stdout + process.stderr


def test_eager_over_two_ranks_passes_every_quick_case(warm, tmp_path):
    code, cases, output = check(tmp_path, "eager", "--ep", "2")
    rest = {k: c["reason"] for k, c in cases.items() if c["status"] != "pass"}
    assert code == 0, output
    assert list(rest) == ["ep/graph-replay-over-ranks"] and "CUDA" in rest[next(iter(rest))]
    assert len(cases) == sum(c.tier == "quick" for c in CASES.values())


@pytest.mark.slow
def test_eager_over_eight_ranks(warm, tmp_path):
    code, cases, output = check(tmp_path, "eager", "--ep", "8")
    assert code == 0, output
    assert sum(c["status"] == "pass" for c in cases.values()) == len(cases) - 1


@pytest.mark.parametrize(
    ("backend", "status", "says"),
    [
        ("Dies", "error", "rank 1 of 2, in experts: the backend ended its process (SIGKILL"),
        ("LosesARow", "fail", "(wrong on 1 of 2 ranks: rank 1, tokens 10 to 20)"),
    ],
)
def test_one_bad_rank_is_a_red_that_names_it(
    warm, tmp_path, kernels, monkeypatch, backend, status, says
):
    """Two cases: after a death the next case has a new group."""
    monkeypatch.setattr(team, "PATIENCE", 2.0)
    pattern = "ep/masked-slots-sent,ep/tokens-lost-between-ranks-even"
    start = time.monotonic()
    code, cases, output = check(
        tmp_path, f"{kernels}:{backend}", "--ep", "2", "--case", pattern
    )  # fmt: skip
    assert code == 1
    assert {c["status"] for c in cases.values()} == {status}, output
    assert says in cases["ep/tokens-lost-between-ranks-even"]["reason"]
    assert time.monotonic() - start < 60


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "says"),
    [
        ("Raises", "rank 1 of 2: RuntimeError: planted (kernels.py, line 31, in slot_rows)"),
        ("Waits", "rank 1 of 2, in experts: no result within 6 s"),
    ],
)
def test_a_rank_that_raises_or_waits_ends_the_call(
    warm, tmp_path, kernels, monkeypatch, backend, says
):
    monkeypatch.setattr(team, "PATIENCE", 2.0)
    options = "--ep", "2", "--case", "ep/masked-slots-sent", "--timeout", "6"
    code, cases, _ = check(tmp_path, f"{kernels}:{backend}", *options)
    assert code == 1 and says in cases["ep/masked-slots-sent"]["reason"]


def test_ranks_that_do_not_find_one_another_say_so_and_the_next_case_has_a_new_group(
    warm, tmp_path, monkeypatch
):
    """A name of a network interface that nobody has."""
    groups = []
    plain = team.Team._anew
    monkeypatch.setattr(team.Team, "_anew", lambda self: (groups.append(self._group), plain(self)))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "absent0")
    case = "ep/one-token,ep/few-experts-for-many-ranks"
    code, cases, output = check(tmp_path, "eager", "--ep", "2", "--case", case)
    assert code == 1 and groups == [0, 1], output
    for one in cases.values():
        assert "no process group: rank 0 of 2 did not find the others: " in one["reason"]
        assert "absent0" in one["reason"] and one["status"] == "error"


# --- torchrun -----------------------------------------------------------------------------------

RUNS = """
import os, sys
from dataclasses import replace
from megamoe.commands.main import main
from tests.helpers.warm import Template, warmed


def check(turn, backend):
    report = f"{sys.argv[1]}-{turn}.json"
    code = main(["check", "--backend", backend, "--json", report, *sys.argv[3:]])
    print(f"rank {os.environ['RANK']}, turn {turn}: exit status {code}", flush=True)
    return code


def bench():
    from megamoe.bench.floor import SHARES, Share
    from megamoe.commands.parsers import bench as parser
    from megamoe.spec.models import MODELS

    MODELS["tiny"] = replace(MODELS["deepseek-v3"], hidden_size=128, intermediate_size=128)
    SHARES["tiny"], parser.SHARES = Share("Tiny", 128, 128, 4, 2), ("tiny",)
    main(["bench", "--device", "cpu", "--share", "tiny", "--tokens", "3", "--repeats", "1",
          "--json", sys.argv[1] + "-bench.json"])


if __name__ == "__main__":
    with warmed(Template.at(os.environ["TEMPLATE"])):
        first = check(0, "eager")
        # torchrun's store is of one group. The second group has its store on a port of its own.
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
        os.environ["MASTER_PORT"] = os.environ["SECOND_PORT"]
        check(1, sys.argv[2])
    os.environ["MASTER_PORT"] = os.environ["THIRD_PORT"]
    bench()
    sys.exit(first)
"""


@pytest.mark.slow
def test_torchrun_starts_the_ranks(template, tmp_path, kernels):
    """Each process judges all ranks; the first one alone speaks. A death ends the run on all.

    Both runs, and one of ``bench`` over the ranks, are of one start of torchrun, which takes most
    of the time.
    """
    (tmp_path / "runs.py").write_text(RUNS)
    with socket.socket() as one, socket.socket() as other:
        ports = []
        for free in (one, other):
            free.bind(("127.0.0.1", 0))
            ports.append(str(free.getsockname()[1]))
    pattern = "ep/masked-slots-sent,ep/one-token,ep/rebalance-moves-bits"
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(tmp_path / "runs.py"), str(tmp_path / "report"), f"{kernels}:Dies",
         "--case", pattern],
        capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
             "SECOND_PORT": ports[0], "THIRD_PORT": ports[1], "TEMPLATE": template.address,
             "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    output = process.stdout + process.stderr
    green, red = (reported(tmp_path / f"report-{turn}.json") for turn in (0, 1))
    assert {c["status"] for c in green.values()} == {"pass"}, output
    assert {c["status"] for c in red.values()} == {"error"}, output
    assert "a rank failed earlier" in red["ep/one-token"]["reason"]
    assert "rank 1 of 2, in experts: the backend ended its process (SIGKILL" in output
    assert output.count("judged case") == 2, "one summary a run"
    assert process.returncode == 0 and output.count("turn 0: exit status 0") == 2
    assert "rank 0, turn 1: exit status 1" in output
    (row,) = json.loads((tmp_path / "report-bench.json").read_text())["rows"]
    assert (row["ranks"], row["tokens"], row["share"]) == (2, 3, "Tiny")
    assert row["bytes"]["dispatch"] % (128 + 4 + 8) == 0 < row["bytes"]["dispatch"]
    assert output.count("| Tiny | 3 |") == 1, "rank 0 alone prints"


# --- a kernel with messages of its own ----------------------------------------------------------

LOSES_A_RANK = """
from group_kernel import Gathers


class LosesARank(Gathers):
    name = "loses-a-rank"

    def gathered(self, p, tokens, group):
        given = super().gathered(p, tokens, group)
        given.topk_ids[tokens[0] :] = -1  # the tokens of rank 1
        return given
"""
OWN = (
    "ep/masked-slots-sent,ep/no-tokens-at-all,ep/tokens-lost-when-all-are-on-one-rank,"
    "ep/rebalance-moves-bits,ep/slots-added-in-the-order-of-ranks,ep/second-call-reads-the-first"
)


def test_a_kernel_that_sends_rows_itself_is_judged_over_ranks(warm, tmp_path):
    """The example of the page. A law of the project's own dispatch does not judge it."""
    kernel, case = f"{EXAMPLES / 'group_kernel.py'}:Gathers", f"{OWN},ep/overflow-*"
    code, cases, output = check(tmp_path, kernel, "--ep", "2", "--case", case)
    assert code == 0, output
    rest = {name: c["status"] for name, c in cases.items() if c["status"] != "pass"}
    assert rest == {"ep/overflow-on-one-rank-hangs-the-others": "skip"}
    assert len(cases) == 7
    assert "ExpertParallel" not in (EXAMPLES / "group_kernel.py").read_text()


def test_a_kernel_that_loses_the_tokens_of_a_rank_is_red_and_the_rank_is_named(warm, tmp_path):
    file = tmp_path / "wrong.py"
    file.write_text(f"import sys\nsys.path.append({str(EXAMPLES)!r})\n{LOSES_A_RANK}")
    case = "ep/masked-slots-sent,ep/tokens-lost-between-ranks-even"
    code, cases, output = check(tmp_path, f"{file}:LosesARank", "--ep", "2", "--case", case)
    assert code == 1 and {c["status"] for c in cases.values()} == {"fail"}, output
    reason = cases["ep/tokens-lost-between-ranks-even"]["reason"]
    assert reason.endswith("(wrong on 1 of 2 ranks: rank 1, tokens 10 to 20)"), reason


# --- what a case needs --------------------------------------------------------------------------


def test_without_ranks_and_for_a_wrong_number_of_them_the_cases_say_what_they_need():
    def needs(ranks: int) -> str:
        return lacking(CASES["one-token"], Identity("b", "fp32", ("forward",), ranks=ranks))

    assert needs(0) == "the run has no team of ranks; use --ep N, or torchrun"
    assert needs(3) == "8 experts cannot be split over 3 ranks"
    assert needs(4) == ""


# --- the placement ------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
def test_every_split_gives_each_token_one_rank(ranks):
    for case in CASES.values():
        parts = ep.tokens_of(case, ranks)
        assert len(parts) == ranks and min(parts) >= 0
        assert sum(parts) == case.params["tokens"], case.id


def test_splits_are_what_they_are_called():
    def parts(name: str, ranks: int) -> list[int]:
        return ep.tokens_of(CASES[name], ranks)

    assert parts("tokens-lost-between-ranks-even", 4) == [5, 5, 5, 6]
    assert parts("tokens-lost-between-ranks-every-other", 4)[1::2] == [0, 0]
    assert parts("tokens-lost-when-all-are-on-one-rank", 4) == [0, 21, 0, 0]
    assert 0 in parts("tokens-lost-between-ranks-ragged", 8)


def test_replicas_are_where_the_module_loads_them():
    table, count = ep.replicas(CASES["replicas-over-ranks-chosen-by-another-row"])
    assert count.tolist() == [3, 3, 3, 3, 2, 2] and table.shape == (6, 3)
    for logical, places in enumerate(table):
        assert {int(p) % 6 for p in places[places >= 0]} == {logical}
    assert np.array_equal(np.sort(table[table >= 0]), np.arange(16))


def test_a_rank_under_torchrun_is_read_from_its_environment():
    assert Ranks.of_torchrun({"RANK": "1", "WORLD_SIZE": "2"}) is None
    actual = Ranks.of_torchrun({"TORCHELASTIC_RUN_ID": "x", "RANK": "3", "WORLD_SIZE": "8"})
    assert actual == Ranks(8, (3,), torchrun=True)
