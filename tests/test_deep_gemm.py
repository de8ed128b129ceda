"""The DeepGEMM backend without SM100: its bindings, its refusals, its layout. It has never run."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
import zipfile
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megamoe.backends import deep_gemm
from megamoe.backends.deep_gemm import (
    BUFFER,
    ESSENTIALS,
    FORWARD,
    NEEDS_SM100,
    STATS,
    DeepGemmBackend,
    ForeignSignature,
    UnsupportedSizes,
    bind,
)
from megamoe.cases.stored import load
from megamoe.commands.main import main
from megamoe.layer.capture import capture
from megamoe.layer.experts import DeepseekV4MegaMoEExperts
from megamoe.layer.symm_buffer import clear_symm_buffers

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
    module = SimpleNamespace(
        fp8_fp4_mega_moe=function("fp8_fp4_mega_moe", forward, calls),
        get_symm_buffer_for_mega_moe=function("get_buffer", buffer, calls, rows),
    )
    return module, calls


@pytest.fixture
def on_sm100(monkeypatch):
    """An SM100 GPU for all that is asked; no default process group, before or after."""
    monkeypatch.setattr(deep_gemm, "_capability", lambda device: 10)
    clear_symm_buffers()
    yield
    clear_symm_buffers()
    if dist.is_initialized():
        dist.destroy_process_group()


def small_problem(sizes: int = 128) -> Any:
    from megamoe.backends import simulate

    return simulate.problem(1, hidden=sizes, intermediate=sizes, top_k=2, experts=3, tokens=4)


@pytest.mark.parametrize("buffer", BUFFERS.values(), ids=BUFFERS)
@pytest.mark.parametrize("forward", FORMS.values(), ids=FORMS)
def test_every_published_form_is_called_with_the_same_meaning(on_sm100, forward, buffer):
    module, calls = package(forward, buffer)
    problem = small_problem()
    backend = DeepGemmBackend(module)
    has_stats = STATS in forward
    backend.stats = torch.zeros(3, dtype=torch.int32) if has_stats else None
    backend.forward(problem)
    sizes, call = calls
    assert sizes["group"].size() == 1
    assert [sizes[n] for n in BUFFER[1:]] == [3, problem.max_num_tokens, 2, 128, 128]
    assert call["l1_weights"][0].dtype == torch.int8
    assert call["l1_weights"][1].dtype == call["l2_weights"][1].dtype == torch.int32
    assert call["activation_clamp"] == problem.activation_clamp
    assert call["fast_math"] == problem.fast_math
    assert call["recipe"] == (1, 1, 32)
    if has_stats:
        assert call[STATS] is backend.stats


def refusing(module: Any, error: str, multiple: int = 512) -> Any:
    """``module``, whose buffer fails for every H or I that is no multiple of ``multiple``."""
    make = module.get_symm_buffer_for_mega_moe

    @functools.wraps(make)
    def picky(*sizes: Any, **options: Any) -> Any:
        if sizes[4] % multiple or sizes[5] % multiple:
            raise RuntimeError(error)
        rows = make(*sizes, **options)
        rows.x, rows.x_sf = torch.ones(384, 512, dtype=torch.int8), torch.ones(384, 4).int()
        return rows

    module.get_symm_buffer_for_mega_moe = picky
    return module


ASSERTION = "Assertion error (mega_moe.cuh:331): num_bytes % 16 == 0"


def test_a_layer_that_the_package_has_no_buffer_for_is_judged_in_larger_sizes(on_sm100):
    module, calls = package(*_latest())
    problem = small_problem()
    y = DeepGemmBackend(refusing(module, ASSERTION)).forward(problem)
    sizes, call = calls
    assert (sizes["hidden"], sizes["intermediate_hidden"]) == (512, 512)
    assert call["l1_weights"][0].shape == (3, 1024, 256)
    assert call["y"].shape == (4, 512) and y.shape == (4, 128) and y.is_contiguous()
    assert (call["sym_buffer"].x[:4, 128:] == 0).all()


def test_the_module_is_told_what_the_package_says_of_its_sizes(on_sm100):
    layer = experts(DeepGemmBackend(refusing(package(*_latest())[0], ASSERTION)), Ranks())
    with pytest.raises(UnsupportedSizes) as caught:
        layer.get_symm_buffer()
    message = "hidden size 128 and intermediate size 128: " + ASSERTION
    assert message in str(caught.value) and "multiples of 512" in str(caught.value)


@pytest.mark.parametrize(
    ("error", "multiple", "sizes"),
    [("CUDA error: out of memory", 512, 128), ("Assertion error (x): num_experts", 1024, 512)],
)
def test_another_failure_of_the_buffer_is_no_matter_of_sizes(on_sm100, error, multiple, sizes):
    """It must end in red, not in a skip."""
    backend = DeepGemmBackend(refusing(package(*_latest())[0], error, multiple))
    with pytest.raises(RuntimeError, match=f"^{re.escape(error)}$"):
        backend.forward(small_problem(sizes))


def test_a_counter_that_the_version_cannot_fill_is_refused(on_sm100):
    """The oldest form has no argument for it: the load would silently stay as it is."""
    module, calls = package(FORMS["DeepGEMM 7f2a703e"], BUFFERS["DeepGEMM 54e22612"])
    backend = DeepGemmBackend(module)
    backend.stats = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ForeignSignature, match=f"has no {STATS}"):
        backend.forward(small_problem())
    assert calls == []


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
    names = dict.fromkeys(("recipe", *ESSENTIALS))
    with pytest.raises(ForeignSignature, match=complaint) as refusal:
        bind(foreign, FORWARD, names, ESSENTIALS)
    assert f"fp8_fp4_mega_moe({parameters})" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("parameters", "complaint"),
    [
        (f"*, {HEAD}, activation_clamp, fast_math", "cannot be called by name"),
        (f"{HEAD}, activation_clamp, fast_math, /", "cannot be called by name"),
    ],
)
def test_a_signature_of_the_right_names_that_cannot_be_called_so_is_refused(parameters, complaint):
    foreign = function("fp8_fp4_mega_moe", parameters, [])
    with pytest.raises(ForeignSignature, match=complaint) as refusal:
        bind(foreign, FORWARD, dict.fromkeys(ESSENTIALS), ESSENTIALS)
    assert "\n" not in str(refusal.value)


def test_a_function_that_does_not_tell_its_signature_is_refused():
    class Compiled:
        __name__ = "fp8_fp4_mega_moe"
        __signature__ = "none"

        def __call__(self, *arguments):
            raise AssertionError("called")

    with pytest.raises(ForeignSignature) as refusal:
        bind(Compiled(), FORWARD, dict.fromkeys(ESSENTIALS), ESSENTIALS)
    assert str(refusal.value) == (
        "fp8_fp4_mega_moe does not tell its signature, so no call can be checked"
    )


GPUS = {"h100": (9, 0), "b200": (10, 0), "b300": (10, 3), "thor": (11, 0), "rtx-5090": (12, 0)}


@pytest.mark.parametrize("gpu", GPUS)
def test_only_the_sm100_family_is_taken_and_its_own_device_is_asked(monkeypatch, gpu):
    """Newer is not enough: the kernel's instructions are in no other family."""
    devices = []

    def capability(device):
        devices.append(device)
        return GPUS[gpu]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    module, _ = package(FORMS["DeepGEMM 7f2a703e"], BUFFERS["DeepGEMM 54e22612"])
    backend, third = DeepGemmBackend(module), torch.device("cuda", 3)
    if gpu in ("b200", "b300"):
        backend.ready(third)
    else:
        with pytest.raises(NotImplementedError, match=f"^{NEEDS_SM100}$"):
            backend.ready(third)
    assert devices == [third]


