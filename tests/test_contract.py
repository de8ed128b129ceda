"""The contract as data: frozen, with evidence for every clause of every revision."""

import dataclasses

import pytest

from megamoe.spec.contract import BASE, NEWEST, REVISIONS, Clause, contract

EVERY = pytest.mark.parametrize("revision", REVISIONS.values(), ids=lambda c: c.revision)


@EVERY
def test_every_clause_has_evidence(revision):
    assert all(isinstance(c, Clause) and c.evidence.strip() for c in revision.clauses.values())
    assert len(revision.clauses) == len(dataclasses.fields(revision)) - 1  # all but the name


def test_revisions_are_found_by_their_name():
    assert all(contract(name) is r and name == r.revision for name, r in REVISIONS.items())
    with pytest.raises(ValueError, match=r"'2026-07'; did you mean 2026-09\? Known: "):
        contract("2026-07")


def test_a_contract_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        BASE.revision = "other"
    with pytest.raises(dataclasses.FrozenInstanceError):
        BASE.combine_order.value = "descending-slot"
    with pytest.raises(TypeError, match="no_such_clause"):
        BASE.variant("other", "a test", no_such_clause=1)


def test_differences_are_by_value_and_not_by_evidence():
    assert BASE.differences(BASE.carried("another kernel")) == []
    assert BASE.differences(NEWEST) == [
        "features", "padding_known", "situ_tanh", "requant_scale", "requant_exponent_min",
        "shared_expert",
    ]  # fmt: skip
