"""The Triton backend where no GPU is: its bits in the interpreter, its kernels in the compiler.

What it computes on a GPU is judged by ``megamoe check --backend triton --device cuda``.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

triton = pytest.importorskip("triton", reason="Triton is not installed: Linux builds only")

from megamoe.backends import BackendError, load_backend  # noqa: E402
from megamoe.backends.triton import staging  # noqa: E402
from megamoe.backends.triton.backend import TritonBackend, kernel_sources  # noqa: E402
from megamoe.backends.triton.binaries import (  # noqa: E402
    Launch,
    _turn,
    code_digest,
    compile_all,
    launch,
)
from megamoe.backends.triton.launches import (  # noqa: E402
    Call,
    is_wide,
    stages_of,
)
from megamoe.backends.triton.packing import pack, unpack  # noqa: E402
from megamoe.backends.triton.staging import prepare_megamoe_inputs  # noqa: E402
from megamoe.backends.triton.tiles import (  # noqa: E402
    CROWD,
    FEW,
    MANY,
    NEARLY,
    OVERLAPPED,
    REGISTERS,
    ROUNDS,
    Tile,
    few_tile,
    overlapped_tile,
)
from megamoe.spec.formats import E2M1_TABLE, bf16_decode  # noqa: E402
from megamoe.spec.problem import Problem, Sizes  # noqa: E402
from megamoe.suite.settings import Settings  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


NUMPY_REFUSES = "TypeError: only 0-dimensional arrays can be converted to Python scalars"
"""From NumPy 2.5 on: the interpreter of Triton 3.6 takes the bounds of a loop so."""


def interpreted(code: str) -> str:
    """What a fresh interpreter prints that runs ``code`` with Triton's interpreter."""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    if NUMPY_REFUSES in result.stderr and triton.__version__ < "3.7":
        pytest.skip(f"Triton {triton.__version__}'s interpreter with NumPy {np.__version__}")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


ROWS = "staging/rows-lost-or-repeated-at-t"
TWINS = {
    17: (31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 191, 192, 193, 383, 384),
}
"""Token count to others whose launch differs in nothing but the number of tokens: the kernel has a
program a token, and the interpreter runs one after the other. ``check`` on a GPU has them all."""


MOST_ROWS = 400


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "least"), [("staging", 75), ("eplb", 30)])
def test_the_kernel_gives_the_contract_s_bits_in_every_case(kind: str, least: int, tmp_path):
    omissions = {f"{ROWS}{tokens}" for tokens in sum(TWINS.values(), ())}
    every = Settings(kind=kind, tier="full").cases("2026-06")
    # The interpreter runs one program after the other. A check on a GPU has more rows.
    few = [case.id for case in every if case.params["tokens"] <= MOST_ROWS]
    selection = [name for name in few if name not in omissions]
    assert kind != "staging" or {f"{ROWS}{twin}" for twin in (*TWINS, 385)} <= {*selection}
    report = tmp_path / "report.json"
    options = [
        "--kind",
        kind,
        "--tier",
        "full",
        "--json",
        str(report),
        "--case",
        ",".join(selection),
    ]
    interpreted(
        "import sys; from megamoe.commands.main import main; sys.exit(main("
        f"['check', '--backend', 'tests/helpers/interpreted.py:Interpreted', *{options}]))"
    )
    cases = json.loads(report.read_text())["cases"]
    assert len(cases) == len(selection) >= least
    assert {c["status"] for c in cases} == {"pass"}


