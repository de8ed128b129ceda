"""The record of a module's loader: the tensors that came, and whether they are right.

A scale factor's byte is its exponent: 2^3 is stored as 130. An engine's ``copy_`` from
``float8_e8m0fnu`` to ``uint8`` stores 8 instead, and 0 for every scale below 1, so that y is 0.
Neither shapes nor the bytes' types show that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import torch

from megamoe.layer.checks import check_count, check_text, describe

SHARDS: Final = ("w1", "w3", "w2")
"""Shards in the order of the parameters: gate (w1) and up (w3) in w13, down (w2) in w2."""
Part = tuple[int, str, bool]
"""Local expert, shard, and whether it is the scale."""

_CODES: Final = (torch.int8, torch.uint8, torch.float4_e2m1fn_x2)
_EXPONENTS: Final = (torch.float8_e8m0fnu, torch.uint8)
_VALUES: Final = (0, 1, 2, 4, 8, 16, 32, 64)
"""The bytes that a conversion of a scale by value can give. As exponents these are 2^-63 and below,
which no weight of a trained model has throughout."""


class Inventory:
    """The checkpoint tensors that the parameters of one module hold."""

    def __init__(self, prefix: str, experts: int, start: int, logical: int) -> None:
        """``experts`` physical ones from ``start`` on, of a checkpoint with ``logical``."""
        self.prefix, self.experts = prefix, experts
        self.start, self.logical = start, logical
        self.parts: set[Part] = set()
        self.by_value: set[Part] = set()
        """Scales whose bytes look like values."""

    def add(self, local: int, shard_id: str, scale: bool, looks_converted: bool) -> None:
        """Local expert ``local`` has this tensor now."""
        part = local, shard_id, scale
        self.parts.add(part)
        self.by_value.discard(part)
        if looks_converted:
            self.by_value.add(part)

    def add_all(self, w13: bool, scale: bool) -> None:
        """Note one whole parameter from a state dict."""
        for local in range(self.experts):
            for shard_id in ("w1", "w3") if w13 else ("w2",):
                self.add(local, shard_id, scale, looks_converted=False)

    def missing(self) -> list[Part]:
        """The tensors that were never loaded, expert by expert."""
        return [part for part in self._all() if part not in self.parts]

    def _all(self) -> Iterator[Part]:
        for local in range(self.experts):
            for scale in (False, True):
                for shard_id in SHARDS:
                    yield local, shard_id, scale

    @property
    def has_any(self) -> bool:
        """Whether any tensor was loaded."""
        return bool(self.parts)

    def name(self, part: Part) -> str:
        """The checkpoint's name of a tensor, and the replica of the expert for which it was."""
        local, shard_id, scale = part
        physical = self.start + local
        logical = physical % self.logical
        replica = "" if physical == logical else f" for physical expert {physical}"
        return f"{self.prefix}.{logical}.{shard_id}.{'scale' if scale else 'weight'}{replica}"

    def check(self, mend: str, weight_of: Callable[[int, str], torch.Tensor]) -> None:
        """``ValueError`` naming the first tensor that is missing, or that holds values.

        ``weight_of(local, shard_id)`` is the weight that a scale belongs to.
        """
        missing = self.missing()
        if missing:
            total = 6 * self.experts
            raise ValueError(
                f"{self.prefix}: {len(missing)} of {total} expert tensors were not loaded, first "
                f"{self.name(missing[0])}; {mend}"
            )
        for local, shard_id, _ in sorted(self.by_value):
            # A scale of zeros is right for an expert of zeros.
            if (weight_of(local, shard_id).view(torch.uint8) & 0x77).any():
                name = self.name((local, shard_id, True))
                raise ValueError(
                    f"{self.prefix}: {name} has only bytes such as 0, 1 and 2, the values of "
                    "scales and not their exponents; load it as float8_e8m0fnu, or view it as "
                    "uint8 without a conversion"
                )


def looks_converted(scale: torch.Tensor, came_as: torch.dtype) -> bool:
    """Whether every byte of a scale is one that a conversion by value gives.

    ``came_as``: the type of its elements; those of float8_e8m0fnu are exponents for certain.
    """
    if came_as == torch.float8_e8m0fnu:
        return False
    values = torch.tensor(_VALUES, dtype=torch.uint8, device=scale.device)
    return bool(torch.isin(scale, values).all())


def check_mine(prefix: str, param: Any, mine: Iterable[Any], weight_name: str) -> None:
    """``ValueError`` for a parameter that does not belong to the module, such as an earlier one."""
    if not any(param is one for one in mine):
        raise ValueError(
            f"{prefix}: {weight_name} was to go into a parameter that is none of this module's; "
            "give module.w13_weight, or another of its four"
        )


def check_load(prefix: str, experts: int, tensor: Any, weight_name: Any, expert_id: Any) -> None:
    """``ValueError`` for arguments of a loader that are nothing it could load."""
    check_text(f"{prefix}: weight_name", weight_name)
    check_count(f"{prefix}: {weight_name}", "expert_id", expert_id, 0)
    if expert_id >= experts:
        raise ValueError(
            f"{prefix}: {weight_name}: expert_id is {expert_id}, and the checkpoint has {experts} "
            "experts"
        )
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{prefix}: {weight_name} is {describe(tensor)}, expected a tensor")


def as_bytes(tensor: torch.Tensor, weight_name: str, scale: bool) -> torch.Tensor:
    """A checkpoint's tensor as it lies there, uint8.

    ``ValueError`` unless its elements are of a type that such a tensor has in a checkpoint, and
    where its name says that it is a weight and it was to be a scale, or the other way round.
    """
    if tensor.element_size() != 1:
        raise ValueError(
            f"{weight_name}: {tensor.dtype} elements, expected one byte each; is this checkpoint "
            "FP4 with UE8M0 scales?"
        )
    what = "a scale" if scale else "a weight"
    dtypes = _EXPONENTS if scale else _CODES
    if tensor.dtype not in dtypes:
        raise ValueError(
            f"{weight_name}: {tensor.dtype} elements for {what}, expected "
            f"{' or '.join(map(str, dtypes[:2]))}"
        )
    last = weight_name.rpartition(".")[2]
    names_scale = "scale" in last if last.endswith(("weight", "scale", "scale_inv")) else scale
    if names_scale != scale:
        other = "a scale" if names_scale else "a weight"
        raise ValueError(
            f"{weight_name}: the name of {other} for {what}; give the parameter that it belongs in"
        )
    return tensor.view(torch.uint8)
