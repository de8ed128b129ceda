"""Kind ``ep`` over real process groups: a right backend is green, and no fault hangs a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megamoe.cases import load_cases
from megamoe.kinds import ep
from megamoe.worker.exchange import Missing
from megamoe.worker.team import PATIENCE, Ranks

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


def check(tmp_path: Path, backend: str, *options: str, launcher: tuple[str, ...] = ()) -> tuple:
    """Exit status, report, output and seconds of ``megamoe check``."""
    file, report = tmp_path / "kernels.py", tmp_path / "report.json"
    file.write_text(FILE)
    spec = f"{file}:{backend}" if backend != "eager" else backend
    command = [sys.executable, *launcher, "-m", "megamoe", "check", "--backend", spec,
               "--json", str(report), *options]  # fmt: skip
    started = time.monotonic()
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    took = time.monotonic() - started
    cases = {c["id"]: c for c in json.loads(report.read_text())["cases"]}
    return done.returncode, cases, done.stdout + done.stderr, took


def test_eager_over_two_ranks_passes_every_quick_case(tmp_path):
    code, cases, said, _ = check(tmp_path, "eager", "--ep", "2")
    left = {k: c["reason"] for k, c in cases.items() if c["status"] != "pass"}
    assert code == 0, said
    assert list(left) == ["ep/graph-replay-over-ranks"] and "CUDA" in left[next(iter(left))]
    assert len(cases) == sum(c.tier == "quick" for c in CASES.values())


@pytest.mark.slow
def test_eager_over_eight_ranks(tmp_path):
    code, cases, said, _ = check(tmp_path, "eager", "--ep", "8")
    assert code == 0, said
    assert sum(c["status"] == "pass" for c in cases.values()) == len(cases) - 1


@pytest.mark.parametrize(
    ("backend", "status", "says"),
    [
        ("Dies", "error", "rank 1 of 2, in experts: the backend ended its process (SIGKILL"),
        ("LosesARow", "fail", "(ranks 0: tokens 0 to 9, 1: tokens 10 to 20)"),
    ],
)
def test_one_bad_rank_is_a_red_that_names_it(tmp_path, backend, status, says):
    """Two cases: after a death the next case has a new group."""
    pattern = "ep/masked-slots-sent,ep/tokens-lost-between-ranks-even"
    code, cases, said, took = check(tmp_path, backend, "--ep", "2", "--case", pattern)
    assert code == 1
    assert {c["status"] for c in cases.values()} == {status}, said
    assert says in cases["ep/tokens-lost-between-ranks-even"]["reason"]
    assert took < 60 + 2 * PATIENCE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "says"),
    [
        ("Raises", "rank 1 of 2: RuntimeError: planted (kernels.py, line 31, in slot_rows)"),
        ("Waits", "rank 1 of 2, in experts: no result within 6 s"),
    ],
)
def test_a_rank_that_raises_or_waits_ends_the_call(tmp_path, backend, says):
    options = "--ep", "2", "--case", "ep/masked-slots-sent", "--timeout", "6"
    code, cases, _, _ = check(tmp_path, backend, *options)
    assert code == 1 and says in cases["ep/masked-slots-sent"]["reason"]


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "code"), [("eager", 0), ("Dies", 1)])
def test_torchrun_starts_the_ranks(tmp_path, backend, code):
    """Each process judges all ranks; the first one alone speaks. A death ends the run on all."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    pattern = "ep/masked-slots-sent,ep/one-token,ep/rebalance-moves-bits"
    options = "--case", pattern, "--timeout", "10"
    got, cases, said, _ = check(tmp_path, backend, *options, launcher=launcher)
    assert (got != 0) == (code != 0), said
    assert said.count("judged case") == 1
    if code:
        assert all(c["status"] == "error" for c in cases.values())
        assert "a rank failed earlier" in cases["ep/one-token"]["reason"]
        assert "rank 1 of 2, in experts: the backend ended its process (SIGKILL" in said
    else:
        assert all(c["status"] == "pass" for c in cases.values())


def test_without_ranks_and_for_a_wrong_number_of_them_the_cases_say_what_they_need():
    def needs(ranks: int) -> str:
        identity = SimpleNamespace(ranks=ranks, device="cpu")
        runner = SimpleNamespace(session=SimpleNamespace(identity=identity))
        with pytest.raises(Missing) as missing:
            ep.judge(runner, CASES["one-token"])
        return missing.value.why

    assert needs(0) == "the backend has no team of ranks; use --ep N, or torchrun"
    assert needs(3) == "the backend has no split of 8 experts over 3 ranks"


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
    found = Ranks.of_torchrun({"TORCHELASTIC_RUN_ID": "x", "RANK": "3", "WORLD_SIZE": "8"})
    assert found == Ranks(8, (3,), torchrun=True)
