"""The module under test: loading, finalizing, replicas, the buffer, forward, and every error."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megamoe.backends import load_backend
from megamoe.backends.eager import EagerBackend
from megamoe.layer import eplb, ops, staging
from megamoe.layer.experts import DeepseekV4MegaMoEExperts
from megamoe.layer.kernel_weights import transform_weights
from megamoe.layer.symm_buffer import clear_symm_buffers
from megamoe.spec.problem import Problem
from tests.helpers.checkpoint import read_checkpoint, write_checkpoint

H, I, LOGICAL, K = 256, 128, 4, 2
NAMES = ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale")


@pytest.fixture(autouse=True)
def no_buffers():
    clear_symm_buffers()
    yield
    clear_symm_buffers()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Folder of a two-layer checkpoint of four experts in three shards, and its bytes by name."""
    folder = tmp_path_factory.mktemp("checkpoint")
    return folder, write_checkpoint(folder, experts=LOGICAL, hidden=H, inter=I, layers=2)


def module(max_num_tokens=16, **changes) -> DeepseekV4MegaMoEExperts:
    sizes = {
        "num_experts": LOGICAL,
        "num_local_experts": LOGICAL,
        "experts_start_idx": 0,
        "top_k": K,
        "hidden_size": H,
        "intermediate_size": I,
        "prefix": "layers.0.ffn.experts",
    }
    return DeepseekV4MegaMoEExperts(max_num_tokens, **sizes | changes)


def load(experts: DeepseekV4MegaMoEExperts, folder, layer=0) -> list[str]:
    """As an engine does: every expert tensor of the layer is offered; names of those stored."""
    names = []
    for t in read_checkpoint(folder):
        if t.layer != layer:
            continue
        param = getattr(experts, t.parameter)
        name = f"layers.{layer}.ffn.experts.{t.parameter}"
        if experts.weight_loader(param, t.tensor, name, t.shard_id, t.expert, return_success=True):
            names.append(t.name)
    return names


def expert_bytes(data, expert, layer=0) -> list[torch.Tensor]:
    """The four parameters of one logical expert, from the bytes that were written."""
    stem = f"layers.{layer}.ffn.experts.{expert}"
    return [
        torch.cat([data[f"{stem}.w1.weight"], data[f"{stem}.w3.weight"]]),
        torch.cat([data[f"{stem}.w1.scale"], data[f"{stem}.w3.scale"]]),
        data[f"{stem}.w2.weight"],
        data[f"{stem}.w2.scale"],
    ]


def stacked(data, experts, layer=0) -> list[torch.Tensor]:
    return [
        torch.stack(t) for t in zip(*(expert_bytes(data, e, layer) for e in experts), strict=True)
    ]


def batch(tokens=5, experts=LOGICAL, seed=0, dtype=torch.int64):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, H, generator=generator).bfloat16()
    ids = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :K]
    return hidden, torch.rand(tokens, K, generator=generator), ids.to(dtype).contiguous()


EVERY = range(LOGICAL)


def directly(data, hidden, weights, ids, experts=EVERY, clamp=10.0, fast=True):
    """The same layer by the backend alone, without the module."""
    problem = Problem(hidden, ids.long(), weights, *stacked(data, experts), clamp, fast, 384)
    return EagerBackend().forward(problem)


def loaded_module(checkpoint, **changes) -> DeepseekV4MegaMoEExperts:
    experts = module(**changes)
    load(experts, checkpoint[0])
    experts.finalize_weights()
    return experts


