"""Problems as files: the format, capturing a module's call, judging it, making it a golden."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megamoe.backends.eager import EagerBackend
from megamoe.backends.simulate import problem
from megamoe.cases.stored import StoredError, StoredProblem, case_of, inputs_of, load, to_bytes
from megamoe.cases.stored_names import title
from megamoe.commands import main as cli
from megamoe.judge import Verdict
from megamoe.layer.capture import capture
from megamoe.layer.deep_gemm_experts import DeepGemmMegaMoEExperts, MegaMoEActivation
from megamoe.layer.engine_module import checkpoint_weights
from megamoe.layer.experts import DeepseekV4MegaMoEExperts
from megamoe.layer.kernel_weights import transform_weights
from megamoe.layer.symm_buffer import clear_symm_buffers
from megamoe.spec.contract import BASE, NEWEST, REVISIONS
from megamoe.spec.tensors import WEIGHTS
from megamoe.suite.at_hand import judge, judge_output
from tests.helpers.local import Local
from tests.helpers.mutated import many, mutated, result_or_one_line

pytestmark = pytest.mark.usefixtures("warm")
BAD = """
from megamoe.backends.eager import EagerBackend

class Bad(EagerBackend):
    name = "bad"
    def forward(self, problem):
        out = super().forward(problem)
        y = out["y"].clone()
        y[-1, 70:] *= 2
        return {**out, "y": y}
