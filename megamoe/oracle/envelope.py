"""The certified envelope: everything that a whole forward may return under an accumulator class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megamoe.oracle.swiglu import Activations
from megamoe.spec.contract import Contract
from megamoe.spec.formats import GROUP, U8, U16, bf16_key, e4m3_key
from megamoe.spec.forms import BF16

I16 = npt.NDArray[np.int16]


def _same_codes(key: I16, codes: U8, sf: U8) -> bool:
    """Beside a byte of 255 every code is NaN."""
    same = (key == e4m3_key(codes)) | (np.repeat(sf, GROUP, axis=-1) == 255)
    return bool(same.all())


Tensors = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Envelope:
    """Everything a correct kernel of one class may return for one case.

    ``T`` tokens, ``K`` slots, ``I`` intermediate. Slots that take no part hold zeros.
    """

    y_lo: U16
    y_hi: U16
    """(T, H) bfloat16 bits, inclusive; NaN in both where NaN is expected."""
    sf_lo: U8
    sf_hi: U8
    """(T, K, I/32) UE8M0 bytes, inclusive."""
    key_lo: I16
    key_hi: I16
    """(T, K, I) E4M3 keys, inclusive, in groups whose exponent is decided."""
    open_groups: npt.NDArray[np.uint32]
    """(n,) flat indices into (T, K, I/32) of the groups whose exponent is not decided."""
    open_low: npt.NDArray[np.float32]
    open_high: npt.NDArray[np.float32]
    """(n, 32) activations of those groups, from which their codes follow once it is known."""
    contract: Contract

    def code_interval(self, sf: U8) -> tuple[I16, I16]:
        """``(T, K, I)`` lowest and highest E4M3 key, given the exponents a backend chose.

        Exponents outside ``sf_lo..sf_hi`` are judged on their own; here they are moved to the
        nearest allowed one.
        """
        low, high = self.key_lo.copy(), self.key_hi.copy()
        if self.open_groups.size:
            exponents = np.clip(sf, self.sf_lo, self.sf_hi).reshape(-1, 1)[self.open_groups]
            keys = Activations(self.open_low, self.open_high, self.contract).code_keys(exponents)
            low.reshape(-1, GROUP)[self.open_groups] = keys[0]
            high.reshape(-1, GROUP)[self.open_groups] = keys[1]
        nan = (sf == 255).reshape(-1)  # NaN whatever the codes beside it are
        low.reshape(-1, GROUP)[nan], high.reshape(-1, GROUP)[nan] = -127, 127
        return low, high

    def is_point(self, y: U16, codes: U8, sf: U8) -> bool:
        """These y, codes and exponents, and no others; NaN is NaN whatever its bits are."""
        nan = BF16.is_nan(y)
        return (
            not self.open_groups.size
            and all(bool((end == sf).all()) for end in (self.sf_lo, self.sf_hi))
            and all(bool(_same_codes(end, codes, sf)) for end in (self.key_lo, self.key_hi))
            and all(
                bool(np.where(nan, BF16.is_nan(end), end == y).all())
                for end in (self.y_lo, self.y_hi)
            )
        )

    def freedom(self, name: str) -> str:
        """A line on the freedom that the class ``name`` leaves."""
        codes = int((self.key_lo != self.key_hi).sum())
        rows = int((bf16_key(self.y_lo) != bf16_key(self.y_hi)).sum())
        return (
            f"{name}: {len(self.open_groups)} exponents, {codes} codes and {rows} of "
            f"{self.y_lo.size} outputs undecided"
        )

    def to_tensors(self, codes: U8, sf: U8) -> Tensors:
        """A compact form: only the differences from the reference ``codes`` and ``sf``."""
        key = e4m3_key(codes)
        free = (self.key_lo != key) | (self.key_hi != key)
        free.reshape(-1, GROUP)[self.open_groups] = False
        where = np.flatnonzero(free)
        groups = np.flatnonzero((self.sf_lo != sf) | (self.sf_hi != sf))
        return {
            "y_lo": self.y_lo,
            "y_hi": self.y_hi,
            "sf_at": groups.astype(np.uint32),
            "sf_lo": self.sf_lo.reshape(-1)[groups],
            "sf_hi": self.sf_hi.reshape(-1)[groups],
            "code_at": where.astype(np.uint32),
            "code_lo": self.key_lo.reshape(-1)[where].astype(np.int8),
            "code_hi": self.key_hi.reshape(-1)[where].astype(np.int8),
            "open_at": self.open_groups,
            "open_low": self.open_low,
            "open_high": self.open_high,
        }

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, npt.NDArray[Any]], codes: U8, sf: U8, contract: Contract
    ) -> Envelope:
        """The inverse of :meth:`to_tensors`."""
        key_lo, key_hi = e4m3_key(codes), e4m3_key(codes)
        key_lo.reshape(-1)[tensors["code_at"]] = tensors["code_lo"]
        key_hi.reshape(-1)[tensors["code_at"]] = tensors["code_hi"]
        sf_lo, sf_hi = sf.copy(), sf.copy()
        sf_lo.reshape(-1)[tensors["sf_at"]] = tensors["sf_lo"]
        sf_hi.reshape(-1)[tensors["sf_at"]] = tensors["sf_hi"]
        return cls(
            tensors["y_lo"],
            tensors["y_hi"],
            sf_lo,
            sf_hi,
            key_lo,
            key_hi,
            tensors["open_at"],
            tensors["open_low"],
            tensors["open_high"],
            contract,
        )