def same(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# --- loading ----------------------------------------------------------------------------------


def test_parameters_have_the_contract_s_shapes():
    experts = module(num_local_experts=3)
    form = {name: (tuple(p.shape), p.dtype) for name, p in experts.named_parameters()}
    assert form == {
        "w13_weight": ((3, 2 * I, H // 2), torch.uint8),
        "w13_weight_scale": ((3, 2 * I, H // 32), torch.uint8),
        "w2_weight": ((3, H, I // 2), torch.uint8),
        "w2_weight_scale": ((3, H, I // 32), torch.uint8),
    }
    assert not any(p.requires_grad for p in experts.parameters())


def test_the_checkpoint_has_the_published_dtypes(checkpoint):
    tensors = list(read_checkpoint(checkpoint[0]))
    assert len(tensors) == 2 * LOGICAL * 6
    assert {t.tensor.dtype for t in tensors if t.is_scale} == {torch.float8_e8m0fnu}
    assert {t.tensor.dtype for t in tensors if not t.is_scale} == {torch.int8}


@pytest.mark.parametrize("layer", [0, 1])
def test_a_checkpoint_is_loaded_byte_for_byte(checkpoint, layer):
    """Also the scales: their bytes are stored, not their values."""
    folder, data = checkpoint
    experts = module()
    assert len(load(experts, folder, layer)) == LOGICAL * 6
    for name, expected in zip(NAMES, stacked(data, range(LOGICAL), layer), strict=True):
        assert torch.equal(getattr(experts, name), expected), name


def test_a_rank_takes_its_own_experts_only(checkpoint):
    folder, data = checkpoint
    experts = module(num_local_experts=2, experts_start_idx=1)
    names = load(experts, folder)
    assert {name.split(".")[4] for name in names} == {"1", "2"}
    for name, expected in zip(NAMES, stacked(data, [1, 2]), strict=True):
        assert torch.equal(getattr(experts, name), expected), name


def test_every_local_replica_is_filled(checkpoint):
    """Ten physical experts of four logical ones: physical 5 to 9 are 1, 2, 3, 0, 1."""
    folder, data = checkpoint
    experts = module(
        num_experts=10, num_local_experts=5, experts_start_idx=5, num_logical_experts=LOGICAL
    )
    assert len(load(experts, folder)) == LOGICAL * 6
    for name, expected in zip(NAMES, stacked(data, [1, 2, 3, 0, 1]), strict=True):
        assert torch.equal(getattr(experts, name), expected), name


def test_success_is_told_only_on_request():
    experts = module(num_local_experts=1)
    w1 = torch.ones(I, H // 2, dtype=torch.int8)
    assert experts.weight_loader(experts.w13_weight, w1, "n", "w1", 0) is None
    assert experts.weight_loader(experts.w13_weight, w1, "n", "w1", 0, return_success=True) is True
    assert experts.weight_loader(experts.w13_weight, w1, "n", "w1", 1, return_success=True) is False


def test_a_parameter_that_does_not_take_the_shard_is_left_alone():
    experts = module(hidden_size=128)  # H = I: the shapes would fit
    w2 = torch.ones(128, 64, dtype=torch.int8)
    for param, shard_id in ((experts.w13_weight, "w2"), (experts.w2_weight, "w1")):
        assert experts.weight_loader(param, w2, "n", shard_id, 0, return_success=True) is False
        assert not param.any()


@pytest.mark.parametrize("shard_id", ["w4", "", "W1"])
def test_an_unknown_shard_is_refused(shard_id):
    experts = module()
    with pytest.raises(ValueError) as caught:
        experts.weight_loader(experts.w13_weight, torch.zeros(1), "n", shard_id, 0)
    assert str(caught.value) == f"Unsupported expert shard id: {shard_id}"


@pytest.mark.parametrize(
    "name,shard_id,shape,expected",
    [
        ("w13_weight", "w1", (I, H), (I, H // 2)),
        ("w13_weight", "w3", (2 * I, H // 2), (I, H // 2)),
        ("w13_weight_scale", "w1", (I, H // 2), (I, H // 32)),
        ("w2_weight", "w2", (I, H // 2), (H, I // 2)),
        ("w2_weight_scale", "w2", (1, I // 32), (H, I // 32)),
    ],
)
def test_a_wrong_shape_is_refused(name, shard_id, shape, expected):
    """A shape that would broadcast, too."""
    experts = module()
    weight = torch.ones(shape, dtype=torch.int8)
    with pytest.raises(ValueError) as caught:
        experts.weight_loader(getattr(experts, name), weight, f"experts.{name}", shard_id, 2)
    assert str(caught.value) == (
        f"DeepSeek V4 MegaMoE expert weight shape mismatch for experts.{name}: "
        f"parameter shard {expected} vs checkpoint {shape}"
    )
    assert not getattr(experts, name).any()


def test_a_checkpoint_of_wider_elements_is_refused():
    experts = module()
    with pytest.raises(
        ValueError, match=r"^experts.w1: torch.bfloat16 elements, expected one byte"
    ):
        experts.weight_loader(
            experts.w13_weight, torch.ones(I, H // 2).bfloat16(), "experts.w1", "w1", 0
        )


def test_local_experts_must_be_among_the_physical_ones():
    with pytest.raises(ValueError, match=r"local experts \[3, 5\) are not within the 4 physical"):
        module(num_local_experts=2, experts_start_idx=3)


# --- finalizing -------------------------------------------------------------------------------


def test_finalize_drops_the_parameters_and_a_second_call_is_idle(checkpoint):
    experts = loaded_module(checkpoint)
    assert list(experts.named_parameters()) == []
    before = experts.get_expert_weights()
    experts.finalize_weights()
    after = experts.get_expert_weights()
    assert [t.data_ptr() for t in after] == [t.data_ptr() for t in before]


@pytest.mark.parametrize("sizes", [{"hidden_size": 192}, {"intermediate_size": 64}])
def test_finalize_refuses_sizes_that_the_kernel_cannot_take(sizes):
    experts = module(**sizes)
    with pytest.raises(ValueError) as caught:
        experts.finalize_weights()
    assert str(caught.value) == (
        "DeepGEMM MegaMoE requires hidden and intermediate sizes to be multiples of 128."
    )
    assert len(list(experts.parameters())) == 4


def test_forward_before_finalize_is_refused():
    with pytest.raises(
        ValueError, match=r"^layers.0.ffn.experts: call finalize_weights\(\) before"
    ):
        module()(*batch(), activation_clamp=10.0)


class Fused:
    """A backend with a kernel's face: it sees the buffer and the kernel-side weights."""

    name, accumulator = "fused", "fp32"

    def run(self, y, weights, buffer, num_tokens, *, activation_clamp, fast_math):
        self.arguments = (weights, buffer, num_tokens, activation_clamp, fast_math)
        y.fill_(num_tokens)


def test_a_fused_backend_gets_kernel_side_weights_and_the_staged_buffer(checkpoint):
    backend = Fused()
    experts = loaded_module(checkpoint, backend=backend)
    hidden, weights, ids = batch()
    y = experts(hidden, weights, ids, activation_clamp=7.0, fast_math=False)
    assert (y == 5).all()
    assert (y.shape, y.dtype) == (hidden.shape, torch.bfloat16)
    kernel_weights, buffer, *rest = backend.arguments
    assert rest == [5, 7.0, False]
    for actual, expected in zip(
        kernel_weights, transform_weights(*stacked(checkpoint[1], range(LOGICAL))), strict=True
    ):
        assert torch.equal(actual, expected)
    reference = directly(checkpoint[1], hidden, weights, ids)
    assert torch.equal(buffer.x[:5].view(torch.uint8), reference["x"])
    assert torch.equal(buffer.x_sf[:5], reference["x_sf"])
    assert torch.equal(buffer.topk_idx[:5], ids)
    assert torch.equal(buffer.topk_weights[:5], weights)


@pytest.mark.parametrize("backend", ["eager", Fused()], ids=["eager", "fused"])
def test_expert_weights_are_contiguous_views_of_what_is_in_use(checkpoint, backend):
    """Copying every row of expert 1 over expert 0's makes it expert 1, for any layout."""
    experts = loaded_module(checkpoint, backend=backend)
    views = experts.get_expert_weights()
    sizes = [2 * I * H // 2, 2 * I * H // 32, H * I // 2, H * I // 32]
    for view, size in zip(views, sizes, strict=True):
        assert view.shape[0] == LOGICAL
        assert view[0].is_contiguous()
        assert view[0].numel() * view.element_size() == size
    for view in views:
        view[0].copy_(view[1])
    for tensor in experts._weights:
        assert torch.equal(tensor[0], tensor[1])
        assert not torch.equal(tensor[0], tensor[2])


# --- the buffer -------------------------------------------------------------------------------


def test_layers_of_the_same_sizes_share_the_buffer():
    first, second = module(prefix="layers.0"), module(prefix="layers.1")
    assert first.get_symm_buffer() is first.get_symm_buffer()
    assert second.get_symm_buffer() is first.get_symm_buffer()
    assert module(max_num_tokens=17).get_symm_buffer() is not first.get_symm_buffer()
    alone = SimpleNamespace(size=lambda: 1)
    assert module(group=alone).get_symm_buffer() is not first.get_symm_buffer()


def test_forward_leaves_every_stage_in_the_buffer(checkpoint):
    experts = loaded_module(checkpoint)
    hidden, weights, ids = batch()
    experts(hidden, weights, ids, activation_clamp=10.0)
    buffer, reference = experts.get_symm_buffer(), directly(checkpoint[1], hidden, weights, ids)
    for name in ("x", "x_sf", "l2_acts", "l2_acts_sf"):
        assert same(getattr(buffer, name)[:5], reference[name]), name
        assert not getattr(buffer, name)[5:].view(torch.uint8).any(), name


def test_what_the_buffer_held_does_not_matter(checkpoint):
    experts = loaded_module(checkpoint)
    arguments = batch(3)
    clean = experts(*arguments, activation_clamp=10.0)
    for tensor in vars(experts.get_symm_buffer()).values():
        if isinstance(tensor, torch.Tensor):
            tensor.view(torch.uint8).fill_(0xFF)
    assert same(experts(*arguments, activation_clamp=10.0), clean)


# --- forward ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("clamp,fast", [(10.0, True), (None, False), (0.25, True)])
def test_forward_is_the_layer(checkpoint, dtype, clamp, fast):
    hidden, weights, ids = batch(dtype=dtype)
    y = loaded_module(checkpoint)(hidden, weights, ids, activation_clamp=clamp, fast_math=fast)
    assert same(y, directly(checkpoint[1], hidden, weights, ids, clamp=clamp, fast=fast)["y"])


def test_a_backend_is_given_what_the_caller_gave(checkpoint):
    """The weights, clamp, silu form and capacity; ids widened, weights in checkpoint layout."""

    class Records:
        name, accumulator = "records", "fp32"

        def forward(self, problem):
            self.problem = problem
            return problem.hidden_states

    backend = Records()
    hidden, weights, ids = batch(dtype=torch.int32)
    experts = loaded_module(checkpoint, backend=backend, max_num_tokens=9)
    experts(hidden, weights, ids, activation_clamp=7.0, fast_math=False)
    problem = backend.problem
    assert (problem.activation_clamp, problem.fast_math, problem.max_num_tokens) == (7.0, False, 9)
    assert problem.topk_ids.dtype == torch.int64
    assert torch.equal(problem.topk_ids, ids)
    assert torch.equal(problem.topk_weights, weights)
    assert torch.equal(problem.hidden_states, hidden)
    for name, expected in zip(NAMES, stacked(checkpoint[1], range(LOGICAL)), strict=True):
        assert torch.equal(getattr(problem, name), expected), name


def test_a_backend_that_is_not_ready_is_heard_before_anything_is_written(checkpoint):
    class Unready(Fused):
        def ready(self, device):
            raise ValueError(f"no kernel for {device.type}")

    experts, load_view = replicated(checkpoint, backend=Unready())
    assert refusal(experts, load_view, *batch()) == "no kernel for cpu"


def test_forward_of_no_tokens(checkpoint):
    y = loaded_module(checkpoint)(*batch(0), activation_clamp=10.0)
    assert (y.shape, y.dtype) == ((0, H), torch.bfloat16)


def test_a_backend_may_return_y_alone(checkpoint):
    class OnlyY:
        name, accumulator = "only-y", "fp32"

        def forward(self, problem):
            return problem.hidden_states * 2

    hidden, weights, ids = batch()
    y = loaded_module(checkpoint, backend=OnlyY())(hidden, weights, ids, activation_clamp=10.0)
    assert torch.equal(y, hidden * 2)


def test_ids_of_other_ranks_take_no_part(checkpoint):
    """Experts 1 and 2 are here: 0, 3, -1 and 2^31 - 1 are slots without effect."""
    experts = loaded_module(checkpoint, num_local_experts=2, experts_start_idx=1)
    hidden, weights, _ = batch(3)
    ids = torch.tensor([[1, 0], [3, 2], [-1, 2**31 - 1]])
    local = torch.tensor([[0, -1], [-1, 1], [-1, -1]])
    y = experts(hidden, weights, ids, activation_clamp=10.0)
    assert same(y, directly(checkpoint[1], hidden, weights, local, experts=[1, 2])["y"])
    assert torch.equal(experts.get_symm_buffer().topk_idx[:3], local)


class Ignoring(EagerBackend):
    """Counts as nothing, itself, whatever is no id of its two experts."""

    ignores_foreign_ids = True

    def forward(self, problem):
        self.ids = problem.topk_ids
        local = torch.where((self.ids >= 0) & (self.ids < 2), self.ids, -1)
        return super().forward(replace(problem, topk_ids=local))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("start", [0, 1])
def test_a_backend_that_ignores_foreign_ids_is_given_them_as_they_are(checkpoint, start, dtype):
    backend, least = Ignoring(), torch.iinfo(dtype).min
    experts = loaded_module(
        checkpoint, num_local_experts=2, experts_start_idx=start, backend=backend
    )
    hidden, weights, _ = batch(3)
    ids = torch.tensor([[1, 3], [-1, 2], [2, least]])
    y = experts(hidden, weights, ids.to(dtype), activation_clamp=10.0)
    local = torch.where((ids >= start) & (ids < start + 2), ids - start, -1)
    here = range(start, start + 2)
    assert same(y, directly(checkpoint[1], hidden, weights, local, experts=here)["y"])
    assert backend.ids[0].tolist() == [1 - start, 3 - start]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16])
def test_no_foreign_id_wraps_into_those_of_the_rank(dtype):
    least, greatest = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    experts = module(
        num_experts=40000, num_local_experts=120, experts_start_idx=greatest - 20,
        hidden_size=128, backend=Ignoring(),
    )  # fmt: skip
    ids = torch.tensor([least, least + 90, greatest - 20, greatest], dtype=dtype)
    assert experts._served_ids(ids).tolist() == [-1, -1, 0, 20]


def test_a_transposed_input_gives_the_bits_of_its_dense_copy(checkpoint):
    hidden, weights, ids = batch()
    transposed = hidden.t().contiguous().t()
    assert not transposed.is_contiguous()
    experts = loaded_module(checkpoint)
    y = experts(transposed, weights, ids, activation_clamp=10.0)
    assert y.is_contiguous()
    assert same(y, experts(hidden, weights, ids, activation_clamp=10.0))


def test_a_fused_backend_writes_dense_rows_whatever_the_input_s_strides(checkpoint):
    """``empty_like`` would keep them, and a kernel refuse once the buffer is staged."""

    class Dense(Fused):
        def run(self, y, *others, **options):
            assert y.is_contiguous()
            super().run(y, *others, **options)

    backend = Dense()
    hidden, weights, ids = batch()
    experts = loaded_module(checkpoint, backend=backend)
    y = experts(hidden.t().contiguous().t(), weights, ids, activation_clamp=10.0)
    assert (y == 5).all()
    assert same(backend.arguments[1].x[:5], directly(checkpoint[1], hidden, weights, ids)["x"])


# --- staging and remap ------------------------------------------------------------------------


def kernels(monkeypatch, has_kernels):
    """What Triton offers on this device: the names asked for, and calls of a form of each."""
    requests, calls = [], []

    def kernel(module, name, device):
        requests.append((name, device.type))

        def instead(*arguments):
            calls.append(name)
            return getattr({"staging": staging, "eplb": eplb}[module], name)(*arguments)

        return instead if has_kernels else None

    monkeypatch.setattr(ops, "kernel", kernel)
    return requests, calls


NAMES_OF_OPS = ["eplb_map_to_physical_and_record", "prepare_megamoe_inputs"]


@pytest.mark.parametrize("has_kernels", [True, False], ids=["triton", "torch"])
def test_the_module_stages_and_remaps_by_what_suits_the_device(
    checkpoint, monkeypatch, has_kernels
):
    requests, calls = kernels(monkeypatch, has_kernels)
    experts, load_view = replicated(checkpoint, backend=Fused())
    experts(*batch(), activation_clamp=10.0)
    assert requests == [(name, "cpu") for name in NAMES_OF_OPS]
    assert calls == (NAMES_OF_OPS if has_kernels else [])
    assert load_view.sum() == 5 * K


def test_a_backend_s_own_staging_and_remap_go_first(checkpoint, monkeypatch):
    requests, _ = kernels(monkeypatch, has_kernels=True)
    experts, load_view = replicated(checkpoint, backend="eager")
    experts(*batch(), activation_clamp=10.0)
    assert requests == []
    assert load_view.sum() == 5 * K


# --- replicas ---------------------------------------------------------------------------------

PHYSICAL = 6
MAP = torch.tensor([[[9] * 2] * LOGICAL, [[0, 4], [1, 5], [2, -1], [3, -1]]])
COUNT = torch.tensor([[9] * LOGICAL, [2, 2, 1, 1]])


def replicated(checkpoint, record=None, **changes):
    """The layer on six physical experts, and the load of two layers; this one is the second."""
    experts = loaded_module(
        checkpoint,
        **{
            "num_experts": PHYSICAL,
            "num_local_experts": PHYSICAL,
            "num_logical_experts": LOGICAL,
        }
        | changes,
    )
    load_view = torch.zeros(2, PHYSICAL, dtype=torch.int32)
    experts.set_eplb_state(1, load_view, MAP, COUNT)
    experts.eplb_state.should_record_tensor = record
    return experts, load_view


def test_replicas_change_nothing_but_the_load(checkpoint):
    experts, load_view = replicated(checkpoint)
    hidden, weights, ids = batch(16)
    y = experts(hidden, weights, ids, activation_clamp=10.0)
    assert same(y, directly(checkpoint[1], hidden, weights, ids)["y"])
    replica = torch.arange(16)[:, None] * 2654435769 % 2**32 % COUNT[1][ids]
    physical = MAP[1][ids, replica]
    assert set(physical.flatten().tolist()) == set(range(PHYSICAL))
    assert torch.equal(experts.get_symm_buffer().topk_idx[:16], physical)
    assert torch.equal(load_view[1].long(), physical.flatten().bincount(minlength=PHYSICAL))
    assert not load_view[0].any()


@pytest.mark.parametrize("record", [True, False])
def test_the_record_flag(checkpoint, record):
    experts, load_view = replicated(checkpoint, torch.tensor(record))
    experts(*batch(), activation_clamp=10.0)
    assert load_view.sum() == (5 * K if record else 0)


def test_a_rank_counts_the_whole_batch_and_computes_its_part(checkpoint):
    """The load view is of all physical experts; physical 4 and 5 are replicas of 0 and 1."""
    experts, load_view = replicated(checkpoint, num_local_experts=2, experts_start_idx=4)
    hidden, weights, ids = batch(16)
    y = experts(hidden, weights, ids, activation_clamp=10.0)
    assert load_view.sum() == 16 * K
    local = experts.get_symm_buffer().topk_idx[:16].clone()
    assert set(local.flatten().tolist()) == {-1, 0, 1}
    assert same(y, directly(checkpoint[1], hidden, weights, local, experts=[0, 1])["y"])


# --- errors leave everything as it was --------------------------------------------------------


def refusal(experts, load_view, *arguments) -> str:
    """The message of ``forward``, after showing that buffer and load are untouched."""
    buffer = experts.get_symm_buffer()
    before = [t.clone() for t in vars(buffer).values() if isinstance(t, torch.Tensor)]
    with pytest.raises(ValueError) as caught:
        experts(*arguments, activation_clamp=10.0)
    after = [t for t in vars(buffer).values() if isinstance(t, torch.Tensor)]
    assert all(same(a, b) for a, b in zip(after, before, strict=True))
    assert not load_view.any()
    return str(caught.value)


def test_more_tokens_than_the_buffer_was_sized_for(checkpoint):
    """Not those that the capacity, aligned up to 384, would hold."""
    experts, load_view = replicated(checkpoint)
    assert refusal(experts, load_view, *batch(17)) == (
        "DeepSeek V4 MegaMoE got 17 tokens, but the symmetric buffer was sized for 16."
    )
    experts(*batch(16), activation_clamp=10.0)


def test_a_hidden_size_that_staging_cannot_take(checkpoint):
    experts, load_view = replicated(checkpoint)
    hidden, weights, ids = batch()
    assert refusal(experts, load_view, hidden[:, :200], weights, ids) == (
        "DeepSeek V4 MegaMoE input staging requires hidden_size to be a multiple of 128."
    )


def test_weights_and_ids_of_different_shapes(checkpoint):
    experts, load_view = replicated(checkpoint)
    hidden, weights, ids = batch()
    assert refusal(experts, load_view, hidden, weights[:, :1], ids) == (
        "DeepSeek V4 MegaMoE input staging requires topk_weights and topk_ids to have the same "
        "shape."
    )


def test_shapes_and_dtypes_of_another_layer(checkpoint):
    experts, load_view = replicated(checkpoint)
    hidden, weights, ids = batch()
    prefix = "layers.0.ffn.experts: "
    assert refusal(experts, load_view, hidden[:, :128], weights, ids) == (
        f"{prefix}hidden_states has shape (5, 128), expected (5, 256)"
    )
    assert refusal(experts, load_view, hidden, weights[:, :1], ids[:, :1]) == (
        f"{prefix}topk_ids has shape (5, 1), expected (5, 2)"
    )
    assert refusal(experts, load_view, hidden[:4], weights, ids) == (
        f"{prefix}topk_ids has shape (5, 2), expected (4, 2)"
    )
    assert refusal(experts, load_view, hidden.float(), weights, ids) == (
        f"{prefix}hidden_states are torch.float32, expected torch.bfloat16"
    )


def test_a_backend_that_cannot_run_the_layer(checkpoint):
    class StagingOnly:
        name, accumulator = "staging-only", "fp32"
        prepare = print

    experts, load_view = replicated(checkpoint, backend=StagingOnly())
    assert refusal(experts, load_view, *batch()) == (
        "layers.0.ffn.experts: backend staging-only has neither run nor forward"
    )


# --- on a GPU ---------------------------------------------------------------------------------

GPUS = [
    pytest.param(
        f"cuda:{n}",
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(torch.cuda.device_count() <= n, reason=f"needs {n + 1} NVIDIA GPUs"),
        ],
    )
    for n in range(2)  # 0 is the current one, 1 is not
]


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("tokens", [5, 0])
def test_the_module_moves_to_a_gpu_and_gives_the_same_bits(checkpoint, tokens, gpu):
    here, there = loaded_module(checkpoint), loaded_module(checkpoint).to(gpu)
    arguments = batch(tokens)
    y = there(*(t.to(gpu) for t in arguments), activation_clamp=10.0)
    assert y.device == torch.device(gpu)
    assert same(y.cpu(), here(*arguments, activation_clamp=10.0))


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("tokens", [5, 96])
def test_a_module_made_on_a_gpu_takes_its_backend_and_gives_its_bits(checkpoint, tokens, gpu):
    experts = module(max_num_tokens=96).to(gpu)
    load(experts, checkpoint[0])
    experts.finalize_weights()
    hidden, weights, ids = batch(tokens)
    y = experts(*(t.to(gpu) for t in (hidden, weights, ids)), activation_clamp=10.0)
    backend = load_backend("auto", gpu)
    assert experts.backend.name == backend.name
    data = stacked(checkpoint[1], range(LOGICAL))
    alone = Problem(hidden, ids, weights, *data, 10.0, True, 96).to(gpu)
    assert same(y.cpu(), backend.forward(alone)["y"].cpu())


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("tokens", [5, 96])
def test_a_rank_on_a_gpu_leaves_out_the_ids_of_others(checkpoint, tokens, gpu):
    start = 1
    experts = module(96, num_local_experts=2, experts_start_idx=start).to(gpu)
    load(experts, checkpoint[0])
    experts.finalize_weights()
    hidden, weights, ids = batch(tokens)
    y = experts(*(t.to(gpu) for t in (hidden, weights, ids)), activation_clamp=10.0)
    backend = load_backend("auto", gpu)
    local = torch.where((ids >= start) & (ids < start + 2), ids - start, -1)
    assert local.min() == -1 and local.max() == 1
    data = stacked(checkpoint[1], range(start, start + 2))
    alone = Problem(hidden, local, weights, *data, 10.0, True, 96).to(gpu)
    assert same(y.cpu(), backend.forward(alone)["y"].cpu())
