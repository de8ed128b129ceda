"""Kind ``eplb``: ``eplb_map`` gives physical ids and adds to the load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch

from megamoe import oracle
from megamoe.cases import Case, Kind
from megamoe.cases.counter import below, key
from megamoe.cases.forms import EPLB
from megamoe.cases.kind import Parts
from megamoe.cases.recipes import routing
from megamoe.cases.streams import IDS, MAP, options
from megamoe.golden import OracleGolden, StoredGolden
from megamoe.judge import Verdict, of_findings, tensor_bits
from megamoe.spec.contract import Contract
from megamoe.spec.forms import bits
from megamoe.worker.exchange import Caller, CallResult


def inputs(case: Case) -> dict[str, Any]:
    """Arguments of ``eplb_map_to_physical_and_record``, by name.

    Map kinds: ``identity`` (replica r of logical l is ``l + r * logical`` while it exists),
    ``uneven`` (counts 1 .. ``max_replicas``, physical ids at random, some of them beyond the
    load view if ``beyond``), ``zero-count`` (as uneven, every ``every``-th count 0).
    """
    p = case.params
    logical, physical = p["logical"], p["physical"]
    recipe = p.get("map_recipe", {})
    o = options(recipe, "map", max_replicas=1, beyond=0, every=0)
    kind = recipe.get("kind", "identity")
    replicas = o["max_replicas"]
    stream = key(case.seed, MAP)
    if kind == "identity":
        table = np.arange(logical)[:, None] + np.arange(replicas)[None, :] * logical
        table = np.where(table < physical, table, -1)
        count = (table >= 0).sum(axis=1)
    elif kind in ("uneven", "zero-count"):
        count = below(stream, logical, replicas) + 1
        table = below(key(stream, 1), logical * replicas, physical + o["beyond"])
        table = table.reshape(logical, replicas)
        table = np.where(np.arange(replicas)[None, :] < np.maximum(count, 1)[:, None], table, -1)
        if kind == "zero-count" and o["every"]:
            count[:: o["every"]] = 0
    else:
        raise ValueError(f"unknown map recipe {kind!r}; known: identity, uneven, zero-count")
    tokens = np.arange(p["tokens"])
    ids, _ = routing(case.seed, tokens, logical, p["top_k"], p.get("ids_recipe", {}))
    dtype = torch.int32 if p["ids_dtype"] == "int32" else torch.int64
    load = below(key(case.seed, IDS), physical, 1000).astype(np.int32)
    arguments = {
        "topk_ids": torch.from_numpy(ids).to(dtype),
        "expert_load_view": torch.from_numpy(load),
        "logical_to_physical_map": torch.from_numpy(table.astype(np.int64)),
        "logical_replica_count": torch.from_numpy(count.astype(np.int64)),
        "record_enabled": torch.tensor(bool(p["record"])),
    }
    if "unpadded" in p:
        arguments["num_unpadded_tokens"] = torch.tensor(p["unpadded"], dtype=torch.int32)
    return arguments


def golden(
    case: Case, inputs: Mapping[str, Any], classes: Sequence[str] | None, contract: Contract
) -> OracleGolden:
    """``ids`` and ``load``."""
    ids, load = oracle.eplb(
        inputs["topk_ids"].numpy(),
        inputs["expert_load_view"].numpy(),
        inputs["logical_to_physical_map"].numpy(),
        inputs["logical_replica_count"].numpy(),
        bool(inputs["record_enabled"]),
        contract,
        int(inputs["num_unpadded_tokens"]) if "num_unpadded_tokens" in inputs else None,
    )
    return OracleGolden({"ids": ids, "load": load})


def ask(call: Caller, case: Case, inputs: Mapping[str, Any]) -> CallResult:
    """The one call of the case."""
    return call.call("eplb_map", inputs, own=("expert_load_view",))


def judge_outcome(
    runner: Any, case: Case, golden: StoredGolden, inputs: Mapping[str, Any], outcome: CallResult
) -> Verdict:
    """Every id and every count; the load is the one input that the call may write into."""
    ids = inputs["topk_ids"]
    actual = tensor_bits("ids", outcome.result, tuple(ids.shape), (ids.dtype,))
    load = bits(outcome.inputs["expert_load_view"])
    findings = [runner.bitwise(n, t, golden.get(n)) for n, t in (("ids", actual), ("load", load))]
    return of_findings(case.id, case.kind, findings, ("bitwise",))


KIND: Final = Kind(
    **vars(EPLB),
    inputs=inputs,
    golden=golden,
    ask=ask,
    judge_outcome=judge_outcome,
    parts=Parts(("ids",), {"load": "expert_load_view"}),
)
