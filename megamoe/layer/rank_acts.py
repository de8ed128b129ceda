"""The call of a case of kind ``ep`` on one rank: the module over a process group, in a worker.

Every rank of the team runs this at the same time with its own tokens and the weights of its own
experts. :mod:`megamoe.kinds.ep` judges what comes back. The process group is torch's default one.
A request names the file of its store, or none, where the environment is that of ``torchrun``.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist

from megamoe.layer.expert_parallel import RankError
from megamoe.layer.experts import DeepseekV4MegaMoEExperts
from megamoe.layer.own_ranks import OwnRanks, spanning
from megamoe.layer.rank_laws import LAWS, Call, refusal
from megamoe.layer.ranks import INTERFACE, engine
from megamoe.spec.tensors import WEIGHTS

START: Final = "the start of the process group"
"""Where a rank is before it has a group; in place of a stage."""


def run(host: Any, request: Mapping[str, Any], inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    """The outputs of every variant by number, and what the judge compares beside them."""
    plain = request["plain"]
    stage = Path(plain["stage"]) if plain.get("stage") else None
    if stage is not None and not dist.is_initialized():
        _write(stage, START)
    group = _group(host, plain, request["seconds"])
    if stage is not None:
        stage.unlink(missing_ok=True)
    call = _make_call(host, plain, inputs, group)
    spans = call.spans
    if spans is not None and stage is not None:
        spans.at = lambda name: _write(stage, name)
    y = call.y().clone()
    counts = _row_counts(call)
    out: dict[str, torch.Tensor] = {"one call": y}
    extra: dict[str, Any] = {"received": counts, "load": call.load[0].tolist()}
    if spans is not None:
        extra["bytes"] = dict(spans.traffic)
    for label, variant in LAWS[plain["law"]](call):
        out[label] = variant.clone()
    if plain["law"] == "refused":
        extra["refused"] = refusal(call)
        out["a call after the refused one"] = call.y().clone()
    if plain.get("gather"):
        return _gather(group, out, extra)
    return {f"{plain['rank']}.{i}": y for i, y in enumerate(out.values())}, {
        "labels": list(out), "ranks": {str(plain["rank"]): extra},
    }  # fmt: skip


def _write(path: Path, name: str) -> None:
    path.write_text(name)


def _group(host: Any, plain: Mapping[str, Any], seconds: float) -> Any:
    """The default group of this process, which the first request makes.

    ``RankError`` where the ranks do not find one another in time.
    """
    limit = datetime.timedelta(seconds=seconds)
    if not dist.is_initialized():
        where = {} if plain["store"] is None else {
            "init_method": f"file://{plain['store']}", "rank": plain["rank"],
            "world_size": plain["of"],
        }  # fmt: skip
        try:
            dist.init_process_group(engine(host.device), timeout=limit, **where)
        except (RuntimeError, ValueError) as error:
            words = " ".join(str(error).split())[:200]
            who = f"rank {plain['rank']} of {plain['of']}"
            mend = "" if where else f"; {INTERFACE}"
            raise RankError(
                f"no process group: {who} did not find the others: {words}{mend}"
            ) from error
    return dist.group.WORLD


def _make_call(host: Any, plain: Mapping[str, Any], inputs: Mapping[str, Any], group: Any) -> Call:
    """The module with this rank's weights, and its replica map if the case has one."""
    local = inputs["w13_weight"].shape[0]
    physical, logical = local * plain["of"], plain["logical"]
    backend = spanning(host.backend, group)  # over one rank too
    module = DeepseekV4MegaMoEExperts(
        plain["max_num_tokens"], group=group, num_experts=physical, num_local_experts=local,
        experts_start_idx=local * plain["rank"], top_k=inputs["topk_ids"].shape[1],
        hidden_size=inputs["hidden_states"].shape[1],
        intermediate_size=inputs["w2_weight"].shape[2] * 2,
        prefix="experts", num_logical_experts=logical, backend=backend,
    )  # fmt: skip
    for name in WEIGHTS:
        # A law that moves weights writes into them, and the request's tensors are the judge's.
        own = inputs[name].clone() if plain["law"] == "rebalance" else inputs[name]
        getattr(module, name).data = own
    module.finalize_weights(without_loader=True)
    device = inputs["topk_ids"].device
    load = torch.zeros(1, physical, dtype=torch.int32, device=device)
    module.set_eplb_state(0, load, inputs["map"][None], inputs["count"][None])
    stats = torch.zeros(local, dtype=torch.int32, device=device)
    counting = _counting(module)
    if hasattr(counting, "stats"):
        counting.stats = stats
    return Call(module, inputs, plain, load)


def _counting(module: DeepseekV4MegaMoEExperts) -> Any:
    """The object whose ``stats`` counts received rows, if it has that attribute."""
    backend = module.backend
    return backend.backend if isinstance(backend, OwnRanks) else backend


def _row_counts(call: Call) -> list[int] | None:
    stats = getattr(_counting(call.module), "stats", None)
    if stats is None:
        return None
    counts: list[int] = stats.tolist()
    return counts


def _gather(group: Any, out: dict[str, torch.Tensor], extra: dict[str, Any]) -> tuple[Any, Any]:
    """What all ranks have, on each of them: under ``torchrun`` each has a judge of its own."""
    parts: list[Any] = [None] * group.size()
    mine = {label: y.cpu().view(torch.int16) for label, y in out.items()}, extra
    dist.all_gather_object(parts, mine, group=group)
    outputs = {
        f"{rank}.{i}": y.view(torch.bfloat16)
        for rank, (theirs, _) in enumerate(parts) for i, y in enumerate(theirs.values())
    }  # fmt: skip
    return outputs, {"labels": list(out), "ranks": {str(r): e for r, (_, e) in enumerate(parts)}}


__all__ = ["run"]
