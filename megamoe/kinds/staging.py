"""Kind ``staging``: ``prepare`` writes codes, scale factors, ids and weights into the buffer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch

from megamoe import oracle
from megamoe.cases import Case, Kind
from megamoe.cases.forms import STAGING
from megamoe.cases.kind import (
    Parts,
    oracle_tensors,
)
from megamoe.cases.recipes import bf16_tensor, hidden_states, own_tokens, routing, twins
from megamoe.golden import OracleGolden, StoredGolden
from megamoe.judge import Finding, Verdict, of_findings
from megamoe.spec.contract import Contract
from megamoe.spec.forms import bits
from megamoe.spec.rest import FILLS, MASKED_REST
from megamoe.spec.tensors import OPERATIONS, TENSORS
from megamoe.worker.exchange import Caller, CallResult
from megamoe.worker.serve import POISON

PREPARE: Final = OPERATIONS["prepare"]


def inputs(case: Case) -> dict[str, Any]:
    """``hidden_states`` (T, H) bf16, ``topk_weights`` (T, K) float32, ``topk_ids`` (T, K).

    ``unpadded``: the rows from there on are padding, as ``is_padding`` (T,) bool says.
    ``distinct``: the tokens from there on repeat one of those before.
    """
    p = case.params
    tokens = np.arange(p["tokens"])
    own, at = own_tokens(case.seed, p, tokens)
    ids, weights = routing(case.seed, own, p["experts"], p["top_k"], p.get("routing_recipe", {}))
    dtype = {"int32": np.int32, "int64": np.int64}[p["ids_dtype"]]
    rows = hidden_states(case.seed, own, p["hidden"], p.get("hidden_recipe", {}))
    tensors = {
        "hidden_states": bf16_tensor(rows[at]),
        "topk_weights": torch.from_numpy(weights[at]),
        "topk_ids": torch.from_numpy(ids[at].astype(dtype)),
    }
    if "unpadded" in p:
        tensors["is_padding"] = torch.from_numpy(tokens >= p["unpadded"])
    return tensors


def golden(
    case: Case, inputs: Mapping[str, Any], classes: Sequence[str] | None, contract: Contract
) -> OracleGolden:
    """``x``, ``x_sf``, ``topk_idx`` and ``topk_weights``, which are kept as bits.

    For a case with ``distinct``, the rows of the first tokens: staging knows no other row.
    """
    own = slice(case.params.get("distinct"))
    tensors = oracle.staging(
        bits(inputs["hidden_states"][own]), inputs["topk_weights"][own].numpy(),
        inputs["topk_ids"][own].numpy(), contract,
        inputs["is_padding"].numpy() if "is_padding" in inputs else None,
    )  # fmt: skip
    return OracleGolden({**tensors, "topk_weights": tensors["topk_weights"].view(np.uint32)})


def ask(call: Caller, case: Case, inputs: Mapping[str, Any]) -> CallResult:
    """The one call of the case."""
    after = {name: inputs[name] for name in ("is_padding",) if name in inputs}
    takes = {name: inputs[name] for name in PREPARE.takes}
    return call.call("prepare", takes, blanks(case, inputs), after=after)


def judge_outcome(
    runner: Any, case: Case, golden: StoredGolden, inputs: Mapping[str, Any], outcome: CallResult
) -> Verdict:
    """Every bit of the batch's rows; beyond them what the contract has, no byte or masked slots."""
    tokens, ids = len(inputs["topk_ids"]), inputs["topk_ids"].numpy()
    masked = runner.session.identity.contract in MASKED_REST
    findings = []
    source = np.arange(tokens)
    if "distinct" in case.params:
        source = twins(case.seed, case.params["distinct"], source)
    for name, tensor in outcome.blank.items():
        right = golden.get(name)[source]
        findings.append(runner.bitwise(name, bits(tensor[:tokens]), right, ids))
        masks = masked and name in FILLS
        findings.append((_masked if masks else _overrun)(name, tensor, tokens))
    return of_findings(case.id, case.kind, findings, ("bitwise",))


def blanks(case: Case, inputs: Any) -> dict[str, torch.Tensor]:
    """The buffer's tensors: at least one row more than the batch has."""
    tokens, top_k = inputs["topk_ids"].shape
    rows = max(case.params["capacity"], tokens + 1)
    sizes = {"T": rows, "K": top_k, "H": case.params["hidden"]}
    specs = [TENSORS[name] for name in PREPARE.returns]
    return {t.name: torch.empty(t.sizes(sizes), dtype=t.dtypes[0]) for t in specs}


def _overrun(name: str, tensor: torch.Tensor, tokens: int) -> Finding:
    """Judge that rows beyond the batch are unchanged."""
    rest = bits(tensor[tokens:].contiguous().view(torch.uint8))
    count = int((rest != POISON).sum())
    text = f"{name}: {count} bytes of rows beyond the {tokens} tokens were written"
    return Finding(name, rest.size, text=text if count else "")


def _masked(name: str, tensor: torch.Tensor, tokens: int) -> Finding:
    """Judge that the slots of rows beyond the batch are masked."""
    rest = tensor[tokens:]
    other = int((rest.contiguous().view(torch.uint8) != _bytes_of(name, rest)).any(-1).sum())
    text = f"{name}: {other} of {len(rest)} rows beyond the {tokens} tokens are not {FILLS[name]}"
    return Finding(name, rest.numel(), text=text if other else "")


def _bytes_of(name: str, rest: torch.Tensor) -> torch.Tensor:
    return torch.full_like(rest, FILLS[name]).contiguous().view(torch.uint8)


def dump(
    case: Case, inputs: Mapping[str, Any], golden: OracleGolden, contract: Contract
) -> dict[str, Any]:
    """The golden, weights as numbers."""
    weights = golden.tensors["topk_weights"].view(np.float32)
    return {**oracle_tensors(case, inputs, golden, contract), "oracle.topk_weights": weights}


KIND: Final = Kind(
    **vars(STAGING),
    inputs=inputs,
    golden=golden,
    ask=ask,
    judge_outcome=judge_outcome,
    parts=Parts((), {name: name for name in PREPARE.returns}, "topk_ids"),
    dump=dump,
)
