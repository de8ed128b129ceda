"""A recorded call's weights beside the checkpoint that they came from.

The names are those of published DeepSeek-V4 checkpoints: ``layers.N.ffn.experts.J.w1.weight``, I8
with two E2M1 codes a byte, and ``...w1.scale``, F8_E8M0. vLLM's loader puts ``model.`` before them
and writes ``weight_scale`` for ``scale``; both forms are read. Only slices of the files are read,
and only for experts that the call used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open

from megamoe import schema
from megamoe.cases.stored import StoredError, StoredProblem, used_experts
from megamoe.files import FileError, parse_json, read_bounded

INDEX: Final = "model.safetensors.index.json"
ABOUT: Final = "checkpoint"
"""Entry of ``about`` of a recorded call: ``layer``, and ``experts`` as [local, checkpoint's]."""
INDEX_LIMIT: Final = 64 << 20
AT_ONCE: Final = 16 << 20
"""Bytes of a tensor that are in memory at a time."""

_NAME: Final = re.compile(
    r"(?:model\.)?layers\.(\d+)\.ffn\.experts\.(\d+)\.(w[123])\.(weight|scale|weight_scale)"
)
_ELEMENTS: Final = {False: ("I8", "U8"), True: ("F8_E8M0", "U8")}
"""Element types in a checkpoint's file: of a weight (False) and of a scale (True)."""

Part = tuple[int, int, str, bool]
"""Layer, expert, shard, and whether it is the scale."""


@dataclass(frozen=True)
class Difference:
    """A tensor of the checkpoint that differs from the recorded call's."""

    name: str
    local: int
    parameter: str
    text: str

    def line(self) -> str:
        """For a terminal."""
        return f"{self.name} (local expert {self.local}, {self.parameter}): {self.text}"


class Checkpoint:
    """The expert tensors of a folder of safetensors files, by their names.

    The index of Hugging Face says which file holds which tensor; without it every file is opened.
    :class:`StoredError` for a folder without expert tensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places: dict[Part, tuple[str, Path]] = {}
        for name, path in _names(folder):
            match = _NAME.fullmatch(name)
            if match:
                layer, expert, shard_id, kind = match.groups()
                self.places[int(layer), int(expert), shard_id, kind != "weight"] = name, path
        if not self.places:
            raise StoredError(
                f"{folder}: holds no tensor with a name such as layers.0.ffn.experts.0.w1.weight; "
                "give the folder of a DeepSeek-V4 checkpoint"
            )

    @property
    def layers(self) -> list[int]:
        """Layers that have experts here, ascending."""
        return sorted({layer for layer, *_ in self.places})

    def slices(self, part: Part, shape: tuple[int, int]) -> Iterator[tuple[int, torch.Tensor]]:
        """First row and bytes (uint8) of one piece of a tensor after another.

        :class:`StoredError` where it is missing, or has another shape or other elements.
        """
        if part not in self.places:
            layer, expert, shard_id, scale = part
            kind = "scale" if scale else "weight"
            raise StoredError(
                f"{self.folder}: lacks layers.{layer}.ffn.experts.{expert}.{shard_id}.{kind}"
            )
        name, path = self.places[part]
        try:
            with safe_open(path, "pt") as file:
                whole = file.get_slice(name)
                form, elements = tuple(whole.get_shape()), whole.get_dtype()
                types = _ELEMENTS[part[3]]
                if form != shape or elements not in types:
                    raise StoredError(
                        f"{path}: {name} is {elements} {form}, the call has {' or '.join(types)} "
                        f"{shape} there"
                    )
                step = max(1, AT_ONCE // shape[1])
                for first in range(0, shape[0], step):
                    yield first, whole[first : first + step].view(torch.uint8)
        except (OSError, SafetensorError) as error:
            message = " ".join(str(error).split())
            raise StoredError(f"{path}: {name} cannot be read: {message}") from error


def differences(call: StoredProblem, folder: Path) -> list[Difference]:
    """The tensors of the experts that the call used, as far as the checkpoint has other bytes.

    :class:`StoredError` where the call does not say which experts it had, or the checkpoint lacks
    one of them.
    """
    checkpoint = Checkpoint(folder)
    layer, experts = _origin(call.about, checkpoint)
    unknown = set(used_experts(call.problem).tolist()) - set(experts)
    if unknown:
        raise StoredError(
            "the file does not say which expert of a checkpoint the local expert "
            f"{min(unknown)} was; record it again"
        )
    out = []
    for local, expert in sorted(experts.items()):
        for parameter, shard_id, ours in _shards(call, local):
            part = layer, expert, shard_id, parameter.endswith("_scale")
            text = _difference(checkpoint, part, ours)
            if text:
                out.append(Difference(checkpoint.places[part][0], local, parameter, text))
    return out


def _shards(call: StoredProblem, local: int) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Parameter, shard and the call's bytes of it, in the order of an expert's stages."""
    p = call.problem
    inter = p.intermediate_size
    for shard_id, rows in (("w1", slice(0, inter)), ("w3", slice(inter, None))):
        for name in ("w13_weight", "w13_weight_scale"):
            yield name, shard_id, getattr(p, name)[local, rows]
    for name in ("w2_weight", "w2_weight_scale"):
        yield name, "w2", getattr(p, name)[local]


def _difference(checkpoint: Checkpoint, part: Part, ours: torch.Tensor) -> str:
    """The number of different bytes, and the first of them; empty if all are equal."""
    rows, width = ours.shape
    count, first, by_value = 0, "", part[3]
    for start, theirs in checkpoint.slices(part, (rows, width)):
        here = ours[start : start + len(theirs)]
        unequal = theirs != here
        count += int(unequal.sum())
        # Scales that were copied as numbers: 2^3 as 8 and not as 130.
        by_value = by_value and torch.equal(
            theirs.view(torch.float8_e8m0fnu).float().to(torch.uint8), here
        )
        if not first and count:
            row, byte = unequal.nonzero()[0].tolist()
            first = (
                f"the first at row {start + row}, byte {byte}: {theirs[row, byte].item():#04x} in "
                f"the checkpoint, {here[row, byte].item():#04x} in the call"
            )
    if not count:
        return ""
    note = "; the call has these scales' values in place of their bytes" if by_value else ""
    return f"{count} of {rows * width} bytes differ, {first}{note}"


def _origin(about: Mapping[str, Any], checkpoint: Checkpoint) -> tuple[int, dict[int, int]]:
    """The layer, and the checkpoint's expert of each local one."""
    origin = about.get(ABOUT)
    pairs = origin.get("experts") if isinstance(origin, Mapping) else None
    whole = isinstance(pairs, list) and all(
        isinstance(p, list) and len(p) == 2 and not any(schema.natural(n) for n in p) for p in pairs
    )
    if not isinstance(origin, Mapping) or not isinstance(pairs, list) or not whole:
        raise StoredError(
            "the file does not say which experts of a checkpoint it holds; record it again with "
            "this version's capture"
        )
    layer, layers = origin.get("layer"), checkpoint.layers
    if layer is None and len(layers) == 1:
        layer = layers[0]
    if layer is None:
        raise StoredError(
            f"the recorded module's prefix {schema.preview(about.get('prefix', ''))} names no "
            f"layer, and {checkpoint.folder} has {len(layers)}; make the module with a prefix "
            "such as model.layers.3.ffn.experts"
        )
    return int(layer), dict(pairs)


def _names(folder: Path) -> Iterator[tuple[str, Path]]:
    """Names of tensors and where each lies."""
    if not folder.is_dir():
        raise StoredError(f"{folder}: no such folder; give the folder of a checkpoint")
    index = folder / INDEX
    if index.exists():
        try:
            table = parse_json(read_bounded(index, INDEX_LIMIT)).get("weight_map")
        except (AttributeError, FileError, OSError, ValueError) as error:
            raise StoredError(f"{index}: cannot be read as an index: {error}") from error
        if not isinstance(table, dict):
            raise StoredError(f"{index}: has no weight_map; it is no index of safetensors files")
        for name, file in table.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise StoredError(f"{index}: {name} lies in {schema.preview(file)}, no file's name")
            yield name, folder / file
        return
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                names = list(file.keys())
        except (OSError, SafetensorError) as error:
            message = " ".join(str(error).split())
            raise StoredError(f"{path}: cannot be read as safetensors: {message}") from error
        for name in names:
            yield name, path
