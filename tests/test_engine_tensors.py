"""What an engine hands to a layer: strides, types, shared memory, and torch's modes around a call.

None of them decides a bit, as docs/contract.md says ("The engine's tensors").
"""

from __future__ import annotations

import runpy
from contextlib import ExitStack

import numpy as np
import pytest
import torch

from megamoe.backends.eager import EagerBackend
from megamoe.layer import staging
from megamoe.layer.checks import dense
from megamoe.layer.deep_gemm_experts import DeepGemmMegaMoEExperts, MegaMoEActivation
from megamoe.layer.experts import DeepseekV4MegaMoEExperts
from megamoe.layer.kernel_weights import transform_weights
from megamoe.layer.symm_buffer import clear_symm_buffers
from megamoe.spec.tensors import WEIGHTS

H, I, E, K, T = 256, 128, 4, 2, 5
FACES = {"older": DeepseekV4MegaMoEExperts, "newer": DeepGemmMegaMoEExperts}


@pytest.fixture(autouse=True)
def no_buffers():
    clear_symm_buffers()
    yield
    clear_symm_buffers()


class Watched(EagerBackend):
    """Keeps what its callables were given, and wants no autocast around them."""

    inside = False

    def prepare(self, *arguments):
        if not self.inside:  # forward stages once more by itself
            self.staged = arguments
        assert not torch.is_autocast_enabled("cpu")
        super().prepare(*arguments)

    def eplb_map(self, *arguments):
        self.remapped = arguments
        assert not torch.is_autocast_enabled("cpu")
        return super().eplb_map(*arguments)

    def forward(self, problem):
        self.problem, self.inside = problem, True
        assert not torch.is_autocast_enabled("cpu")
        output = super().forward(problem)
        self.inside = False
        return output


