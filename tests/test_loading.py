"""The weights are the checkpoint's: what is missing, comes late or is something else is refused."""

from __future__ import annotations

import pytest
import torch

from megamoe.backends.eager import EagerBackend
from megamoe.layer.deep_gemm_experts import DeepGemmMegaMoEExperts, MegaMoEActivation
from megamoe.layer.experts import DeepseekV4MegaMoEExperts
from megamoe.layer.symm_buffer import clear_symm_buffers
from megamoe.spec.tensors import WEIGHTS
from tests.helpers.checkpoint import read_checkpoint, write_checkpoint

H, I, E, PREFIX = 256, 128, 4, "layers.0.ffn.experts"
FACES = {"older": DeepseekV4MegaMoEExperts, "newer": DeepGemmMegaMoEExperts}


@pytest.fixture(autouse=True)
def no_buffers():
    clear_symm_buffers()
    yield
    clear_symm_buffers()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, experts=E, hidden=H, inter=I)
    return list(read_checkpoint(folder))


class Packs(EagerBackend):
    """Weights in a form of its own, so that the parameters' memory is not what is in use."""

    def pack_weights(self, *weights):
        return tuple(w.clone() for w in weights)

    def run(self, y, weights, buffer, num_tokens, *, activation_clamp, fast_math):
        y.fill_(float(weights[0][0].int().sum()))


def module_of(face, **changes):
    newer = {"activation": MegaMoEActivation(clamp=10.0)} if face == "newer" else {}
    sizes = {
        "num_experts": E, "num_local_experts": E, "experts_start_idx": 0, "top_k": 2,
        "hidden_size": H, "intermediate_size": I, "prefix": PREFIX, "backend": EagerBackend(),
    }  # fmt: skip
    return FACES[face](16, **sizes | newer | changes)


def load_tensor(experts, t, tensor=None, expert=None):
    """One tensor of the checkpoint, as an engine's loader gives it."""
    expert = t.expert if expert is None else expert
    tensor = t.tensor if tensor is None else tensor
    name = f"{PREFIX}.{t.parameter}"
    experts.weight_loader(getattr(experts, t.parameter), tensor, name, t.shard_id, expert)


def use(experts):
    """What needs the weights first: finalizing them, or the first call."""
    if isinstance(experts, DeepseekV4MegaMoEExperts):
        experts.finalize_weights()
    return call(experts)


def call(experts):
    clamp = {"activation_clamp": 10.0} if isinstance(experts, DeepseekV4MegaMoEExperts) else {}
    ids = torch.tensor([[0, 1], [2, 3]])
    return experts(torch.ones(2, H, dtype=torch.bfloat16), torch.ones(2, 2), ids, **clamp)


# --- what is missing --------------------------------------------------------------------------


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("name", ["0.w1.weight", "2.w3.weight", "3.w2.weight", "1.w1.scale",
                                  "2.w3.scale", "3.w2.scale"])  # fmt: skip
def test_one_tensor_that_lacks_is_named(checkpoint, face, name):
    experts = module_of(face)
    for t in checkpoint:
        if t.name != f"{PREFIX}.{name}":
            load_tensor(experts, t)
    with pytest.raises(ValueError) as caught:
        use(experts)
    message = f"{PREFIX}: 1 of 24 expert tensors were not loaded, first {PREFIX}.{name}; load them"
    assert str(caught.value).startswith(message)
    (late,) = (t for t in checkpoint if t.name == f"{PREFIX}.{name}")
    load_tensor(experts, late)
    assert use(experts).any()


def test_a_replica_that_lacks_is_named(checkpoint):
    """Physical expert 5 is logical 1 too; the record is taken back as if it had been missed."""
    experts = module_of("older", num_experts=6, num_local_experts=3, experts_start_idx=3,
                   num_logical_experts=E)  # fmt: skip
    for t in checkpoint:
        load_tensor(experts, t)
    experts._inventory.parts.discard((2, "w3", True))
    with pytest.raises(ValueError, match=r"1 of 18 .* first layers.0.ffn.experts.1.w3.scale for "
                                         r"physical expert 5; "):  # fmt: skip
        experts.finalize_weights()
    experts._inventory.parts.add((2, "w3", True))
    experts.finalize_weights()


def test_a_module_that_was_given_nothing_is_refused_until_somebody_says_so():
    """The newer face's parameters may be written by anybody; nothing tells it when they are."""
    experts = module_of("older")
    with pytest.raises(ValueError, match=r"^layers.0.ffn.experts: 24 of 24 expert tensors were not "
                                         r".*weights\(without_loader=True\)$"):  # fmt: skip
        experts.finalize_weights()
    with pytest.raises(ValueError, match="24 of 24"):
        experts.get_expert_weights()
    assert len(list(experts.parameters())) == 4
    experts.finalize_weights(without_loader=True)
    assert not call(experts).any()
    assert not call(module_of("newer")).any()


@pytest.mark.parametrize("face", FACES)
def test_a_state_dict_loads_too(checkpoint, face):
    source, experts = module_of(face), module_of(face)
    for t in checkpoint:
        load_tensor(source, t)
    part = {n: p for n, p in source.state_dict().items() if n != "w2_weight_scale"}
    experts.load_state_dict(part, strict=False)
    with pytest.raises(ValueError, match=r"4 of 24 .* first layers.0.ffn.experts.0.w2.scale"):
        use(experts)
    experts.load_state_dict(source.state_dict())
    assert torch.equal(use(experts).view(torch.int16), use(source).view(torch.int16))