def test_tensors_on_the_cpu_are_refused_beside_an_sm100_too(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    with pytest.raises(NotImplementedError) as refusal:
        DeepGemmBackend(object()).forward(small_problem())
    assert str(refusal.value) == "DeepGEMM MegaMoE requires SM100 GPUs."


def test_a_missing_package_is_named_with_the_remedy(on_sm100, monkeypatch):
    monkeypatch.setitem(sys.modules, "deep_gemm", None)
    with pytest.raises(NotImplementedError, match="install DeepGEMM or sgl-deep-gemm"):
        DeepGemmBackend().package()


@pytest.mark.parametrize("name", ["get_symm_buffer_for_mega_moe", "fp8_fp4_mega_moe"])
def test_a_package_without_mega_moe_is_refused(on_sm100, name):
    module, _ = package(*_latest())
    delattr(module, name)
    module.__version__ = "2.1.1"
    with pytest.raises(NotImplementedError, match=rf"^deep_gemm 2\.1\.1 has no {name}; install"):
        DeepGemmBackend(module).forward(small_problem())


def test_the_suite_judges_its_layout_and_skips_what_needs_the_gpu(capsys):
    assert main(["check", "--backend", "deep_gemm", "--kind", "layout", "-n", "1"]) == 0
    if not torch.cuda.is_available():
        code = main(["check", "--backend", "deep_gemm", "--case", "forward/combine-as-a-tree"])
        assert code == 2  # nothing could be judged: never green
        assert "requires SM100" in capsys.readouterr().out


# --- in the module ------------------------------------------------------------------------------


class Ranks:
    """The face of a process group of two, of which this is rank 1."""

    def size(self) -> int:
        return 2

    def rank(self) -> int:
        return 1


def experts(backend: Any, group: Any = None, **changes: Any) -> DeepseekV4MegaMoEExperts:
    """Physical experts 3, 4 and 5 of six, replicas of the three logical ones."""
    sizes = {
        "num_experts": 6, "num_local_experts": 3, "experts_start_idx": 3, "top_k": 2,
        "hidden_size": 128, "intermediate_size": 128, "prefix": "layers.0.ffn.experts",
        "num_logical_experts": 3,
    }  # fmt: skip
    return DeepseekV4MegaMoEExperts(8, group=group, backend=backend, **sizes | changes)


def replicas(layer: DeepseekV4MegaMoEExperts) -> torch.Tensor:
    """Logical 0, 1, 2 are served by physical 3, 1, 5; the load of all six."""
    counts = torch.zeros(1, 6, dtype=torch.int32)
    physical = torch.tensor([[[3], [1], [5]]])
    layer.set_eplb_state(0, counts, physical, torch.ones(1, 3, dtype=torch.int64))
    return counts


def test_a_group_is_given_the_ids_of_all_ranks(on_sm100):
    """The kernel looks for an expert on rank ``id // 3``: a local id would go to rank 0."""
    module, calls = package(*_latest())
    group = Ranks()
    layer = experts(DeepGemmBackend(module), group)
    layer.finalize_weights(without_loader=True)
    ids = torch.tensor([[0, 5], [4, -1], [3, 6]])
    layer(torch.ones(3, 128).bfloat16(), torch.ones(3, 2), ids, activation_clamp=10.0)
    sizes, call = calls
    assert sizes["group"] is group
    assert sizes["num_experts"] == 6
    assert call["l1_weights"][0].shape[0] == 3
    staged = call["sym_buffer"].topk_idx[:3]
    assert staged.tolist() == [[0, 5], [4, -1], [3, -1]]  # 6 is nobody's


def test_replicas_on_other_ranks_are_reached(on_sm100):
    module, calls = package(*_latest())
    layer = experts(DeepGemmBackend(module), Ranks())
    layer.finalize_weights(without_loader=True)
    counts = replicas(layer)
    ids = torch.tensor([[0, 1]])
    layer(torch.ones(1, 128).bfloat16(), torch.ones(1, 2), ids, activation_clamp=10.0)
    assert calls[1]["sym_buffer"].topk_idx[0].tolist() == [3, 1]
    assert counts.tolist() == [[0, 1, 0, 1, 0, 0]]


def test_a_rank_without_tokens_makes_the_call_that_the_others_wait_for(on_sm100):
    module, calls = package(*_latest())
    layer = experts(DeepGemmBackend(module), Ranks())
    layer.finalize_weights(without_loader=True)
    none = (torch.ones(0, 128).bfloat16(), torch.ones(0, 2), torch.ones(0, 2, dtype=torch.int64))
    y = layer(*none, activation_clamp=10.0)
    assert y.shape == calls[1]["y"].shape == (0, 128)


def test_a_captured_call_of_a_group_is_not_judged_by_this_rank_s_experts_alone(on_sm100, tmp_path):
    """Its ``y`` sums over all ranks; the experts of the others are not in the file."""
    module, _ = package(*_latest())
    layer = experts(DeepGemmBackend(module), Ranks())
    layer.finalize_weights(without_loader=True)
    for ids, is_judged in (([[0, 5]], False), ([[3, 5]], True)):
        with capture(layer, tmp_path / f"{is_judged}.safetensors") as c:
            layer(
                torch.ones(1, 128).bfloat16(), torch.ones(1, 2), torch.tensor(ids),
                activation_clamp=10.0,
            )  # fmt: skip
        assert ("y" in load(c.files[0]).outputs) == is_judged


def test_a_share_without_a_group_is_refused_when_the_layer_is_made():
    with pytest.raises(ValueError) as refusal:
        experts(DeepGemmBackend(object()))
    assert str(refusal.value) == (
        "layers.0.ffn.experts: backend deep_gemm sends tokens to the ranks that hold their "
        "experts, and only 3 of 6 experts are here; give the process group of all ranks as group="
    )


def test_a_share_without_a_group_is_refused_when_a_name_is_looked_up():
    layer = experts("deep_gemm")
    with pytest.raises(ValueError, match="only 3 of 6 experts are here"):
        layer.finalize_weights(without_loader=True)


@pytest.mark.parametrize("changes", [{"experts_start_idx": 0}, {"num_local_experts": 2}])
def test_experts_that_are_not_where_the_kernel_looks_are_refused(changes):
    with pytest.raises(ValueError, match=r"equal share of the 6 experts on each rank.*rank 1 of 2"):
        experts(DeepGemmBackend(object()), Ranks(), **changes)


@pytest.mark.parametrize("later", [False, True], ids=["first call", "after a good call"])
def test_what_does_not_fit_is_found_before_anything_is_written(on_sm100, later):
    """The counter may be set when the buffer is long made: load and buffer stay as they were."""
    module, calls = package(FORMS["DeepGEMM 7f2a703e"], BUFFERS["DeepGEMM 54e22612"])
    backend = DeepGemmBackend(module)
    layer = experts(backend, Ranks())
    layer.finalize_weights(without_loader=True)
    counts = replicas(layer)
    inputs = (torch.ones(1, 128).bfloat16(), torch.ones(1, 2), torch.tensor([[0, 1]]))
    if later:
        layer(*inputs, activation_clamp=10.0)
        calls[1]["sym_buffer"].topk_idx.fill_(77)
        counts.zero_()
    backend.stats = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ForeignSignature, match=f"has no {STATS}"):
        layer(*inputs, activation_clamp=10.0)
    assert not counts.any()
    if later:
        assert (calls[1]["sym_buffer"].topk_idx == 77).all()
    else:
        assert calls == []