"""


@pytest.fixture
def bad(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text(BAD)
    return f"{path}:Bad"


@pytest.fixture
def small():
    """4 tokens, 6 experts of which some are not used."""
    return problem(5, tokens=4, top_k=2, hidden=256, intermediate=128, experts=6)


@pytest.fixture
def file(tmp_path, small):
    path = tmp_path / "small.safetensors"
    path.write_bytes(to_bytes(StoredProblem(small, {}, {"from": "a test"})))
    return path


# --- the format -------------------------------------------------------------------------------


def test_a_problem_comes_back_as_it_was(file, small):
    record = load(file)
    for name, value in vars(small).items():
        actual = getattr(record.problem, name)
        same = torch.equal(actual, value) if isinstance(value, torch.Tensor) else actual == value
        assert same, name
    assert record.about == {"from": "a test"}


FEATURES = {
    "shared_recipe": {"size": 256}, "activation": "swiglustep", "activation_alpha": 1.5,
    "activation_beta": 0.25, "clamp": 3.5,
}  # fmt: skip


def test_a_problem_with_features_comes_back_whole_in_a_format_of_its_own(tmp_path):
    whole, path = problem(4, shared_output_recipe={}, **FEATURES), tmp_path / "p.safetensors"
    path.write_bytes(to_bytes(StoredProblem(whole)))
    back = load(path).problem
    assert set(back.arguments) == set(whole.arguments) and back.features == whole.features
    for name, value in whole.arguments.items():
        actual = getattr(back, name)
        assert torch.equal(actual, value) if isinstance(value, torch.Tensor) else actual == value, (
            name
        )
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["megamoe"])["format"] == 2


def test_a_problem_with_features_is_judged_from_its_file(tmp_path):
    for number, more in enumerate((FEATURES, {"shared_output_recipe": {}})):
        whole = problem(4, **more)
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(to_bytes(StoredProblem(whole)))
        contract = next(c for c in REVISIONS.values() if set(whole.features) <= {*c.features.value})
        verdict, _ = judge(load(path).problem, Local(EagerBackend(contract)))
        assert verdict.status == "pass", verdict.reason


def test_only_experts_that_are_used_are_in_the_file(tmp_path, small):
    small.topk_ids[:] = 3
    path = tmp_path / "one.safetensors"
    path.write_bytes(to_bytes(StoredProblem(small)))
    assert load_file(path)["input.w2_weight"].shape[0] == 1
    assert load(path).problem.num_experts == 6


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda t: t.pop("input.w2_weight"), "lacks input.w2_weight"),
        (lambda t: t.update({"input.topk_ids": t["input.topk_ids"].int()}), "expected torch.int64"),
        (lambda t: t.update({"input.topk_ids": t["input.topk_ids"] + 90}), "an id is outside"),
        (lambda t: t.update({"input.experts": t["input.experts"] * 0}), "not in the file"),
        (lambda t: t.update({"input.topk_weights": t["input.topk_weights"][:1]}), "expected"),
        (lambda t: t.update({"observed.z": torch.zeros(1)}), "observed.z is no stage"),
    ],
)
def test_a_file_that_is_none_is_refused_in_one_line(file, edit, says):
    with safe_open(file, "pt") as opened:
        meta = opened.metadata()
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, meta)
    with pytest.raises(StoredError, match=says):
        load(file)


def test_other_files_are_refused(tmp_path, capsys):
    (tmp_path / "a.safetensors").write_bytes(b"not one")
    save_file({"y": torch.zeros(1)}, tmp_path / "b.safetensors")
    for name, says in (
        ("a", "no safetensors file"),
        ("b", "holds an output and no problem; `megamoe explain CASE --actual"),
        ("c", "no such file"),
    ):
        assert cli.main(["replay", str(tmp_path / f"{name}.safetensors")]) == 2
        assert says in capsys.readouterr().err


def with_meta(file, document):
    """The same tensors with another metadata entry."""
    save_file(load_file(file), file, {"megamoe": document})


def meta_of(file):
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["megamoe"])


def test_whatever_stands_in_the_metadata(file):
    @many
    @given(mutated(meta_of(file)))
    def holds(document):
        with_meta(file, json.dumps(document))
        result_or_one_line(lambda: load(file).problem.num_experts + 1)

    holds()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_experts", 10**15, "num_experts is 1000000000000000; it must be an integer from 1 to"),
        ("num_experts", True, "num_experts is True; it must be an integer"),
        ("fast_math", 1, "fast_math is 1; it must be true or false"),
        ("activation_clamp", float("nan"), "activation_clamp is nan; it must be null or a number"),
        ("activation_clamp", -1, "activation_clamp is -1; it must be null or a number from 0 on"),
        ("max_num_tokens", 3, "max_num_tokens is 3, below its 4 tokens"),
        ("about", [], "about is a list of 0; it must be an object"),
        ("format", True, "has format True, this megamoe reads 1"),
    ],
)
def test_metadata_of_a_wrong_type_is_named(file, key, value, message):
    with_meta(file, json.dumps({**meta_of(file), key: value}))
    with pytest.raises(StoredError, match=f"small.safetensors: .*{message}"):
        load(file)


@pytest.mark.parametrize(
    ("about", "name"),
    [
        ({}, "f"),
        ({"reduced_from": "forward/a"}, "f (forward/a, reduced)"),
        ({"reduced_from": "g", "origin": "forward/a"}, "f (forward/a, reduced)"),
        ({"fuzz": {"seed": 3, "number": 7}}, "f (problem 7 of seed 3)"),
        ({"captured_from": "engine.layer.Experts"}, "f (a call of Experts)"),
        ({"reduced_from": "a\n\x1b[2J", "fuzz": 1}, "f (a??[2J, reduced)"),
    ],
)
def test_a_file_is_called_by_what_it_says_of_itself(about, name):
    assert title("f", about) == name


@pytest.mark.parametrize("text", ["{", "[]", "3", "[" * 100_000])
def test_metadata_that_is_no_object_is_one_line(file, text):
    with_meta(file, text)
    with pytest.raises(StoredError, match=r"its metadata is no (JSON|object).*; write it again"):
        load(file)


def test_an_input_that_no_problem_has_is_refused(file):
    meta = meta_of(file)
    save_file(
        {**load_file(file), "input.more": torch.zeros(1)}, file, {"megamoe": json.dumps(meta)}
    )
    with pytest.raises(StoredError, match=r"'input.more' is no input; record it again"):
        load(file)


@pytest.mark.timeout(60)
def test_a_fifo_a_folder_and_a_giant_are_one_line(tmp_path, monkeypatch, file):
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(StoredError, match=r"cannot be read as safetensors: .* is a fifo"):
        load(tmp_path / "a.safetensors")
    with pytest.raises(StoredError, match="is a directory, no regular file"):
        load(tmp_path)
    monkeypatch.setattr("megamoe.cases.stored.STORED_LIMIT", 1000)
    with pytest.raises(StoredError, match="has more than 1000 bytes, the most that is read"):
        load(file)


def test_whatever_a_case_says_of_its_stored_inputs(file, tmp_path, small):
    (tmp_path / "inputs").mkdir()
    inputs = file.rename(tmp_path / "inputs" / file.name)
    recipe = {"file": file.name, "sha256": hashlib.sha256(inputs.read_bytes()).hexdigest()}
    (tmp_path / "victim.safetensors").write_bytes(inputs.read_bytes())

    def inputs_by(document):
        case = case_of(small, "a", recipe=document)
        return inputs_of(replace(case, source=tmp_path / "cases/a.toml"))

    assert inputs_by(recipe)["max_num_tokens"] == small.max_num_tokens
    with pytest.raises(StoredError, match=r"must be the name of a file in golden/inputs"):
        inputs_by({**recipe, "file": "../victim.safetensors"})

    @many
    @given(mutated(recipe))
    def holds(document):
        if isinstance(document, dict):
            result_or_one_line(lambda: inputs_by({"kind": "stored", **document}))

    holds()


# --- replay -----------------------------------------------------------------------------------


def test_replay_judges_a_backend_on_the_file(file, bad, tmp_path, capsys):
    assert cli.main(["replay", str(file), "--backend", "eager"]) == 0
    assert cli.main(["replay", str(file), "--backend", bad, "--json", f"{tmp_path}/out.json"]) == 1
    out = capsys.readouterr().out
    assert "y: 186 of 1024 elements outside" in out and "channel" in out
    assert f"alone:  megamoe replay {file} --backend {bad}" in out
    assert json.loads((tmp_path / "out.json").read_text())["worst"]["token"] == 3


def test_replay_without_output_or_backend_says_what_to_do(file, capsys):
    assert cli.main(["replay", str(file)]) == 2
    assert f"`megamoe replay {file} --backend B` judges a backend's" in capsys.readouterr().err


# --- capture ----------------------------------------------------------------------------------


def module_of(p, backend=None, **sizes):
    """The engine's module, loaded with the problem's weights."""
    clear_symm_buffers()
    settings = {
        "num_experts": p.num_experts, "num_local_experts": p.num_experts, "experts_start_idx": 0,
    }  # fmt: skip
    module = DeepseekV4MegaMoEExperts(
        16, **settings | sizes, top_k=p.top_k, hidden_size=p.hidden_size,
        intermediate_size=p.intermediate_size, prefix="layers.3", backend=backend or EagerBackend(),
    )  # fmt: skip
    for name in WEIGHTS:
        getattr(module, name).data.copy_(getattr(p, name)[: module.num_local_experts])
    return module


def call(module, p):
    return module(
        p.hidden_states, p.topk_weights, p.topk_ids, activation_clamp=p.activation_clamp,
        fast_math=p.fast_math,
    )  # fmt: skip


def test_a_captured_call_is_the_problem_and_its_output_is_judged(tmp_path, small, capsys):
    module, path = module_of(small), tmp_path / "call.safetensors"
    module.finalize_weights(without_loader=True)
    with capture(module, path) as c:
        y = call(module, small)
        call(module, small)  # one call was asked for
    assert c.files == [path]
    record = load(path)
    assert torch.equal(record.outputs["y"], y)
    assert torch.equal(record.problem.w13_weight, small.w13_weight)
    assert record.problem.activation_clamp == 10.0 and record.about["prefix"] == "layers.3"
    assert cli.main(["replay", str(path)]) == 0
    assert "PASS" in capsys.readouterr().out
    wrong = {"y": y * 1.5}
    assert judge_output(record.problem, wrong, "fp32-ordered", contract=BASE).status == "fail"


@pytest.mark.parametrize("form", ["tensors", "function"])
def test_weights_that_are_given_stand_for_those_of_the_module(form, tmp_path, small):
    module, path = module_of(small), tmp_path / "call.safetensors"
    replacements = {name: getattr(small, name) ^ 1 for name in WEIGHTS}
    rows_of = lambda experts: {name: replacements[name][experts] for name in WEIGHTS}  # noqa: E731
    weights = replacements if form == "tensors" else rows_of
    module.finalize_weights(without_loader=True)
    with capture(module, path, weights=weights):
        call(module, small)
    experts = small.topk_ids.unique()
    assert torch.equal(load(path).problem.w2_weight[experts], replacements["w2_weight"][experts])


def test_kernel_side_weights_are_undone(small):
    w13, w13_sf, w2, w2_sf = transform_weights(*(getattr(small, name) for name in WEIGHTS))
    experts = torch.tensor([1, 4])
    engine = SimpleNamespace(
        _transformed_l1_weights=(w13.view(torch.int8), w13_sf),
        _transformed_l2_weights=(w2.view(torch.int8), w2_sf),
        w13_weight=None,
    )
    actual = checkpoint_weights(engine, experts)
    for name in WEIGHTS:
        assert torch.equal(actual[name], getattr(small, name)[experts]), name


def test_a_backends_own_form_is_undone_by_itself_or_refused(small):
    """Recorded as they lie there, the bits of another order would pass for a checkpoint's."""

    def other_order(w13, w13_sf, w2, w2_sf):
        return w13 ^ 0x55, w13_sf, w2 ^ 0x55, w2_sf

    weights = tuple(getattr(small, name) for name in WEIGHTS)
    backend = SimpleNamespace(name="mine", pack_weights=other_order)
    engine = SimpleNamespace(w13_weight=None, _weights=other_order(*weights), backend=backend)
    with pytest.raises(StoredError, match="backend mine keeps weights in a form of its own"):
        checkpoint_weights(engine, torch.tensor([1]))
    backend.unpack_weights = other_order
    actual = checkpoint_weights(engine, torch.tensor([1, 4]))
    for name, whole in zip(WEIGHTS, weights, strict=True):
        assert torch.equal(actual[name], whole[[1, 4]]), name


