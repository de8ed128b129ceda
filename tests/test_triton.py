"""The Triton backend where no GPU is: its bits in the interpreter, its kernels in the compiler.

What it computes on a GPU is judged by ``megamoe check --backend triton --device cuda``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed: Linux builds only")

from megamoe.backends import BackendError, load_backend  # noqa: E402
from megamoe.backends.triton.launches import OVERLAPPED, Tile, tile_for  # noqa: E402
from megamoe.backends.triton.packing import reorder  # noqa: E402
from megamoe.formats import E2M1_TABLE, bf16_decode  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


def interpreted(code: str) -> str:
    """What a fresh interpreter prints that runs ``code`` with Triton's interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "least"), [("staging", 90), ("eplb", 30)])
def test_the_kernel_gives_the_contract_s_bits_in_every_case(kind: str, least: int, tmp_path):
    report = tmp_path / "report.json"
    interpreted(
        "import sys; from megamoe.cli import main; "
        f"sys.exit(main(['check', '--backend', 'tests/helpers/interpreted.py:Interpreted', "
        f"'--kind', '{kind}', '--tier', 'full', '--json', '{report}']))"
    )
    cases = json.loads(report.read_text())["cases"]
    assert len(cases) >= least
    assert {c["status"] for c in cases} == {"pass"}


@pytest.mark.slow
def test_every_bf16_is_cast_as_the_format_says():
    """Unscaled, so that all 65536 inputs reach the cast: subnormals, ties, NaN, saturation."""
    out = interpreted(
        """
import numpy as np, torch, triton, triton.language as tl
from megamoe.backends.triton.staging import e4m3_code
from megamoe.formats import e4m3_cast
@triton.jit
def cast(x, y, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(y + at, e4m3_code(tl.load(x + at)))
bits = np.arange(1 << 16, dtype=np.uint32) << 16
x = bits.view(np.float32)
got = torch.zeros(1 << 16, dtype=torch.int32)
cast[(64,)](torch.from_numpy(x), got, 1024)
wanted = e4m3_cast(x)
nan = np.isnan(x)
assert (got.numpy()[~nan] == wanted[~nan]).all() and (got.numpy()[nan] == 0x7F).all()
print("ok")
"""
    )
    assert out.strip() == "ok"


def test_slots_are_sorted_by_expert_and_cut_into_tiles_in_the_interpreter():
    out = interpreted(
        """
import torch
from megamoe.backends.triton.dispatch import dispatch
ids = torch.tensor([[3, 0], [-1, 3], [3, 7], [1, 3]])  # 7 is no expert
T, K, H, E, ROWS = 4, 2, 128, 4, 2
x = torch.arange(T * H, dtype=torch.int32).to(torch.uint8).reshape(T, H) & 0x7B
x_sf = torch.full((T, 1), 0x80808080 - (1 << 32), dtype=torch.int32)
operand = torch.zeros(T, H, dtype=torch.bfloat16)
order, counts = torch.full((8,), -1, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
tiles = torch.zeros(8, 3, dtype=torch.int32)
dispatch[(T + 1, 1)](x, x_sf, ids, operand, order, counts, tiles, T, H, K, E, 8,
                     ROWS=ROWS, BLOCK=1024, EXPERTS=4, CHUNK=8)
assert sorted(order[:1].tolist()) == [1] and sorted(order[1:2].tolist()) == [6]
assert sorted(order[2:6].tolist()) == [0, 3, 4, 7]
assert tiles[:4].tolist() == [[0, 0, 1], [1, 1, 2], [3, 2, 6], [3, 4, 6]]
assert (tiles[4:, 0] == -1).all()
from megamoe.formats import E4M3_TABLE
want = torch.from_numpy(E4M3_TABLE[x.numpy()]).double() * 2
p = torch.arange(32)
source = ((p >> 1) & 3) * 8 + (p & 1) * 4 + (p >> 4) * 2 + ((p >> 3) & 1)
assert sorted(source.tolist()) == list(range(32))
assert torch.equal(operand.double().view(T, 4, 32), want.view(T, 4, 32)[..., source])
print("ok")
"""
    )
    assert out.strip() == "ok"


def test_the_combine_adds_live_slots_in_ascending_order_in_the_interpreter():
    out = interpreted(
        """
import torch
from megamoe.backends.triton.dispatch import combine
big = 2.0**30
slots = torch.tensor([big, 1.0, -big, 64.0, -0.0, 5.0]).bfloat16().view(6, 1).repeat(1, 128)
ids = torch.tensor([[0, 1, 0], [-1, 1, 9]])
y = torch.full((2, 128), 7.0, dtype=torch.bfloat16)
combine[(2, 1)](slots, ids, y, 128, 2, TOP_K=3, BLOCK=128)
# Ascending, the 1 is lost in 2^30; slots without an expert here are not read.
assert (y[0] == 0).all() and (y[1] == 0).all()
print("ok")
"""
    )
    assert out.strip() == "ok"


