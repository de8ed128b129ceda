"""A checkpoint on disk in the Hugging Face layout: several safetensors shards and their index.

Names and dtypes are those of published DeepSeek-V4 checkpoints:
``layers.N.ffn.experts.J.w1.weight`` is I8 (two E2M1 values a byte), ``...w1.scale`` is F8_E8M0.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class ExpertTensor:
    """One tensor of a checkpoint, with what its name says."""

    name: str
    layer: int
    expert: int
    shard_id: str
    is_scale: bool
    tensor: torch.Tensor

    @property
    def parameter(self) -> str:
        """Name of the module's parameter that it belongs in."""
        stem = "w2_weight" if self.shard_id == "w2" else "w13_weight"
        return f"{stem}_scale" if self.is_scale else stem


def expert_bytes(layer: int, expert: int, shard_id: str, kind: str, shape) -> torch.Tensor:
    """The bytes of one tensor: from its name alone, different for each."""
    seed = ((layer * 1000 + expert) * 10 + int(shard_id[1])) * 2 + (kind == "scale")
    generator = torch.Generator().manual_seed(seed)
    low, high = (0, 256) if kind == "weight" else (116, 122)
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)


def write_checkpoint(
    folder: Path, *, experts: int, hidden: int, inter: int, layers: int = 1, shards: int = 3
) -> dict[str, torch.Tensor]:
    """Write it; gives name to bytes (uint8). Tensors are dealt out to the shards in turn."""
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(layers):
        for expert in range(experts):
            for shard_id, rows, depth in (
                ("w1", inter, hidden),
                ("w2", hidden, inter),
                ("w3", inter, hidden),
            ):
                stem = f"layers.{layer}.ffn.experts.{expert}.{shard_id}"
                for kind, columns in (("weight", depth // 2), ("scale", depth // 32)):
                    tensors[f"{stem}.{kind}"] = expert_bytes(
                        layer, expert, shard_id, kind, (rows, columns)
                    )
    files: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
    index: dict[str, str] = {}
    for i, (name, data) in enumerate(tensors.items()):
        dtype = torch.float8_e8m0fnu if name.endswith(".scale") else torch.int8
        files[i % shards][name] = data.view(dtype)
        index[name] = f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors"
    for i, content in enumerate(files):
        save_file(content, folder / f"model-{i + 1:05d}-of-{shards:05d}.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}, indent=1))
    return tensors


def read_checkpoint(folder: Path) -> Iterator[ExpertTensor]:
    """Every expert tensor, through the index and the real loader, shard by shard."""
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    for file in sorted(set(index.values())):
        with safe_open(folder / file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - a file, not a dict
                _, layer, _, _, expert, shard_id, kind = name.split(".")
                yield ExpertTensor(
                    name=name,
                    layer=int(layer),
                    expert=int(expert),
                    shard_id=shard_id,
                    is_scale=kind == "scale",
                    tensor=shard.get_tensor(name),
                )