def test_what_triton_packed_is_unpacked(small):
    triton = pytest.importorskip(
        "megamoe.backends.triton.backend", reason="needs Triton: Linux only"
    )
    backend = triton.TritonBackend(torch.device("cpu"))  # packs anywhere
    module = module_of(small, backend=backend)
    module.finalize_weights(without_loader=True)
    assert module.w13_weight is None
    assert not torch.equal(module._weights[0], small.w13_weight)
    actual = checkpoint_weights(module, torch.tensor([1, 4]))
    for name in WEIGHTS:
        assert torch.equal(actual[name], getattr(small, name)[[1, 4]]), name


def test_ids_are_local_and_the_load_is_not_counted(tmp_path, small):
    # Experts 2 and 3 of 6 are here; logical l is served by physical 5 - l.
    small.topk_ids[:] = torch.tensor([[0, 1], [2, 3], [3, 5], [-1, 2]])
    module = module_of(small, num_local_experts=2, experts_start_idx=2)
    module.finalize_weights(without_loader=True)
    load_view = torch.zeros(1, 6, dtype=torch.int32)
    table = (5 - torch.arange(6)).view(1, 6, 1)
    module.set_eplb_state(0, load_view, table, torch.ones(1, 6, dtype=torch.int64))
    with capture(module, tmp_path / "c.safetensors"):
        call(module, small)
    # What the one real call counted, and no more.
    assert load_view.tolist() == [[1, 0, 2, 2, 1, 1]]
    ids = load(tmp_path / "c.safetensors").problem.topk_ids
    assert ids.tolist() == [[-1, -1], [1, 0], [0, -1], [-1, 1]]