def test_token_counts_that_the_interpreter_is_spared_are_launched_as_their_twin(monkeypatch):
    def launch_of(tokens: int):
        """The launch, without its tensors and its number of tokens."""
        rows = -(-tokens // 384) * 384
        inputs = (torch.zeros(tokens, 128, dtype=torch.bfloat16), torch.zeros(tokens, 2),
                  torch.zeros(tokens, 2, dtype=torch.int64))  # fmt: skip
        outputs = (torch.zeros(rows, 128, dtype=torch.float8_e4m3fn),
                   torch.zeros(rows, 1, dtype=torch.int32),
                   torch.zeros(rows, 2, dtype=torch.int64), torch.zeros(rows, 2))  # fmt: skip
        launches = []
        monkeypatch.setattr(
            staging, "launch", lambda *words, **options: launches.append((*words, options))
        )
        prepare_megamoe_inputs(*inputs, *outputs)
        ((kernel, (programs, *grid), *words, options),) = launches
        assert programs == tokens
        return kernel, grid, [w for w in words if not isinstance(w, torch.Tensor)], options

    for twin, others in TWINS.items():
        for other in others:
            assert launch_of(other) == launch_of(twin), other


@pytest.mark.slow
def test_every_bf16_is_cast_as_the_format_says():
    """Unscaled, so that all 65536 inputs reach the cast: subnormals, ties, NaN, saturation."""
    out = interpreted(
        """
import numpy as np, torch, triton, triton.language as tl
from megamoe.backends.triton.kernels.staging import e4m3_code
from megamoe.spec.formats import e4m3_cast
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
from megamoe.backends.triton.kernels.dispatch import dispatch
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
from megamoe.spec.formats import E4M3_TABLE
want = torch.from_numpy(E4M3_TABLE[x.numpy()]).double() * 2
p = torch.arange(32)  # position 8 t + 4 b + 2 a + h has element 8 t + 4 h + 2 b + a
source = (p >> 3) * 8 + (p & 1) * 4 + ((p >> 2) & 1) * 2 + ((p >> 1) & 1)
assert sorted(source.tolist()) == list(range(32))
assert torch.equal(operand.double().view(T, 4, 32), want.view(T, 4, 32)[..., source])
print("ok")
"""
    )
    assert out.strip() == "ok"


def test_many_rows_are_ranked_by_expert_and_short_tiles_come_last_in_the_interpreter():
    out = interpreted(
        """
import torch
from megamoe.backends.triton.kernels.dispatch import count, rank, spread
counted = [9, 0, 4, 2, 7]  # rows an expert; two more slots have none
ids = torch.tensor([e for e, n in enumerate(counted) for _ in range(n)] + [-1, 5])
ids = ids[torch.randperm(24, generator=torch.Generator().manual_seed(0))].view(12, 2)
E, ROWS, total, most = 5, 4, 24, 40
counts, order = torch.zeros(2, 2, 8, dtype=torch.int32), torch.full((24,), -1, dtype=torch.int32)
places, tiles = torch.zeros(24, dtype=torch.int32), torch.zeros(most, 3, dtype=torch.int32)
count[(3,)](ids, counts[0], total, E, EXPERTS=8, CHUNK=8, TALLIES=2)
assert counts[0].sum(0)[:5].tolist() == counted and counts[0].any(1).all()
rank[(3,)](ids, counts[0], counts[1], order, places, tiles, total, E, most,
           ROWS=ROWS, EXPERTS=8, CHUNK=8, TALLIES=2)
flat = ids.flatten()
assert flat[order[:22].long()].tolist() == [e for e, n in enumerate(counted) for _ in range(n)]
for slot in range(24):
    live = 0 <= flat[slot] < E
    assert (order[places[slot]] == slot) if live else places[slot] == -1
# Whole tiles, then the one of three rows, then those of one or two.
assert tiles[:7].tolist() == [[0, 0, 9], [0, 4, 9], [2, 9, 13], [4, 15, 22],
                              [4, 19, 22], [0, 8, 9], [3, 13, 15]]
assert (tiles[7:, 0] == -1).all()
x = torch.arange(12 * 128, dtype=torch.int32).to(torch.uint8).view(12, 128) & 0x7B
x_sf = torch.full((12, 1), 0x80808080 - (1 << 32), dtype=torch.int32)
rows = torch.zeros(24, 128, dtype=torch.bfloat16)
spread[(12, 1)](x, x_sf, places, rows, 128, TOP_K=2, BLOCK=128)
from megamoe.spec.formats import E4M3_TABLE
want = torch.from_numpy(E4M3_TABLE[x.numpy()]).double() * 2
p = torch.arange(32)  # position 16 b + 8 a + 2 t + h has element 8 t + 4 h + 2 b + a
source = ((p >> 1) & 3) * 8 + (p & 1) * 4 + (p >> 4) * 2 + ((p >> 3) & 1)
for row in range(22):
    token = int(order[row]) // 2
    assert torch.equal(rows[row].double().view(4, 32), want[token].view(4, 32)[:, source])
print("ok")
"""
    )
    assert out.strip() == "ok"


def test_the_combine_adds_live_slots_in_ascending_order_in_the_interpreter():
    out = interpreted(
        """
import torch
from megamoe.backends.triton.kernels.dispatch import combine
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


def test_the_packed_bits_are_what_the_kernels_take_apart_and_lie_as_they_read():
    """By the kernels' shifts and masks: bf16 pairs of nibbles i and i + 4, times 2^-126."""
    rng = np.random.default_rng(1)
    weight = rng.integers(0, 256, (2, 128, 128), dtype=np.uint8)  # K = 256: two steps
    scale = rng.integers(0, 256, (2, 128, 8), dtype=np.uint8)
    packed, scales = pack(torch.from_numpy(weight), torch.from_numpy(scale), gate_and_up=True)
    back = unpack(packed, scales, gate_and_up=True)
    assert np.array_equal(back[0], weight) and np.array_equal(back[1], scale)
    # By the kernels' places: (expert, block of 64 rows, step, row, lane t, group).
    w = packed.numpy().view(np.uint32).reshape(2, 2, 2, 64, 4, 4)
    plain = weight.view(np.uint32).reshape(2, 128, 2, 4, 4)  # expert, row, step, group, t
    # Rows 16 i to 16 i + 7 of a block are gate, the next eight the up rows of those channels.
    r = np.arange(128)
    order = (r // 16) * 8 + r % 8 + (r // 8 % 2) * 64
    words = plain[:, order].reshape(2, 2, 64, 2, 4, 4).transpose(0, 1, 3, 2, 5, 4).reshape(-1)
    scale_words = scale.view(np.uint32)[:, order].reshape(2, 2, 64, 2).transpose(0, 1, 3, 2)
    assert np.array_equal(scales.numpy().view(np.uint32).reshape(scale_words.shape), scale_words)
    w = w.reshape(-1)
    mask = np.uint32(0x81C081C0)
    pairs = [
        (w << np.uint32(6)) & mask,
        (w << np.uint32(2)) & mask,
        ((w >> np.uint32(4)) | (w << np.uint32(28))) & mask,
        (w & np.uint32(0x81808180)) | ((w >> np.uint32(8)) & np.uint32(0x00400040)),
    ]
    for i, pair in enumerate(pairs):
        for half, nibble in ((pair & 0xFFFF, i), (pair >> 16, i + 4)):
            expected = E2M1_TABLE[(words >> np.uint32(4 * nibble)) & 0xF]
            actual = bf16_decode(half.astype(np.uint16)).astype(np.float64) * 2.0**126
            assert np.array_equal(actual, expected)
            assert np.array_equal(np.signbit(actual), np.signbit(expected))


SIZES = {"hidden": "i32", "inter": "i32"}
ROUTING = {"order": "*i32", "tiles": "*i32"}
OUTPUTS = {"acts": "*bf16", "codes": "*u8", "sf": "*u8"}


def build(kernel, arguments, constants, capability=90, **options):
    """A kernel, compiled."""
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(arguments.items())
        if kind.startswith("*") or name in SIZES
    }
    signature = {**arguments, **dict.fromkeys(constants, "constexpr")}
    source = GluonASTSource(kernel, signature, constants, aligned)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=options)


EVENT = re.compile(
    r"(bar\.sync)|(ld\.shared|st\.shared|stmatrix|ldmatrix)|(mbarrier\.arrive\.shared)"
)


def met_before_they_arrive(ptx: str) -> bool:
    """Whether warps meet after their last access of shared memory, before one arrives for all."""
    events = [match.lastindex for match in EVENT.finditer(ptx)]
    return all(events[i - 1] == 1 for i, event in enumerate(events) if event == 3)


def test_an_arrival_after_an_access_without_a_meeting_is_seen():
    arrive = "mbarrier.arrive.shared::cta.b64 _, [%r1];"
    assert met_before_they_arrive(f"st.shared.b32 [%r2], %r3; bar.sync 2, 128; {arrive}")
    assert not met_before_they_arrive(f"bar.sync 2, 128; ld.shared.b32 %r3, [%r2]; {arrive}")


def compiled(kernel, arguments, constants, instruction, tmp_path, **options):
    """What ptxas says of a kernel for Hopper."""
    binary = build(kernel, arguments, constants, **options)
    assert binary.metadata.shared <= 227 * 1024
    assert met_before_they_arrive(binary.asm["ptx"])
    assert instruction in binary.asm["ptx"]
    ptx = tmp_path / "kernel.ptx"
    ptx.write_text(binary.asm["ptx"])
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    result = subprocess.run(
        [ptxas, "-v", "-arch=sm_90a", ptx, "-o", tmp_path / "kernel.cubin"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "registers" in result.stderr
    return result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("tile", FEW, ids=lambda t: f"{t.N} rows, {t.BLOCKS} blocks")
@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
def test_the_products_for_few_tokens_compile_for_hopper_in_their_registers(
    tile: Tile, wide, tmp_path
):
    """And so many blocks fit on a multiprocessor as the choice of a tile reckons with."""
    from megamoe.backends.triton.kernels import few

    shared = {"N": tile.N, "WARPS": tile.WARPS, "AHEAD": tile.AHEAD, "WIDE": wide}
    options = {"num_warps": tile.WARPS, "maxnreg": tile.registers}
    kernels = [
        (few.linear1,
         {"x": "*i32", "w13": "*i32", "s13": "*i32", "topk_weights": "*fp32", **ROUTING,
          **OUTPUTS, **SIZES, "top_k": "i32", "clamp": "fp32"},
         {"HAS_CLAMP": True, "FAST": not wide, **shared}),
        (few.linear2,
         {"acts": "*i32", "w2": "*i32", "s2": "*i32", **ROUTING, "slots": "*bf16", **SIZES},
         shared),
    ]  # fmt: skip
    for kernel, arguments, constants in kernels:
        output = compiled(kernel, arguments, constants, "mma.sync", tmp_path, **options)
        # One register of 16 rows goes to memory: fewer blocks, or other orders, are slower.
        allowed = (0, 4) if tile is FEW[-1] else (0,)
        assert int(re.search(r"(\d+) bytes spill stores", output).group(1)) in allowed
        registers = int(re.search(r"Used (\d+) registers", output).group(1))
        assert REGISTERS // (registers * 32 * tile.WARPS) >= tile.BLOCKS


@pytest.mark.slow
@pytest.mark.parametrize("capability", [100, 120])
def test_the_products_for_few_tokens_compile_for_newer_gpus(capability):
    """Where they have never run."""
    from megamoe.backends.triton.kernels import few

    wide = FEW[-1]
    binary = build(
        few.linear2,
        {"acts": "*i32", "w2": "*i32", "s2": "*i32", **ROUTING, "slots": "*bf16", **SIZES},
        {"N": wide.N, "WARPS": wide.WARPS, "AHEAD": wide.AHEAD, "WIDE": False},
        capability,
        num_warps=wide.WARPS,
        maxnreg=wide.registers,
    )
    assert "mma.sync" in binary.asm["ptx"] and binary.asm["cubin"]


ADDING = """
import triton, triton.language as tl
@triton.jit
def add(x):
    tl.store(x, tl.load(x) + {n})
"""


def test_the_digest_of_a_binary_is_that_of_its_code_not_of_where_its_source_lies(
    tmp_path, monkeypatch
):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def binary(folder: str, n: int) -> bytes:
        path = tmp_path / folder / f"adding{n}.py"
        path.parent.mkdir(exist_ok=True)
        monkeypatch.setenv("TRITON_CACHE_DIR", str(path.parent / "cache"))
        path.write_text(ADDING.format(n=n))
        spec = importlib.util.spec_from_file_location(f"{folder}_{n}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        source = ASTSource(module.add, {"x": "*i32"})
        return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]

    here, there, other = binary("here", 1), binary("there", 1), binary("here", 2)
    assert here != there
    assert code_digest(here) == code_digest(there) != code_digest(other)


@pytest.mark.slow
@pytest.mark.parametrize("tile", OVERLAPPED, ids=lambda t: f"{t.N} rows")
@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
def test_the_overlapped_products_compile_for_hopper_without_spills(tile: Tile, wide, tmp_path):
    """A spill would cost what overlapping gains; serialised, the products would have wrong bits."""
    from megamoe.backends.triton.kernels import overlapped
    from megamoe.backends.triton.kernels.layouts import TOKEN_BOX, WEIGHT_BOX

    tokens = f"tensordesc<bf16[{tile.N}, 64],{TOKEN_BOX!r}>"
    weights = f"tensordesc<i16[64, 32],{WEIGHT_BOX!r}>"
    kernels = [
        (overlapped.linear1,
         {"x": tokens, "w13": weights, "s13": "*i32", "topk_weights": "*fp32", **ROUTING,
          **OUTPUTS, **SIZES, "clamp": "fp32", "tile_count": "i32"},
         {"HAS_CLAMP": True, "FAST": not wide}),
        (overlapped.linear2,
         {"acts": tokens, "w2": weights, "s2": "*i32", **ROUTING, "slots": "*bf16", **SIZES,
          "tile_count": "i32"},
         {}),
    ]  # fmt: skip
    for kernel, arguments, constants in kernels:
        constants = {
            **constants, "N": tile.N, "BOXES": tile.BOXES, "STAGES": tile.STAGES, "WIDE": wide,
        }  # fmt: skip
        output = compiled(
            kernel, arguments, constants, "wgmma.mma_async", tmp_path, num_warps=tile.WARPS
        )
        assert "serialized" not in output
        assert " 0 bytes spill stores" in output


def test_the_tile_follows_the_rows_an_expert_and_the_blocks_a_multiprocessor_gets():
    deep, five, six, wide = FEW

    def tile(tokens: int, experts: int = 32, inter: int = 2048) -> Tile:
        return few_tile(tokens * 6, experts, inter, processors=132)

    assert tile(1) == deep  # 6 experts of 64 blocks: 2.9 per multiprocessor, all at once
    assert tile(1, 48, 3072) == five  # of 96: 4.4, all at once too
    assert tile(2) == six  # 5.8
    assert tile(3) == tile(5) == five  # 8.7 to 14.5
    assert tile(6) == tile(32) == six  # 15.5, of all experts
    assert tile(33) == wide


@pytest.mark.parametrize(
    ("blocks", "position"),
    [(3, 0), (4, 1), (5, 1), (6, 2), (NEARLY, 2), (NEARLY + 1, 1), (ROUNDS, 1), (ROUNDS + 1, 2)],
)
def test_a_tile_of_eight_rows_at_the_edges_of_its_rule(blocks, position):
    assert few_tile(blocks, experts=99, inter=32, processors=1) == FEW[position]


def test_large_tiles_follow_the_rows_an_expert_and_whole_shares_of_channels():
    narrow, broad = OVERLAPPED
    crowded, many = 32 * CROWD, 32 * MANY
    assert overlapped_tile(crowded, 32, 4096) is None
    assert overlapped_tile(crowded + 1, 32, 4096) == overlapped_tile(many, 32, 4096) == narrow
    assert overlapped_tile(many + 1, 32, 4096) == broad
    # 128 channels are half a share of the narrow tile, and a whole one of the broad.
    assert overlapped_tile(many, 32, 128) is None
    assert overlapped_tile(many + 1, 32, 128) == broad
    # Experts that no row can reach do not count.
    assert overlapped_tile(16, 1, 4096) == narrow and overlapped_tile(16, 2, 4096) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU of capability 9.0")
def test_no_bit_depends_on_the_tile():
    """Experts have as many rows as the edges of tiles, of their halves and of their quarters."""
    from megamoe.backends.triton.backend import launch, new_symm_buffer
    from megamoe.backends.triton.launches import Memory

    edges = [0, 1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257, 512, 513]
    device, hidden, inter = torch.device("cuda", 0), 512, 384
    backend = TritonBackend(device)
    seed = torch.Generator(device=device).manual_seed(1)
    experts, tokens = len(edges), sum(edges)

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=seed, device=device, dtype=torch.uint8)

    w13, s13, w2, s2 = backend.pack_weights(
        draw(0, 256, experts, 2 * inter, hidden // 2),
        draw(116, 121, experts, 2 * inter, hidden // 32),
        draw(0, 256, experts, hidden, inter // 2),
        draw(116, 121, experts, hidden, inter // 32),
    )
    ids = torch.repeat_interleave(torch.arange(experts), torch.tensor(edges)).to(device)
    ids = ids[torch.randperm(tokens, generator=seed, device=device)][:, None]
    x = torch.randn(tokens, hidden, generator=seed, device=device).bfloat16()
    routing = torch.rand(tokens, 1, generator=seed, device=device)

    def bits(tile: Tile) -> list[torch.Tensor]:
        buffer = new_symm_buffer(None, device, Sizes(experts, tokens, 1, hidden, inter))
        backend.prepare(
            x,
            routing,
            ids,
            *(t[:tokens] for t in (buffer.x, buffer.x_sf, buffer.topk_idx, buffer.topk_weights)),
        )
        y = torch.full_like(x, float("nan"))
        call = Call(tokens, buffer.capacity, experts, hidden, inter, 1, 10.0, True, False, device)
        launch(Memory(buffer, w13, s13, w2, s2, y), stages_of(call, tile))
        codes = buffer.l2_acts[:tokens].view(torch.uint8)
        return [y.view(torch.int16), codes, buffer.l2_acts_sf[:tokens]]

    expected = bits(FEW[-1])
    for tile in (*FEW[:-1], *OVERLAPPED):
        for name, actual, right in zip(("y", "codes", "scales"), bits(tile), expected, strict=True):
            assert torch.equal(actual, right), (tile, name)


def on_cpu(experts=2, tokens=3, hidden=256, inter=128, top_k=2):
    """Output, packed weights and buffer of a small call, on the CPU: nothing is launched."""
    problem_weights = [
        torch.zeros(experts, 2 * inter, hidden // 2, dtype=torch.uint8),
        torch.zeros(experts, 2 * inter, hidden // 32, dtype=torch.uint8),
        torch.zeros(experts, hidden, inter // 2, dtype=torch.uint8),
        torch.zeros(experts, hidden, inter // 32, dtype=torch.uint8),
    ]
    backend = TritonBackend(torch.device("cpu"))
    weights = backend.pack_weights(*problem_weights)
    sizes = Sizes(experts, tokens, top_k, hidden, inter)
    buffer = backend.new_symm_buffer(None, torch.device("cpu"), sizes)
    y = torch.zeros(tokens, hidden, dtype=torch.bfloat16)
    return backend, y, weights, buffer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_tokens": 4}, "got 4 tokens, but the symmetric buffer was sized for 3"),
        ({"y": torch.zeros(2, 256, dtype=torch.bfloat16)}, r"y is \(2, 256\)"),
        ({"y": torch.zeros(3, 256)}, "torch.float32; it must be"),
        ({"y": torch.zeros(256, 3, dtype=torch.bfloat16).t()}, "y has strides"),
        (
            {"y": torch.zeros(3, 256, dtype=torch.bfloat16, device="meta")},
            "y is on meta, the symmetric buffer on cpu",
        ),
        ({"buffer": on_cpu(hidden=512)[3]}, "made for hidden size 512"),
        ({"buffer": on_cpu(experts=1)[3]}, "up to 1 experts; the weights have 256, 128 and 2"),
    ],
    ids=[
        "capacity",
        "rows of y",
        "dtype of y",
        "strides of y",
        "device of y",
        "other sizes",
        "fewer experts",
    ],
)
def test_what_would_leave_its_bounds_is_refused_before_a_launch(change, message):
    backend, y, weights, buffer = on_cpu()
    call = {"y": y, "weights": weights, "buffer": buffer, "num_tokens": 3, **change}
    with pytest.raises(ValueError, match=message):
        backend.run(**call, activation_clamp=None, fast_math=True)


def test_more_slots_than_the_kernels_take_are_refused_with_the_buffer():
    with pytest.raises(ValueError, match="takes top-k up to 32, not 33"):
        on_cpu(top_k=33)


def test_a_problem_beyond_its_capacity_is_refused_before_it_is_staged():
    backend, _, _, _ = on_cpu()
    problem = Problem(
        torch.zeros(4, 256, dtype=torch.bfloat16), torch.zeros(4, 2, dtype=torch.int64),
        torch.zeros(4, 2), *(torch.zeros(2, *shape, dtype=torch.uint8) for shape in
                             ((256, 128), (256, 8), (256, 64), (256, 4))),
        activation_clamp=None, fast_math=True, max_num_tokens=3,
    )  # fmt: skip
    with pytest.raises(ValueError, match="got 4 tokens"):
        backend.forward(problem)


def test_a_wide_scale_is_seen_also_when_it_is_written_later_or_in_inference_mode():
    scale = torch.full((2, 4), 128, dtype=torch.uint8)
    assert not is_wide(scale)
    scale[0, 0] = 129
    assert is_wide(scale)
    with torch.inference_mode():
        inference_scale = torch.full((2, 4), 128, dtype=torch.uint8)
        assert not is_wide(inference_scale)
        inference_scale[0, 0] = 129
        assert is_wide(inference_scale)


def test_a_weight_that_bf16_cannot_hold_is_refused_and_nan_is_not():
    assert is_wide(torch.tensor([252, 255, 0], dtype=torch.uint8))
    for byte in (253, 254):
        with pytest.raises(NotImplementedError, match="above 252 and not 255"):
            is_wide(torch.tensor([byte, 255, 0], dtype=torch.uint8))


@pytest.mark.parametrize("tokens", [3, 64])  # few rows, many rows
def test_such_a_weight_is_refused_before_the_first_launch(monkeypatch, tokens):
    gpu = SimpleNamespace(major=9, multi_processor_count=132)
    monkeypatch.setattr("megamoe.backends.triton.launches.properties", lambda device: gpu)
    backend, y, weights, buffer = on_cpu(tokens=tokens)
    options = {"activation_clamp": None, "fast_math": True}
    stages = [name for name, _ in backend.stages(y, weights, buffer, tokens, **options)]
    assert stages == ["dispatch", "linear1", "linear2", "combine"]
    weights[3][0, 0, 0] = 253
    with pytest.raises(NotImplementedError, match="above 252"):
        backend.stages(y, weights, buffer, tokens, **options)


@pytest.mark.parametrize(
    ("tokens", "kernels"),
    [(3, ["dispatch", "linear1", "linear2", "combine"]),
     (64, ["count", "rank", "spread", "linear1", "linear2", "combine"]), (0, [])],
)  # fmt: skip
def test_a_run_launches_its_stages_in_order_and_on_the_current_stream(monkeypatch, tokens, kernels):
    gpu = SimpleNamespace(major=9, multi_processor_count=132)
    monkeypatch.setattr("megamoe.backends.triton.launches.properties", lambda device: gpu)
    stream = SimpleNamespace(get_current_stream=lambda index: 77)
    monkeypatch.setattr("triton.runtime.driver", SimpleNamespace(active=stream))
    launches = []

    def note(launch, tensors, stream):
        launches.append((launch._kernel.fn.__name__, stream))

    monkeypatch.setattr(Launch, "__call__", note)
    monkeypatch.setattr(Launch, "compile", lambda launch, tensors, wait: True)
    backend, y, weights, buffer = on_cpu(tokens=tokens)
    call = {"activation_clamp": None, "fast_math": True}
    backend.run(y, weights, buffer, tokens, **call)
    assert launches == [(name, 77) for name in kernels]
    ran = launches.copy()
    launches.clear()
    for _, launch_stage in backend.stages(y, weights, buffer, tokens, **call):
        launch_stage()
    assert launches == ran


def test_what_another_process_compiles_comes_last_and_is_waited_for():
    calls = []

    def kernel(name, busy):
        def compiled(wait):
            calls.append((name, wait))
            return wait or not busy

        return compiled

    compile_all([kernel("a", busy=True), kernel("b", busy=False), kernel("c", busy=True)])
    assert calls == [
        ("a", False), ("b", False), ("c", False), ("a", False), ("c", False), ("a", True),
        ("c", False), ("c", True),
    ]  # fmt: skip


def test_a_kernel_is_compiled_by_one_process_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with _turn("k", wait=False) as first, _turn("k", wait=False) as second:
        assert first and not second
        with _turn("other", wait=False) as third:
            assert third
    with _turn("k", wait=False) as again:
        assert again


def test_staging_refuses_rows_that_are_not_dense():
    """What else it refuses, torch's version refuses too: ``test_staging.py``."""
    strided = torch.zeros(2, 256, dtype=torch.uint8)[:, ::2]
    with pytest.raises(ValueError, match=r"^x_fp8 has strides \(256, 2\); its rows must be cont"):
        prepare_megamoe_inputs(
            torch.ones(2, 128).bfloat16(), torch.ones(2, 1), torch.zeros(2, 1).long(), strided,
            torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, 1).long(), torch.zeros(2, 1),
        )  # fmt: skip


def test_remap_refuses_maps_that_do_not_fit():
    """Where torch's version raises, a kernel would read or write somebody else's memory."""
    out = interpreted(
        """
import torch
from megamoe.backends.triton.eplb import eplb_map_to_physical_and_record as remap
def told(call, *arguments):
    try:
        call(*arguments)
    except ValueError as error:
        return str(error)
ids = torch.zeros(4, 2, dtype=torch.int64)
load, table = torch.zeros(4, dtype=torch.int32), torch.tensor([[0, 2], [1, 3]])
counts = torch.tensor([2])
assert "logical_replica_count has 1 experts" in told(remap, ids, load, table, counts, True)
# Token 1 hashes to replica 4 of 5, of which the table knows two.
one = torch.tensor([[0], [0]])
physical = remap(one, load, table, torch.tensor([5, 2]), True)
assert (2654435769 % 5, physical.tolist()) == (4, [[0], [-1]]) and load.tolist() == [1, 0, 0, 0]
print("ok")
"""
    )
    assert out.strip() == "ok"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_refusal_is_one_line():
    with pytest.raises(BackendError, match=r"needs an NVIDIA GPU of compute capability 9\.0"):
        load_backend("triton", "cpu")


def test_a_kernel_is_launched_on_the_device_of_its_tensors(monkeypatch):
    """Triton launches on the current device, where a tensor of another may well be readable."""
    events = []

    @contextmanager
    def current(device):
        events.append(str(device))
        yield
        events.append("left")

    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda tensor: 0)  # there is none
    # On a machine with one GPU a fake tensor would ask for the second.
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda device: None, raising=False)
    with FakeTensorMode():
        here, there = (torch.empty(1, device=f"cuda:{i}") for i in range(2))

    class Kernel(dict):
        __hash__ = object.__hash__

    kernel = Kernel({(3,): lambda *arguments: events.append(arguments[1])})
    launch(kernel, (3,), there, 7)
    assert events == ["cuda:1", 7, "left"]
    launch(kernel, (3,), here, 8)  # where Triton launches anyway
    assert events[3:] == [8]


class Compiled:
    """A kernel as Triton shows it, and as its own compiled form: says what it was given."""

    arg_names = ("x", "n", "BLOCK", "EARLY")
    hash = "h"

    def __init__(self):
        def kernel(x, n, BLOCK, EARLY=False): ...

        self.fn, self.signature, self.calls = kernel, inspect.signature(kernel), []

    def __getitem__(self, grid):
        def run(*arguments, **options):
            self.calls.append((grid, arguments[1:], options))
            return self

        return run


def test_the_fingerprint_has_the_kernels_and_not_their_imports(tmp_path):
    folder = ROOT / "megamoe/backends/triton/kernels"
    before = kernel_sources(folder)
    for path in folder.glob("*.py"):
        if path.stem == "__init__":
            continue
        copy = shutil.copytree(folder, tmp_path / path.stem, ignore=shutil.ignore_patterns("__py*"))
        text = path.read_text()
        (copy / path.name).write_text(f"import os\n{text}\n\ndef host_code():\n    pass\n")
        assert kernel_sources(copy) == before, path
        (copy / path.name).write_text(f"{text}\nA_CONSTANT = 1\n")
        assert kernel_sources(copy) != before, path
    (copy / "few.py").write_text(
        (folder / "few.py").read_text().replace("tl.static_range", "range")
    )
    assert kernel_sources(copy) != before  # in the body of a kernel


def test_device_code_is_in_the_folder_of_kernels_and_imports_no_launch():
    """Otherwise code that decides bits would not be in the fingerprint."""
    folder = ROOT / "megamoe/backends/triton"
    for path in folder.glob("*.py"):
        assert not re.search(r"^@(triton|gluon)\.", path.read_text(), re.MULTILINE), path
    for path in (folder / "kernels").glob("*.py"):
        for line in re.findall(r"^\s*(?:from|import) megamoe\S*.*", path.read_text(), re.MULTILINE):
            assert re.search(r"triton\.(kernels\.|packing )|triton import packing", line), (
                path,
                line,
            )


def test_what_was_compiled_is_launched_without_asking_triton_again():
    kernel, x = Compiled(), torch.zeros(64)
    for n, block in ((17, 8), (17, 8), (18, 8), (17, 4), (17, 8), (1, 8), (1.0, 8), (1, 8)):
        launch(kernel, (n,), x, n, num_warps=4, BLOCK=block)
    options, stream = {"num_warps": 4, "BLOCK": 8}, {"stream": None}
    assert kernel.calls == [
        ((17,), (17,), options),
        ((17, 1, 1), (17, 8, False), stream),
        ((18,), (18,), options),
        ((17,), (17,), {**options, "BLOCK": 4}),
        ((17, 1, 1), (17, 8, False), stream),
        ((1,), (1,), options),
        ((1.0,), (1.0,), options),  # no integer
        ((1, 1, 1), (1, 8, False), stream),
    ]
    for tensor in (x.int(), x.to("meta")):  # another dtype, another device
        launch(kernel, (17,), tensor, 17, num_warps=4, BLOCK=8)
        assert kernel.calls.pop() == ((17,), (17,), options)
    other = Compiled()
    launch(other, (17,), x, 17, num_warps=4, BLOCK=8)
    assert other.calls == kernel.calls[:1]


def test_an_address_that_is_no_multiple_of_16_is_a_question_each_time():
    """What serves aligned tensors may load 16 bytes at once; what serves others is slower."""
    kernel, x = Compiled(), torch.zeros(64)
    once = Launch(kernel, (1,), (None,), 5, BLOCK=8)
    for tensor in (x[1:], x, x[2:], x[4:]):
        once([tensor])
    request = ((1,), (5,), {"BLOCK": 8})
    assert kernel.calls == [request] * 3 + [((1, 1, 1), (5, 8, False), {"stream": None})]


@dataclass
class Box:
    """A description for TMA, which Triton checks when it is made."""

    base: torch.Tensor
    size: int = 16

    count = 0

    def __post_init__(self):
        Box.count += 1


def test_a_launch_describes_each_tensor_anew_and_holds_none(monkeypatch):
    monkeypatch.setattr(Box, "count", 0)
    boxes = []

    class Kernel(Compiled):
        def __getitem__(self, grid):
            run = super().__getitem__(grid)

            def noting(box, *arguments, **options):
                boxes.append(box)
                return run(box, *arguments, **options)

            return noting

    once = Launch(Kernel(), (1,), (Box,), 5, BLOCK=8)
    first, second = torch.zeros(16), torch.zeros(16)
    once([first])
    once([second])
    assert [box.base is t for box, t in zip(boxes, (first, second), strict=True)] == [True, True]
    assert [box.size for box in boxes] == [16, 16] and Box.count == 1
    refs = [weakref.ref(first), weakref.ref(second)]
    boxes.clear()
    del first, second
    assert [ref() for ref in refs] == [None, None]


def test_a_tensor_is_to_triton_its_dtype_and_whether_its_address_is_a_multiple_of_16():
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
    from triton.runtime.jit import native_specialize_impl

    from megamoe.backends.triton.kernels.layouts import TOKEN_BOX, WEIGHT_BOX

    hopper = make_backend(GPUTarget("cuda", 90, 32))

    def specialize(argument):
        return native_specialize_impl(hopper, argument, False, True, True)

    kinds = set()
    for dtype in (torch.uint8, torch.int32, torch.int64, torch.bfloat16, torch.float32):
        tensor = torch.zeros(256, dtype=dtype)
        aligned = [tensor, tensor[::2], tensor.view(16, 16).t(), tensor[16:], tensor[:0]]
        assert len({specialize(t) for t in aligned}) == 1
        assert specialize(tensor[1:]) != specialize(tensor)
        kinds |= {specialize(tensor), specialize(tensor[1:])}
    assert len(kinds) == 10
    for box, block, dtype in (
        (TOKEN_BOX, [128, 128], torch.bfloat16), (WEIGHT_BOX, [64, 32], torch.int16),
    ):  # fmt: skip
        rows = [torch.zeros(n, 256, dtype=dtype) for n in (128, 384)]
        assert len({specialize(TensorDescriptor.from_tensor(r, block, box)) for r in rows}) == 1


def test_the_launches_of_a_forward_are_made_once_and_by_all_that_decides_them(monkeypatch):
    gpu = SimpleNamespace(major=9, multi_processor_count=132)
    monkeypatch.setattr("megamoe.backends.triton.launches.properties", lambda device: gpu)
    call = Call(8, 384, 4, 512, 256, 2, 10.0, True, False, torch.device("cpu"))
    assert stages_of(call) is stages_of(replace(call))
    others = {
        "tokens": 9, "capacity": 768, "experts": 5, "hidden": 640, "inter": 384, "top_k": 3,
        "clamp": None, "fast_math": False, "wide": True, "device": torch.device("meta"),
    }  # fmt: skip
    assert set(others) == {f.name for f in fields(Call)}
    ids = {id(stages_of(replace(call, **{name: value}))) for name, value in others.items()}
    assert len(ids | {id(stages_of(call))}) == len(others) + 1
