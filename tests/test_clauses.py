"""Every clause of every contract decides a bit: changed alone, it moves a golden and turns red.

So no clause is decoration, neither in the oracle nor in ``eager``. What a contract cannot show is
named in :data:`UNSEEN` and :data:`WITHIN`, with the reason.
"""

import pytest

from megamoe.backends.eager import EagerBackend
from megamoe.cases import golden_root, load_cases
from megamoe.cases.forms import FORWARD
from megamoe.golden import Store, make, regenerate
from megamoe.golden.store import pack
from megamoe.judge import BAD
from megamoe.spec.contract import BASE, REVISIONS
from megamoe.suite.runner import Runner
from tests.helpers.local import Local

CASES = {case.id: case for case in load_cases()}
OTHER = {
    "replica_choice": ("eplb/replica-hash-differs-r2", "flat-position"),
    "replica_hash": ("eplb/replica-hash-differs-r3", 2654435761),
    "padding_known": ("eplb/padding-rows-counted-1-of-2", False),
    "staging_amax_floor": ("staging/amax-floor-1e-4-385f", 1e-7),
    "staging_exponent_min": ("staging/amax-at-448x2k-or-a-step-beside-3a5f", 110),
    "staging_exponent_max": ("staging/amax-at-448x2k-or-a-step-beside-43df", 120),
    "staging_clips": ("staging/nan-7fc0-everywhere", lambda clips: not clips),
    "cast_saturates": ("staging/infinity-7f80-everywhere", False),
    "amax_drops_nan": ("staging/nan-7fc0-everywhere", False),
    "gate_up_order": ("forward/requant-amax-at-448x2k", "up-gate"),
    "gate_clamped_below": ("forward/clamp-10-one-sided-or-missing", True),
    "clamp_drops_nan": ("forward/nan-token-with-clamp-becomes-bounds", False),
    "precise_silu": (
        "forward/directed-precise-silu-by-a-reciprocal",
        lambda form: "g/d" if form == "g*(1/d)" else "g*(1/d)",
    ),
    "routing_weight": ("forward/requant-amax-at-448x2k", "combine"),
    "bf16_before_requant": ("forward/clamp-10-one-sided-or-missing", True),
    "requant_scale": (
        "forward/requantise-amax-infinite", lambda rule: "bits" if rule == "product" else "product",
    ),
    "requant_exponent_min": ("forward/requantise-tiny-1e-24", lambda floor: 105 - floor),
    "situ_tanh": (
        "forward/situ-tiny-precise", lambda form: "tanhf" if form == "sigmoid" else "sigmoid",
    ),
    "shared_expert": (
        "forward/shared-expert-added-at-another-place",
        lambda place: "first" if place == "last" else "last",
    ),
    "combine_order": ("forward/combine-reversed-cancelling-pair", "descending-slot"),
}  # fmt: skip
"""Clause -> the case that shows it, and another value."""
WITNESSES = {
    ("sgl", "staging_amax_floor"): "staging/amax-floor-1e-4-2edb",
    ("sgl", "clamp_drops_nan"): "forward/infinite-hidden-value-with-clamp",
}
"""Where a contract needs another case than the others."""
UNSEEN = {
    ("2026-06", "padding_known"): "no case of this contract has padding rows",
    ("sgl", "padding_known"): "no case of this contract has padding rows",
    ("sgl", "cast_saturates"): "values are clipped before the cast, and an infinite amax is NaN",
}
WITHIN = {
    (name, "situ_tanh"): "an error of exp allowed to 2 * sigmoid(2x) - 1 is worth any tanh"
    for name in ("2026-09", "2026-11")
}
"""The golden moves, but no kernel can be caught."""
FEATURES = "features"
"""Decides which cases a contract knows, and no bit."""


@pytest.mark.parametrize("clause", BASE.clauses)
@pytest.mark.parametrize("revision", REVISIONS)
def test_a_clause_that_is_changed_alone_is_seen(revision, clause):
    if (revision, clause) in UNSEEN or clause == FEATURES:
        return
    name, value = OTHER[clause]
    case = CASES[WITNESSES.get((revision, clause), name)]
    contract = REVISIONS[revision]
    other_value = value(contract.clauses[clause].value) if callable(value) else value
    other = contract.variant("other", "a test", **{clause: other_value})
    inputs = regenerate(case)

    # An explicit family: what a changed contract leaves of a proof is not the question here.
    classes = ["fp32-ordered"]
    tables = [pack(make(case, inputs, classes, contract=c))[1] for c in (contract, other)]
    assert tables[0] != tables[1]
    if (revision, clause) in WITHIN:
        return

    backend = EagerBackend(other)
    backend.contracts = (revision,)
    store = Store(golden_root(), make, contract)
    verdict = Runner(Local(backend), store).run(case)
    assert verdict.status in BAD
    backend = EagerBackend(contract)
    assert Runner(Local(backend), store).run(case).status == "pass"


def test_every_clause_has_another_value():
    assert {*OTHER, FEATURES} == set(BASE.clauses)


@pytest.mark.parametrize("revision", REVISIONS)
def test_a_contract_without_a_feature_does_not_know_its_cases(revision):
    contract = REVISIONS[revision]
    asking = {case.id: FORWARD.features(case) for case in CASES.values() if case.kind == "forward"}
    for feature in contract.features.value:
        ids = [name for name, features in asking.items() if feature in features]
        names = [name for name in ids if revision in CASES[name].revisions]
        assert names
        less = contract.variant(
            "other", "a test", features=tuple(f for f in contract.features.value if f != feature)
        )
        assert not any(FORWARD.knows(CASES[name], less) for name in ids)


def test_a_floor_of_105_is_red_in_june_and_right_in_september():
    """And the reverse; the verdict says under which contract the output is right."""
    for mine, theirs in (("2026-09", "2026-06"), ("2026-06", "2026-09")):
        backend = EagerBackend(REVISIONS[mine])
        backend.contracts = (theirs,)
        runner = Runner(Local(backend), Store(golden_root(), make, REVISIONS[theirs]))
        own = Runner(Local(EagerBackend(REVISIONS[mine])),
                     Store(golden_root(), make, REVISIONS[mine]))  # fmt: skip
        red = [c for c in CASES.values() if "requantise-" in c.id or "tiny-activations" in c.id]
        red = [c for c in red if runner.run(c).status == "fail"]
        assert len(red) >= 5
        for case in red:
            verdict = runner.run(case)
            assert mine in verdict.right_under
            assert f"right under {', '.join(verdict.right_under)}" in verdict.reason
            assert own.run(case).status == "pass"
