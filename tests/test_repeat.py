"""tools/repeat.py: it must see a backend that returns other bits, and one that does not run."""

import importlib.util
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[1] / "tools" / "repeat.py"
spec = importlib.util.spec_from_file_location("repeat", TOOL)
assert spec is not None and spec.loader is not None
repeat = importlib.util.module_from_spec(spec)
spec.loader.exec_module(repeat)

CASE = "forward/combine-in-bf16"

KERNELS = """
import os
import torch
from megamoe.backends.eager import EagerBackend

class Drifts(EagerBackend):
    name = "drifts"
    def forward(self, problem):
        out = dict(super().forward(problem))
        out["y"] = out["y"] * (1.0 + 0.5 * torch.get_num_threads())
        return out

class Stops(EagerBackend):
    name = "stops"
    def forward(self, problem):
        if torch.get_num_threads() == 2:
            raise RuntimeError("two is one too many")
        return super().forward(problem)
"""


def run(*arguments: str) -> int:
    return repeat.main(["--case", CASE, *arguments])


@pytest.fixture
def kernels(tmp_path: Path) -> str:
    path = tmp_path / "kernels.py"
    path.write_text(KERNELS)
    return str(path)


@pytest.mark.slow
def test_eager_returns_the_same_bits_from_one_thread_and_from_two(capsys) -> None:
    assert run() == 0
    out = capsys.readouterr().out
    assert "| y | 1 | 1 |" in out
    assert "eager, 1 case, 1 and 2 threads: the same bits" in out


@pytest.mark.slow
def test_a_tensor_that_depends_on_the_threads_is_named(kernels, capsys) -> None:
    assert run("--backend", f"{kernels}:Drifts") == 1
    out = capsys.readouterr().out
    assert f"{CASE}: y differs" in out
    assert "| y | 1 | 0 |" in out
    assert "x_sf differs" not in out


@pytest.mark.slow
def test_a_case_that_did_not_run_is_never_the_same(kernels, capsys) -> None:
    assert run("--backend", f"{kernels}:Stops") == 1
    assert f"{CASE}: did not run: RuntimeError: two is one too many" in capsys.readouterr().out


def test_a_case_that_only_one_run_has_is_a_difference() -> None:
    assert repeat.compare({"a": {"y": "1"}}, {}) == ["a: y differs"]


def test_nothing_to_run_is_misuse(capsys) -> None:
    assert repeat.main(["--case", "forward/no-such-case"]) == 2
    assert "unknown case" in capsys.readouterr().err
