"""Count how often ``megamoe explain`` gives a name to a corruption without one.

    python tools/false_names.py --count 400 --seed 1

Each corruption is drawn at random and laid over the stages of a right forward: bit flips, noise,
swapped slots or channels, other rows. A corruption that the judge would accept does not count. A
name is false if a deviation is said to explain every value, or, in the second column, some of them.
"""

from __future__ import annotations

import argparse
import collections
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from megamoe.backends.eager import EagerBackend
from megamoe.backends.simulate import problem
from megamoe.explain import FromProblem, explain
from megamoe.judge import forward_bits
from megamoe.spec.contract import NEWEST
from megamoe.spec.problem import Problem

Stages = dict[str, Any]
SHAPES = (
    {"tokens": 3, "top_k": 3, "intermediate": 256, "clamp": 2.0},
    {"tokens": 3, "top_k": 4, "intermediate": 128, "clamp": 10.0},
    {"tokens": 3, "top_k": 6, "intermediate": 256, "experts": 8, "clamp": 4.0},
)
SCALES = {"w13_scale": [120, 2], "w2_scale": [120, 2]}


def _some(rng: Any, size: int, most: int) -> Any:
    return rng.choice(size, rng.integers(1, most + 1), replace=False)


def flip_one(rng: Any, stage: Any) -> None:
    """One bit of one element."""
    flat = stage.reshape(-1)
    bit = rng.integers(0, 8 * flat.itemsize)
    flat[rng.integers(flat.size)] ^= np.array(1 << bit, np.uint64).astype(flat.dtype)


def flip_many(rng: Any, stage: Any) -> None:
    """One bit of some elements, up to a tenth of all."""
    flat = stage.reshape(-1)
    for at in _some(rng, flat.size, max(2, flat.size // 10)):
        bit = rng.integers(0, 8 * flat.itemsize)
        flat[at] ^= np.array(1 << bit, np.uint64).astype(flat.dtype)


def flip_same(rng: Any, stage: Any) -> None:
    """The same bit of a random half of the elements."""
    flat = stage.reshape(-1)
    bit = np.array(1 << rng.integers(0, 8 * flat.itemsize), np.uint64).astype(flat.dtype)
    flat[rng.random(flat.size) < 0.5] ^= bit


def noise(rng: Any, stage: Any) -> None:
    """One step up or down in a random part of the elements."""
    flat = stage.reshape(-1)
    mask = rng.random(flat.size) < rng.choice([0.02, 0.2, 0.9])
    flat[mask] += rng.choice([-1, 1], int(mask.sum())).astype(flat.dtype)


def shuffle(rng: Any, stage: Any) -> None:
    """Channels in another order."""
    part = stage.reshape(-1, stage.shape[-1])
    part[:] = part[:, rng.permutation(part.shape[1])]


def swap(rng: Any, stage: Any) -> None:
    """Two slots, or two halves of a row, change places."""
    if stage.ndim == 2 and len(stage) > 1:
        one, two = rng.choice(len(stage), 2, replace=False)
        stage[[one, two]] = stage[[two, one]]
    else:
        half = stage.shape[-1] // 2
        stage[...] = np.roll(stage, half, axis=-1)


def random_bits(rng: Any, stage: Any) -> None:
    """Random bytes in a run of elements."""
    flat = stage.reshape(-1)
    first, count = rng.integers(flat.size), rng.integers(1, flat.size // 2 + 1)
    raw = rng.integers(0, 256, count * flat.itemsize, dtype=np.uint8).view(flat.dtype)
    part = flat[first : first + count]
    part[:] = raw[: part.size]


CORRUPTIONS: tuple[Callable[[Any, Any], None], ...] = (
    flip_one, flip_many, flip_same, noise, shuffle, swap, random_bits,
)  # fmt: skip


def corrupted(rng: Any, right: Stages, how: Callable[[Any, Any], None], shows: str) -> Stages:
    """A copy with one stage corrupted; a backend that shows ``y`` alone has that one only."""
    out = {name: stage.copy() for name, stage in right.items()}
    if shows == "y":
        how(rng, out["y"])
        return {"y": out["y"]}
    how(rng, out[rng.choice(list(out))])
    return out


def problems(seed: int) -> list[tuple[Problem, Stages]]:
    """Small layers, and ``eager``'s stages of them."""
    out = []
    for number, shape in enumerate(SHAPES):
        layer = problem(seed + number, weights_recipe=SCALES, **shape)
        out.append((layer, forward_bits(EagerBackend().forward(layer), layer)))
    return out


def main() -> None:
    """Draw, explain, count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    a = parser.parse_args()
    rng, layers = np.random.default_rng(a.seed), problems(a.seed)
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    start = time.perf_counter()
    for _ in range(a.count):
        layer, stages = layers[rng.integers(len(layers))]
        token = int(rng.integers(layer.hidden_states.shape[0]))
        how = CORRUPTIONS[rng.integers(len(CORRUPTIONS))]
        right = {name: stage[token] for name, stage in stages.items()}
        actual = corrupted(rng, right, how, rng.choice(["stages", "stages", "y"]))
        diagnosis = explain(FromProblem(layer), token, 0, "fp32-ordered", actual, contract=NEWEST)[
            "actual"
        ]
        count = counts[how.__name__]
        if diagnosis["parts_at"] is None:
            count["accepted"] += 1
            continue
        count["outside"] += 1
        for kind in ("exact", "partial"):
            ways = [w for step in diagnosis["explanations"] for w in step[kind]]
            count[kind] += bool(ways)
            for way in ways[:2]:
                print(f"  {how.__name__}: {kind}: {way['stage']}: {way['what']} {way['where']} "
                      f"{way['explains']} {way['unexplained']}", flush=True)  # fmt: skip
    total: collections.Counter[str] = sum(counts.values(), collections.Counter())
    print(f"{'corruption':<14}{'outside':>9}{'named':>9}{'in part':>9}{'accepted':>10}")
    for name, count in [*sorted(counts.items()), ("all", total)]:
        print(f"{name:<14}{count['outside']:>9}{count['exact']:>9}{count['partial']:>9}"
              f"{count['accepted']:>10}")  # fmt: skip
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
