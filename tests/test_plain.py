"""The oracle of every contract against a plain implementation of it: no difference in any element.

``helpers/plain.py`` computes each number by itself, in exact fractions.
"""

from fractions import Fraction

import pytest

from megamoe import oracle
from megamoe.backends import simulate
from megamoe.spec.contract import REVISIONS
from megamoe.spec.formats import bf16_decode, e4m3_decode
from tests.helpers import plain

ORDINARY = {"hidden_recipe": {"kind": "bell"}}
SMALL = {"routing_recipe": {"scaling": 2.0**-40}}
"""Activations below the floor of the requantise byte."""
TINY = {"hidden_recipe": {"kind": "bell", "log2_scale": -20}}
"""Hidden states below staging's floors."""
PROBLEMS = [
    pytest.param({**change, "fast_math": fast, "clamp": clamp}, id=f"{name}-{fast}-{clamp}")
    for name, change in (("ordinary", ORDINARY), ("small", SMALL), ("tiny", TINY))
    for fast, clamp in ((True, 1.0), (False, "none"))
]


@pytest.mark.parametrize("revision", REVISIONS)
@pytest.mark.parametrize("params", PROBLEMS)
def test_the_oracle_computes_what_the_contract_says(params, revision):
    problem = simulate.problem(
        11, hidden=128, intermediate=128, experts=3, top_k=2, tokens=1, **params
    )
    golden = oracle.forward(problem, [], contract=REVISIONS[revision])
    y, codes, sf = plain.forward(problem, revision)
    for token, row in enumerate(y):
        assert list(map(Fraction, bf16_decode(golden.y[token]).tolist())) == row
    assert codes
    for at, values in codes.items():
        assert golden.sf[at].tolist() == sf[at]
        assert list(map(Fraction, e4m3_decode(golden.codes[at]).tolist())) == values


def test_every_contract_has_a_rule():
    assert set(plain.RULES) == set(REVISIONS)
