"""The part of a batch in which a fault shows: tokens, experts, and rows of experts.

One token alone cannot tell a lost slot from a lost expert. The tokens that are wrong, and those
that are right, can: each rule here predicts the wrong slots of the whole batch, and a rule is
offered only if it predicts exactly the tokens that are wrong.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

import numpy as np

from megamoe.explain.channels import FEWEST, MOST, in_words
from megamoe.explain.expert_sets import expert_rules
from megamoe.explain.grouped import before, grouped_rules, one_of_each
from megamoe.explain.heads import head_rules
from megamoe.explain.near import nearest
from megamoe.explain.rules import Bools, Ids, Rule, WrongSlots, phrase, rules
from megamoe.explain.tails import tail_rules
from megamoe.explain.tile_parts import part_rules
from megamoe.explain.unwritten import zero_rows
from megamoe.judge import Finding
from megamoe.judge.elements import GRID_LIMIT, TALLY_LIMIT, TILE
from megamoe.spec.problem import Problem
from megamoe.spec.stages import STEPS

ZERO_SLOT: Final = "a slot is left out: codes and scale bytes are zero"
ZERO_Y: Final = "y is zero"
_TELLING: Final = 8
"""Live slots that tell rules apart where all tokens are wrong: each is right or wrong."""
_LOST_SLOT: Final = re.compile(r"slot (\d+) \(.*\) is lost")
"""Names of deviations of one token by which slots are lost."""
_OF_EXPERT: Final = re.compile(r"(?:takes the weights|scales are those) of expert (\d+)")
"""Names of deviations of one token by which slots meet another expert's weights."""


def known_rules(ids: Ids, experts: int, wrong: Bools) -> list[Rule]:
    """All rules for ``(T, K)`` expert ids; some of them are those of the ``wrong`` tokens
    ``(T,)``."""
    return [
        *expert_rules(ids, experts, wrong), *rules(ids, experts, wrong),
        *head_rules(ids, experts), *tail_rules(ids, experts),
        *part_rules(ids, experts), *grouped_rules(ids, experts),
    ]  # fmt: skip


def fitting(
    ids: Ids, experts: int, wrong: Bools, slots: Bools | None = None,
    one: tuple[int, set[int]] | None = None,
) -> list[Rule]:  # fmt: skip
    """The rules that predict exactly the ``wrong`` tokens ``(T,)``.

    With ``slots`` ``(T, K)`` they predict exactly these slots; with ``one``, a token and its wrong
    slots, these of that token.
    """
    matches = [r for r in known_rules(ids, experts, wrong) if (r.slots.any(axis=1) == wrong).all()]
    if slots is not None:
        matches = [r for r in matches if (r.slots == slots).all()]
    if one is not None:
        token, own = one
        matches = [r for r in matches if set(np.flatnonzero(r.slots[token]).tolist()) == own]
        if not matches and len(own) == 1 and not wrong.all():
            # No rule of experts or tokens: the slot itself, in the tokens that are wrong.
            matches = [_slot_of(own, wrong, ids.shape[1])]
    return matches


def _tell(wrong_slots: WrongSlots, live: Bools) -> bool:
    """Whether enough slots are known, some of them wrong and some right, that no rule agrees with
    them by chance."""
    wrong = sum(len(slots) for slots in wrong_slots.values())
    every = int(live[[*wrong_slots]].sum())
    return len(wrong_slots) > 1 and every >= _TELLING and 0 < wrong < every


def _follows(
    rule: Rule, ids: Ids, wrong: Bools, wrong_experts: Collection[int] | None
) -> bool:  # fmt: skip
    """Whether the experts of a rule are the wrong ones; where these are not known, whether wrong
    and right tokens are enough to tell."""
    if wrong_experts is None:
        return bool(min(wrong.sum(), (~wrong).sum()) >= _TELLING)
    return set(ids[rule.slots].tolist()) == set(wrong_experts)


