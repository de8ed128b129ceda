"""A cause that fits one token, tried on other tokens that are wrong.

One token can fit a deviation by chance: two routing weights that are nearly equal are enough. So
each deviation that fits it is tried on a few more of the wrong tokens, and only those that fit all
of them are causes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Final

import numpy as np

from megamoe.explain import Source, departure, refutations
from megamoe.explain.deviations.shown import CHANCE
from megamoe.explain.extent import join
from megamoe.explain.grouped import one_of_each
from megamoe.explain.idle import predictor, with_idle_rows
from megamoe.explain.match import Names, general
from megamoe.explain.other_tiles import compare
from megamoe.explain.places import batch_of, known_rules, loses, wrong_tokens
from megamoe.explain.zeros import OF_CODES
from megamoe.judge import Finding
from megamoe.judge.elements import GRID_LIMIT, TILE
from megamoe.spec.contract import Contract
from megamoe.spec.problem import Problem

Plain = dict[str, Any]
_MOST: Final = 4
"""Other tokens that are tried."""
_MOST_OF_LARGE: Final = 2
"""The same where a token takes about a second."""
_MOST_OF_CHANCE: Final = 16
"""The same for a match that one token may give by chance."""
_LARGE: Final = 1 << 25
"""Weights of linear 1 of a token's slots from which a layer counts as large."""
_CHOICE: Final = " takes the weights of expert "
_INDEX: Final = "weights and scales are those of the expert "
"""Parts of names, of one slot and of all slots."""
_SEVERAL_SLOTS: Final = "in some slots only"


def of_all_tokens(
    actual: Plain, stages: Mapping[str, Any], token: int, source: Source, problem: Problem,
    findings: Sequence[Finding], accumulator: str, contract: Contract,
) -> Plain:  # fmt: skip
    """``{"batch": ...}``: the rules for the tokens that are wrong; empty as in ``batch_of``.

    ``actual`` is what :func:`megamoe.explain.explain` says of the output of ``token``. Its causes
    are changed in place: those that do not fit the other tokens become ``alone``. ``stages``: the
    stages of all tokens as bits; ``findings``: of all tokens; ``source``: the operands of
    ``problem``.
    """
    if not actual["explanations"]:
        return {}
    steps = actual["explanations"]
    fitting = _names(way for step in steps for way in step["exact"])
    on_others = partial(_others, actual, stages, token, source, findings, accumulator, contract)
    in_some = any(way["where"] for step in steps for way in step["exact"])
    is_small = not _is_large(source, token)
    # A choice of slots is one more freedom, so it needs more tokens.
    most = _MOST_OF_CHANCE if in_some and is_small else _most(source, token)
    others = on_others(fitting, most)
    slots = {}
    if actual["parts_at"]["stage"] in ("l2_acts", "l2_acts_sf"):
        slots = {at: set(one["wrong_slots"]) for at, one in {token: actual, **others}.items()}
    on_tiles = partial(
        compare, actual, {name: stage[token] for name, stage in stages.items()}, token, source,
        findings, accumulator, contract, not is_small,
    )  # fmt: skip
    if is_early := loses(actual):  # what is zero in some channels only loses no slot
        on_tiles()
    result = batch_of(actual, stages, token, problem, findings, slots)
    batch = result.get("batch", {"rules": []})
    if not (batch["rules"] and batch["is_lost"]):  # such a rule holds for all tokens already
        alone = [{**step} for step in steps]
        _keep(steps, token, others)
        for step, before in zip(steps, alone, strict=True):
            if step["exact"] or not step["may_be"]:
                continue
            most = _MOST_OF_CHANCE if is_small else _MOST_OF_LARGE
            _prove(step, before, token, on_others(_names([step["may_be"]]), most))
        _refute(actual, stages, token, source, findings, accumulator, contract)
        if batch.get("wrong", 0) > 1 and not batch["rules"]:
            _place(batch, actual, stages, token, source, problem, findings, accumulator, contract)
        if not is_early:
            on_tiles()
    for step in steps:
        step["is_placed"] = bool(batch["rules"])
    return result


