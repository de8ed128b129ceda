"""``--checkpoint`` of ``capture`` and ``replay``: the recorded weights are the checkpoint's."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from megamoe.backends.eager import EagerBackend
from megamoe.cases import checkpoint as module
from megamoe.cases.checkpoint import Checkpoint, differences
from megamoe.cases.stored import StoredError, StoredProblem, load, to_bytes
from megamoe.commands import main as cli
from megamoe.layer.capture import capture
from megamoe.layer.experts import DeepseekV4MegaMoEExperts
from megamoe.layer.origin import checkpoint_experts
from megamoe.layer.symm_buffer import clear_symm_buffers
from tests.helpers.checkpoint import INDEX, read_checkpoint, write_checkpoint

H, I, E = 256, 128, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, experts=E, hidden=H, inter=I, layers=2)
    return folder


def record(folder, path, layer=1, change=lambda t: t.tensor, replicas=False):
    """A call of one layer, recorded; ``change`` is what the engine does with a tensor."""
    clear_symm_buffers()
    sizes = {"num_experts": E, "num_local_experts": E, "experts_start_idx": 0}
    if replicas:  # physical 3, 4 and 5 are here: logical 3, 0 and 1 as loaded
        sizes = {"num_experts": 6, "num_local_experts": 3, "experts_start_idx": 3,
                 "num_logical_experts": E}  # fmt: skip
    experts = DeepseekV4MegaMoEExperts(
        16, **sizes, top_k=2, hidden_size=H, intermediate_size=I, backend=EagerBackend(),
        prefix=f"model.layers.{layer}.ffn.experts",
    )  # fmt: skip
    for t in read_checkpoint(folder):
        if t.layer == layer:
            tensor = change(t)
            for local in experts._local_replicas(t.expert):
                shard = experts._shard(getattr(experts, t.parameter), local, t.shard_id)
                # As an engine's own loader does, with whatever conversion that is.
                shard.copy_(tensor.view(torch.uint8) if tensor.dtype == t.tensor.dtype else tensor)
    experts.finalize_weights(without_loader=True)
    if replicas:
        load_view, counts = torch.zeros(1, 6, dtype=torch.int32), torch.tensor([[2, 2, 1, 1]])
        table = torch.tensor([[[0, 4], [1, 5], [2, -1], [3, -1]]])
        experts.set_eplb_state(0, load_view, table, counts)
    hidden = torch.randn(3, H, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids = torch.tensor([[0, 1], [3, 1], [1, 0]])
    with capture(experts, path):
        experts(hidden, torch.ones(3, 2), ids, activation_clamp=10.0)
    return path


def by_value(t):
    """The scale's numbers in bytes: all below 1 are 0."""
    return t.tensor.float().to(torch.uint8) if t.is_scale else t.tensor


def test_the_weights_of_a_right_engine_are_the_checkpoints(folder, tmp_path, capsys):
    path = record(folder, tmp_path / "call.safetensors")
    assert load(path).about["checkpoint"] == {"layer": 1, "experts": [[0, 0], [1, 1], [3, 3]]}
    assert cli.main(["replay", str(path), "--checkpoint", str(folder)]) == 0
    out = capsys.readouterr().out
    assert f"{path}: the weights of its 3 experts are those of {folder}" in out
    assert f"PASS {path}" in out


def test_scales_that_were_converted_by_value_are_red(folder, tmp_path, capsys):
    """y is 0, and right for these weights: without the checkpoint nobody can know."""
    path, report = record(folder, tmp_path / "c.safetensors", change=by_value), tmp_path / "r.json"
    assert not load(path).outputs["y"].any()
    assert cli.main(["replay", str(path)]) == 0
    capsys.readouterr()
    say = ["replay", str(path), "--checkpoint", str(folder), "--json", str(report)]
    assert cli.main(say) == 1
    out = capsys.readouterr().out
    assert f"FAIL {path}: other bytes than in {folder}: 9 tensors" in out
    assert (
        "layers.1.ffn.experts.0.w1.scale (local expert 0, w13_weight_scale): 1024 of 1024 bytes "
        "differ, the first at row 0, byte 0: 0x" in out
    )
    assert "in the checkpoint, 0x00 in the call; the call has these scales' values in place" in out
    assert "and 1 more; --verbose names all" in out and "PASS" not in out
    assert cli.main([*say, "--verbose"]) == 1
    assert len([x for x in capsys.readouterr().out.splitlines() if "bytes differ" in x]) == 9
    verdict = json.loads(report.read_text())
    assert (
        verdict["status"] == "fail"
        and "9 tensors with other bytes than the checkpoint's" in verdict["reason"]
    )