def _slot_of(own: set[int], wrong: Bools, slots: int) -> Rule:
    (k,) = own
    which = np.zeros((len(wrong), slots), np.bool_)
    which[wrong, k] = True
    if wrong.sum() == 1:
        return one_slot(which)
    where = f"slot {k} of {phrase(wrong)}"
    return Rule(where, f"{where} is dropped", which)


def one_slot(slots: Bools) -> Rule:
    """The rule of a single slot: the one that is true in ``slots`` ``(T, K)``."""
    (at,) = np.flatnonzero(slots)
    token, k = divmod(int(at), slots.shape[1])
    place = f"token {token} slot {k}"
    if at == 0:
        place += ", the first (a padding row with index 0 writes there)"
    elif at == slots.size - 1:
        place += ", the last (an index that is held to the range writes there)"
    return Rule(f"one slot of the batch: {place}", f"one slot is dropped: {place}", slots)


def batch_of(
    actual: Mapping[str, Any], stages: Mapping[str, Any], token: int, problem: Problem,
    findings: Sequence[Finding], wrong_slots: WrongSlots,
) -> dict[str, Any]:  # fmt: skip
    """``{"batch": ...}`` of :func:`in_batch`; empty where nothing is wrong, or not all wrong tokens
    are known. ``findings`` are those of all tokens."""
    if not actual["explanations"]:
        return {}
    wrong, is_whole = wrong_tokens(actual, findings, problem.num_tokens)
    if not is_whole:
        return {}
    ids, experts = problem.topk_ids.numpy(), problem.num_experts
    tally = _experts_of(actual, findings)
    batch = in_batch(actual, stages, token, ids, experts, wrong, wrong_slots, tally)
    # Where zeros are right, the values are what was there before: no pattern.
    tiles = "" if zero_rows(problem)[wrong].all() else _tiles_of(actual, findings)
    return {"batch": {**batch, "tiles": tiles}}


def _experts_of(actual: Mapping[str, Any], findings: Sequence[Finding]) -> set[int] | None:
    """The experts with a wrong code, which the picture of ``check`` names too; None where codes are
    not the first wrong step, or not all are known."""
    if actual["parts_at"]["stage"] not in STEPS[1]:
        return None
    tallies = [finding.experts for finding in findings if finding.stage in STEPS[1]]
    whole = all(len(tally) < TALLY_LIMIT for tally in tallies)
    return set().union(*tallies) if whole else None