# --- what comes late --------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [EagerBackend(), Packs()], ids=["checkpoint", "packed"])
def test_loading_after_finalizing_is_refused_and_the_weights_stay(checkpoint, backend):
    experts = module_of("older", backend=backend)
    for t in checkpoint:
        load_tensor(experts, t)
    parameters = {name: getattr(experts, name) for name in WEIGHTS}
    experts.finalize_weights()
    y = call(experts)
    for t in checkpoint[:6]:
        for param in (getattr(experts, t.parameter), parameters[t.parameter]):
            with pytest.raises(ValueError) as caught:
                experts.weight_loader(param, t.tensor, t.name, t.shard_id, 3)
            assert str(caught.value).startswith(
                f"{PREFIX}: {t.name} comes after finalize_weights(), and would not reach"
            )
    assert all(p.numel() == 0 for p in parameters.values())
    with pytest.raises(IndexError):
        parameters["w2_weight"].data[0].zero_()
    assert torch.equal(call(experts).view(torch.int16), y.view(torch.int16))


@pytest.mark.parametrize("face", FACES)
def test_a_parameter_of_another_module_is_refused(checkpoint, face):
    experts, other = module_of(face), module_of(face)
    t = checkpoint[0]
    with pytest.raises(
        ValueError, match=f"^{PREFIX}: {t.name} was to go into a parameter that is "
    ):
        experts.weight_loader(getattr(other, t.parameter), t.tensor, t.name, t.shard_id, 0)
    assert not any(p.any() for p in other.parameters())


# --- what is something else -------------------------------------------------------------------

FORMS = {
    # Name of the checkpoint's tensor, its elements, what is said.
    "weight bytes for a scale": (
        "0.w1.scale", lambda t: t.view(torch.int8), "torch.int8 elements for a scale, expected"
    ),
    "bool for a scale": ("0.w2.scale", lambda t: t.view(torch.uint8).bool(), "torch.bool elements"),
    "bool for a weight": ("0.w3.weight", lambda t: t.bool(), "torch.bool elements for a weight"),
    "E4M3 for a scale": (
        "0.w3.scale", lambda t: t.view(torch.float8_e4m3fn), "torch.float8_e4m3fn elements for a s"
    ),
    "E8M0 for a weight": (
        "0.w2.weight", lambda t: t.view(torch.float8_e8m0fnu), "torch.float8_e8m0fnu elements for"
    ),
    "float scales": ("0.w1.scale", lambda t: t.float(), "torch.float32 elements, expected one"),
    "no tensor": ("0.w1.scale", lambda t: t.float().tolist(), "is a list of 128 (list), expected"),
}  # fmt: skip


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("form", FORMS)
def test_elements_that_such_a_tensor_does_not_have(checkpoint, face, form):
    name, other, message = FORMS[form]
    (t,) = (t for t in checkpoint if t.name == f"{PREFIX}.{name}")
    experts = module_of(face)
    with pytest.raises(ValueError) as caught:
        load_tensor(experts, t, other(t.tensor))
    assert f"{PREFIX}.{t.parameter}" in str(caught.value) and message in str(caught.value)
    assert not any(p.any() for p in experts.parameters())


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize(("name", "scale"), [("w13_weight", True), ("w1.scale", False),
                                             ("w1.weight_scale_inv", False)])  # fmt: skip
def test_a_name_of_the_other_kind_is_refused(face, name, scale):
    """In bytes, and of a shape that fits, the two are the same to a copy."""
    experts = module_of(face)
    param = experts.w13_weight_scale if scale else experts.w13_weight
    tensor = torch.ones(I, H // 32 if scale else H // 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match=rf"^l\.{name}: the name of a .* for a .*; give the param"):
        experts.weight_loader(param, tensor, f"l.{name}", "w1", 0)
    assert not param.any()


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("shard", ["w1", "w2", "w3"])
def test_scales_that_were_converted_by_value_are_refused(checkpoint, face, shard):
    """As ``copy_`` from float8_e8m0fnu to uint8 does: 2^-5 becomes 0, and y with it."""
    experts = module_of(face)
    for t in checkpoint:
        wrong = t.is_scale and t.expert == 2 and t.shard_id == shard
        load_tensor(experts, t, t.tensor.float().to(torch.uint8) if wrong else None)
    with pytest.raises(
        ValueError, match=rf"^{PREFIX}: {PREFIX}.2.{shard}.scale has only bytes such"
    ):
        use(experts)
    (right,) = (t for t in checkpoint if t.name == f"{PREFIX}.2.{shard}.scale")
    load_tensor(experts, right, right.tensor.view(torch.uint8))
    assert use(experts).any()


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("byte", [0, 0x88])
def test_scales_of_zeros_are_right_for_an_expert_of_zeros(checkpoint, face, byte):
    """0x88 is two E2M1 codes of -0."""
    experts = module_of(face)
    for t in checkpoint:
        instead = None
        if t.expert == 1:
            instead = torch.full_like(t.tensor.view(torch.uint8), 0 if t.is_scale else byte)
        load_tensor(experts, t, instead)
    assert use(experts).any()


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("expert", [-1, E, 1.0, None, True], ids=str)
def test_an_expert_that_the_checkpoint_does_not_have(checkpoint, face, expert):
    experts, t = module_of(face), checkpoint[0]
    with pytest.raises(ValueError, match=rf"^{PREFIX}: {t.name}: expert_id is "):
        experts.weight_loader(getattr(experts, t.parameter), t.tensor, t.name, t.shard_id, expert)
    with pytest.raises(ValueError, match=rf"^{PREFIX}: weight_name is None, expected a string"):
        experts.weight_loader(getattr(experts, t.parameter), t.tensor, None, t.shard_id, 0)
