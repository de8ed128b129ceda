"""Which staging and remap the module takes, by the device and Triton; and vLLM's own keywords."""

from __future__ import annotations

import sys

import pytest
import torch

from megamoe.layer import eplb, ops, staging

CUDA = torch.device("cuda", 0)
PAIRS = [("staging", "prepare_megamoe_inputs"), ("eplb", "eplb_map_to_physical_and_record")]


@pytest.fixture(autouse=True)
def fresh_imports():
    ops._import.cache_clear()
    yield
    ops._import.cache_clear()


def gpu(monkeypatch, *capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize(("module", "name"), PAIRS)
def test_an_nvidia_gpu_takes_triton_s(monkeypatch, module, name, capability):
    """Whatever the backend: also where the ``triton`` backend's products do not run."""
    pytest.importorskip("triton")
    gpu(monkeypatch, *capability)
    function = ops.kernel(module, name, CUDA)
    assert function.__module__ == f"megamoe.backends.triton.{module}"
    assert function.__name__ == name


@pytest.mark.parametrize(("module", "name"), PAIRS)
def test_elsewhere_torch_s_is_taken(monkeypatch, module, name):
    assert ops.kernel(module, name, torch.device("cpu")) is None
    gpu(monkeypatch, 7, 5)
    assert ops.kernel(module, name, CUDA) is None
    gpu(monkeypatch, 9, 4)  # as an MI300 says of itself
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert ops.kernel(module, name, CUDA) is None


@pytest.mark.parametrize(("module", "name"), PAIRS)
def test_without_triton_torch_s_is_taken(monkeypatch, module, name):
    gpu(monkeypatch, 9, 0)
    monkeypatch.setitem(sys.modules, f"megamoe.backends.triton.{module}", None)
    assert ops.kernel(module, name, CUDA) is None


# --- the calls that vLLM's modules make -------------------------------------------------------


def remapped(**more):
    """As vLLM calls it; physical ids and the load."""
    load = torch.zeros(4, dtype=torch.int32)
    ids = ops.eplb_map_to_physical_and_record(
        topk_ids=torch.tensor([[0, 1], [1, -1], [0, 1]], dtype=torch.int32),
        expert_load_view=load,
        logical_to_physical_map=torch.tensor([[0], [3]]),
        logical_replica_count=torch.tensor([1, 1]),
        record_enabled=torch.tensor(True),
        **more,
    )
    return ids.tolist(), load.tolist()


def test_remap_takes_vllm_s_keywords():
    ids = [[0, 3], [3, -1], [0, 3]]
    assert remapped() == (ids, [2, 0, 0, 3])
    assert remapped(num_unpadded_tokens=None) == (ids, [2, 0, 0, 3])
    for unpadded in (2, torch.tensor(2, dtype=torch.int32)):
        assert remapped(num_unpadded_tokens=unpadded) == (ids, [1, 0, 0, 2])
    with pytest.raises(TypeError, match="unexpected keyword argument 'num_padded_tokens'"):
        remapped(num_padded_tokens=1)


def staged(name="x_fp8", **more):
    """As vLLM calls it; the four outputs."""
    out = {
        name: torch.zeros(3, 128, dtype=torch.uint8),
        "x_sf": torch.zeros(3, 1, dtype=torch.int32),
        "topk_idx_out": torch.zeros(3, 1, dtype=torch.int64),
        "topk_weights_out": torch.zeros(3, 1),
    }
    ops.prepare_megamoe_inputs(
        hidden_states=torch.full((3, 128), 448.0).bfloat16(),
        topk_weights=torch.ones(3, 1),
        topk_ids=torch.tensor([[5], [6], [7]]),
        **out,
        **more,
    )
    return [t.tolist() for t in out.values()]


@pytest.mark.parametrize("name", ["x_fp8", "x"])
def test_staging_takes_vllm_s_keywords_of_both_ages(name):
    x, x_sf, ids, weights = staged(name)
    assert (x[2][127], x_sf[2]) == (0x7E, [0x7F7F7F7F])
    assert (ids, weights) == ([[5], [6], [7]], [[1.0]] * 3)
    padding = torch.tensor([False, True, False])
    assert staged(name, is_padding=None) == [x, x_sf, ids, weights]
    assert staged(name, is_padding=padding) == [x, x_sf, [[5], [-1], [7]], [[1.0], [0.0], [1.0]]]


def test_staging_refuses_other_keywords_as_python_does():
    with pytest.raises(TypeError, match="unexpected keyword argument 'shared_x_sf'"):
        staged(shared_x_sf=None)
    with pytest.raises(TypeError, match="unexpected keyword argument 'x'"):
        staged(x=torch.zeros(3, 128, dtype=torch.uint8))
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x_fp8'"):
        staged(name="x_sf")


def test_where_padding_is_told_torch_s_code_is_taken(monkeypatch):
    """Triton's kernels know no padding."""
    names = []

    def instead(module, name, device):
        names.append(name)
        return getattr({"staging": staging, "eplb": eplb}[module], name)

    monkeypatch.setattr(ops, "kernel", instead)
    staged()
    remapped()
    assert names == [name for _, name in PAIRS]
    staged(is_padding=torch.zeros(3, dtype=torch.bool))
    remapped(num_unpadded_tokens=3)
    assert len(names) == 2
