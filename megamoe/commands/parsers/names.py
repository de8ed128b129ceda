"""Names of things in rooms that import torch, for help texts and for mistakes.

``tests/test_cli.py`` compares each with the room that defines it.
"""

from __future__ import annotations

from typing import Final

MODELS: Final = ("hopper-triton", "sm100")
""":data:`megamoe.predict.MODELS`."""
MODEL: Final = "sm100"
SHARES: Final = ("flash", "kimi-k3", "pro", "v3", "v4.1-flash")
""":data:`megamoe.bench.SHARES`."""
DEFAULT_SHARES: Final = ("flash", "pro")
PEERS: Final = ("humming-kernels", "sgl-deep-gemm", "torch-grouped-mm")
""":data:`megamoe.bench.peers.PEERS`."""
PICTURES: Final = 20
""":data:`megamoe.suite.reds.PICTURES`."""
ALL_PICTURES: Final = 10**9
""":data:`megamoe.suite.reds.ALL_PICTURES`."""
DIMENSIONS: Final = (
    "x-codes", "act-codes", "w13-nibbles", "w13-bytes", "w2-nibbles", "w2-bytes", "x-bytes",
    "act-bytes", "shared-w13-codes", "shared-w13-bytes", "shared-w2-codes", "shared-w2-bytes",
    "nvfp4-w13-nibbles", "nvfp4-w13-bytes", "nvfp4-w2-nibbles", "nvfp4-w2-bytes", "x-branches",
    "act-branches", "x-rounding", "act-rounding", "gate-up-rounding", "row-rounding", "silu",
    "clamp", "weights", "specials", "tokens", "model-tokens", "rows-per-expert", "tiles",
    "experts", "top-k", "live-slots", "hidden", "intermediate", "shapes", "offsets", "capacity",
    "routing", "inputs", "features", "activations", "calls", "staging-codes", "staging-bytes",
    "staging-branches", "staging-rounding", "staging-specials", "staging-tokens",
    "staging-hidden", "staging-top-k", "staging-ids", "staging-capacity", "staging-padding",
    "staging-inputs", "eplb-tokens", "eplb-top-k", "eplb-logical", "eplb-physical",
    "eplb-replicas", "eplb-ids", "eplb-record", "eplb-padding", "eplb-inputs", "layout-hidden",
    "layout-intermediate", "layout-experts", "layout-bytes", "errors",
)  # fmt: skip
"""Of :func:`megamoe.coverage.dimensions.dimensions`, under the newest contract."""
