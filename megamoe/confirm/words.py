"""Words of one instruction: the operands that a chip is given, and what a model makes of them.

A tile is ``C (64, 8) + A (64, K) B (8, K)^T`` for one warpgroup. The operands follow from a seed,
so a file of answers holds a digest of all words and a sample.
"""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megamoe.oracle.units import HOPPER_8BIT, HOPPER_16BIT, Unit, dense, narrowed, words
from megamoe.spec.formats import E4M3_TABLE, F64, bf16_decode

U32 = npt.NDArray[np.uint32]
Raw = npt.NDArray[np.uint8]
ROWS: Final = 64
COLUMNS: Final = 8
WIDTH: Final = 32
"""Bytes of K that a step takes."""
SAMPLE: Final = 4
"""Tiles whose words a file holds: 512 words each, one of each sort of operands."""
PIECE: Final = 64
"""Tiles that are made and computed together."""


@dataclass(frozen=True)
class Instruction:
    """One instruction that a chip is asked."""

    name: str
    kind: int
    """The number by which ``units.cu`` knows the instruction."""
    unit: Unit
    smallest: int
    """Exponent field of the operands' subnormals."""
    size: int
    """Bytes of an operand."""

    def decode(self, raw: Raw) -> F64:
        """``(..., bytes)`` operands as numbers."""
        if self.size == 1:
            return np.asarray(E4M3_TABLE[raw], np.float64)
        with np.errstate(invalid="ignore"):  # signalling NaN
            return bf16_decode(np.ascontiguousarray(raw).view(np.uint16)).astype(np.float64)


INSTRUCTIONS: Final = {
    i.name: i
    for i in (
        Instruction("wgmma-e4m3", 0, HOPPER_8BIT, -6, 1),
        Instruction("wgmma-bf16", 1, HOPPER_16BIT, -126, 2),
    )
}


@dataclass(frozen=True)
class Request:
    """A request for ``tiles`` tiles of ``steps`` steps, with operands from a seed."""

    instruction: Instruction
    seed: int
    tiles: int
    steps: int

    @property
    def outputs(self) -> int:
        """Words in all."""
        return self.tiles * ROWS * COLUMNS

    def pieces(self) -> Iterator[tuple[Raw, Raw, npt.NDArray[np.float32]]]:
        """A ``(n, 64, bytes)``, B ``(n, 8, bytes)`` uint8 and C ``(n, 64, 8)`` float32."""
        for start in range(0, self.tiles, PIECE):
            rng = np.random.default_rng([self.seed, self.instruction.kind, start])
            count = min(PIECE, self.tiles - start)
            yield self._draw(rng, count)

    def _draw(self, rng: np.random.Generator, count: int) -> tuple[Raw, Raw, Any]:
        """Sorts of operands in turn: any bits, near each other, sparse, subnormal."""
        a, b = (self._operands(rng, count, rows) for rows in (ROWS, COLUMNS))
        c = np.ldexp(
            rng.uniform(-1, 1, (count, ROWS, COLUMNS)), rng.integers(-30, 30, (count, 1, 1))
        )
        c[rng.random(count) < 0.5] = 0
        return a, b, narrowed(c, self.instruction.unit.result_bits).astype(np.float32)

    def _operands(self, rng: np.random.Generator, count: int, rows: int) -> Raw:
        wide = self.instruction.size == 2
        dtype, one, fraction, top = (
            (np.uint16, 0x3F80, 7, 0x8000) if wide else (np.uint8, 0x38, 3, 0x80)
        )
        shape = (count, rows, self.steps * WIDTH // self.instruction.size)
        bits = rng.integers(0, 2 * top, shape)
        sort = np.arange(count) % 4
        for at in np.flatnonzero(sort):
            spread = int(rng.choice([1, 4, 6])) << fraction
            near = one + rng.integers(-spread, spread, shape[1:])
            bits[at] = near | np.where(rng.random(shape[1:]) < 0.5, top, 0)
            if sort[at] == 2:
                bits[at][rng.random(shape[1:]) < 0.7] = 0
            if sort[at] == 3:
                bits[at][rng.random(shape[1:]) < 0.5] &= top | 3
        return bits.astype(dtype).view(np.uint8).reshape(count, rows, -1)


def words_of(request: Request, unit: Unit, tiles: int | None = None) -> Iterator[U32]:
    """Words ``(n, 64, 8)`` by ``unit``, a piece after the other; of the first ``tiles`` only."""
    instruction, rest = request.instruction, request.tiles if tiles is None else tiles
    for a, b, c in request.pieces():
        if rest <= 0:
            return
        n = min(rest, len(a))
        rest -= n
        x, w = instruction.decode(a[:n]), instruction.decode(b[:n])
        with np.errstate(all="ignore"):
            sums = dense(unit, x[:, :, None], w[:, None], c[:n].astype(np.float64),
                         instruction.smallest)  # fmt: skip
        yield words(sums)


def words_entry(request: Request, pieces: Iterator[U32]) -> dict[str, Any]:
    """The part of a file that holds the words of a chip, which come piece by piece."""
    digest, sample = hashlib.sha256(), b""
    for piece in pieces:
        digest.update(np.ascontiguousarray(_one_nan(piece)).astype("<u4").tobytes())
        if not sample:
            sample = _one_nan(piece[:SAMPLE]).astype("<u4").tobytes()
    packed = base64.b64encode(zlib.compress(sample, 9)).decode()
    return {"seed": request.seed, "tiles": request.tiles, "steps": request.steps,
            "sha256": digest.hexdigest(), "sample": packed}  # fmt: skip


def sample_of(answer: dict[str, Any]) -> U32:
    """The sample's words ``(n, 64, 8)``; ``ValueError`` where it is damaged."""
    content = zlib.decompress(base64.b64decode(answer["sample"], validate=True))
    return np.frombuffer(content, "<u4").reshape(-1, ROWS, COLUMNS).astype(np.uint32)


def _one_nan(piece: U32) -> U32:
    return np.where(np.isnan(piece.view(np.float32)), np.uint32(0x7FFFFFFF), piece)


def units_near(unit: Unit) -> Iterator[tuple[str, Unit]]:
    """The single changes of a unit that words are tried against."""
    for bits in (unit.align_bits - 1, unit.align_bits + 1):
        yield f"{bits} bits kept in the alignment", replace(unit, align_bits=bits)
    for bits in (unit.result_bits - 1, unit.result_bits + 1):
        yield f"{bits} bits of the sum kept", replace(unit, result_bits=bits)
    for step in (unit.step // 2, unit.step * 2):
        yield f"steps of {step}", replace(unit, step=step)
    yield "a zero takes part at no exponent", replace(unit, floor=-1000)


__all__ = [
    "INSTRUCTIONS",
    "Instruction",
    "Request",
    "sample_of",
    "units_near",
    "words_entry",
    "words_of",
]