def layer(face="older", top_k=K, replicas=False, **changes):
    """A layer whose weights are bytes of a fixed seed."""
    newer = {"activation": MegaMoEActivation(clamp=10.0)} if face == "newer" else {}
    experts = FACES[face](
        16, num_experts=E, num_local_experts=E, experts_start_idx=0, top_k=top_k, hidden_size=H,
        intermediate_size=I, prefix="l.0", **{"backend": Watched()} | newer | changes,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    sizes = ((2 * I, H // 2), (2 * I, H // 32), (H, I // 2), (H, I // 32))
    weights = [
        torch.randint(low, high, (E, *size), dtype=torch.uint8, generator=generator)
        for size, (low, high) in zip(sizes, [(0, 256), (116, 122)] * 2, strict=True)
    ]
    for name, tensor in zip(
        WEIGHTS, transform_weights(*weights) if newer else weights, strict=True
    ):
        parameter = getattr(experts, name)
        parameter.data.copy_(tensor.view(parameter.dtype))
    if face == "older":
        experts.finalize_weights(without_loader=True)
    if replicas:
        load = torch.zeros(1, E, dtype=torch.int32)
        table, counts = torch.arange(E).view(1, E, 1), torch.ones(1, E, dtype=torch.int64)
        experts.set_eplb_state(0, load, table, counts)
    return experts


def batch(tokens=T, top_k=K):
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(tokens, H, generator=generator).bfloat16()
    ids = torch.rand(tokens, E, generator=generator).argsort(-1)[:, :top_k].contiguous()
    # Multiples of 1/16 below 1: numbers of every type that weights may have.
    weights = torch.randint(1, 16, (tokens, top_k), generator=generator) / 16.0
    return hidden, weights, ids


def run(experts, arguments):
    """y's bits, by value."""
    clamp = {"activation_clamp": 10.0} if isinstance(experts, DeepseekV4MegaMoEExperts) else {}
    with torch.inference_mode(False):
        return experts(*arguments, **clamp).clone().view(torch.int16)


# --- strides and types ------------------------------------------------------------------------


def sliced(tensor):
    """Columns of a wider tensor."""
    return torch.cat([tensor, torch.full_like(tensor, 3)], dim=1)[:, : tensor.shape[1]]


def padded(tensor):
    """Each second row of a taller one."""
    return torch.stack([tensor, torch.full_like(tensor, 3)], dim=1)[:, 0]


def transposed(tensor):
    return tensor.t().contiguous().t()


def odd_ones(tensor):
    """Another stride for each axis of one element; the rest as it was."""
    strides = [7 if n == 1 else s for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
    return tensor.clone().as_strided(tensor.shape, strides)


FORMS = {"sliced": sliced, "padded rows": padded, "transposed": transposed}


def assert_dense(*tensors):
    for tensor in tensors:
        assert tensor.stride() == torch.empty(tensor.shape).stride()


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("form", FORMS)
def test_strides_decide_nothing_and_backends_do_not_see_them(face, form):
    experts, arguments = layer(face, replicas=True), batch()
    y = run(experts, arguments)
    other = [FORMS[form](t) for t in arguments]
    assert not any(t.is_contiguous() for t in other)
    assert torch.equal(run(experts, other), y)
    backend = experts.backend
    assert_dense(*backend.staged[:3], backend.remapped[0], backend.problem.hidden_states)
    assert all(torch.equal(a, b) for a, b in zip(other, arguments, strict=True))


@pytest.mark.parametrize(("tokens", "top_k"), [(1, 2), (5, 1), (1, 1)])
def test_the_stride_of_one_element_decides_nothing(tokens, top_k):
    """``is_contiguous`` is true for each of these, whatever the stride of the axis of one."""
    experts, arguments = layer(top_k=top_k, replicas=True), batch(tokens, top_k)
    y = run(experts, arguments)
    other = [odd_ones(t) for t in arguments]
    assert all(t.is_contiguous() for t in other[1:])
    assert torch.equal(run(experts, other), y)
    assert_dense(*experts.backend.staged[:3], experts.backend.remapped[0])


def test_a_dense_tensor_is_not_copied():
    for tensor in (torch.ones(3, 2), torch.ones(0, 2), odd_ones(torch.ones(3, 1))):
        assert dense(tensor).data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("replicas", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_type_of_ids_decides_nothing(dtype, replicas):
    hidden, weights, ids = batch()
    experts = layer(replicas=replicas)
    y = run(experts, (hidden, weights, ids))
    assert torch.equal(run(experts, (hidden, weights, ids.to(dtype))), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_type_of_routing_weights_decides_nothing_beyond_their_values(dtype):
    hidden, weights, ids = batch()
    experts = layer()
    y = run(experts, (hidden, weights, ids))
    assert torch.equal(run(experts, (hidden, weights.to(dtype), ids)), y)
    assert experts.backend.staged[1].dtype == torch.float32


def test_float64_weights_are_rounded_to_nearest_even_once():
    """By way of bfloat16 or float16, or cut off, they would be other numbers."""
    ulp = 2.0**-23
    weights = torch.tensor([[1 + ulp / 2, 1 + 1.5 * ulp]], dtype=torch.float64)
    hidden, _, ids = batch(1)
    experts = layer()
    run(experts, (hidden, weights, ids))
    assert experts.get_symm_buffer().topk_weights[0].tolist() == [1.0, 1 + 2 * ulp]


# --- memory -----------------------------------------------------------------------------------


def test_inputs_may_share_memory_with_one_another():
    hidden, weights, ids = batch()
    hidden[:] = hidden[:1].clone()
    experts = layer()
    y = run(experts, (hidden, weights, ids))
    packed = torch.empty(T, 2 * K, dtype=torch.int32)  # as some routers return both
    packed[:, :K], packed[:, K:] = weights.view(torch.int32), ids
    other = hidden[:1].expand(T, H), packed[:, :K].view(torch.float32), packed[:, K:]
    assert torch.equal(run(experts, other), y)


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("name", ["hidden_states", "topk_weights", "topk_ids"])
def test_an_input_in_the_symmetric_buffer_is_refused_before_a_write(face, name):
    """Staging would overwrite what it reads."""
    experts, arguments = layer(face, replicas=True), batch()
    buffer = experts.get_symm_buffer()
    raw = buffer.x.view(torch.uint8).view(-1)
    places = {
        "hidden_states": raw.view(torch.bfloat16)[64 : 64 + T * H].view(T, H),
        "topk_weights": buffer.topk_weights[:T], "topk_ids": buffer.topk_idx[1 : T + 1],
    }  # fmt: skip
    call = dict(zip(("hidden_states", "topk_weights", "topk_ids"), arguments, strict=True))
    call[name] = places[name].copy_(call[name])
    before = raw.clone(), buffer.topk_idx.clone(), buffer.topk_weights.clone()
    with pytest.raises(ValueError, match=f"^l.0: {name} lie in memory that the call writes"):
        run(experts, call.values())
    after = raw, buffer.topk_idx, buffer.topk_weights
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert not experts.eplb_state.expert_load_view.any()


def test_ids_in_the_memory_of_the_load_are_refused_and_ids_beside_it_are_not():
    experts, (hidden, weights, ids) = layer(replicas=True), batch()
    memory = torch.zeros(E + T * K, dtype=torch.int32)
    experts.eplb_state.expert_load_view = memory[:E]
    inside = memory[E - 1 : -1].view(T, K)
    with pytest.raises(ValueError, match=r"^l.0: topk_ids lie in memory that the call writes"):
        run(experts, (hidden, weights, inside))
    assert not memory.any()
    beside = memory[E:].view(T, K).copy_(ids)
    assert run(experts, (hidden, weights, beside)).any()
    assert memory[:E].sum() == T * K


# --- torch's modes ----------------------------------------------------------------------------


def mode(name):
    """A block in which torch is otherwise."""
    stack = ExitStack()
    if name.startswith("autocast"):
        dtype = getattr(torch, name.split()[1])
        stack.enter_context(torch.autocast("cpu", dtype))
    elif name == "inference mode":
        stack.enter_context(torch.inference_mode())
    elif name == "no grad":
        stack.enter_context(torch.no_grad())
    elif name.startswith("default dtype"):
        torch.set_default_dtype(getattr(torch, name.split()[2]))
        stack.callback(torch.set_default_dtype, torch.float32)
    else:
        stack.enter_context(torch.device("meta"))
    return stack


MODES = [
    "autocast bfloat16", "autocast float16", "inference mode", "no grad", "default dtype float64",
    "default dtype bfloat16", "default device meta",
]  # fmt: skip


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("name", MODES)
def test_a_mode_around_the_call_decides_nothing(face, name):
    """The first call of a layer, which makes its buffer, and the call after it without the mode."""
    arguments = batch()
    y = run(layer(face, replicas=True), arguments)
    clear_symm_buffers()
    experts = layer(face, replicas=True)
    clamp = {"activation_clamp": 10.0} if face == "older" else {}
    with mode(name):
        under = experts(*arguments, **clamp)
    assert under.device.type == "cpu" and under.dtype == torch.bfloat16
    assert torch.equal(under.view(torch.int16), y)
    assert torch.equal(run(experts, arguments), y)
    assert experts.eplb_state.expert_load_view.sum() == 2 * T * K


@pytest.mark.parametrize("face", FACES)
def test_what_is_made_in_inference_mode_can_be_written_outside(face):
    """Parameters are loaded and experts replaced later, by code that knows nothing of the mode."""
    with torch.inference_mode():
        experts = layer(face)
        y = run(experts, batch())
    views = experts.get_expert_weights()
    for view in views:
        view[1].copy_(view[0])
    assert not torch.equal(run(experts, batch()), y)


@pytest.mark.parametrize("at", [0, 1], ids=["hidden_states", "topk_weights"])
def test_a_gradient_is_refused_where_one_would_be_recorded(at):
    experts, arguments = layer(replicas=True), list(batch())
    y = run(experts, arguments)
    experts.eplb_state.expert_load_view.zero_()
    arguments[at].requires_grad_(True)
    name = ("hidden_states", "topk_weights")[at]
    with pytest.raises(ValueError, match=f"^l.0: {name} require a gradient, and the layer has no"):
        run(experts, arguments)
    assert not experts.eplb_state.expert_load_view.any()
    with torch.no_grad():
        output = experts(*arguments, activation_clamp=10.0)
    assert torch.equal(output.view(torch.int16), y) and not output.requires_grad


def test_autocast_is_left_on_for_the_caller():
    experts = layer()
    with torch.autocast("cpu", torch.bfloat16):
        experts(*batch(), activation_clamp=10.0)
        assert torch.is_autocast_enabled("cpu")
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16


def test_torchs_defaults_while_megamoe_is_imported_decide_nothing():
    """An engine imports a model's layers with the model's dtype and device as defaults."""
    with mode("default dtype bfloat16"), mode("default device meta"):
        module = runpy.run_path(staging.__file__)
    assert module["RECIP_448"].item() == float(np.float32(1) / np.float32(448))


# --- on a GPU ---------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_a_call_on_another_stream_is_ordered_by_that_stream(backend):
    """The inputs are written on it, behind work that takes longer than the launch."""
    experts = layer(backend=backend).to("cuda")
    arguments = [t.cuda() for t in batch()]
    y = run(experts, arguments)
    late = [torch.zeros_like(t) for t in arguments]
    stream, busy = torch.cuda.Stream(), torch.ones(4096, 4096, device="cuda")
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(20):
            busy = busy @ busy * 0
        for to, tensor in zip(late, arguments, strict=True):
            to.copy_(tensor)
        there = run(experts, late)
    stream.synchronize()
    assert torch.equal(there, y)
