"""Times of the triton backend's products by tile: why ``CROWD`` and ``MANY`` are what they are.

    PYTHONPATH=. python3 tools/tiles.py [--share flash pro] [--tokens T ...] [--repeats N]

Needs a GPU. A row is a share and a number of tokens; a column is a tile, with microseconds of
dispatch and both products by events, caches flushed (``megamoe/bench/timing.py``). The fastest
tile has a star; the last column is the tile that :mod:`megamoe.backends.triton.launches` takes.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch

from megamoe.backends.triton.backend import TritonBackend, launch, new_symm_buffer
from megamoe.backends.triton.launches import Call, Memory, stages_of
from megamoe.backends.triton.tiles import FEW, OVERLAPPED, Tile
from megamoe.bench import timing
from megamoe.bench.floor import SHARES, Share
from megamoe.bench.measure import random_weights
from megamoe.spec.problem import Sizes

CLAMP = 10.0


def name(tile: Tile) -> str:
    """As a column has it."""
    return f"{tile.N} x {tile.share}" if tile.BOXES else f"{tile.N}, {tile.BLOCKS} blocks"


def times(
    backend: TritonBackend, share: Share, tokens: int, weights: tuple[torch.Tensor, ...],
    repeats: int,
) -> tuple[dict[Tile, float], Tile]:  # fmt: skip
    """Microseconds of each tile that can serve ``tokens``, and the one that is taken."""
    device = backend.device
    generator = torch.Generator(device=device).manual_seed(tokens)
    hidden = torch.randn(tokens, share.hidden, generator=generator, device=device).bfloat16()
    order = torch.rand(tokens, share.experts, generator=generator, device=device)
    ids = order.argsort(1)[:, : share.top_k].contiguous()
    routing = torch.rand(tokens, share.top_k, generator=generator, device=device)
    sizes = Sizes(share.experts, tokens, share.top_k, share.hidden, share.intermediate)
    buffer = new_symm_buffer(None, device, sizes)
    views = [t[:tokens] for t in (buffer.x, buffer.x_sf, buffer.topk_idx, buffer.topk_weights)]
    backend.prepare(hidden, routing, ids, *views)
    w13, s13, w2, s2 = weights
    memory = Memory(buffer, w13, s13, w2, s2, torch.empty_like(hidden))
    call = Call(
        tokens, buffer.capacity, share.experts, share.hidden, share.intermediate, share.top_k,
        CLAMP, True, False, device,
    )  # fmt: skip
    each = call.rows / share.experts
    few = FEW if each <= 64 else ()
    large = OVERLAPPED if each >= 4 else ()
    took = {}
    for tile in (*few, *large):
        products = [s for s in stages_of(call, tile) if s[0] != "combine"]
        took[tile] = timing.events(partial(launch, memory, products), repeats, ahead=True)
    return took, call.tile()


def main() -> None:
    """A table, row by row."""
    parser = argparse.ArgumentParser(description="times of the triton backend's products by tile")
    parser.add_argument("--share", nargs="+", choices=sorted(SHARES), default=["flash", "pro"])
    parser.add_argument("--tokens", nargs="+", type=int,
                        default=[1, 8, 16, 32, 64, 96, 128, 256, 512, 1024, 2048, 3072, 4096, 6144,
                                 8192])  # fmt: skip
    parser.add_argument("--repeats", type=int, default=15)
    a = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    backend = TritonBackend(device)
    tiles = (*FEW, *OVERLAPPED)
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}")
    print(f"| share | T | rows per expert | {' | '.join(map(name, tiles))} | taken |")
    print("|---" * (len(tiles) + 4) + "|")
    for key in a.share:
        share = SHARES[key]
        generator = torch.Generator(device=device).manual_seed(1)
        weights = backend.pack_weights(*random_weights(share, generator))
        for tokens in a.tokens:
            took, pick = times(backend, share, tokens, weights, a.repeats)
            best = min(took, key=lambda tile: took[tile])
            cells = [
                "" if tile not in took else f"{took[tile]:.0f}{'*' * (tile == best)}"
                for tile in tiles
            ]
            each = tokens * share.top_k / share.experts
            print(f"| {share.name} | {tokens} | {each:.4g} | {' | '.join(cells)} | {name(pick)} |",
                  flush=True)  # fmt: skip
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
