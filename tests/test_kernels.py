"""Adapters of published kernels without the kernels: the registry, wheels, calls and layouts.

No package of another project is needed. Fakes have the names and signatures of the published ones.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import megamoe
from megamoe.backends import eager_fp8_block, eager_w4a8_token
from megamoe.commands.kernels import here
from megamoe.commands.main import main
from megamoe.kernels import (
    around,
    humming,
    registry,
    sgl_deep_gemm,
    triton_kernels_mxfp4,
    vllm_eplb,
    vllm_staging,
)
from megamoe.kernels.registry import Need, kernel, kernels
from megamoe.kernels.sglang_pre_dispatch import SglangPreDispatch
from megamoe.kernels.source import Source, execute
from megamoe.kernels.torch_grouped_mm import TorchGroupedMm
from megamoe.layer import launch_laws
from megamoe.spec import accumulators
from megamoe.spec.contract import CONTRACTS
from megamoe.spec.problem import Problem
from megamoe.worker.known import BUILTINS, KERNELS

ROOT = Path(__file__).parents[1]
CLASSES = {a.name for a in vars(accumulators).values() if isinstance(a, accumulators.Accumulator)}


# --- the registry ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", kernels())
def test_each_kernel_is_a_backend_and_claims_what_there_is(name):
    one = kernel(name)
    assert {**BUILTINS, **KERNELS}[name] == one.module
    assert callable(importlib.import_module(one.module).create)
    assert one.unknown_contracts == []
    assert one.accumulator in CLASSES
    assert one.evidence and one.theirs and one.ours and one.needs and one.arch


def test_each_adapter_is_in_the_registry():
    assert set(KERNELS) < set(kernels())


def test_the_table_imports_no_torch():
    code = "import sys; from megamoe.commands.main import main; main(['kernels']); "
    code += "main(['kernels', 'humming']); sys.exit('torch' in sys.modules)"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert process.returncode == 0, process.stderr
    assert all(f"\n{name}\t" in process.stdout for name in kernels())


def test_an_unknown_kernel_is_one_line(capsys):
    assert main(["kernels", "hummin"]) == 2
    assert "unknown kernel 'hummin'; did you mean humming?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("major", "reasons"),
    [(9, []), (None, ["no NVIDIA GPU seen; it needs compute capability 9.x"]),
     (10, ["the GPU has compute capability 10.x; it needs 9.x"])],
)  # fmt: skip
def test_the_gpu_is_one_of_the_needs(major, reasons):
    one = SimpleNamespace(**vars(kernel("humming")))
    variant = registry.Kernel(**{**vars(one), "needs": (), "contracts": ("2026-11",)})
    assert variant.lacks(lambda: major) == reasons


def test_a_package_that_is_missing_says_how_to_get_it(monkeypatch):
    need = Need("no-such-kernel", "no-such-kernel==1.2")
    assert (need.installation(), need.missing()) == (
        "", "no package no-such-kernel: pip install no-such-kernel==1.2"
    )  # fmt: skip
    assert Need("no-such", "x", other=("numpy",)).installation().startswith("numpy ")
    from_source = Need("no-such", "build it from source")
    assert from_source.missing() == "no package no-such: build it from source"


def test_a_wheel_stands_in_for_an_installation(monkeypatch, tmp_path):
    need = Need("vllm", "vllm", wheel="MEGAMOE_VLLM_WHEEL")
    file = tmp_path / "vllm-0.24.0-cp38-abi3-linux.whl"
    monkeypatch.setenv("MEGAMOE_VLLM_WHEEL", str(file))
    assert need.installation() == ""
    assert need.missing() == f"MEGAMOE_VLLM_WHEEL={file}: no such file; name the wheel of vllm"
    file.write_bytes(b"no zip")
    assert need.installation() == "vllm 0.24.0 (wheel)"
    with pytest.raises(NotImplementedError, match=r"MEGAMOE_VLLM_WHEEL=.*not a zip file"):
        Source.of(need)


def test_a_contract_that_this_megamoe_lacks_is_a_reason():
    variant = registry.Kernel(
        **{**vars(kernel("humming")), "needs": (), "contracts": ("none-such",)}
    )
    assert variant.lacks(lambda: 9) == ["contract none-such is not in this megamoe"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_the_script_says_why_a_kernel_is_not_judged_and_that_none_was(tmp_path):
    process = subprocess.run(
        [ROOT / "tools/judge_kernels.sh", "humming"], capture_output=True, text=True, timeout=60,
        env={**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable},
    )  # fmt: skip
    line, last = process.stdout.splitlines()
    assert line.startswith("humming: not judged: no package humming-kernels: pip install")
    assert (last, process.returncode) == ("no kernel was judged", 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize(
    "name", ["sgl-deep-gemm", "humming", "triton-kernels-mxfp4", "sglang-pre-dispatch"]
)
def test_an_adapter_refuses_in_the_words_of_the_registry(name):
    one = kernel(name)
    with pytest.raises(NotImplementedError) as caught:
        importlib.import_module(one.module).create("cuda")
    assert str(caught.value) == "; ".join(one.lacks(lambda: None))


# --- files of a wheel ------------------------------------------------------------------------

STAGING = """
import torch
from vllm.triton_utils import tl, triton
from vllm.model_executor.layers.quantization.utils.quant_utils import kMxfp8Dynamic