def test_the_reordered_bits_are_what_the_kernels_take_apart():
    """By the kernels' shifts and masks: bf16 pairs of nibbles i and i + 4, times 2^-126."""
    words = np.random.default_rng(1).integers(0, 2**32, 4096, dtype=np.uint32)
    packed = torch.from_numpy(words.view(np.uint8).reshape(2, 8, -1).copy())
    made = reorder(packed)
    assert made.shape == packed.shape
    w = made.numpy().reshape(-1).view(np.uint32)
    mask = np.uint32(0x81C081C0)
    pairs = [
        (w << np.uint32(6)) & mask,
        (w << np.uint32(2)) & mask,
        ((w >> np.uint32(4)) | (w << np.uint32(28))) & mask,
        (w & np.uint32(0x81808180)) | ((w >> np.uint32(8)) & np.uint32(0x00400040)),
    ]
    for i, pair in enumerate(pairs):
        for half, nibble in ((pair & 0xFFFF, i), (pair >> 16, i + 4)):
            want = E2M1_TABLE[(words >> np.uint32(4 * nibble)) & 0xF]
            got = bf16_decode(half.astype(np.uint16)).astype(np.float64) * 2.0**126
            assert np.array_equal(got, want)
            assert np.array_equal(np.signbit(got), np.signbit(want))


TILES = sorted(
    {tile_for(rows, e) for rows in (1, 64, 384, 3000, 49152) for e in (1, 32, 384)}, key=repr
)
SIZES = {"hidden": "i32", "inter": "i32"}
ROUTING = {"order": "*i32", "tiles": "*i32"}
OUTPUTS = {"acts": "*bf16", "codes": "*u8", "sf": "*u8"}


def compiled(kernel, arguments, constants, warps, tmp_path):
    """What ptxas says of a kernel for Hopper, and the kernel."""
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(arguments.items())
        if kind.startswith("*") or name in SIZES
    }
    signature = {**arguments, **dict.fromkeys(constants, "constexpr")}
    source = GluonASTSource(kernel, signature, constants, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert made.metadata.shared <= 227 * 1024
    assert "wgmma.mma_async" in made.asm["ptx"]
    ptx = tmp_path / "kernel.ptx"
    ptx.write_text(made.asm["ptx"])
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    told = subprocess.run(
        [ptxas, "-v", "-arch=sm_90a", ptx, "-o", tmp_path / "kernel.cubin"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    assert "registers" in told.stderr
    return told.stderr


@pytest.mark.slow
@pytest.mark.parametrize("tile", TILES, ids=lambda t: f"{t.BN}x{t.N}")
@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
def test_the_products_compile_for_hopper_without_serialised_instructions(
    tile: Tile, wide, tmp_path
):
    """Serialised ``wgmma`` was not only slow: with few tokens its bits were wrong."""
    from megamoe.backends.triton import linear

    shared = {"BN": tile.BN, "N": tile.N, "STAGES": tile.STAGES, "WARPS": tile.WARPS,
              "WIDE": wide, "PAIRED": tile.PAIRED}  # fmt: skip
    kernels = [
        (linear.linear1,
         {"x": "*bf16", "w13": "*i16", "s13": "*i32", "topk_weights": "*fp32", **ROUTING,
          **OUTPUTS, **SIZES, "top_k": "i32", "clamp": "fp32"},
         {"HAS_CLAMP": True, "FAST": not wide, **shared}),
        (linear.linear2,
         {"acts": "*bf16", "w2": "*i16", "s2": "*i32", **ROUTING, "slots": "*bf16", **SIZES},
         shared),
    ]  # fmt: skip
    for kernel, arguments, constants in kernels:
        told = compiled(kernel, arguments, constants, tile.WARPS, tmp_path)
        assert "serialized" not in told


@pytest.mark.slow
@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
def test_the_overlapped_products_compile_for_hopper_without_spills(wide, tmp_path):
    """Two groups of 240 registers: a spill in the loop would cost what overlapping gains."""
    from megamoe.backends.triton import overlapped
    from megamoe.backends.triton.layouts import TOKEN_BOX, WEIGHT_BOX

    one, two = OVERLAPPED
    tokens = f"tensordesc<bf16[{one.N}, 128],{TOKEN_BOX!r}>"
    weights = f"tensordesc<i16[64, 32],{WEIGHT_BOX!r}>"
    kernels = [
        (overlapped.linear1,
         {"x": tokens, "w13": weights, "s13": "*i32", "topk_weights": "*fp32", **ROUTING,
          **OUTPUTS, **SIZES, "clamp": "fp32"},
         {"HAS_CLAMP": True, "FAST": not wide}, one),
        (overlapped.linear2,
         {"acts": tokens, "w2": weights, "s2": "*i32", **ROUTING, "slots": "*bf16", **SIZES},
         {}, two),
    ]  # fmt: skip
    for kernel, arguments, constants, tile in kernels:
        constants = {**constants, "N": tile.N, "STAGES": tile.STAGES, "WIDE": wide}
        told = compiled(kernel, arguments, constants, tile.WARPS, tmp_path)
        assert "serialized" not in told
        assert " 0 bytes spill stores" in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_refusal_is_one_line():
    with pytest.raises(BackendError, match=r"needs an NVIDIA GPU of compute capability 9\.0"):
        load_backend("triton", "cpu")
