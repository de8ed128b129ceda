"""Kind ``ep``: the layer over several ranks, with the bits that one rank gives.

A case is a problem of all tokens, and a rule that gives each token a rank. Its golden is that of
the whole problem: the number of ranks decides no bit, so one golden serves any number. Beside y,
the rows that each expert received and the load that each rank recorded are judged. The cases need a
team of workers: ``megamoe check --ep N``, or ``torchrun``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from megamoe import oracle
from megamoe.cases import Case
from megamoe.cases.counter import below, key
from megamoe.cases.forms import EP
from megamoe.cases.streams import MAP
from megamoe.judge import BadOutput, Finding, Verdict, bitwise, forward_bits, place_of, tensor_bits
from megamoe.kinds import forward, laws
from megamoe.spec.contract import contract as contract_of
from megamoe.spec.forms import BF16
from megamoe.spec.problem import Problem
from megamoe.spec.tensors import TENSORS, WEIGHTS
from megamoe.worker.exchange import Caller, CallResult

# --- the placement ------------------------------------------------------------------------------


def tokens_of(case: Case, ranks: int) -> list[int]:
    """Tokens of each rank; consecutive ones go to consecutive ranks.

    ``even``: equal parts; ``ragged``: random parts, some of them empty; ``one-rank``: all to
    ``busy_rank``; ``every-other``: none to the odd ranks.
    """
    p = case.params
    total, split = p["tokens"], p["split"]
    if split == "one-rank":
        share = np.eye(ranks, dtype=np.int64)[p["busy_rank"] % ranks]
    elif split == "every-other":
        share = (np.arange(ranks) % 2 == 0).astype(np.int64)
    elif split == "ragged":
        share = below(key(case.seed, MAP, ranks), ranks, 4).astype(np.int64) ** 2
        share = share if share.any() else np.ones(ranks, np.int64)
    else:
        share = np.ones(ranks, np.int64)
    ends = np.cumsum(share) * total // max(1, share.sum())
    return [int(n) for n in np.diff(ends, prepend=0)]


def replicas(case: Case) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The map (L, R) of logical to physical experts, -1 for none, and the counts (L,).

    Physical expert p holds logical ``p % L``, as the module loads it.
    """
    logical, physical = case.params["experts"], case.params["physical"]
    table = np.arange(logical)[:, None] + np.arange(-(-physical // logical))[None, :] * logical
    table = np.where(table < physical, table, -1)
    return table, (table >= 0).sum(axis=1)


@dataclass(frozen=True)
class Place:
    """One rank's part of a case, and what it must count."""

    rows: slice
    experts: list[int]
    """The logical expert that each of its physical ones holds."""
    physical: npt.NDArray[np.int64]
    """Physical ids of its own tokens, (T of the rank, K)."""
    load: npt.NDArray[np.int32]
    """(P,): the load that it records."""


def places(case: Case, problem: Problem, ranks: int, revision: str) -> list[Place]:
    """Every rank's part, by the oracle's remap of its own tokens."""
    table, count = replicas(case)
    physical = case.params["physical"]
    local, ids = physical // ranks, problem.topk_ids.numpy()
    ends = np.cumsum([0, *tokens_of(case, ranks)])
    out = []
    for rank in range(ranks):
        rows = slice(int(ends[rank]), int(ends[rank + 1]))
        load = np.zeros(physical, np.int32)
        physical_ids, load = oracle.eplb(
            ids[rows], load, table, count, True, contract_of(revision), None
        )
        experts = [p % case.params["experts"] for p in range(local * rank, local * (rank + 1))]
        out.append(Place(rows, experts, physical_ids, load))
    return out


# --- the judgement ------------------------------------------------------------------------------


def judge(runner: Any, case: Case) -> Verdict:
    """Every rank's output against the golden, its counts, and its law."""
    identity = runner.session.identity
    ranks = identity.ranks
    golden, problem = runner.problem(case)
    every = places(case, problem, ranks, identity.contract)
    with runner.caller() as call:
        by_rank = _by_rank(_call_ranks(case, call, problem, every), identity.here)
        alone = None
        steady = identity.batch_invariant and identity.provides("forward")
        if case.params["family"] == "envelope" and steady:
            alone = forward_bits(call.forward(problem).result, problem)["y"]
    outputs = [_whole(problem, every, by_rank, at) for at in range(len(by_rank.labels))]
    y = outputs[0]
    findings: list[Finding] = []
    at = place_of("y", range(problem.num_tokens), problem.topk_ids.numpy())
    others = list(zip(by_rank.labels[1:], outputs[1:], strict=True))
    if alone is not None:
        others.append(("one rank in place of the group", alone))
    for label, other in others:
        findings.append(laws.relabel(case.params["law"], label, bitwise("y", BF16, other, y, at)))
    findings += _judge_counts(every, by_rank)
    if case.params["law"] == "refused":
        findings += _refusals(case, problem, ranks, by_rank)
    actual = forward.rows(case, {"y": y})
    verdict: Verdict = forward.verdict_of(
        runner, case, golden, problem, actual, findings, ("ranks",)
    )
    return _with_ranks(verdict, every)


@dataclass(frozen=True)
class _RankOutputs:
    labels: list[str]
    y: Mapping[int, list[torch.Tensor]]
    """Rank -> one output for each label."""
    extra: Mapping[int, Mapping[str, Any]]


def _call_ranks(
    case: Case, call: Caller, problem: Problem, every: Sequence[Place]
) -> list[CallResult]:
    """The call on every rank that is here."""
    identity, p = call.session.identity, case.params
    table, count = replicas(case)
    beside = {"map": torch.from_numpy(table), "count": torch.from_numpy(count.astype(np.int64))}
    # Of an expert in use every place, for a rebalance copies any of them.
    live = set(problem.topk_ids.unique().tolist())
    requests = []
    for rank in identity.here:
        place, local = every[rank], p["physical"] // len(every)
        first, experts = place.experts[0], torch.tensor(place.experts)
        whole = place.experts == list(range(first, first + local))
        rows: Any = slice(first, first + local) if whole else experts  # a slice copies nothing
        weights = {name: getattr(problem, name)[rows] for name in WEIGHTS}
        mine = replace(
            problem, hidden_states=problem.hidden_states[place.rows],
            topk_ids=problem.topk_ids[place.rows], topk_weights=problem.topk_weights[place.rows],
            **weights,
        )  # fmt: skip
        requests.append((mine, {
            "rank": rank, "of": len(every), "law": p["law"], "logical": p["experts"],
            "seed": case.seed, "refuses": p["busy_rank"], "gather": identity.torchrun,
            "used": [expert in live for expert in place.experts],
        }))  # fmt: skip
    return call.each_rank("ep", requests, beside)


def _by_rank(outcomes: Sequence[CallResult], here: Sequence[int]) -> _RankOutputs:
    """What came back, by rank; :class:`BadOutput` where a rank's part is missing."""
    y: dict[int, list[torch.Tensor]] = {}
    extra: dict[int, Mapping[str, Any]] = {}
    labels: list[str] = outcomes[0].extra.get("labels", [])
    for each in outcomes:
        if each.extra.get("labels") != labels or not labels:
            raise BadOutput(f"the ranks {list(here)} made other calls than one another")
        for name, tensor in dict(each.result).items():
            rank, _, _ = name.partition(".")
            y.setdefault(int(rank), []).append(tensor)
        extra |= {int(rank): more for rank, more in each.extra["ranks"].items()}
    return _RankOutputs(labels, y, extra)


def _whole(
    problem: Problem, every: Sequence[Place], by_rank: _RankOutputs, at: int
) -> npt.NDArray[np.uint16]:
    """One output of all ranks, (T, H) bits in the order of the problem's tokens."""
    parts = []
    for rank, place in enumerate(every):
        if len(by_rank.y.get(rank, [])) != len(by_rank.labels):
            raise BadOutput(f"rank {rank} gave {len(by_rank.y.get(rank, []))} outputs")
        shape = (place.rows.stop - place.rows.start, problem.hidden_size)
        parts.append(tensor_bits("y", by_rank.y[rank][at], shape, TENSORS["y"].dtypes))
    return np.concatenate(parts)


def _judge_counts(every: Sequence[Place], by_rank: _RankOutputs) -> list[Finding]:
    """Rows received by each expert and the load recorded by each rank, of the first call."""
    ids = np.concatenate([place.physical.ravel() for place in every])
    total = np.bincount(ids[ids >= 0], minlength=len(every[0].load))
    out = []
    for rank, place in enumerate(every):
        local = len(place.experts)
        expected = total[local * rank : local * (rank + 1)].tolist()
        actual = by_rank.extra[rank].get("received")
        if actual is not None:
            out.append(_equal(f"rank {rank}: rows received", actual, expected))
        out.append(_equal(f"rank {rank}: load", by_rank.extra[rank]["load"], place.load.tolist()))
    return out


def _equal(what: str, actual: Sequence[int], expected: Sequence[int]) -> Finding:
    wrong = [i for i, (a, b) in enumerate(zip(actual, expected, strict=True)) if a != b]
    text = "" if not wrong else (
        f"{what}: expert {wrong[0]} has {actual[wrong[0]]}, expected {expected[wrong[0]]}"
    )  # fmt: skip
    return Finding("load", len(expected), outside=len(wrong), text=text)


def _refusals(case: Case, problem: Problem, ranks: int, by_rank: _RankOutputs) -> list[Finding]:
    """The rank over its capacity raises the contract's error, every other one a RankError."""
    out = []
    refuses, most = case.params["busy_rank"] % ranks, problem.max_num_tokens
    for rank in range(ranks):
        error = by_rank.extra[rank].get("refused")
        kind, text = error or ("nothing", "")
        if rank == refuses:
            right = kind == "ValueError" and str(most + 1) in text and str(most) in text
            expected = f"a ValueError for {most + 1} tokens of {most}"
        else:
            right = kind == "RankError" and f"rank {refuses} " in text
            expected = f"a RankError that names rank {refuses}"
        complaint = "" if right else f"rank {rank} raised {kind} {text}; expected {expected}"
        out.append(Finding("refused", 1, outside=not right, text=complaint))
    return out


def _with_ranks(verdict: Verdict, every: Sequence[Place]) -> Verdict:
    """A fail names the ranks whose tokens have other bits; nothing else changes."""
    wrong = {row for finding in verdict.findings for row in finding.rows}
    parts = [
        f"rank {rank}, tokens {p.rows.start} to {p.rows.stop - 1}"
        for rank, p in enumerate(every) if wrong & {*range(p.rows.start, p.rows.stop)}
    ]  # fmt: skip
    if verdict.status != "fail" or not parts:
        return verdict
    of = f"wrong on {len(parts)} of {len(every)} ranks: {'; '.join(parts)}"
    return replace(verdict, reason=f"{verdict.reason} ({of})")


KIND: Final = replace(forward.KIND, **vars(EP), judge=judge, ask=None, judge_outcome=None)

__all__ = ["KIND", "places", "replicas", "tokens_of"]