def _place(
    batch: Plain, actual: Plain, stages: Mapping[str, Any], token: int, source: Source,
    problem: Problem, findings: Sequence[Finding], accumulator: str, contract: Contract,
) -> None:  # fmt: skip
    """Find the rules some of whose tokens are right, since the cause changes nothing there."""
    (step, *rest), wrong = actual["explanations"], wrong_tokens(actual, findings, source.tokens)[0]
    if rest or step["step"] != "y" or not step["exact"] or "l2_acts" not in stages:
        return
    rows = np.flatnonzero(wrong).tolist()
    channels = {at: _channel(findings, at) for at in rows}
    only, ids = _names(step["exact"]), problem.topk_ids.numpy()
    gives = predictor(source, stages, accumulator, contract, only, channels)
    one = source.token(token)
    weights = len(one.ids) * source.hidden_size * one.intermediate
    some = [token, *spread(rows, token, _most(source, token))]
    candidates = known_rules(ids, problem.num_experts, wrong)
    rules = one_of_each(with_idle_rows(candidates, wrong, gives, some, weights))
    if rules:
        batch.update(rules=[rule.where for rule in rules], near="", has_idle_rows=True)


def _refute(
    actual: Plain, stages: Mapping[str, Any], token: int, source: Source,
    findings: Sequence[Finding], accumulator: str, contract: Contract,
) -> None:  # fmt: skip
    """Of several causes, keep those that leave right codes of right tokens as they are, where there
    are any: one that rounds only ties, and not one that rounds all codes. One that holds in some
    channels only says nothing of the others. Where only zeros are
    left, causes in some slots stay, too: right tokens may be right in other slots than these."""
    steps = [
        s for s in actual["explanations"]
        if len(s["exact"]) > 1 and s["step"] != "y" and not any(w["channels"] for w in s["exact"])
    ]  # fmt: skip
    only = _names(way for step in steps for way in step["exact"])
    wrong = {row for finding in findings for row, _, _ in finding.grid}
    right = [at for at in range(source.tokens) if at not in wrong]
    if not only or any(len(finding.grid) >= GRID_LIMIT for finding in findings):
        return
    against: frozenset[tuple[str, str]] = frozenset()
    for at in spread(right, token, _most(source, token)):
        rows = {name: stage[at] for name, stage in stages.items()}
        against |= refutations(source, at, accumulator, rows, contract, only)
    leave_out(actual, against)


def leave_out(actual: Plain, against: Names, case: str = "") -> None:
    """Take the deviations ``against`` out of the causes of each step that has others too. If a
    ``case`` refutes them, the step has them as ``refuted_by``."""
    steps = actual["explanations"]
    for step in steps:
        survivors = [w for w in step["exact"] if (w["stage"], general(w["what"])) not in against]
        if survivors and all(way["what"] in OF_CODES for way in survivors):
            survivors = [way for way in step["exact"] if way in survivors or way["where"]]
        if not survivors or step["follows"]:
            continue
        rejects = [way for way in step["exact"] if way not in survivors]
        if case and rejects:
            step["refuted_by"] = [*step.get("refuted_by", ()), {"case": case, "ways": rejects}]
        step["exact"] = survivors
    for before, step in pairwise(steps):
        if step["follows"]:
            step["exact"] = before["exact"]


def _others(
    actual: Plain, stages: Mapping[str, Any], token: int, source: Source,
    findings: Sequence[Finding], accumulator: str, contract: Contract, only: Names, most: int,
) -> dict[int, Plain]:  # fmt: skip
    """What the deviations ``only`` say of at most ``most`` other tokens, by token."""
    wrong = wrong_tokens(actual, findings, source.tokens)[0]
    out = {}
    for at in spread(np.flatnonzero(wrong).tolist(), token, most):
        rows = {name: stage[at] for name, stage in stages.items()}
        channel = _channel(findings, at)
        one = departure(source, at, channel, accumulator, rows, contract, only)
        if one["explanations"]:
            out[at] = one
    return out


def _is_large(source: Source, token: int) -> bool:
    one = source.token(token)
    return len(one.ids) * source.hidden_size * one.intermediate > _LARGE


