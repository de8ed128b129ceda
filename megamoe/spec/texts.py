"""The texts of refused calls, word for word: those of vLLM 0.24 and those of vLLM 0.33.

Texts are no numerics, so they are no clauses. But an engine's tests compare them, and vLLM 0.33
changed most of them with the module's face: the prefix "DeepSeek V4" is gone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

from megamoe.spec.contract import Contract

NEWER_FACE: Final = ("2026-11",)
"""Revisions whose module is ``DeepGemmMegaMoEExperts``; the others have the words of vLLM 0.24."""


@dataclass(frozen=True)
class Text:
    """One error in both wordings; braces hold the fields to fill in."""

    older: str
    newer: str


_STAGING: Final = "MegaMoE input staging requires "
_OF_SHARD: Final = (
    "DeepSeek V4 MegaMoE expert weight shape mismatch for {name}: parameter shard {shard} vs "
    "checkpoint {loaded}"
)
_SIZES: Final = "DeepGEMM MegaMoE requires hidden and intermediate sizes to be multiples of 128."
_SHARD_ID: Final = "Unsupported expert shard id: {shard_id}"

TEXTS: Final = {
    "capacity": Text(
        "DeepSeek V4 MegaMoE got {tokens} tokens, but the symmetric buffer was sized for {most}.",
        "MegaMoE got {tokens} tokens, but the symmetric buffer was sized for {most}.",
    ),
    "staging-hidden": Text(
        f"DeepSeek V4 {_STAGING}hidden_size to be a multiple of 128.",
        f"{_STAGING}hidden_size to be a multiple of 128.",
    ),
    "staging-shapes": Text(
        f"DeepSeek V4 {_STAGING}topk_weights and topk_ids to have the same shape.",
        f"{_STAGING}topk_weights and topk_ids to have the same shape.",
    ),
    "sizes": Text(_SIZES, _SIZES),
    "shard-id": Text(_SHARD_ID, _SHARD_ID),
    "weight-shape": Text(
        _OF_SHARD,
        "MegaMoE {shard_id} weight shape {loaded} does not match the kernel shard {shard}",
    ),
    "scale-shape": Text(_OF_SHARD, "Scale shape {loaded} does not tile {shard}"),
}
"""The texts of both faces. A text of the newer face alone stands in its module."""


def text(key: str, contract: Contract, **values: Any) -> str:
    """The text ``key`` of :data:`TEXTS` in the words of the contract's face."""
    words = TEXTS[key]
    wording = words.newer if contract.revision in NEWER_FACE else words.older
    return wording.format(**values)


WORDLESS: Final = ("sgl",)
"""Revisions whose staging is a kernel of another project, with words of its own that no caller
compares: its wrong calls must be refused, in any words."""


def has_words(message: str, contract: Contract) -> bool:
    """Whether a call that is refused with ``message`` must be refused in the contract's words."""
    staging = (TEXTS[key].older for key in ("staging-hidden", "staging-shapes"))
    return contract.revision not in WORDLESS or message not in staging


def restated(message: str, contract: Contract, *, shard_id: str = "", parameter: str = "") -> str:
    """``message``, in the words of vLLM 0.24, as the contract's face says it.

    The older words for a shape are the same for a weight and its scale, and name no shard;
    ``parameter`` and ``shard_id`` of the wrong call decide. A message outside of the table does not
    change.
    """
    other = "weight-shape" if parameter.endswith("_scale") else "scale-shape"
    for key, words in TEXTS.items():
        match = re.fullmatch(_pattern(words.older), message)
        if match and key != other:
            return text(key, contract, **{"shard_id": shard_id, **match.groupdict()})
    return message


def _pattern(words: str) -> str:
    return re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+)", re.escape(words))
