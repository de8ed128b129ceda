"""The module with vLLM 0.33's face: what it takes, what it refuses, and the older face's bits."""

from __future__ import annotations

import math

import pytest
import torch

from megamoe.backends.eager import EagerBackend
from megamoe.layer.deep_gemm_experts import DeepGemmMegaMoEExperts, MegaMoEActivation
from megamoe.layer.experts import DeepseekV4MegaMoEExperts
from megamoe.layer.kernel_weights import transform_weights
from megamoe.layer.symm_buffer import clear_symm_buffers
from megamoe.spec.tensors import WEIGHTS
from tests.helpers.checkpoint import read_checkpoint, write_checkpoint

H, I, LOGICAL, K = 256, 128, 4, 2
PLAIN = MegaMoEActivation(clamp=10.0)
PREFIX = "layers.0.ffn.experts"


@pytest.fixture(autouse=True)
def no_buffers():
    clear_symm_buffers()
    yield
    clear_symm_buffers()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """All expert tensors of a layer of four experts."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, experts=LOGICAL, hidden=H, inter=I)
    return list(read_checkpoint(folder))


def module(face=DeepGemmMegaMoEExperts, **changes):
    sizes = {
        "num_experts": LOGICAL, "num_local_experts": LOGICAL, "experts_start_idx": 0, "top_k": K,
        "hidden_size": H, "intermediate_size": I, "prefix": PREFIX, "backend": EagerBackend(),
    }  # fmt: skip
    newer = {"activation": PLAIN} if face is DeepGemmMegaMoEExperts else {}
    return face(16, **sizes | newer | changes)


def experts_of(checkpoint, face=DeepGemmMegaMoEExperts, **changes):
    experts = module(face, **changes)
    for t in checkpoint:
        param = getattr(experts, t.parameter)
        experts.weight_loader(param, t.tensor, f"{PREFIX}.{t.parameter}", t.shard_id, t.expert)
    if face is DeepseekV4MegaMoEExperts:
        experts.finalize_weights()
    return experts


def batch(tokens=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, H, generator=generator).bfloat16()
    ids = torch.rand(tokens, LOGICAL, generator=generator).argsort(-1)[:, :K]
    return hidden, torch.rand(tokens, K, generator=generator), ids.contiguous()


def same(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# --- the activation ---------------------------------------------------------------------------


def test_an_activation_is_plain_swiglu_without_a_clamp_where_nothing_is_said():
    assert MegaMoEActivation() == MegaMoEActivation("swiglu", clamp=None, alpha=1.0, beta=0.0)
    with pytest.raises(AttributeError):
        MegaMoEActivation().clamp = 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "gelu", "alpha": math.nan}, "Unsupported MegaMoE activation 'gelu'."),
        (
            {"alpha": math.inf, "clamp": -1.0},
            "MegaMoE activation scales must be finite: MegaMoEActivation(name='swiglu', "
            "clamp=-1.0, alpha=inf, beta=0.0).",
        ),
        (
            {"name": "situ", "clamp": -1.0},
            "MegaMoE activation clamp must be >= 0: MegaMoEActivation(name='situ', "
            "clamp=-1.0, alpha=1.0, beta=0.0).",
        ),
        (
            {"name": "situ", "clamp": 7.0},
            "SiTU takes no clamp, a positive alpha and a non-negative beta; got "
            "MegaMoEActivation(name='situ', clamp=7.0, alpha=1.0, beta=0.0).",
        ),
    ],
)
def test_an_activation_is_checked_in_vllm_s_order(options, message):
    """Each of these is wrong in a later way too."""
    with pytest.raises(ValueError) as caught:
        MegaMoEActivation(**options)
    assert str(caught.value) == message


# --- the constructor --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"activation": MegaMoEActivation("situ")},
            "mxfp4 experts support ['situ', 'swiglu'], not 'situ' with beta 0.",
        ),
        ({"weight_format": "nvfp4"}, "nvfp4 experts support [], not 'swiglu'."),
    ],
)
def test_what_no_backend_computes_is_refused_before_sizes_are_looked_at(changes, message):
    with pytest.raises(NotImplementedError) as caught:
        module(hidden_size=192, **changes)
    assert str(caught.value) == f"DeepGEMM MegaMoE {message}"


OTHERS = [
    MegaMoEActivation(clamp=7.0, alpha=1.702, beta=1.0),
    MegaMoEActivation("situ", alpha=4.0, beta=25.0),
]


@pytest.mark.parametrize("activation", OTHERS, ids=["oai", "situ"])
def test_an_activation_reaches_the_backend_with_its_scales(checkpoint, activation):
    class Spy(EagerBackend):
        def forward(self, problem):
            self.problem = problem
            return super().forward(problem)

    backend = Spy()
    experts_of(checkpoint, activation=activation, backend=backend)(*batch())
    act = backend.problem.act
    assert (act.name, act.clamp) == (activation.name, activation.clamp)
    assert (act.alpha, act.beta) == (activation.alpha, activation.beta)


@pytest.mark.parametrize("activation", OTHERS, ids=["oai", "situ"])
def test_a_feature_that_the_backend_has_not_is_refused_before_the_load_is_counted(
    checkpoint, activation
):
    class Plain(EagerBackend):
        name, features = "plain", ()

    experts = experts_of(checkpoint, activation=activation, backend=Plain())
    load = torch.zeros(LOGICAL, dtype=torch.int32)
    one = torch.arange(LOGICAL)[:, None]
    experts.eplb_state.expert_load_view = load
    experts.eplb_state.logical_to_physical_map = one
    experts.eplb_state.logical_replica_count = torch.ones(LOGICAL, dtype=torch.int64)
    with pytest.raises(NotImplementedError, match="backend plain does not compute s"):
        experts(*batch())
    assert not load.any()


@pytest.mark.parametrize("sizes", [{"hidden_size": 192}, {"intermediate_size": 64}])
def test_sizes_are_refused_when_the_module_is_made(sizes):
    with pytest.raises(ValueError) as caught:
        module(**sizes)
    assert str(caught.value) == (
        "DeepGEMM MegaMoE requires hidden and intermediate sizes to be multiples of 128."
    )


def test_parameters_have_the_kernel_s_forms():
    """Scales are MN-major: one word of all rows is contiguous."""
    experts = module(num_local_experts=3)
    form = {name: (tuple(p.shape), p.dtype) for name, p in experts.named_parameters()}
    assert form == {
        "w13_weight": ((3, 2 * I, H // 2), torch.int8),
        "w13_weight_scale": ((3, 2 * I, H // 128), torch.int32),
        "w2_weight": ((3, H, I // 2), torch.int8),
        "w2_weight_scale": ((3, H, I // 128), torch.int32),
    }
    assert experts.w13_weight_scale.stride() == (2 * I * H // 128, 1, 2 * I)


# --- loading ----------------------------------------------------------------------------------


def test_a_checkpoint_is_loaded_into_the_kernel_s_layout(checkpoint):
    """What the older face has before it is finalized, transformed."""
    older = experts_of(checkpoint, DeepseekV4MegaMoEExperts)
    newer = experts_of(checkpoint)
    for name, expected in zip(WEIGHTS, transform_weights(*older._weights), strict=True):
        actual = getattr(newer, name).data
        assert torch.equal(actual.view(expected.dtype), expected), name


@pytest.mark.parametrize(
    ("name", "shard_id", "shape", "message"),
    [
        ("w13_weight", "w4", (I, H // 2), "Unsupported expert shard id: w4"),
        (
            "w13_weight", "w1", (1, H // 2),
            "MegaMoE w1 weight shape (1, 128) does not match the kernel shard (128, 128)",
        ),
        (
            "w2_weight", "w2", (H, I),
            "MegaMoE w2 weight shape (256, 128) does not match the kernel shard (256, 64)",
        ),
        ("w2_weight_scale", "w2", (H, 1), "Scale shape (256, 1) does not tile (256, 4)"),
    ],
)  # fmt: skip
def test_a_wrong_shard_is_refused_and_nothing_stored(name, shard_id, shape, message):
    experts = module()
    with pytest.raises(ValueError) as caught:
        experts.weight_loader(
            getattr(experts, name), torch.ones(shape, dtype=torch.int8), "n", shard_id, 2
        )
    assert str(caught.value) == message
    assert not any(p.any() for p in experts.parameters())


@pytest.mark.parametrize(("name", "expert"), [("w13_weight", 3), ("w2_weight", 0)])
def test_an_unknown_shard_that_would_not_be_stored_here_is_passed_over(name, expert):
    """As vLLM 0.33 does: the older face refuses it first."""
    experts = module(num_local_experts=1)
    arguments = getattr(experts, name), torch.ones(1, dtype=torch.int8), "n", "w4", expert
    assert experts.weight_loader(*arguments, return_success=True) is False
    assert experts.weight_loader(*arguments) is None


# --- the older face's bits --------------------------------------------------------------------


@pytest.mark.parametrize("clamp,fast", [(10.0, True), (None, False), (0.25, True)])
def test_both_faces_give_the_same_bits(checkpoint, clamp, fast):
    older = experts_of(checkpoint, DeepseekV4MegaMoEExperts)
    newer = experts_of(checkpoint, activation=MegaMoEActivation(clamp=clamp), fast_math=fast)
    arguments = batch()
    y = older(*arguments, activation_clamp=clamp, fast_math=fast)
    assert y.any()
    assert same(newer(*arguments), y)


def test_both_faces_give_the_same_bits_on_each_of_two_ranks(checkpoint):
    arguments = batch(16)
    parts = []
    for start in (0, 2):
        here = {"num_local_experts": 2, "experts_start_idx": start}
        older = experts_of(checkpoint, DeepseekV4MegaMoEExperts, **here)
        parts.append(experts_of(checkpoint, **here)(*arguments))
        assert same(parts[-1], older(*arguments, activation_clamp=10.0))
    assert not same(*parts)


def test_both_faces_give_the_same_bits_with_redundant_experts(checkpoint):
    """Six physical experts of four on two ranks; each rank counts the whole batch."""
    table = torch.tensor([[[0, 4], [1, 5], [2, -1], [3, -1]]])
    counts, arguments = torch.tensor([[2, 2, 1, 1]]), batch(16)
    for start in (0, 3):
        results = []
        for face in (DeepseekV4MegaMoEExperts, DeepGemmMegaMoEExperts):
            experts = experts_of(
                checkpoint, face, num_experts=6, num_local_experts=3, experts_start_idx=start,
                num_logical_experts=LOGICAL,
            )  # fmt: skip
            load = torch.zeros(1, 6, dtype=torch.int32)
            experts.set_eplb_state(0, load, table, counts)
            older = face is DeepseekV4MegaMoEExperts
            y = experts(*arguments, **({"activation_clamp": 10.0} if older else {}))
            results.append((y, load, experts.get_symm_buffer().topk_idx[:16].clone()))
            assert load.sum() == 16 * K
        assert all(same(a, b) for a, b in zip(*results, strict=True))


# --- weights in use ---------------------------------------------------------------------------


class Fused:
    """A backend with a kernel's face."""

    name, accumulator = "fused", "fp32"

    def run(self, y, weights, buffer, num_tokens, *, activation_clamp, fast_math):
        self.call = weights, activation_clamp, fast_math
        y.fill_(num_tokens)


