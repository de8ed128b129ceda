"""Exact EPLB remap: logical expert ids to physical replicas, and the load that was recorded."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from megamoe.spec.contract import CURRENT, Contract

Ints = npt.NDArray[Any]


def eplb(
    topk_ids: Ints,
    load: npt.NDArray[np.int32],
    logical_to_physical_map: Ints,
    logical_replica_count: Ints,
    record: bool,
    contract: Contract = CURRENT,
) -> tuple[Ints, npt.NDArray[np.int32]]:
    """``(T, K)`` ids and ``(P,)`` load to the physical ids and the load after the call.

    ``logical_to_physical_map`` is ``(L, R)`` and ``logical_replica_count`` ``(L,)``. The replica
    depends on the token's row alone, so one token sends all its slots by one hash. Written as a
    loop over slots in Python integers: it is the specification, and cases are small.
    """
    num_logical = logical_to_physical_map.shape[0]
    out = np.full(topk_ids.shape, -1, dtype=topk_ids.dtype)
    new_load = load.copy()
    # The cast to int32 comes first: an id beyond 2**31 wraps and may become valid.
    logical_ids = topk_ids.astype(np.int64).astype(np.int32)
    for token, slot in np.ndindex(*topk_ids.shape):
        logical = int(logical_ids[token, slot])
        if not 0 <= logical < num_logical:
            continue
        count = max(int(logical_replica_count[logical]), 1)
        replica = (token * contract.replica_hash.value) % 2**32 % count
        physical = int(logical_to_physical_map[logical, replica])
        out[token, slot] = physical
        if record and 0 <= physical < len(new_load):
            new_load[physical] += 1
    return out, new_load
