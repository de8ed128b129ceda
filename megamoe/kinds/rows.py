"""Rows of one forward that must be equal: those of tokens with the same inputs.

The layer computes each token from that token alone, so a batch of thousands can be judged against
the few rows of a golden: of the key ``distinct`` all other tokens repeat one of the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from megamoe.cases import Case
from megamoe.cases.recipes import twins
from megamoe.judge import TWINS, Finding, bitwise, place_of
from megamoe.judge.judgements import observable_codes
from megamoe.spec.problem import Problem
from megamoe.spec.tensors import TENSORS


def twin_findings(case: Case, actual: Mapping[str, Any], problem: Problem) -> list[Finding]:
    """Each stage of the tokens from ``distinct`` on, bitwise against that of their twins.

    ``actual``: stage to bits of all tokens; ``problem`` has all tokens too. No finding where the
    case has no such tokens.
    """
    distinct, tokens = case.params.get("distinct"), problem.num_tokens
    if distinct is None or distinct == tokens:
        return []
    others = np.arange(distinct, tokens)
    source = twins(case.seed, distinct, others)
    ids = problem.topk_ids.numpy()[distinct:]
    live = (ids >= 0).any(axis=1)
    findings = []
    for name, stage in actual.items():
        tensor = TENSORS[name]
        # If only live slots have codes, most tokens of some batches have none.
        some = slice(None) if tensor.reads_masked else live
        at, twin, own = others[some], source[some], ids[some]
        pair = [tensor.elements(stage[rows]) for rows in (at, twin)]
        if name == "l2_acts":
            sf = actual["l2_acts_sf"]
            pair = [
                observable_codes(codes, sf[r]) for codes, r in zip(pair, (at, twin), strict=True)
            ]
        place = place_of(name, at.tolist(), own)
        mask = None if tensor.reads_masked else (own >= 0)[:, :, None]
        one = bitwise(name, tensor.form_of(stage), pair[0], pair[1], place, mask)
        findings.append(_relabel(one, distinct))
    return findings


def _relabel(finding: Finding, distinct: int) -> Finding:
    if not finding.bad:
        return finding
    text = (
        f"{finding.stage}: {finding.outside} elements are not those of the token with the same "
        f"inputs, one of the first {distinct}"
    )
    return replace(finding, text=text, sides=TWINS)