def test_a_fused_backend_is_given_the_parameters_themselves(checkpoint):
    experts = experts_of(checkpoint, backend=Fused(), fast_math=False)
    assert (experts(*batch()) == 5).all()
    weights, *rest = experts.backend.call
    assert rest == [10.0, False]
    for name, weight in zip(WEIGHTS, weights, strict=True):
        parameter = getattr(experts, name)
        assert weight.data_ptr() == parameter.data_ptr()
        assert weight.stride() == parameter.stride()


def test_a_backend_that_packs_is_given_what_it_made_of_the_checkpoint_s_form(checkpoint):
    class Packs(Fused):
        packed = 0

        def pack_weights(self, *weights):
            self.packed += 1
            self.checkpoint_weights = weights
            return tuple(t + 1 for t in weights)

    experts = experts_of(checkpoint, backend=Packs())
    experts(*batch())
    experts(*batch())
    backend = experts.backend
    assert backend.packed == 1
    older = experts_of(checkpoint, DeepseekV4MegaMoEExperts)
    for weight, packed_weight, expected in zip(
        backend.checkpoint_weights, backend.call[0], older._weights, strict=True
    ):
        assert torch.equal(weight, expected)
        assert torch.equal(packed_weight, expected + 1)


@pytest.mark.parametrize("how", ["in place", "through a view", "behind torch's back", "loader"])
def test_a_weight_that_is_written_later_is_in_use_at_the_next_call(checkpoint, how):
    """Expert 1 becomes expert 0."""
    experts, arguments = experts_of(checkpoint), batch()
    before = experts(*arguments)
    if how == "in place":
        for name in WEIGHTS:
            getattr(experts, name)[0].copy_(getattr(experts, name)[1].clone())
    elif how == "loader":
        for t in checkpoint:
            if t.expert == 1:
                param = getattr(experts, t.parameter)
                experts.weight_loader(param, t.tensor, t.name, t.shard_id, 0)
    else:
        views = experts.get_expert_weights()
        assert all(v[0].is_contiguous() for v in views)
        for view in views:
            to = view if how == "through a view" else view.data
            to[0].copy_(to[1])
    hidden, weights, ids = arguments
    after = experts(hidden, weights, ids)
    assert not same(after, before)
    assert same(after, experts(hidden, weights, torch.where(ids == 0, 1, ids)))