def test_one_byte_is_named_by_tensor_expert_row_and_place(folder, tmp_path, monkeypatch):
    """In whichever piece of the tensor it lies, and of whichever file."""
    path = record(folder, tmp_path / "c.safetensors")
    call = load(path)
    assert differences(call, folder) == []
    places = {
        "w1.weight": ("w13_weight", 5, 17), "w3.weight": ("w13_weight", I + 127, 0),
        "w1.scale": ("w13_weight_scale", 0, 7), "w3.scale": ("w13_weight_scale", I + 3, 1),
        "w2.weight": ("w2_weight", 255, 63), "w2.scale": ("w2_weight_scale", 128, 3),
    }  # fmt: skip
    for at_once in (1 << 20, 300):
        monkeypatch.setattr(module, "AT_ONCE", at_once)
        for name, (parameter, row, byte) in places.items():
            tensor = getattr(call.problem, parameter).clone()
            tensor[3, row, byte] ^= 0x10
            other = StoredProblem(replace(call.problem, **{parameter: tensor}), {}, call.about)
            (difference,) = differences(other, folder)
            assert difference.name == f"layers.1.ffn.experts.3.{name}"
            assert (difference.local, difference.parameter) == (3, parameter)
            first = row - I if name.startswith("w3") else row
            assert (
                "1 of " in difference.text and f"at row {first}, byte {byte}: 0x" in difference.text
            )
            assert "values" not in difference.text


def test_an_expert_that_nobody_used_is_not_asked(folder, tmp_path):
    call = load(record(folder, tmp_path / "c.safetensors"))
    weight = call.problem.w2_weight.clone()
    weight[2] ^= 1
    other = StoredProblem(replace(call.problem, w2_weight=weight), {}, call.about)
    assert differences(other, folder) == []


def test_replicas_are_compared_with_the_expert_that_the_map_says(folder, tmp_path):
    path = record(folder, tmp_path / "c.safetensors", replicas=True)
    call = load(path)
    pairs = call.about["checkpoint"]["experts"]
    assert set(map(tuple, pairs)) <= {(0, 3), (1, 0), (2, 1)} and len(pairs) > 1
    assert differences(call, folder) == []
    swapped = {
        **call.about,
        "checkpoint": {"layer": 1, "experts": [[pairs[0][0], 2], *pairs[1:]]},
    }
    assert len(differences(StoredProblem(call.problem, {}, swapped), folder)) == 6


def test_experts_that_the_engine_exchanged_are_red(folder, tmp_path):
    layer = [t for t in read_checkpoint(folder) if t.layer == 1]
    tensors = {(t.expert, t.shard_id, t.is_scale): t.tensor for t in layer}
    swap = {0: 1, 1: 0}
    path = record(
        folder, tmp_path / "c.safetensors",
        change=lambda t: tensors[swap.get(t.expert, t.expert), t.shard_id, t.is_scale],
    )  # fmt: skip
    assert [d.local for d in differences(load(path), folder)] == [0] * 6 + [1] * 6


def test_a_layer_of_another_number_is_red(folder, tmp_path):
    call = load(record(folder, tmp_path / "c.safetensors", layer=0))
    assert differences(call, folder) == []
    about = {**call.about, "checkpoint": {**call.about["checkpoint"], "layer": 1}}
    assert len(differences(StoredProblem(call.problem, {}, about), folder)) == 18


def test_files_without_an_index_and_with_vllms_names_are_read(folder, tmp_path):
    path, other = record(folder, tmp_path / "c.safetensors"), tmp_path / "other"
    other.mkdir()
    everything = {}
    for file in folder.glob("*.safetensors"):
        everything |= load_file(file)
    renamed = {
        f"model.{name.removesuffix('.scale')}{'.weight_scale' if name.endswith('scale') else ''}": t
        for name, t in everything.items()
    }
    save_file(renamed, other / "one.safetensors")
    assert len(Checkpoint(other).places) == 2 * E * 6
    assert differences(load(path), other) == []


SCRIPT = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.helpers.checkpoint import read_checkpoint
from megamoe.layer.experts import DeepseekV4MegaMoEExperts
from megamoe.backends.eager import EagerBackend
m = DeepseekV4MegaMoEExperts(16, num_experts=4, num_local_experts=4, experts_start_idx=0, top_k=1,
    hidden_size=256, intermediate_size=128, prefix="layers.0.ffn.experts", backend=EagerBackend())
for t in read_checkpoint(Path({folder!r})):
    if t.layer == 0:
        shard = m._shard(getattr(m, t.parameter), t.expert, t.shard_id)
        shard.copy_(t.tensor if t.expert == {wrong} and t.is_scale else t.tensor.view(torch.uint8))
m.finalize_weights(without_loader=True)
m(torch.ones(2, 256, dtype=torch.bfloat16), torch.ones(2, 1), torch.tensor([[0], [3]]),
  activation_clamp=None)