def test_a_call_that_raises_is_kept(tmp_path, small):
    class Broken(EagerBackend):
        def forward(self, problem):
            raise RuntimeError("illegal memory access")

    module = module_of(small, Broken())
    module.finalize_weights(without_loader=True)
    with pytest.raises(RuntimeError), capture(module, tmp_path / "c.safetensors"):
        call(module, small)
    record = load(tmp_path / "c.safetensors")
    assert not record.outputs and torch.equal(record.problem.topk_ids, small.topk_ids)


def test_rows_and_calls_can_be_chosen(tmp_path, small):
    module = module_of(small)
    module.finalize_weights(without_loader=True)
    with capture(module, tmp_path / "c.safetensors", skip=1, calls=2, tokens=[2]) as c:
        for _ in range(4):
            call(module, small)
    assert [p.name for p in c.files] == ["c.safetensors", "c-1.safetensors"]
    record = load(c.files[1])
    assert torch.equal(record.problem.hidden_states, small.hidden_states[2:3])
    assert record.outputs["y"].shape == (1, 256) and record.about["call"] == 2


def test_no_call_is_an_error_and_so_is_another_module(tmp_path, small):
    with (
        pytest.raises(StoredError, match="no call was recorded"),
        capture(module_of(small), tmp_path / "c.safetensors"),
    ):
        pass
    with pytest.raises(StoredError, match="takes no hidden_states"):
        capture(torch.nn.Linear(1, 1), tmp_path / "c.safetensors")