def prepare_megamoe_inputs(hidden_states, topk_weights, topk_ids, x, x_sf, a, b{more}):
    assert x.dtype == torch.float8_e4m3fn and kMxfp8Dynamic.scale.group_shape.col == 32
    x.copy_(hidden_states)
"""
ROUTER = """
import torch
from vllm.distributed.eplb.eplb_state import EplbLayerState
from vllm.platforms import current_platform
from vllm.v1.worker.ubatching import dbo_current_ubatch_id

class Router(EplbLayerState):
    state: EplbLayerState | None = None

assert current_platform.is_cuda_alike()

def eplb_map_to_physical_and_record(topk_ids, expert_load_view, logical_to_physical_map,
                                    logical_replica_count, record_enabled{more}):
    expert_load_view += 1
    return topk_ids + 1{use}
"""


@pytest.fixture
def wheel(monkeypatch, tmp_path):
    """``wheel({name: text})``: vLLM's wheel with these files, and no GPU check."""

    def write(files):
        file = tmp_path / "vllm-9.9.0-py3-none-any.whl"
        with zipfile.ZipFile(file, "w") as archive:
            for name, text in files.items():
                archive.writestr(name, text)
        monkeypatch.setenv("MEGAMOE_VLLM_WHEEL", str(file))

    return write


@pytest.mark.parametrize(
    ("more", "contracts"), [("", ("2026-06",)), (", is_padding=None", ("2026-09", "2026-11"))]
)
def test_vllms_staging_is_called_from_its_wheel(wheel, more, contracts):
    wheel({"vllm/models/nvidia/ops/prepare_megamoe.py": STAGING.format(more=more)})
    backend = vllm_staging.VllmStaging()
    assert backend.contracts == contracts
    codes = torch.zeros(1, 128, dtype=torch.uint8)
    backend.prepare(torch.full((1, 128), 2.0, dtype=torch.bfloat16), None, None, codes, *"abc")
    assert codes.unique().tolist() == [0x40]
    assert backend.fingerprint()["options"] == "vllm 9.9.0 (wheel)"
    assert not [name for name in sys.modules if name.partition(".")[0] == "vllm"]


@pytest.mark.parametrize(
    ("more", "use", "contracts"),
    [("", "", ("2026-06",)),
     (", num_unpadded_tokens=None", " * num_unpadded_tokens", ("2026-09", "2026-11"))],
)  # fmt: skip
def test_vllms_remap_is_called_from_its_wheel(wheel, more, use, contracts):
    name = "vllm/model_executor/layers/fused_moe/router/base_router.py"
    wheel({name: ROUTER.format(more=more, use=use)})
    backend = vllm_eplb.VllmEplb()
    assert backend.contracts == contracts
    load, last = torch.zeros(2), [torch.tensor(3)] if more else []
    assert backend.eplb_map(torch.tensor([5]), load, None, None, None, *last).item() == (
        8 if more else 6
    )
    assert load.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("files", "message"),
    [({"vllm/a.py": ""}, "vllm 9.9.0 .wheel. has no vllm/"),
     ({f"vllm/{one}/prepare_megamoe.py": "" for one in "ab"}, "has several of"),
     ({"vllm/a/prepare_megamoe.py": "def prepare_megamoe_inputs(x): pass"}, "does not begin with")],
)  # fmt: skip
def test_another_vllm_is_refused_with_one_line(wheel, files, message):
    wheel(files)
    with pytest.raises(NotImplementedError, match=message):
        vllm_staging.VllmStaging()


