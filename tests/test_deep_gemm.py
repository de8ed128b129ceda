"""The DeepGEMM backend without SM100: its bindings, its refusals, its layout. It has never run."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megamoe.backends import deep_gemm
from megamoe.backends.deep_gemm import (
    BUFFER,
    FORWARD,
    MEANT,
    DeepGemmBackend,
    ForeignSignature,
    bind,
)
from megamoe.cli import main

HEAD = "y, l1_weights, l2_weights, sym_buffer"
REST = "recipe=(1, 1, 32), activation='swiglu', activation_clamp=None, fast_math=True"
FORMS = {
    "DeepGEMM 7f2a703e": f"{HEAD}, {REST}",
    "DeepGEMM 891d57b4 to 54e22612, sgl-deep-gemm 0.1.5": (
        f"{HEAD}, cumulative_local_expert_recv_stats=None, {REST}"
    ),
    "sgl-deep-gemm 0.2.5": (
        f"{HEAD}, shared_l1_weights=None, shared_l2_weights=None, "
        f"cumulative_local_expert_recv_stats=None, {REST}, use_x_scales=False, l1_alphas=None, "
        "l2_alphas=None, l2_act_scales=None, weight_layout='megamoe', global_num_tokens=None"
    ),
}
"""Published forms of ``fp8_fp4_mega_moe``: names, order and defaults."""

SIZES = "group, num_experts, num_max_tokens_per_rank, num_topk, hidden, intermediate_hidden"
BUFFERS = {
    "DeepGEMM 7f2a703e to 88965b07": f"{SIZES}, use_fp8_dispatch=True, activation='swiglu'",
    "DeepGEMM 54e22612": f"{SIZES}, use_fp8_dispatch=None, mma_type='fp8xfp4', activation='swiglu'",
    "sgl-deep-gemm 0.2.5": (
        f"{SIZES}, num_shared_experts=0, use_fp8_dispatch=None, mma_type='fp8xfp4', "
        "activation='swiglu'"
    ),
}


def function(name: str, parameters: str, calls: list[dict[str, Any]], result: Any = None) -> Any:
    """A function of that signature which notes what each parameter was given."""
    space: dict[str, Any] = {"note": calls.append, "result": result}
    exec(f"def {name}({parameters}):\n    note(dict(locals()))\n    return result", space)
    return space[name]


def package(forward: str, buffer: str) -> tuple[Any, list[dict[str, Any]]]:
    calls: list[dict[str, Any]] = []
    rows = SimpleNamespace(
        x=torch.zeros(384, 128, dtype=torch.uint8),
        x_sf=torch.zeros(384, 1, dtype=torch.int32),
        topk_idx=torch.zeros(384, 2, dtype=torch.int64),
        topk_weights=torch.zeros(384, 2),
    )
    made = SimpleNamespace(
        fp8_fp4_mega_moe=function("fp8_fp4_mega_moe", forward, calls),
        get_symm_buffer_for_mega_moe=function("get_buffer", buffer, calls, rows),
    )
    return made, calls


@pytest.fixture
def on_sm100(monkeypatch):
    monkeypatch.setattr(deep_gemm, "_capability", lambda: 10)


def small_problem() -> Any:
    from megamoe import simulate

    return simulate.problem(1, hidden=128, intermediate=128, top_k=2, experts=3, tokens=4)


@pytest.mark.parametrize("buffer", BUFFERS.values(), ids=BUFFERS)
@pytest.mark.parametrize("forward", FORMS.values(), ids=FORMS)
def test_every_published_form_is_called_with_the_same_meaning(on_sm100, forward, buffer):
    made, calls = package(forward, buffer)
    problem = small_problem()
    backend = DeepGemmBackend(made)
    backend.stats = torch.zeros(3, dtype=torch.int32)
    backend.forward(problem)
    sized, called = calls
    assert sized["group"].size() == 1
    assert [sized[n] for n in BUFFER[1:]] == [3, problem.max_num_tokens, 2, 128, 128]
    assert called["l1_weights"][0].dtype == torch.int8
    assert called["l1_weights"][1].dtype == called["l2_weights"][1].dtype == torch.int32
    assert called["activation_clamp"] == problem.activation_clamp
    assert called["fast_math"] == problem.fast_math
    assert called["recipe"] == (1, 1, 32)
    assert called.get("cumulative_local_expert_recv_stats", backend.stats) is backend.stats


@pytest.mark.parametrize(
    ("parameters", "complaint"),
    [
        ("out, l1_weights, l2_weights, sym_buffer, activation_clamp, fast_math", "does not begin"),
        ("y, l2_weights, l1_weights, sym_buffer, activation_clamp, fast_math", "does not begin"),
        (f"{HEAD}, activation_clamp, fast_math, expert_map", "requires expert_map"),
        (f"{HEAD}, fast_math", "has no activation_clamp"),
    ],
)
def test_a_foreign_signature_is_refused_with_the_one_found(parameters, complaint):
    foreign = function("fp8_fp4_mega_moe", parameters, [])
    named = dict.fromkeys(("recipe", *MEANT))
    with pytest.raises(ForeignSignature, match=complaint) as refusal:
        bind(foreign, FORWARD, named, MEANT)
    assert f"fp8_fp4_mega_moe({parameters})" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_without_sm100_the_contract_s_text_is_raised(monkeypatch):
    monkeypatch.setattr(deep_gemm, "_capability", lambda: 9)
    with pytest.raises(NotImplementedError, match=r"^DeepGEMM MegaMoE requires SM100 GPUs\.$"):
        DeepGemmBackend(object()).forward(small_problem())


def test_a_missing_package_is_named_with_the_remedy(on_sm100, monkeypatch):
    monkeypatch.setitem(sys.modules, "deep_gemm", None)
    with pytest.raises(NotImplementedError, match="install DeepGEMM or sgl-deep-gemm"):
        DeepGemmBackend().package()


def test_a_package_without_mega_moe_is_refused(on_sm100):
    with pytest.raises(NotImplementedError, match="has no get_symm_buffer_for_mega_moe"):
        DeepGemmBackend(SimpleNamespace(__version__="2.1.1")).forward(small_problem())


def test_the_suite_judges_its_layout_and_skips_what_needs_the_gpu(capsys):
    assert main(["check", "--backend", "deep_gemm", "--kind", "layout", "-n", "1"]) == 0
    if not torch.cuda.is_available():
        code = main(["check", "--backend", "deep_gemm", "--case", "forward/combine-as-a-tree"])
        assert code == 2  # nothing could be judged: never green
        assert "requires SM100" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("version", ["0.1.5", "0.2.5"])
def test_the_real_package_binds(version, tmp_path):
    """Its source is read, not imported: it needs a GPU to be imported."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:",
         "--python-version", "3.12", "-d", tmp_path, f"sgl-deep-gemm=={version}"],
        capture_output=True, text=True,
    )  # fmt: skip
    wheels = list(tmp_path.glob("*.whl"))
    if not wheels:
        pytest.skip(f"sgl-deep-gemm {version} cannot be downloaded: {done.stderr.strip()[-100:]}")
    source = zipfile.ZipFile(wheels[0]).read("deep_gemm/mega/__init__.py").decode()
    found = {n.name: n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)}
    for name, leading, needed in (
        ("fp8_fp4_mega_moe", FORWARD, MEANT),
        ("get_symm_buffer_for_mega_moe", BUFFER, ()),
    ):
        real = function(name, _plain(found[name].args), [])
        named = dict.fromkeys(("recipe", "activation", *MEANT))
        assert set(needed) <= set(bind(real, leading, named, needed))


def _plain(arguments: ast.arguments) -> str:
    for argument in arguments.args:
        argument.annotation = None
    return ast.unparse(arguments)


# --- tools/compile_sm100.py ---------------------------------------------------------------------


def compile_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/compile_sm100.py", *arguments],
        capture_output=True, text=True, cwd=Path(__file__).resolve().parents[1],
    )  # fmt: skip


def test_compiling_without_headers_says_what_to_give(tmp_path):
    done = compile_tool("--include", str(tmp_path), "--nvcc", "nvcc")
    assert done.returncode == 2
    assert "no fused kernel under" in done.stderr


def test_what_the_compiler_refuses_is_a_row_and_a_red(tmp_path):
    header = tmp_path / "deep_gemm/impls/sm100_fp8_fp4_mega_moe.cuh"
    header.parent.mkdir(parents=True)
    header.touch()
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho '{tmp_path}/a.cuh(1): error: no' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    done = compile_tool(
        "--include", str(tmp_path), "--nvcc", str(nvcc), "--model", "deepseek-v3", "--tokens", "64"
    )
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "| deepseek-v3 | 64 | 32 | 10 | a.cuh(1): error: no |"