# --- capture of the newer face ----------------------------------------------------------------


def newer_module_of(p, **more):
    """As vLLM 0.33 has it: weights in the kernel's layout, the clamp in the constructor."""
    clear_symm_buffers()
    settings = {
        "num_experts": p.num_experts, "num_local_experts": p.num_experts, "experts_start_idx": 0,
        "activation": MegaMoEActivation(clamp=7.0), "fast_math": False, "backend": EagerBackend(),
    }  # fmt: skip
    module = DeepGemmMegaMoEExperts(
        16, top_k=p.top_k, hidden_size=p.hidden_size, intermediate_size=p.intermediate_size,
        **settings | more,
    )  # fmt: skip
    weights = transform_weights(*(getattr(p, name) for name in WEIGHTS))
    for name, tensor in zip(WEIGHTS, weights, strict=True):
        parameter = getattr(module, name)
        parameter.data.copy_(tensor.view(parameter.dtype))
    return module


def arguments(p):
    return p.hidden_states, p.topk_weights, p.topk_ids


def test_the_newer_face_is_recorded_with_its_clamp_and_its_silu(tmp_path, small, capsys):
    path = tmp_path / "call.safetensors"
    module = newer_module_of(small)
    with capture(module, path):
        y = module(*arguments(small))
    record = load(path)
    assert torch.equal(record.outputs["y"], y)
    assert (record.problem.activation_clamp, record.problem.fast_math) == (7.0, False)
    for name in WEIGHTS:
        assert torch.equal(getattr(record.problem, name), getattr(small, name)), name
    assert record.about["contract"] == "2026-11"
    assert cli.main(["replay", str(path)]) == 0
    assert "PASS" in capsys.readouterr().out


@pytest.mark.parametrize("to", ["the call", "the constructor"])
def test_a_y_with_shared_experts_in_it_is_left_out(tmp_path, small, to):
    path, shared = tmp_path / "call.safetensors", torch.nn.Identity()
    constructor = to == "the constructor"
    module = newer_module_of(small, **({"shared_experts": shared} if constructor else {}))
    with capture(module, path):
        module(*arguments(small), **({} if constructor else {"shared_experts": shared}))
    assert not load(path).outputs


@pytest.mark.parametrize(
    ("attributes", "says"),
    [
        ({"activation": MegaMoEActivation(alpha=1.7)}, "only plain swiglu can be recorded"),
        ({"activation": MegaMoEActivation("situ")}, "only plain swiglu can be recorded"),
        ({"weight_format": "nvfp4"}, "has nvfp4 weights; only mxfp4 can be recorded"),
    ],
)
def test_what_no_problem_can_say_is_refused_at_the_call(tmp_path, small, attributes, says):
    module = newer_module_of(small)
    vars(module).update(attributes)
    with pytest.raises(StoredError, match=says), capture(module, tmp_path / "c.safetensors"):
        module(*arguments(small))


class Engines(torch.nn.Module):
    """A module of an engine's own: known by its name and its attributes."""

    def __init__(self, p):
        super().__init__()
        self.num_local_experts, self.activation_clamp = p.num_experts, 10.0
        for name in WEIGHTS:
            self.register_buffer(name, getattr(p, name))

    def forward(self, hidden_states, topk_weights, topk_ids):
        return hidden_states * self.factor


@pytest.mark.parametrize(
    ("name", "backend", "contract"),
    [
        ("DeepGemmMegaMoEExperts", None, "2026-11"),
        ("DeepseekV4MegaMoEExperts", None, "2026-06"),
        # What computed y is known better than by the module's age.
        ("DeepseekV4MegaMoEExperts", SimpleNamespace(contracts=("sgl",)), "sgl"),
        ("DeepGemmMegaMoEExperts", SimpleNamespace(contracts=("sgl", "2026-06")), "2026-11"),
    ],
)
def test_the_contract_of_what_was_recorded(tmp_path, small, name, backend, contract):
    module, path = type(name, (Engines,), {"factor": 1})(small), tmp_path / "c.safetensors"
    if backend is not None:
        module.backend = backend
    with capture(module, path):
        module(*arguments(small))
    assert load(path).about["contract"] == contract