def test_the_interpreter_does_not_judge_staging(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(NotImplementedError, match="casts to E4M3 wrongly"):
        vllm_staging.create("cpu")


def test_a_real_package_comes_back_after_the_stand_ins(tmp_path, monkeypatch):
    real = SimpleNamespace(here=1)
    monkeypatch.setitem(sys.modules, "engine", real)
    (tmp_path / "m.py").write_text("from engine.deep import Name\nmade = Name\n")
    module = execute(tmp_path / "m.py", "megamoe_foreign_test", {}, ("engine",))
    assert isinstance(module.made, type)
    assert sys.modules["engine"] is real and "engine.deep" not in sys.modules
    (tmp_path / "m.py").write_text("raise ValueError('no')")
    with pytest.raises(ValueError, match="no"):
        execute(tmp_path / "m.py", "megamoe_foreign_test", {}, ("engine",))
    assert sys.modules["engine"] is real and "megamoe_foreign_test" not in sys.modules


# --- calls -----------------------------------------------------------------------------------


def block_problem(**more):
    e, h, i = 2, 512, 256
    fields = {
        "weight_format": "fp8-block", "num_tokens": 1, "num_experts": e, "activation_clamp": 7.0,
        "fast_math": False, "hidden_states": torch.ones(1, h, dtype=torch.bfloat16),
        "topk_ids": torch.tensor([[1, -1]]), "topk_weights": torch.full((1, 2), 1.5),
        "w13_weight": torch.zeros(e, 2 * i, h, dtype=torch.uint8),
        "w13_weight_scale": torch.ones(e, 4, 4), "w2_weight_scale": torch.ones(e, 4, 2),
        "w2_weight": torch.zeros(e, h, i, dtype=torch.uint8),
        "buffer_sizes": SimpleNamespace(num_experts=e, max_num_tokens=1, top_k=2, hidden_size=h,
                                        intermediate_size=i),
    }  # fmt: skip
    return SimpleNamespace(**{**fields, **more})


class FakeSgl:
    """The functions of sgl-deep-gemm 0.1.5 with its signatures."""

    __version__ = "0.1.5"

    def __init__(self):
        self.calls = {}

    def transform_weights_for_mega_moe_sm90(self, l1_weights, l2_weights):
        return l1_weights, l2_weights

    def get_symm_buffer_for_mega_moe(
        self, group, num_experts, num_max_tokens_per_rank, num_topk, hidden, intermediate_hidden,
    ):  # fmt: skip
        self.calls["sizes"] = (
            num_experts, num_max_tokens_per_rank, num_topk, hidden, intermediate_hidden
        )  # fmt: skip
        tokens, topk = num_max_tokens_per_rank, num_topk
        return SimpleNamespace(
            x=torch.zeros(tokens, hidden, dtype=torch.uint8).view(torch.float8_e4m3fn),
            x_sf=torch.zeros(tokens, hidden // 128),
            topk_idx=torch.zeros(tokens, topk, dtype=torch.int64),
            topk_weights=torch.zeros(tokens, topk),
        )

    def mega_moe_pre_dispatch_sm90(
        self, x, topk_idx, topk_weights, buf_x, buf_x_sf, buf_topk_idx, buf_topk_weights,
        num_tokens, group_size=128, routed_scaling_factor=1.0,
    ):  # fmt: skip
        self.calls["dispatch"] = (topk_idx.dtype, num_tokens, group_size)
        buf_x[:num_tokens] = x.to(buf_x.dtype)
        buf_topk_weights[:num_tokens] = topk_weights

    def fp8_mega_moe(
        self, y, l1_weights, l2_weights, sym_buffer, cumulative_local_expert_recv_stats=None,
        recipe=(128, 128, 128), activation="swiglu", activation_clamp=None, fast_math=True,
    ):  # fmt: skip
        stats = cumulative_local_expert_recv_stats
        self.calls["call"] = (stats.dtype, len(stats), recipe, activation_clamp, fast_math)
        y.copy_(sym_buffer.x[: len(y)].bfloat16() * sym_buffer.topk_weights[: len(y), :1])


def test_sgl_deep_gemm_is_called_as_its_source_demands(monkeypatch):
    monkeypatch.setattr(sgl_deep_gemm, "one_rank", lambda device: "one")
    package = FakeSgl()
    backend = sgl_deep_gemm.SglDeepGemm("cpu", package)
    y = backend.forward(block_problem())
    assert y.unique().tolist() == [1.5] and y.dtype == torch.bfloat16
    assert package.calls == {
        "sizes": (2, 1, 2, 512, 256), "dispatch": (torch.int32, 1, 128),
        "call": (torch.int32, 2, (128, 128, 128), 7.0, False),
    }  # fmt: skip
    assert backend.fingerprint()["sources"] == "0.1.5"


def test_sgl_deep_gemm_has_the_run_face_that_laws_of_launch_need(monkeypatch):
    monkeypatch.setattr(sgl_deep_gemm, "one_rank", lambda device: "one")
    backend = sgl_deep_gemm.SglDeepGemm("cpu", FakeSgl())
    runs = list(launch_laws.variants(backend, block_problem(), "stale-bytes"))
    assert len(runs) == 3
    assert all(y.unique().tolist() == [1.5] for _, y, _ in runs)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [({"weight_format": "mxfp4"}, NotImplementedError, "no conversion between the two is exact"),
     ({"w2_weight_scale": torch.ones(2, 1, 2)}, ValueError, r"give float32 \(2, 4, 2\)"),
     ({"w13_weight_scale": torch.ones(2, 2, 1).double()}, ValueError, "float32"),
     ({"w2_weight": torch.zeros(2, 512, 128, dtype=torch.uint8)}, NotImplementedError,
      "I in multiples of 256, not 512 and 128"),
     ({"w2_weight": torch.zeros(2, 256, 256, dtype=torch.uint8)}, NotImplementedError,
      "H in multiples of 512 and")],
)  # fmt: skip
def test_other_weights_are_refused(change, kind, message):
    with pytest.raises(kind, match=message):
        sgl_deep_gemm.block_weights(block_problem(**change))


class OldSgl(FakeSgl):
    """0.1.4: no pre-dispatch."""

    __version__ = "0.1.4"
    mega_moe_pre_dispatch_sm90 = None


def test_an_older_sgl_deep_gemm_has_its_contract_and_is_staged_for(monkeypatch):
    monkeypatch.setattr(sgl_deep_gemm, "one_rank", lambda device: "one")
    package = OldSgl()
    assert sgl_deep_gemm.suitable(package) is package
    backend = sgl_deep_gemm.SglDeepGemm("cpu", package)
    assert backend.contracts == ("sgl-sm90-0.1.4",)
    assert backend.forward(block_problem()).unique().tolist() == [448 * 1.5]  # the code of amax
    (buffer,) = backend._buffers.values()
    assert buffer.x_sf.unique().tolist() == [torch.tensor(1 / 448).item()]
    assert buffer.topk_idx.tolist() == [[1, -1]]


def test_what_is_staged_for_an_older_sgl_deep_gemm_is_the_contract_s():
    hidden = megamoe.problem(
        tokens=4, hidden=512, intermediate=128, experts=1, top_k=1, weight_format="fp8-block",
        hidden_states={"spread": 30, "patch": [
            {"token": 1, "channel": 3, "bits": 0x7FC0}, {"token": 3, "count": 256, "bits": 0},
            {"token": 2, "channel": 200, "bits": 0xFF80}]},
    ).hidden_states  # fmt: skip
    codes, scale = sgl_deep_gemm.staged(hidden)
    right, right_scale = eager_fp8_block.stage(hidden, CONTRACTS["sgl-sm90-0.1.4"])
    nan = (right & 0x7F) == 0x7F
    assert torch.equal(scale, right_scale) and nan.any()
    assert torch.equal(codes.view(torch.uint8)[~nan], right[~nan])
    assert ((codes.view(torch.uint8)[nan] & 0x7F) == 0x7F).all()


@pytest.mark.parametrize(
    ("version", "revision"),
    [("0.1.3", "sgl-sm90-0.1.4"), ("0.1.4.post1", "sgl-sm90-0.1.4"), ("0.1.5rc2", "sgl-sm90"),
     ("0.2.5", "sgl-sm90"), ("of unknown version", "sgl-sm90")],
)  # fmt: skip
def test_the_contract_of_sgl_deep_gemm_follows_its_version(version, revision):
    assert sgl_deep_gemm.contract_of(version).revision == revision


def test_a_version_without_the_functions_is_refused():
    old = SimpleNamespace(__version__="0.1.2", fp8_mega_moe=FakeSgl.fp8_mega_moe)
    with pytest.raises(NotImplementedError, match=r"0\.1\.2 has no get_symm_buffer_for_mega_moe"):
        sgl_deep_gemm.suitable(old)
    new = FakeSgl()
    assert sgl_deep_gemm.suitable(new) is new
    new.fp8_mega_moe = lambda y: None
    with pytest.raises(NotImplementedError, match="takes no cumulative_local_expert"):
        sgl_deep_gemm.suitable(new)


def library_that_lacks(symbol, library):
    """Compile a library with one function, which calls a function that nobody has."""
    text = f"int {symbol}(void); int call(void) {{ return {symbol}(); }}\n"
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", library]
    subprocess.run(command, input=text, text=True, check=True)


def test_a_library_for_another_torch_is_refused_before_the_package_loads_it(tmp_path, monkeypatch):
    """The package's loader binds late, and the linker never looks at a loaded library again."""
    library_that_lacks("_ZN3c106absentEv", tmp_path / "_C.so")

    def load(name):
        if name == "deep_gemm":
            ctypes.CDLL(str(tmp_path / "_C.so"), os.RTLD_LAZY)
        return FakeSgl()

    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(sgl_deep_gemm, "require", lambda facts: None)
    monkeypatch.setattr(sgl_deep_gemm.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(sgl_deep_gemm.importlib, "import_module", load)
    with pytest.raises(
        NotImplementedError, match="undefined symbol: _ZN3c106absentEv; it was comp"
    ):
        sgl_deep_gemm.create()


@pytest.mark.parametrize(
    ("error", "answer"),
    [(NotImplementedError("built for another torch"), "no: built for another torch"),
     (OSError("no\nlibrary"), "no: it cannot be loaded: OSError: no library"), (None, "yes")],
)  # fmt: skip
def test_a_compiled_package_is_here_if_its_adapter_takes_it(error, answer, monkeypatch):
    def create(device):
        if error:
            raise error

    monkeypatch.setitem(sys.modules, "stand_in", SimpleNamespace(create=create))
    one = registry.Kernel(**{
        **vars(kernel("sgl-deep-gemm")), "needs": (), "arch": (9,), "module": "stand_in",
    })  # fmt: skip
    monkeypatch.setattr(registry, "gpu_major", lambda: 9)
    assert here(one) == answer
    monkeypatch.setattr(registry, "gpu_major", lambda: None)
    assert here(one).startswith("no: no NVIDIA GPU seen"), "and nothing is loaded"


def test_humming_names_the_compiler_that_the_environment_names(monkeypatch):
    monkeypatch.delenv("HUMMING_COMPILER", raising=False)
    assert humming.Humming().fingerprint()["options"] == "indexed"
    monkeypatch.setenv("HUMMING_COMPILER", "nvcc")
    assert humming.Humming().fingerprint()["options"] == "indexed, HUMMING_COMPILER=nvcc"


def test_a_library_that_lacks_something_else_is_left_to_its_package(tmp_path):
    library_that_lacks("absent", tmp_path / "_C.so")
    sgl_deep_gemm.check_links(tmp_path / "_C.so")
    sgl_deep_gemm.check_links(tmp_path / "none.so")


def test_an_import_that_fails_is_one_line_with_its_cause(monkeypatch):
    def load(name):
        raise OSError("Could not load this library: _C.so") from OSError("undefined symbol: absent")

    monkeypatch.setattr(sgl_deep_gemm, "require", lambda facts: None)
    monkeypatch.setattr(sgl_deep_gemm.importlib, "import_module", load)
    with pytest.raises(NotImplementedError, match="undefined symbol: absent; it was compiled for"):
        sgl_deep_gemm.create()


@pytest.mark.parametrize(("columns", "count"), [(64, 4), (128, 4), (129, 8), (4096, 8)])
def test_a_narrow_matrix_gets_a_layout_that_its_block_can_have(columns, count):
    assert triton_kernels_mxfp4.warps(columns) == count
    block = 128 if count == 4 else 256  # compute_block_n of opt_flags_nvidia.py
    assert block % (2 * count * 2 * 8) == 0


@pytest.mark.parametrize("words", [1, 3, 4, 5])
def test_sglangs_rows_of_scales_begin_at_16_bytes(words):
    call = {}

    def dispatch(x, ids, weights, buf_x, buf_sf, idx, w, quant_group_size):
        call.update(ids=ids.dtype, codes=buf_x.dtype, group=quant_group_size)
        assert buf_sf.shape == (2, words) and buf_sf.stride(1) == 1
        assert buf_sf.stride(0) * 4 % 16 == 0
        buf_sf.copy_(torch.arange(2 * words).view(2, words))

    hidden, sf = torch.zeros(1, 128 * words), torch.full((2, words), 9, dtype=torch.int32)
    SglangPreDispatch(dispatch).prepare(
        hidden, None, torch.zeros(1, 1, dtype=torch.int64),
        torch.zeros(2, 128 * words, dtype=torch.uint8), sf, None, None,
    )  # fmt: skip
    assert call == {"ids": torch.int32, "codes": torch.float8_e4m3fn, "group": 32}
    assert sf.tolist() == [list(range(words)), [9] * words]  # no row beyond the token


class AsOnCuda(TorchDispatchMode):
    """torch's division by a number as CUDA has it: a product with the number's reciprocal."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.div.Tensor and not isinstance(args[1], torch.Tensor):
            return args[0] * (1 / torch.tensor(args[1], dtype=args[0].dtype))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "stage",
    [sgl_deep_gemm.staged, around.per_row,
     lambda rows: eager_fp8_block.stage(rows, CONTRACTS["sgl-sm90"]),
     lambda rows: eager_w4a8_token.quantise(rows, CONTRACTS["w4a8-token"])],
    ids=["sgl-deep-gemm", "around", "eager-fp8-block", "eager-w4a8-token"],
)  # fmt: skip
def test_a_scale_is_a_quotient_on_cuda_too(stage):
    rows = torch.arange(1, 65).bfloat16()[:, None].expand(-1, 128).contiguous()
    here = stage(rows)
    with AsOnCuda():
        there = stage(rows)
        assert ((rows[:, 0].float() / 448.0) != rows[:, 0].float().div(torch.tensor(448.0))).any()
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(here, there, strict=True))


def test_humming_and_torch_get_one_scale_a_row():
    rows = torch.tensor([[0.0, 0.0], [-7.0, 1.75], [448.0, 1.0]]).bfloat16()
    codes, scale = around.per_row(rows)
    assert scale.flatten().tolist() == [torch.tensor(1e-30).item(), 7 / 448, 1.0]
    assert codes.float().tolist() == [[0, 0], [-448, 112], [448, 1]]


# --- what stands around two products ---------------------------------------------------------


def test_routes_leave_out_foreign_ids_and_sort_by_expert():
    ids = torch.tensor([[2, -1], [0, 2], [3, 9]])
    routes = around.Routes.of(ids, 4)
    assert routes.expert.tolist() == [0, 2, 2, 3]
    assert list(zip(routes.token.tolist(), routes.slot.tolist(), strict=True)) == [
        (1, 0), (0, 0), (1, 1), (2, 0),
    ]  # fmt: skip
    assert routes.ends.tolist() == [1, 1, 3, 4] and routes.ends.dtype == torch.int32


def test_mxfp4_becomes_bfloat16_exactly_or_not_at_all():
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    packed = torch.tensor(
        [[lo | hi << 4 for lo, hi in zip(range(16), range(15, -1, -1), strict=True)]]
    )
    packed = packed.view(1, 1, 16).to(torch.uint8)
    for byte in (2, 127, 251):
        weights = around.decoded(packed, torch.tensor([[[byte]]], dtype=torch.uint8)).double()
        table = [*values, *(-v for v in values)]
        expected = [table[n] * 2.0 ** (byte - 127) for lo in range(16) for n in (lo, 15 - lo)]
        assert weights.flatten().tolist() == expected
    for byte in (0, 1, 252, 255):
        with pytest.raises(NotImplementedError, match="from 2 to 251"):
            around.decoded(packed, torch.tensor([[[byte]]], dtype=torch.uint8))
    zeros = torch.zeros_like(packed)
    for byte, is_nan in ((0, False), (254, False), (255, True)):  # weights of an unused expert
        weights = around.decoded(zeros, torch.tensor([[[byte]]], dtype=torch.uint8))
        assert weights.isnan().all() if is_nan else weights.eq(0).all()


def test_mxfp4_becomes_e4m3_exactly_or_not_at_all():
    packed = torch.tensor([[n | (n + 8) << 4 for n in range(8)] * 2], dtype=torch.uint8)
    packed = packed.view(1, 1, 16).repeat(2, 2, 2)  # two experts of two rows of two groups
    byte = torch.tensor([127, 113, 120, 127, 9, 9, 9, 9], dtype=torch.uint8).view(2, 2, 2)
    codes, factor = around.folded(packed, byte)
    assert codes.dtype == torch.float8_e4m3fn and factor.tolist() == [2.0**-6, 2.0**-124]
    exact = around.decoded(packed, byte).double()
    assert torch.equal(codes.double() * factor.double()[:, None, None], exact)
    byte[0, 0, 1] = 112
    with pytest.raises(NotImplementedError, match="15 apart, the largest 127: E4M3 holds"):
        around.folded(packed, byte)
    packed[0, 0, 16:] = 0x80  # 0 and -0: of zeros the scale does not matter
    assert around.folded(packed, byte)[0][0, 0, 32:].eq(0).all()
    byte[0, 0, 1] = 0  # too small a byte for bfloat16's numbers, but of zeros
    assert around.decoded(packed, byte)[0, 0, 32:].eq(0).all()
    assert around.folded(packed, byte.clamp(max=3))[1].tolist() == [2.0**-130] * 2  # subnormal
    byte[1, 1, 1] = 255
    with pytest.raises(NotImplementedError, match="byte 255 is NaN"):
        around.folded(packed, byte)


def integers(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def small_problem(ids, clamp=None):
    """No order of addition matters: linear 1 sums integers times a power of two, and linear 2 has
    one weight that is not zero in each row, of expert ``x``: ``(x + 1) / 2``."""
    e, h, i, tokens = 3, 128, 128, len(ids)
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randint(-2, 3, (tokens, h), generator=generator).bfloat16()
    diagonal = torch.zeros(e, h, i // 2, dtype=torch.uint8)
    for x in range(e):
        for n in range(h):
            diagonal[x, n, n // 2] = (x + 1) << 4 * (n % 2)
    return Problem(
        hidden, torch.tensor(ids), torch.rand(tokens, len(ids[0]), generator=generator),
        integers(1, e, 2 * i, h // 2), torch.full((e, 2 * i, h // 32), 120, dtype=torch.uint8),
        diagonal, torch.full((e, h, i // 32), 127, dtype=torch.uint8),
        clamp, False, 8,
    )  # fmt: skip


@pytest.mark.parametrize("clamp", [None, 0.5])
def test_torchs_grouped_product_gives_each_slot_its_experts_row(clamp):
    p = small_problem([[0, 2], [-1, 2], [2, 9]], clamp)
    one = around.decoded(p.w13_weight, p.w13_weight_scale).double()
    two = around.decoded(p.w2_weight, p.w2_weight_scale).double()
    y = TorchGroupedMm().forward(p)
    for token, experts in enumerate(p.topk_ids.tolist()):
        expected = torch.zeros(128, dtype=torch.float32)
        for slot, expert in enumerate(experts):
            if 0 <= expert < 3:
                gate_up = (one[expert] @ p.hidden_states[token].double()).bfloat16().float()
                gate, up = gate_up[:128], gate_up[128:]
                if clamp is not None:
                    gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
                acts = (gate / (1 + (-gate).exp()) * up).bfloat16()
                row = (two[expert] @ acts.double()).float().bfloat16().float()
                expected = expected + row * p.topk_weights[token, slot]
        assert torch.equal(y[token], expected.bfloat16()), token
    assert y[1].abs().sum() > 0


def test_a_call_that_asks_for_more_is_declined():
    p = small_problem([[0]])
    object.__setattr__(p, "activation", "situ")
    with pytest.raises(NotImplementedError, match="not situ"):
        TorchGroupedMm().forward(p)
