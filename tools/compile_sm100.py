"""Compile DeepGEMM's fused kernel for sm_100a, without a GPU, for each model of the shape table.

    PYTHONPATH=. python3 tools/compile_sm100.py --include DIR [--nvcc NVCC] [--json FILE]
    make compile-sm100 INCLUDE=DIR [NVCC=NVCC] [ARGS='--json FILE']

``DIR`` holds ``deep_gemm/`` and ``cutlass/`` headers, as a package of DeepGEMM ships them. Says,
for each kernel, registers, spilled bytes and shared memory. That it compiles does not say that it
is right: nothing is run. A model whose I / 32 is not a multiple of 16 is known not to compile.

The constants follow the package's own choice for EP8 (block sizes by tokens an expert; stages by
what fits in shared memory); they are worked out anew here, as facts of 54e22612.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megamoe.spec.models import MODELS

SMEM_CAPACITY = 232448
RANKS, SMS = 8, 148


@dataclass
class KernelReport:
    """The compiler's report on one kernel."""

    model: str
    tokens: int
    block_m: int
    stages: int
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    seconds: float = 0
    error: str = ""


FLAGS = (
    "-std=c++20", "--gpu-architecture=sm_100a", "-O3", "--expt-relaxed-constexpr",
    "--expt-extended-lambda", "--diag-suppress=39,161,174,177,186,940",
    "--ptxas-options=--register-usage-level=10,--verbose",
)  # fmt: skip