def test_replay_judges_what_was_recorded_under_its_contract(tmp_path, small, monkeypatch, capsys):
    def write_file(about):
        path = tmp_path / "c.safetensors"
        path.write_bytes(to_bytes(StoredProblem(small, {"y": small.hidden_states}, about)))
        return str(path)

    revisions = []

    def judge_output(problem, output, accumulator, contract, name, others):
        revisions.append(contract.revision)
        return Verdict(name, "forward", "pass")

    monkeypatch.setattr("megamoe.commands.replay.judge_output", judge_output)
    base = {"accumulator": "fp32"}
    assert cli.main(["replay", write_file(base)]) == 0
    assert cli.main(["replay", write_file({**base, "contract": "2026-06"})]) == 0
    assert (
        cli.main(["replay", write_file({**base, "contract": "sgl"}), "--contract", "2026-09"]) == 0
    )
    assert revisions == [NEWEST.revision, "2026-06", "2026-09"]
    assert cli.main(["replay", write_file({**base, "contract": ["2026-06"]})]) == 2
    assert "unknown contract" in capsys.readouterr().err


SCRIPT = """
import sys, torch
from megamoe.layer.experts import DeepseekV4MegaMoEExperts
from megamoe.backends.eager import EagerBackend
tokens = int(sys.argv[1])
m = DeepseekV4MegaMoEExperts(16, num_experts=2, num_local_experts=2, experts_start_idx=0, top_k=1,
    hidden_size=128, intermediate_size=128, prefix="", backend=EagerBackend())
m.finalize_weights(without_loader=True)
m(torch.ones(tokens, 128, dtype=torch.bfloat16), torch.ones(tokens, 1),
  torch.zeros(tokens, 1, dtype=torch.int64), activation_clamp=None)
"""


def test_a_script_is_run_and_its_call_recorded(tmp_path, capsys):
    script, out = tmp_path / "engine.py", tmp_path / "c.safetensors"
    script.write_text(SCRIPT)
    assert cli.main(["capture", "--out", str(out), str(script), "3"]) == 0
    assert "3 tokens, 1 expert used" in capsys.readouterr().out
    assert load(out).problem.num_experts == 2
    script.write_text("pass")
    assert cli.main(["capture", "--out", str(out), str(script)]) == 2
    assert "made no module" in capsys.readouterr().err


# --- golden import ----------------------------------------------------------------------------


def test_a_file_becomes_a_golden_in_three_acts(file, bad, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("CI", raising=False)
    root = str(tmp_path / "mine")
    assert cli.main(["golden", "import", str(file), "--golden", root, "--name", "prod-1"]) == 0
    assert "golden bless" in capsys.readouterr().out
    assert cli.main(["golden", "bless", "--golden", root]) == 0
    assert cli.main(["golden", "verify", "--golden", root, "-j", "1"]) == 0
    check = ["check", "--golden", root, "--case", "forward/prod-1", "-n", "1", "--backend"]
    assert cli.main([*check, "eager"]) == 0
    assert cli.main([*check, bad]) == 1
    # The inputs are part of what was blessed.
    inputs = tmp_path / "mine" / "inputs" / "prod-1.safetensors"
    inputs.write_bytes(inputs.read_bytes()[:-1] + b"\1")
    capsys.readouterr()
    assert cli.main([*check, "eager"]) == 1
    assert "sha256 does not match" in capsys.readouterr().out


def test_import_refuses_and_leaves_nothing(file, tmp_path, capsys):
    root = tmp_path / "mine"
    say = ["golden", "import", str(file), "--golden", str(root)]
    assert cli.main([*say, "--name", "No!"]) == 2
    assert not root.exists()
    assert cli.main(say) == 0
    assert cli.main(say) == 2
    assert "already in" in capsys.readouterr().err
    assert cli.main(["golden", "import", str(file)]) == 2
    assert "--golden DIR" in capsys.readouterr().err


def test_the_judge_of_a_file_is_the_judge_of_check(small):
    verdict, output = judge(small, Local(EagerBackend()))
    assert verdict.status == "pass" and set(verdict.how) == {"bitwise", "staged"}
    assert output is not None and "l2_acts" in output