def test_a_foreign_kernel_is_found_when_the_buffer_is_made(on_sm100):
    module, calls = package(f"{HEAD}, activation_clamp, fast_math, expert_map", _latest()[1])
    layer = experts(DeepGemmBackend(module), Ranks())
    with pytest.raises(ForeignSignature, match="requires expert_map"):
        layer.get_symm_buffer()
    assert calls == []


def test_layers_share_one_buffer_of_the_installed_package(on_sm100, monkeypatch):
    """Each layer looks the name up for itself; the buffer of a model is gigabytes."""
    module, calls = package(*_latest())
    monkeypatch.setitem(sys.modules, "deep_gemm", module)
    group = Ranks()
    one, two = experts("deep_gemm", group), experts("deep_gemm", group)
    assert one.get_symm_buffer() is two.get_symm_buffer()
    assert len(calls) == 1


def _latest() -> tuple[str, str]:
    return FORMS["sgl-deep-gemm 0.2.5"], BUFFERS["sgl-deep-gemm 0.2.5"]


@pytest.mark.slow
@pytest.mark.parametrize("version", ["0.1.5", "0.2.5"])
def test_the_real_package_binds(version, tmp_path):
    """Its source is read, not imported: it needs a GPU to be imported."""
    process = subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:",
         "--python-version", "3.12", "-d", tmp_path, f"sgl-deep-gemm=={version}"],
        capture_output=True, text=True,
    )  # fmt: skip
    wheels = list(tmp_path.glob("*.whl"))
    if not wheels:
        pytest.skip(
            f"sgl-deep-gemm {version} cannot be downloaded: {process.stderr.strip()[-100:]}"
        )
    source = zipfile.ZipFile(wheels[0]).read("deep_gemm/mega/__init__.py").decode()
    functions = {n.name: n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)}
    for name, leading, required in (
        ("fp8_fp4_mega_moe", FORWARD, ESSENTIALS),
        ("get_symm_buffer_for_mega_moe", BUFFER, ()),
    ):
        real = function(name, _plain(functions[name].args), [])
        names = dict.fromkeys(("recipe", "activation", *ESSENTIALS))
        assert set(required) <= set(bind(real, leading, names, required))


def _plain(arguments: ast.arguments) -> str:
    for argument in arguments.args:
        argument.annotation = None
    return ast.unparse(arguments)