# --- calls that are refused -------------------------------------------------------------------


def test_more_tokens_than_the_buffer_was_sized_for_leave_everything_as_it_was(checkpoint):
    experts = experts_of(checkpoint)
    load = torch.zeros(1, LOGICAL, dtype=torch.int32)
    identity = torch.arange(LOGICAL).view(1, -1, 1)
    experts.set_eplb_state(0, load, identity, torch.ones(1, LOGICAL, dtype=torch.int64))
    with pytest.raises(ValueError) as caught:
        experts(*batch(17))
    assert str(caught.value) == (
        "MegaMoE got 17 tokens, but the symmetric buffer was sized for 16."
    )
    hidden, weights, ids = batch()
    with pytest.raises(ValueError) as caught:
        experts(hidden, weights[:, :1], ids)
    assert str(caught.value) == (
        "MegaMoE input staging requires topk_weights and topk_ids to have the same shape."
    )
    assert not load.any()
    assert not experts.get_symm_buffer().x.view(torch.uint8).any()


# --- shared experts ---------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["the call", "the constructor"])
def test_shared_experts_are_added_in_bfloat16(checkpoint, to):
    shared = torch.nn.Sequential(torch.nn.Linear(H, H, dtype=torch.bfloat16))
    hidden, weights, ids = batch()
    routed = experts_of(checkpoint)(hidden, weights, ids)
    if to == "the call":
        y = experts_of(checkpoint)(hidden, weights, ids, shared_experts=shared)
    else:
        experts = experts_of(checkpoint, shared_experts=shared)
        assert len(list(experts.parameters())) == 4  # the shared ones are the model's
        y = experts(hidden, weights, ids)
    assert same(y, routed + shared(hidden))


def test_shared_experts_given_twice_are_refused_before_anything_else(checkpoint):
    experts = module(shared_experts=torch.nn.Identity())
    with pytest.raises(ValueError) as caught:
        experts(*batch(17), shared_experts=torch.nn.Identity())
    assert str(caught.value) == (
        f"{PREFIX} fuses the shared expert into MegaMoE; pass shared_experts=None."
    )
