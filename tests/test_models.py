"""The shape table of models."""

import pytest

from megamoe.spec.features import SIZE_MULTIPLE
from megamoe.spec.models import MODELS


@pytest.mark.parametrize("model", MODELS.values(), ids=lambda m: m.name)
def test_models_fit_the_contract(model):
    assert model.hidden_size % SIZE_MULTIPLE == 0
    assert model.intermediate_size % SIZE_MULTIPLE == 0
    assert 1 <= model.top_k <= model.num_experts
    assert model.local_experts(8) * 8 == model.num_experts
    assert model.evidence


def test_ranks_that_do_not_divide_the_experts_are_refused():
    model = MODELS["deepseek-v4-flash"]
    for ep_size in (0, 3, 512):
        with pytest.raises(ValueError, match=f"256 experts do not divide over {ep_size} ranks"):
            model.local_experts(ep_size)