def align(n: int, to: int) -> int:
    """The next multiple."""
    return -(-n // to) * to


def blocks(expected: float) -> tuple[int, int, int, int]:
    """BLOCK_M, STORE_BLOCK_M, BLOCK_K and epilogue warpgroups by tokens an expert."""
    table = (
        (8.5, (16, 8, 256, 2)),
        (16.5, (32, 16, 128, 2)),
        (32.5, (64, 32, 128, 1)),
        (64.5, (96, 16, 128, 2)),
        (96.5, (128, 32, 128, 2)),
    )
    return next((sizes for most, sizes in table if expected <= most), (192, 32, 128, 2))


def source(model: str, tokens: int) -> tuple[str, KernelReport, int]:
    """The translation unit, its record and the dynamic shared memory of the launch."""
    shape = MODELS[model]
    hidden, inter = shape.hidden_size, shape.intermediate_size
    experts, top_k = shape.num_experts, shape.top_k
    local = shape.local_experts(RANKS)
    block_m, store_m, block_k, groups = blocks(tokens * RANKS * top_k / experts)
    capacity = align(tokens, 384)
    pull = hidden
    while pull > 4096:
        pull //= 2
    sf_m = align(block_m, 128)
    warps = groups * 4
    base = align(experts * 4, 1024) + align(pull * 4, 1024)
    base += align(max(groups * store_m * 64 * 2, groups * store_m * 128 * 2), 1024)
    base += (4 + 4 + warps * 2) * 8 + store_m * warps * 4 + 4
    stage = block_m // 2 * block_k + 128 * block_k + (sf_m + 128) * (block_k // 32) + 16
    stages = (SMEM_CAPACITY - base) // stage
    ring = align(RANKS * capacity * min(top_k, local) + local * 191, 384)
    values = [
        capacity, hidden, inter, experts, top_k, local, block_m, 128, block_k, store_m, sf_m, 128,
        ring, ring // block_m * sf_m, stages, pull, 128, 128, groups * 128, SMS, RANKS,
        "10.0f", "true",
    ]  # fmt: skip
    text = (
        "#include <deep_gemm/impls/sm100_fp8_fp4_mega_moe.cuh>\n"
        "using namespace deep_gemm;\n"
        "static void instantiate() {\n"
        "  auto kernel = reinterpret_cast<void*>(&sm100_fp8_fp4_mega_moe_impl<"
        f"{', '.join(map(str, values))}>);\n}}\n"
    )
    return text, KernelReport(model, tokens, block_m, stages), base + stages * stage


def compile_kernel(nvcc: str, include: Path, model: str, tokens: int) -> KernelReport:
    """Compile one kernel; a failure is in ``error``, one line."""
    text, report, shared = source(model, tokens)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        Path(folder, "kernel.cu").write_text(text)
        began = time.monotonic()
        process = subprocess.run(
            [nvcc, "kernel.cu", "-cubin", "-o", cubin.name, f"-I{include.resolve()}", *FLAGS],
            capture_output=True, text=True, cwd=folder,
        )  # fmt: skip
        report.seconds = round(time.monotonic() - began, 1)
        if process.returncode or not cubin.is_file():
            errors = [li for li in process.stderr.splitlines() if "error" in li]
            first = (errors or process.stderr.splitlines() or ["no message"])[0]
            report.error = first.replace(f"{include.resolve()}/", "")[:200]
            return report
    report.registers = max(map(int, re.findall(r"Used (\d+) registers", process.stderr)), default=0)
    report.spilled = sum(map(int, re.findall(r"(\d+) bytes spill stores", process.stderr)))
    report.shared = shared
    return report


def headers(include: Path, name: str) -> dict[str, str]:
    """The origin of the kernel: DeepGEMM by name and by the bytes of its headers, CUTLASS by
    version."""
    digest = hashlib.sha256()
    for path in sorted(p for p in (include / "deep_gemm").rglob("*") if p.is_file()):
        digest.update(str(path.relative_to(include)).encode() + b"\0" + path.read_bytes())
    version = include / "cutlass/version.h"
    text = version.read_text() if version.is_file() else ""
    numbers = dict(re.findall(r"#define CUTLASS_(MAJOR|MINOR|PATCH) (\d+)", text))
    cutlass = ".".join(numbers.get(n, "?") for n in ("MAJOR", "MINOR", "PATCH"))
    return {"deep_gemm": name, "sha256": digest.hexdigest(), "cutlass": cutlass}


def is_known_failure(row: dict[str, Any]) -> bool:
    """The kernel describes scale factors as I / 32 bytes and asserts a multiple of 16."""
    return bool(MODELS[row["model"]].intermediate_size // 32 % 16)


def main() -> int:
    """Compile all; exit 1 if one does otherwise than is known, 2 if there is nothing to compile."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--include", type=Path, required=True)
    parser.add_argument("--nvcc", default="nvcc")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 8192])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--headers", default="not named", help="whose headers, for the record")
    args = parser.parse_args()
    path = shutil.which(args.nvcc)
    if not path:
        print("compile_sm100: no nvcc; install CUDA 12.9 or newer, or give --nvcc", file=sys.stderr)
        return 2
    if not (args.include / "deep_gemm/impls/sm100_fp8_fp4_mega_moe.cuh").is_file():
        print(
            f"compile_sm100: no fused kernel under {args.include}; give the include folder of a "
            "DeepGEMM package with Mega MoE",
            file=sys.stderr,
        )
        return 2
    nvcc, rows = str(Path(path).absolute()), []
    print("| model | T | BLOCK_M | stages | registers | spilled bytes | shared bytes | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for model in args.model:
        for tokens in args.tokens:
            report = compile_kernel(nvcc, args.include, model, tokens)
            rows.append(asdict(report))
            numbers = (report.registers, report.spilled, report.shared, report.seconds)
            cells = report.error or " | ".join(map(str, numbers))
            print(
                f"| {model} | {tokens} | {report.block_m} | {report.stages} | {cells} |", flush=True
            )
    if args.json:
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        release = re.search(r"release .*", version)
        record = {
            "nvcc": release.group() if release else version,
            "flags": FLAGS,
            "headers": headers(args.include, args.headers),
            "kernels": rows,
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return int(any(bool(row["error"]) != is_known_failure(row) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
