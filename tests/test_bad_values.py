"""Values that no call may have: one line each, and nothing is written before it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megamoe.backends.eager import EagerBackend
from megamoe.layer.deep_gemm_experts import DeepGemmMegaMoEExperts, MegaMoEActivation
from megamoe.layer.experts import DeepseekV4MegaMoEExperts
from megamoe.layer.symm_buffer import clear_symm_buffers

H, E, K, T = 128, 4, 2, 3
SIZES = {
    "num_experts": E, "num_local_experts": E, "experts_start_idx": 0, "top_k": K,
    "hidden_size": H, "intermediate_size": 128, "prefix": "l.0", "backend": EagerBackend(),
}  # fmt: skip
FACES = {"older": DeepseekV4MegaMoEExperts, "newer": DeepGemmMegaMoEExperts}


@pytest.fixture(autouse=True)
def no_buffers():
    clear_symm_buffers()
    yield
    clear_symm_buffers()


def make_experts(face, most=16, **changes):
    newer = {"activation": MegaMoEActivation(clamp=10.0)} if face == "newer" else {}
    return FACES[face](most, **SIZES | newer | changes)


def ready(face, **changes):
    """A layer with an EPLB state; the load that it counts into."""
    experts = make_experts(face, **changes)
    if face == "older":
        experts.finalize_weights(without_loader=True)
    load = torch.zeros(1, E, dtype=torch.int32)
    experts.set_eplb_state(
        0, load, torch.arange(E).view(1, E, 1), torch.ones(1, E, dtype=torch.int64)
    )
    return experts, load


def arguments(**changes):
    call = {
        "hidden_states": torch.ones(T, H, dtype=torch.bfloat16),
        "topk_weights": torch.ones(T, K),
        "topk_ids": torch.zeros(T, K, dtype=torch.int64),
    }
    return call | changes


def refusal(experts, load, call) -> str:
    """What a call is told; the buffer, the load and what the call was given stay as they were."""
    tensors = [t for t in vars(experts.get_symm_buffer()).values() if isinstance(t, torch.Tensor)]
    for tensor in tensors:
        tensor.view(torch.uint8).fill_(0x5A)
    inputs = [
        t for t in call.values()
        if isinstance(t, torch.Tensor) and t.layout == torch.strided and not t.is_meta
    ]  # fmt: skip
    before = [t.clone() for t in inputs]
    with pytest.raises(ValueError) as caught:
        experts(**call)
    assert all((t.view(torch.uint8) == 0x5A).all() for t in tensors)
    assert not load.any()
    assert all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(inputs, before, strict=True)
    )
    assert "\n" not in str(caught.value)
    return str(caught.value)


def ids(value, dtype=torch.int64):
    tensor = torch.zeros(T, K, dtype=dtype)
    tensor[1, 1] = value
    return tensor


TENSORS = {
    "float ids": ({"topk_ids": ids(1.0, torch.float32)}, "topk_ids are torch.float32, expected"),
    "NaN ids": ({"topk_ids": ids(math.nan, torch.float64)}, "topk_ids are torch.float64, expected"),
    "ids of 16 bits": ({"topk_ids": ids(1, torch.int16)}, "topk_ids are torch.int16, expected"),
    "bool ids": ({"topk_ids": ids(1, torch.bool)}, "topk_ids are torch.bool, expected"),
    "an id above int32": (
        {"topk_ids": ids(2**32)},
        "topk_ids has 4294967296 at token 1, slot 1, beyond int32; the remap would take it for "
        "another expert",
    ),
    "an id below int32": ({"topk_ids": ids(-(2**31) - 1)}, "topk_ids has -2147483649 at token 1"),
    "no ids": ({"topk_ids": None}, "topk_ids is None, expected a tensor"),
    "a list of ids": ({"topk_ids": [[0, 1]] * T}, "topk_ids is a list of 3 (list), expected"),
    "ids of one dimension": (
        {"topk_ids": torch.zeros(T, dtype=torch.int64)}, "topk_ids has shape (3,), expected two"
    ),
    "integer weights": (
        {"topk_weights": torch.ones(T, K, dtype=torch.int32)},
        "topk_weights are torch.int32, expected torch.float32, torch.bfloat16, torch.float16 or "
        "torch.float64",
    ),
    "weights of three dimensions": (
        {"topk_weights": torch.ones(T, K, 1)}, "topk_weights has shape (3, 2, 1), expected two"
    ),
    "sparse weights": (
        {"topk_weights": torch.ones(T, K).to_sparse()}, "topk_weights are torch.sparse_coo"
    ),
    "hidden states of one dimension": (
        {"hidden_states": torch.ones(H).bfloat16()},
        "hidden_states has shape (128,), expected two dimensions",
    ),
    "hidden states of float32": (
        {"hidden_states": torch.ones(T, H)}, "hidden_states are torch.float32, expected torch.bf"
    ),
    "hidden states of NumPy": (
        {"hidden_states": np.ones((T, H), np.float32)}, "hidden_states is array("
    ),
    "hidden states elsewhere": (
        {"hidden_states": torch.ones(T, H, dtype=torch.bfloat16, device="meta")},
        "hidden_states are on meta, the layer is on cpu; move one",
    ),
    "top-k of another layer": (
        {"topk_ids": ids(0)[:, :1], "topk_weights": torch.ones(T, 1)},
        "topk_ids has shape (3, 1), expected (3, 2)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("what", TENSORS)
def test_a_tensor_that_is_none_of_the_layers(face, what):
    changes, message = TENSORS[what]
    call = arguments(**changes) | ({"activation_clamp": 10.0} if face == "older" else {})
    experts, load = ready(face)
    assert refusal(experts, load, call).startswith(f"l.0: {message}")


CLAMPS = [math.nan, -1.0, -1, [10.0], "10", True, torch.tensor(10.0), complex(1)]


@pytest.mark.parametrize("clamp", CLAMPS, ids=str)
def test_a_clamp_that_is_no_number_from_0_on(clamp):
    experts, load = ready("older")
    message = refusal(experts, load, arguments(activation_clamp=clamp))
    assert message.startswith("l.0: activation_clamp is ")
    assert message.endswith(", expected None or a number from 0 on")
    with pytest.raises(ValueError, match=r"^MegaMoE activation clamp must be >= 0: MegaMoEAct"):
        MegaMoEActivation(clamp=clamp)


@pytest.mark.parametrize("clamp", [None, 0, 10, 0.5, math.inf, np.float32(7)], ids=str)
def test_a_clamp_that_is_a_number_is_taken(clamp):
    experts, _ = ready("older")
    assert experts(**arguments(activation_clamp=clamp)).shape == (T, H)
    assert MegaMoEActivation(clamp=clamp).clamp is clamp


@pytest.mark.parametrize("value", ["no", 1, None, 0.0, torch.tensor(True)], ids=str)
def test_a_flag_that_is_no_bool(value):
    """Any string is true."""
    experts, load = ready("older")
    message = refusal(experts, load, arguments(activation_clamp=None, fast_math=value))
    assert message.startswith("l.0: fast_math is ") and message.endswith(", expected True or False")
    with pytest.raises(ValueError, match=r"^MegaMoE: fast_math is .*, expected True or False$"):
        make_experts("newer", fast_math=value)
    unfinished = make_experts("older")
    with pytest.raises(ValueError, match=r"^l.0: without_loader is .*, expected True or False$"):
        unfinished.finalize_weights(without_loader=value)
    assert len(list(unfinished.parameters())) == 4


NUMBERS = {
    "most": (-1, 0, 1.5, "16", True, None),
    "num_experts": (0, -4, 4.0), "num_local_experts": (0, -1, None), "top_k": (0, -1, "2"),
    "hidden_size": (0, -128, 128.0), "intermediate_size": (0, -128, "128"),
    "experts_start_idx": (-1, 0.0, None), "num_logical_experts": (0, -1, 2.0),
}  # fmt: skip


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("name", NUMBERS)
def test_a_size_that_is_no_number_to_build_from(face, name):
    parameter = "max_num_tokens" if name == "most" else name
    for value in NUMBERS[name]:
        with pytest.raises(
            ValueError, match=f"^l.0: {parameter} is .*, expected an integer from [01] on$"
        ):
            make_experts(face, **{name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefix": None}, "prefix is None, expected a string"),
        ({"num_logical_experts": 5}, "l.0: num_logical_experts is 5, more than the 4 physical"),
        ({"experts_start_idx": 1}, "l.0: local experts [1, 5) are not within the 4 physical ones"),
    ],
)
@pytest.mark.parametrize("face", FACES)
def test_a_module_that_cannot_be(face, changes, message):
    with pytest.raises(ValueError) as caught:
        make_experts(face, **changes)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": None}, "MegaMoE: activation is None, expected a MegaMoEActivation"),
        ({"activation": "swiglu"}, "MegaMoE: activation is 'swiglu' (str), expected a MegaMoEAct"),
        ({"weight_format": ["mxfp4"]}, "MegaMoE: weight_format is a list of 1 (list), expected"),
        ({"shared_experts": 3}, "MegaMoE: shared_experts is 3 (int), expected None or a module"),
    ],
)
def test_what_only_the_newer_face_is_told(changes, message):
    with pytest.raises(ValueError) as caught:
        make_experts("newer", **changes)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("scale", ["1", None, [1.0], True], ids=str)
@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_a_scale_of_an_activation_that_is_no_number(name, scale):
    with pytest.raises(ValueError, match=r"^MegaMoE activation scales must be finite: "):
        MegaMoEActivation(**{name: scale})


def test_shared_experts_that_cannot_be_called():
    experts, load = ready("newer")
    message = refusal(experts, load, arguments(shared_experts=torch.ones(1)))
    assert message.startswith("MegaMoE: shared_experts is a tensor of torch.float32 (1,), expected")


EPLB = {
    "moe_layer_idx": [
        (-1, "moe_layer_idx is -1 (int), expected an integer from 0 on"),
        (1, "moe_layer_idx is 1, and expert_load_view has 1 layers"),
        (0.0, "moe_layer_idx is 0.0 (float), expected an integer from 0 on"),
    ],
    "expert_load_view": [
        (None, "expert_load_view is None, expected a tensor"),
        (torch.zeros(1, E), "expert_load_view is a tensor of torch.float32 (1, 4), expected"),
        (
            torch.zeros(1, 5, dtype=torch.int32),
            "expert_load_view is a tensor of torch.int32 (1",
        ),
        (torch.zeros(E, dtype=torch.int32), "expert_load_view is a tensor of torch.int32 (4,)"),
    ],
    "logical_to_physical_map": [
        (
            torch.zeros(1, E, dtype=torch.int64),
            "logical_to_physical_map is a tensor of torch.int64 (1, 4), expected (layers, 4, "
            "replicas) torch.int32 or torch.int64",
        ),
    ],
    "logical_replica_count": [
        (
            torch.ones(1, 3, dtype=torch.int64),
            "logical_replica_count is a tensor of torch.int64",
        ),
    ],
}


@pytest.mark.parametrize("name", EPLB)
def test_an_eplb_state_of_another_layer_is_not_taken(name):
    fitting = {
        "moe_layer_idx": 0, "expert_load_view": torch.zeros(1, E, dtype=torch.int32),
        "logical_to_physical_map": torch.arange(E).view(1, E, 1),
        "logical_replica_count": torch.ones(1, E, dtype=torch.int64),
    }  # fmt: skip
    experts = make_experts("newer")
    for value, message in EPLB[name]:
        with pytest.raises(ValueError) as caught:
            experts.set_eplb_state(**fitting | {name: value})
        assert str(caught.value).startswith(f"l.0: {message}")
        assert not experts.eplb_state.active
    experts.set_eplb_state(**fitting)
    assert experts.eplb_state.active


def test_no_tokens_are_no_excuse_for_a_wrong_value():
    experts, load = ready("older")
    none = arguments(**{name: tensor[:0] for name, tensor in arguments().items()})
    assert experts(**none, activation_clamp=None).shape == (0, H)
    message = refusal(experts, load, none | {"activation_clamp": math.nan})
    assert message.startswith("l.0: activation_clamp is nan")