def _most(source: Source, token: int) -> int:
    return _MOST_OF_LARGE if _is_large(source, token) else _MOST


def spread(tokens: Sequence[int], token: int, most: int) -> list[int]:
    """At most ``most`` of the tokens besides ``token``, the first and the last among them."""
    rest = [at for at in tokens if at != token]
    if len(rest) <= most:
        return rest
    return [rest[k * (len(rest) - 1) // (most - 1)] for k in range(most)]


def _channel(findings: Sequence[Finding], token: int) -> int:
    """The first channel of the tile of ``y`` where the token has most wrong elements."""
    y = next((f for f in findings if f.stage == "y"), None)
    tiles = [] if y is None else [(count, tile) for row, tile, count in y.grid if row == token]
    return max(tiles)[1] * TILE if tiles else 0


def _keep(steps: list[Plain], token: int, others: Mapping[int, Plain]) -> None:
    """Keep as exact what fits the other tokens too, step by step."""
    for k, step in enumerate(steps):
        if step["follows"]:
            step["exact"] = steps[k - 1]["exact"]
            continue
        peers = {
            at: other for at, one in others.items() for other in one["explanations"]
            if other["step"] == step["step"]
        }  # fmt: skip
        if not step["exact"] or not peers:
            continue
        step["tried_on"] = [*peers]
        step["decisions"] += sum(other["decisions"] for other in peers.values())
        pairs = [(token, step), *peers.items()]
        step["evidence"] = " and ".join(f"{one['evidence']} of token {at}" for at, one in pairs)
        for way in step["exact"]:
            _compare(way, token, peers)
        fits = [way for way in step["exact"] if not way["fails_on"]]
        # Channels are one more freedom: a deviation that needs none stands for those that do.
        fits = _without_a_choice([way for way in fits if not way["channels"]] or fits)
        if not fits:
            step["alone"] = sorted(step["exact"], key=lambda way: len(way["fails_on"]))
        step["exact"] = fits


def _without_a_choice(fits: list[Plain]) -> list[Plain]:
    """Leave out that each slot takes some expert's weights, where one index gives the expert of
    all slots."""
    if any(not way["where"] and _INDEX in way["what"] for way in fits):
        return [way for way in fits if _CHOICE not in way["what"]]
    return fits


def _prove(step: Plain, before: Plain, token: int, others: Mapping[int, Plain]) -> None:
    """Take the match that one token may give by chance, if it fits all tokens and these hardly by
    chance. It then has the name of a token that leaves one slot only. ``before``: the step as
    ``token`` alone shows it."""
    peers = [one for other in others.values() for one in other["explanations"]
             if one["step"] == step["step"]]  # fmt: skip
    every = [one["may_be"] for one in (step, *peers)]
    if not peers or not all(every):
        return
    unique = [one["what"] for one in every if one["is_unique"]]
    if not unique or math.prod(one["chance"] for one in every) > CHANCE:
        return
    step.update(before, exact=[{**step["may_be"], "what": unique[0]}], partial=[], alone=[])
    _keep([step], token, others)


def _names(ways: Iterable[Plain]) -> Names:
    return frozenset((way["stage"], general(way["what"])) for way in ways)


def _compare(way: Plain, token: int, peers: Mapping[int, Plain]) -> None:
    """Note the tokens that a deviation fits and those that it does not fit; and its channels, which
    are those of all tokens."""
    name, wheres = (way["stage"], general(way["what"])), {way["where"]}
    way["holds_on"], way["fails_on"] = [token], []
    for at, other in peers.items():
        same = [w for w in other["exact"] if (w["stage"], general(w["what"])) == name]
        same = [w for w in same if join(way, w)]
        way["holds_on" if same else "fails_on"].append(at)
        wheres |= {w["where"] for w in same[:1]}
        if not all(w["repeats"] for w in same):
            way["repeats"] = 0
    if not way["fails_on"] and len(wheres) > 1:
        way["where"] = _SEVERAL_SLOTS


__all__ = ["leave_out", "of_all_tokens", "spread"]