def _tiles_of(actual: Mapping[str, Any], findings: Sequence[Finding]) -> str:
    """As "y in tiles 4 and 5 of 128 channels" if all wrong elements of the batch are in few."""
    stage = actual["parts_at"]["stage"]
    for finding in findings:
        tiles = sorted(finding.tiles)
        of_all = sum(finding.tiles.values()) == finding.outside
        few = 0 < len(tiles) <= min(MOST, finding.shape[1] // 2)
        if finding.stage == stage and finding.outside >= FEWEST and of_all and few:
            return f"{stage} in {in_words(tiles, TILE)}"
    return ""


def wrong_tokens(
    actual: Mapping[str, Any], findings: Sequence[Finding], tokens: int
) -> tuple[Bools, bool]:
    """``(T,)`` tokens that are outside in the first wrong step, and whether these are all."""
    step = next(step for step in STEPS if actual["parts_at"]["stage"] in step)
    wrong, is_whole = np.zeros(tokens, np.bool_), True
    for finding in findings:
        if finding.stage in step:
            is_whole = is_whole and len(finding.grid) < GRID_LIMIT
            wrong[[row for row, _, _ in finding.grid]] = True
    return wrong, is_whole


def loses(actual: Mapping[str, Any]) -> bool:
    """Whether a cause of the first wrong step, which is that of ``y``, loses slots."""
    step = actual["explanations"][0]
    names = [way["what"] for way in step["exact"]]
    return step["step"] == "y" and any(
        name == ZERO_Y or _LOST_SLOT.fullmatch(name) for name in names
    )


def in_batch(
    actual: Mapping[str, Any], stages: Mapping[str, Any], token: int, ids: Ids, experts: int,
    wrong: Bools, wrong_slots: WrongSlots, wrong_experts: Collection[int] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The rules that fit the whole batch, with the cause that one token has; JSON-able.

    ``actual``: what :func:`megamoe.explain.part.part` says of ``token``. ``stages``: the stages of
    all tokens as bits. ``wrong`` ``(T,)``: tokens that are outside in the first wrong step.
    ``wrong_slots``: the slots with wrong codes, of tokens where they are known. ``wrong_experts``:
    the experts of all of these; None where they are not known.
    """
    # Of the first wrong step; what holds in some channels only loses no slot.
    exact = actual["explanations"][0]["exact"]
    causes = [way["what"] for way in exact if not way.get("channels")]
    lost_slots = [int(one[1]) for one in map(_LOST_SLOT.fullmatch, causes) if one]
    live = (ids >= 0) & (ids < experts)
    slots, one, is_lost = None, None, True
    if ZERO_Y in causes and not (stages["y"][token] & 0x7FFF).any():
        one = token, set(np.flatnonzero(live[token]).tolist())
    elif lost_slots:
        one = token, {lost_slots[0]}
    elif ZERO_SLOT in causes:
        zero = ~(stages["l2_acts"].any(axis=-1) | stages["l2_acts_sf"].any(axis=-1))
        slots = zero & live & wrong[:, None]
    else:
        is_lost = False
    matches = fitting(ids, experts, wrong, slots, one)
    if slots is None:
        matches = [
            rule for rule in matches
            if not rule.is_pattern or _follows(rule, ids, wrong, wrong_experts)
        ]  # fmt: skip
    if len(wrong) < 2:
        matches = []  # a batch of one token says no more than the token
    elif is_lost:
        matches = one_of_each(rule for rule in matches if rule.loses())
    else:
        # One token agrees with some rule by chance, and all tokens agree with many, unless their
        # slots tell rules apart.
        is_some = (wrong.sum() > 1 and not wrong.all()) or _tell(wrong_slots, live)
        matches = [rule for rule in matches if rule.is_rare or is_some]
        matches = [rule for rule in matches if rule.gives(wrong_slots)]
        mentions = {int(one[1]) for one in map(_OF_EXPERT.search, causes) if one}
        is_other = bool(causes) and not any("weights" in what for what in causes)
        matches = one_of_each(
            rule for rule in matches
            if rule.experts is None or (not is_other and rule.takes(mentions, token))
        )  # fmt: skip
    mask = _wrong_slots(ids.shape, wrong, slots, wrong_slots)
    if not matches and mask is not None and mask.sum() == 1 and len(wrong) > 1:
        matches = [one_slot(mask)]
    place = next((rule.slots for rule in matches if rule.where.startswith("expert")), None)
    is_shifted = any(rule.experts is not None for rule in matches)
    return {
        "tokens": len(wrong),
        "wrong": int(wrong.sum()),
        "which": phrase(wrong),
        "slots": int(live.sum()),
        "wrong_slots": None if mask is None else int(mask.sum()),
        "is_lost": is_lost,
        "rules": [rule.loss if is_lost else rule.where for rule in matches],
        "near": "" if matches else nearest(known_rules(ids, experts, wrong), wrong),
        "is_empty_tokens": any(rule.is_rare for rule in matches),
        "before": "" if place is None or is_shifted else before(ids, experts, place),
    }


def _wrong_slots(
    shape: tuple[int, ...], wrong: Bools, lost_slots: Bools | None, wrong_slots: WrongSlots
) -> Bools | None:
    """``(T, K)``: the slots that are wrong or ``lost_slots``; None where they are not known of all
    ``wrong`` tokens."""
    if lost_slots is not None:
        return lost_slots
    if not set(np.flatnonzero(wrong).tolist()) <= set(wrong_slots):
        return None
    mask = np.zeros(shape, np.bool_)
    for token, slots in wrong_slots.items():
        mask[token, sorted(slots)] = True
    return mask
