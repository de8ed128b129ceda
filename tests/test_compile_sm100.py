"""tools/compile_sm100.py with a compiler that is a shell script."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def compile_tool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/compile_sm100.py", *arguments],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Headers by name only."""
    header = tmp_path / "deep_gemm/impls/sm100_fp8_fp4_mega_moe.cuh"
    header.parent.mkdir(parents=True)
    header.touch()
    version = tmp_path / "cutlass/version.h"
    version.parent.mkdir()
    version.write_text("".join(f"#define CUTLASS_{n} {v}\n" for n, v in CUTLASS.items()))
    return tmp_path


CUTLASS = {"MAJOR": 4, "MINOR": 2, "PATCH": 1}
REFUSES = "echo '{0}/a.cuh(1): error: no' >&2; exit 1"
COMPILES = """
case "$1" in --version) echo 'release 13.5, V13.5.37'; exit;; esac
while [ "$1" != -o ]; do shift; done; echo binary > "$2"
echo 'ptxas info    : Used 128 registers' >&2
"""


def nvcc(folder: Path, script: str) -> Path:
    path = folder / "nvcc"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_without_a_compiler_it_says_what_to_give(folder):
    process = compile_tool("--include", folder, "--nvcc", folder / "no-nvcc")
    assert process.returncode == 2
    assert "install CUDA 12.9 or newer, or give --nvcc" in process.stderr


def test_without_headers_it_says_what_to_give(tmp_path):
    process = compile_tool("--include", tmp_path, "--nvcc", sys.executable)
    assert process.returncode == 2
    assert "no fused kernel under" in process.stderr


def run(folder: Path, script: str, model: str, *more: str | Path):
    compiler = nvcc(folder, script.replace("{0}", str(folder)))
    return compile_tool(
        "--include", folder, "--nvcc", compiler, "--model", model, "--tokens", "64", *more
    )


def test_what_the_compiler_refuses_is_a_row_and_a_red(folder):
    process = run(folder, REFUSES, "deepseek-v3")
    assert process.returncode == 1
    assert process.stdout.splitlines()[-1] == "| deepseek-v3 | 64 | 32 | 10 | a.cuh(1): error: no |"


@pytest.mark.parametrize(("script", "status"), [(REFUSES, 0), (COMPILES, 1)])
def test_the_size_that_is_known_not_to_compile_is_no_red_until_it_does(folder, script, status):
    """Then the documentation has to say something else."""
    assert run(folder, script, "deepseek-v4.1-flash").returncode == status


def test_the_record_says_what_was_compiled_with_what(folder):
    path = folder / "out.json"
    assert run(folder, COMPILES, "deepseek-v3", "--json", path, "--headers", "mine").returncode == 0
    record = json.loads(path.read_text())
    assert record["nvcc"] == "release 13.5, V13.5.37"
    assert record["headers"]["deep_gemm"] == "mine"
    assert record["headers"]["cutlass"] == "4.2.1"
    digest = record["headers"]["sha256"]
    (kernel,) = record["kernels"]
    assert (kernel["registers"], kernel["spilled"], kernel["shared"]) == (128, 0, 218980)
    assert "-O3" in record["flags"]
    (folder / "deep_gemm/impls/sm100_fp8_fp4_mega_moe.cuh").write_text("// another\n")
    run(folder, COMPILES, "deepseek-v3", "--json", path)
    assert json.loads(path.read_text())["headers"]["sha256"] != digest


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_verb_passes_on_what_it_is_given(tmp_path):
    process = subprocess.run(
        ["make", "-s", "compile-sm100", f"INCLUDE={tmp_path}", f"NVCC={sys.executable}",
         f"MEGAMOE_PYTHON={sys.executable}"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert process.returncode == 2
    assert f"no fused kernel under {tmp_path}" in process.stderr