"""


@pytest.mark.parametrize(("wrong", "status"), [(3, 1), (1, 0), (-1, 0)])
def test_capture_compares_what_it_recorded(folder, tmp_path, pytestconfig, capsys, wrong, status):
    """Expert 1 has wrong scales too, but the call does not use it."""
    clear_symm_buffers()
    script, out = tmp_path / "engine.py", tmp_path / "c.safetensors"
    root = str(pytestconfig.rootpath)
    script.write_text(SCRIPT.format(root=root, folder=str(folder), wrong=wrong))
    say = ["capture", "--out", str(out), "--checkpoint", str(folder), str(script)]
    assert cli.main(say) == status
    output = capsys.readouterr().out
    assert ("layers.0.ffn.experts.3.w1.scale (local expert 3" in output) == bool(status)
    assert ("are those of" in output) != bool(status)


@pytest.fixture
def call(folder, tmp_path):
    return load(record(folder, tmp_path / "c.safetensors"))


def broken(folder, other, drop="", dtype=None, index=None):
    """A copy in one file, without an index, of which something is otherwise."""
    other.mkdir()
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    if dtype is not None:
        tensors[drop] = tensors[drop].float().to(dtype)
    else:
        tensors.pop(drop, None)
    save_file(tensors, other / "one.safetensors")
    if index is not None:
        (other / INDEX).write_text(index)
    return other


def test_what_cannot_be_compared_is_said_in_one_line(folder, tmp_path, call, capsys):
    name = "layers.1.ffn.experts.3.w3.scale"
    messages = {
        tmp_path / "no": "no such folder",
        broken(folder, tmp_path / "a", name): f"lacks {name}",
        broken(
            folder, tmp_path / "b", name, torch.float32
        ): f"{name} is F32 (128, 8), the call has F8_E8M0 or U8 (128, 8) there",
        broken(folder, tmp_path / "c", index="{"): "cannot be read as an index",
        broken(folder, tmp_path / "d", index='{"weight_map": 3}'): "has no weight_map",
        broken(
            folder, tmp_path / "e", index=json.dumps({"weight_map": {name: "../x"}})
        ): "no file's",
    }
    (tmp_path / "empty").mkdir()
    messages[tmp_path / "empty"] = "holds no tensor with a name such as"
    for other, words in messages.items():
        with pytest.raises(StoredError) as caught:
            differences(call, other)
        assert words in str(caught.value) and "\n" not in str(caught.value)
    program = tmp_path / "program.py"
    program.write_text("")
    assert cli.main(["capture", "--checkpoint", str(tmp_path / "no"), str(program)]) == 2
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({}, "does not say which experts of a checkpoint it holds"),
        ({"checkpoint": [1]}, "does not say which experts"),
        ({"checkpoint": {"layer": 1, "experts": [[0]]}}, "does not say which experts"),
        ({"checkpoint": {"layer": 1, "experts": [[0, -1]]}}, "does not say which experts"),
        ({"checkpoint": {"layer": 1, "experts": [[0, 0], [3, 3]]}}, "does not say which expert of"),
        ({"checkpoint": {"layer": None, "experts": [[0, 0]]}, "prefix": "moe"},
         "prefix 'moe' names no layer, and "),
    ],
)  # fmt: skip
def test_a_file_that_does_not_say_where_its_weights_are_from(
    folder, tmp_path, call, about, message
):
    path = tmp_path / "again.safetensors"
    path.write_bytes(to_bytes(StoredProblem(call.problem, {}, about)))
    with pytest.raises(StoredError, match=message):
        differences(load(path), folder)


def test_a_checkpoint_of_one_layer_needs_no_prefix(tmp_path):
    folder = tmp_path / "one"
    folder.mkdir()
    write_checkpoint(folder, experts=E, hidden=H, inter=I)
    call = load(record(folder, tmp_path / "c.safetensors", layer=0))
    about = {"checkpoint": {"layer": None, "experts": call.about["checkpoint"]["experts"]}}
    assert differences(StoredProblem(call.problem, {}, about), folder) == []


def test_what_the_map_has_beyond_the_number_of_replicas_is_no_replica():
    """Physical expert 4 was one of logical 0 once, and is one of logical 1 now."""
    state = SimpleNamespace(
        logical_to_physical_map=torch.tensor([[1, 4], [0, 4]]),
        logical_replica_count=torch.tensor([1, 2]),
    )
    engine = SimpleNamespace(eplb_state=state, prefix="layers.12.mlp.experts")
    origin = checkpoint_experts(engine, torch.tensor([0, 1, 2]), 3)
    assert origin == {"layer": 12, "experts": [[1, 1]]}
