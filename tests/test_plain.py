"""The oracle of every contract against a plain implementation of it: no difference in any element.

``helpers/plain.py`` computes each number by itself, in exact fractions.
"""

from fractions import Fraction

import pytest

from megamoe import oracle
from megamoe.backends import simulate
from megamoe.spec.contract import REVISIONS
from megamoe.spec.formats import bf16_decode, e4m3_decode
from megamoe.spec.problem import Problem
from tests.helpers import plain

ORDINARY = {"hidden_recipe": {"kind": "bell"}, "top_k": 2}
SMALL = {"routing_recipe": {"scaling": 2.0**-40}}
"""Activations below the floor of the requantise byte."""
TINY = {"hidden_recipe": {"kind": "bell", "log2_scale": -20}}
"""Hidden states below staging's floors."""
PROBLEMS = [
    pytest.param({**change, "fast_math": fast, "clamp": clamp}, id=f"{name}-{fast}-{clamp}")
    for name, change in (("ordinary", ORDINARY), ("small", SMALL), ("tiny", TINY))
    for fast, clamp in ((True, 1.0), (False, "none"))
]


WIDE = {"hidden_recipe": {"kind": "bell", "log2_scale": 2}}
SHARED = {"shared_recipe": {"size": 128}}
FEATURE_PROBLEMS = [
    pytest.param({"clamp": "none", "fast_math": True, **params}, id=name)
    for name, params in {
        "shared-expert": {**SHARED, "top_k": 2},
        "shared-expert-alone": {**SHARED, "top_k": 2, "routing_recipe": {"mask": [[0, 0], [0, 1]]}},
        "shared-expert-against-slot-0": {
            "top_k": 2, "shared_recipe": {"kind": "expert"}, "weights_recipe": {"same": True},
            "routing_recipe": {"weights": [[-1.0, 2.0**-20]]},
        },
        "shared-expert-precise-clamp": {**SHARED, "fast_math": False, "clamp": 1.5},
        "shared-output": {"shared_output_recipe": {"spread": 6}},
        "oai": {**WIDE, "clamp": 7.0, "activation_alpha": 1.702, "activation_beta": 1.0},
        "alpha-beta": {"activation_alpha": 0.7, "activation_beta": -0.3, "fast_math": False},
        "swiglustep": {**WIDE, "activation": "swiglustep", "clamp": 3.3},
        "swiglustep-alpha": {
            **WIDE, "activation": "swiglustep", "clamp": 0.4, "activation_alpha": 1.5,
            "activation_beta": 1.0, "fast_math": False,
        },
        "situ-4-25": {"activation": "situ", "activation_alpha": 4.0, "activation_beta": 25.0},
        "situ-4-25-precise": {
            **WIDE, "activation": "situ", "activation_alpha": 4.0, "activation_beta": 25.0,
            "fast_math": False,
        },
        "situ-2-8": {"activation": "situ", "activation_alpha": 2.0, "activation_beta": 8.0},
        "situ-tiny": {
            **TINY, "activation": "situ", "activation_alpha": 3.0, "activation_beta": 7.0,
            "routing_recipe": {"scaling": 2.0**22},
        },
        "fp8-combine": {"combine_dtype": "fp8", "hidden": 256},
        "fp8-combine-wide": {"combine_dtype": "fp8", "weights_recipe": {"w2_scale": [60, 90]}},
        "fp8-combine-shared": {"combine_dtype": "fp8", **SHARED},
    }.items()
]  # fmt: skip


def make_problem(params: dict) -> Problem:
    sizes = {"hidden": 128, "intermediate": 128, "experts": 3, "top_k": 1, "tokens": 1}
    return simulate.problem(11, **{**sizes, **params})


def problems_and_contracts() -> list:
    """Each problem under the contracts that have a rule for it, once for each rule.

    What every call meets, staging and the requantise byte, is tried with the problems that ask
    nothing besides.
    """
    out = []
    for param in [*PROBLEMS, *FEATURE_PROBLEMS]:
        features, rules = set(make_problem(*param.values).features), []
        for name, contract in REVISIONS.items():
            clauses = ("shared_expert",) if "shared-expert" in features else ()
            clauses += ("situ_tanh",) if "situ" in features else ()
            clauses += () if features else ("requant_scale", "staging_amax_floor", "precise_silu")
            rule = [contract.clauses[clause].value for clause in clauses]
            if features <= set(contract.features.value) and rule not in rules:
                rules.append(rule)
                out.append(pytest.param(*param.values, name, id=f"{param.id}-{name}"))
    return out


@pytest.mark.parametrize(("params", "revision"), problems_and_contracts())
def test_the_oracle_computes_what_the_contract_says(params, revision):
    problem = make_problem(params)
    golden = oracle.forward(problem, [], contract=REVISIONS[revision])
    y, codes, sf = plain.forward(problem, revision)
    for token, row in enumerate(y):
        assert list(map(Fraction, bf16_decode(golden.y[token]).tolist())) == row
    assert codes or (problem.topk_ids < 0).all()
    for at, values in codes.items():
        assert golden.sf[at].tolist() == sf[at]
        assert list(map(Fraction, e4m3_decode(golden.codes[at]).tolist())) == values


def test_every_contract_has_a_rule():
    assert set(plain.RULES) == set(REVISIONS)
