"""The contract as data: frozen, with evidence, and the same numbers as the code that runs."""

from __future__ import annotations

import dataclasses

import pytest

from megamoe.layer import eplb, staging
from megamoe.spec import formats
from megamoe.spec.contract import CURRENT, MODELS, REVISIONS, Clause


@pytest.mark.parametrize("revision", REVISIONS.values(), ids=str)
def test_every_clause_has_evidence(revision):
    clauses = [getattr(revision, x.name) for x in dataclasses.fields(revision)]
    clauses = [c for c in clauses if isinstance(c, Clause)]
    assert len(clauses) == len(dataclasses.fields(revision)) - 1  # all but the name
    assert all(c.evidence.strip() for c in clauses)


def test_revisions_are_found_by_their_name():
    assert REVISIONS[CURRENT.revision] is CURRENT
    assert all(name == r.revision for name, r in REVISIONS.items())


def test_a_contract_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CURRENT.revision = "other"
    with pytest.raises(dataclasses.FrozenInstanceError):
        CURRENT.group_size.value = 16


def test_the_module_under_test_runs_the_current_revision():
    """Its constants are its own, as an engine's would be; a difference would be a finding."""
    assert CURRENT.group_size.value == formats.GROUP
    assert CURRENT.staging_amax_floor.value == staging.AMAX_FLOOR
    assert CURRENT.size_multiple.value == staging.SIZE_MULTIPLE
    assert CURRENT.replica_hash.value == eplb.REPLICA_HASH


@pytest.mark.parametrize("model", MODELS.values(), ids=lambda m: m.name)
def test_models_fit_the_contract(model):
    assert model.hidden_size % CURRENT.size_multiple.value == 0
    assert model.intermediate_size % CURRENT.size_multiple.value == 0
    assert 1 <= model.top_k <= model.num_experts
    assert model.local_experts(8) * 8 == model.num_experts
    assert model.evidence


def test_ranks_that_do_not_divide_the_experts_are_refused():
    model = MODELS["deepseek-v4-flash"]
    for ep_size in (0, 3, 512):
        with pytest.raises(ValueError, match=f"256 experts do not divide over {ep_size} ranks"):
            model.local_experts(ep_size)
