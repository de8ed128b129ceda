"""Which staging and remap the module takes: by the device, the GPU's maker and age, and Triton."""

from __future__ import annotations

import sys

import pytest
import torch

from megamoe.layer import ops

CUDA = torch.device("cuda", 0)
PAIRS = [("staging", "prepare_megamoe_inputs"), ("eplb", "eplb_map_to_physical_and_record")]


@pytest.fixture(autouse=True)
def asked_anew():
    ops._imported.cache_clear()
    yield
    ops._imported.cache_clear()


def gpu(monkeypatch, *capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize(("module", "name"), PAIRS)
def test_an_nvidia_gpu_takes_triton_s(monkeypatch, module, name, capability):
    """Whatever the backend: also where the ``triton`` backend's products do not run."""
    pytest.importorskip("triton")
    gpu(monkeypatch, *capability)
    found = ops.kernel(module, name, CUDA)
    assert found.__module__ == f"megamoe.backends.triton.{module}"
    assert found.__name__ == name


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
