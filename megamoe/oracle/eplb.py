"""Exact EPLB remap: logical expert ids to physical replicas, and the load that was recorded."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from megamoe.spec.contract import Contract

Ints = npt.NDArray[Any]


def eplb(
    topk_ids: Ints, load: npt.NDArray[np.int32], logical_to_physical_map: Ints,
    logical_replica_count: Ints, record: bool, contract: Contract,
    num_unpadded_tokens: int | None = None,
) -> tuple[Ints, npt.NDArray[np.int32]]:  # fmt: skip
    """``(T, K)`` ids and ``(P,)`` load to the physical ids and the load after the call.

    ``logical_to_physical_map`` is ``(L, R)`` and ``logical_replica_count`` ``(L,)``. Rows from
    ``num_unpadded_tokens`` on are padding, where the contract knows of any: they are mapped and
    not counted. Written as a loop over slots in Python integers: it is the specification, and
    cases are small.
    """
    num_logical = logical_to_physical_map.shape[0]
    out = np.full(topk_ids.shape, -1, dtype=topk_ids.dtype)
    new_load = load.copy()
    has_padding = contract.padding_known.value and num_unpadded_tokens is not None
    rows = num_unpadded_tokens if has_padding else topk_ids.shape[0]
    assert rows is not None
    # The cast to int32 comes first: an id beyond 2**31 wraps and may become valid.
    logical_ids = topk_ids.astype(np.int64).astype(np.int32)
    for token, slot in np.ndindex(*topk_ids.shape):
        logical = int(logical_ids[token, slot])
        if not 0 <= logical < num_logical:
            continue
        place = token * topk_ids.shape[1] + slot
        if contract.replica_choice.value == "token-hash":
            place = (token * contract.replica_hash.value) % 2**32
        replica = place % max(int(logical_replica_count[logical]), 1)
        physical = int(logical_to_physical_map[logical, replica])
        out[token, slot] = physical
        if record and token < rows and 0 <= physical < len(new_load):
            new_load[physical] += 1
    return out, new_load
