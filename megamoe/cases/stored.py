"""A problem as a file: one forward call with stored inputs, without a recipe.

``capture``, ``reduce`` and ``golden import`` share one format, a safetensors file: ``input.*``
holds the fields of :class:`~megamoe.spec.problem.Problem`, of the weights only those of the experts
in ``input.experts``; ``observed.*``, if present, holds the output of the engine itself. The
metadata entry ``megamoe`` is JSON: the scalars, and ``about``, where it came from.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from megamoe import schema
from megamoe.cases import CAPACITY_ALIGNMENT, Case
from megamoe.cases.recipes import EXTRAS
from megamoe.files import STORED_LIMIT, digest_bounded, open_bounded, parse_json
from megamoe.spec.contract import BASE
from megamoe.spec.features import ACTIVATIONS as KNOWN_ACTIVATIONS
from megamoe.spec.features import COMBINE_DTYPES, SIZE_MULTIPLE, WEIGHT_FORMATS
from megamoe.spec.problem import Problem
from megamoe.spec.stages import STAGES
from megamoe.spec.tensors import ACTIVATIONS, NVFP4_FACTORS, SHARED_WEIGHTS, TENSORS, WEIGHTS
from megamoe.spec.weights import layout_of

FORMATS: Final = (1, 2)
"""2: the call asks for one of :data:`megamoe.spec.features.FEATURES`, which readers of 1 ignore."""
OPTIONAL: Final = (*SHARED_WEIGHTS, "shared_output")
"""Tensors that a problem may have besides."""
KIND: Final = "stored"
"""``hidden_recipe.kind`` of a case whose inputs lie in a file."""
INPUTS: Final = "inputs"
"""The folder of these files, under golden/."""
MOST_EXPERTS: Final = 65536
"""The largest number of experts of a stored problem: ids are int64, but weights need addresses."""
OF_FORMAT: Final = ("weight_format", "l2_activation_scale")
"""Fields of a problem whose weights are not MXFP4."""
SCALARS: Final = ("activation_clamp", "fast_math", "max_num_tokens", *EXTRAS, *OF_FORMAT)
"""Fields of a problem that are metadata of the file."""


class StoredError(ValueError):
    """A file is no stored problem, or a problem cannot be stored; one line."""


@dataclass(frozen=True)
class StoredProblem:
    """The content of a file."""

    problem: Problem
    outputs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Stages that the recorded call itself returned, by the names of ``tensors.STAGES``."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """The origin of the problem, as plain data."""


def _clamp(value: Any) -> str:
    number = isinstance(value, float) or not schema.natural(value)
    right = value is None or (number and value >= 0)  # which NaN is not
    return "" if right else "must be null or a number from 0 on"


def _scale(value: Any) -> str:
    right = isinstance(value, float | int) and not isinstance(value, bool)
    return "" if right and math.isfinite(value) else "must be a finite number"


def _experts(value: Any) -> str:
    right = not schema.natural(value) and 1 <= value <= MOST_EXPERTS
    return "" if right else f"must be an integer from 1 to {MOST_EXPERTS}"


_FILE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
"""Names of files in golden/inputs: no path leads out of it."""
_META: Final = schema.Object(
    {
        "activation_clamp": _clamp, "fast_math": bool, "max_num_tokens": schema.natural,
        "num_experts": _experts,
    },
    {
        "about": dict, "activation": schema.OneOf(KNOWN_ACTIVATIONS),
        "combine_dtype": schema.OneOf(COMBINE_DTYPES), "activation_alpha": _scale,
        "activation_beta": _scale, "weight_format": schema.OneOf(WEIGHT_FORMATS),
        "l2_activation_scale": _scale,
    },
)  # fmt: skip


def used_experts(problem: Problem) -> torch.Tensor:
    """Ids that some slot names and that are local, ascending, int64."""
    ids = problem.topk_ids
    return ids[(ids >= 0) & (ids < problem.num_experts)].unique()


def to_bytes(call: StoredProblem) -> bytes:
    """The file's content. Tensors may be on any device."""
    p = call.problem
    experts = used_experts(p)
    tensors = {
        "input.hidden_states": p.hidden_states,
        "input.topk_ids": p.topk_ids.long(),
        "input.topk_weights": p.topk_weights,
        "input.experts": experts,
        **{f"input.{name}": getattr(p, name)[experts] for name in (*WEIGHTS, *p.expert_factors)},
        **{f"input.{name}": p.arguments[name] for name in OPTIONAL if name in p.arguments},
        **{f"observed.{name}": tensor for name, tensor in call.outputs.items()},
    }
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    meta = {
        "format": FORMATS[1] if p.features else FORMATS[0],
        "contract": BASE.revision,
        "activation_clamp": p.activation_clamp,
        "fast_math": p.fast_math,
        "max_num_tokens": p.max_num_tokens,
        "num_experts": p.num_experts,
        **{name: p.arguments[name] for name in (*EXTRAS, *OF_FORMAT) if name in p.arguments},
        "about": dict(call.about),
    }
    return save(plain, {"megamoe": json.dumps(meta, sort_keys=True)})


def load(path: Path) -> StoredProblem:
    """The problem of ``path``; experts without weights there are zeros, as in any problem.

    :class:`StoredError` for a file that is missing, damaged or of another kind, shape or dtype.
    """
    text, tensors = _read(path)
    if text is None and "y" in tensors:
        raise StoredError(
            f"{path}: holds an output and no problem; `megamoe explain CASE --actual {path}` "
            "explains it"
        )
    if text is None:
        raise StoredError(
            f"{path}: holds no stored problem; make one with `megamoe capture` or `megamoe reduce`"
        )
    meta = _meta(path, text)
    _check(path, tensors, meta)
    inputs = {n.removeprefix("input."): t for n, t in tensors.items() if n.startswith("input.")}
    experts = inputs.pop("experts")
    for name in (n for n in (*WEIGHTS, *NVFP4_FACTORS) if n in inputs):
        # Zero pages until they are written: experts that no slot names cost nothing.
        try:
            part = inputs[name]
            whole = torch.zeros(meta["num_experts"], *part.shape[1:], dtype=part.dtype)
        except RuntimeError:  # torch's word for no memory
            raise StoredError(
                f"{path}: there is no memory for the {name} of {meta['num_experts']} experts"
            ) from None
        whole[experts] = inputs[name]
        inputs[name] = whole
    outputs = {
        n.removeprefix("observed."): t for n, t in tensors.items() if n.startswith("observed.")
    }
    fields: dict[str, Any] = {**inputs, **{n: meta[n] for n in SCALARS if n in meta}}
    problem = Problem(**fields)
    if fault := problem.act.fault():
        raise StoredError(f"{path}: {fault}; record it again")
    return StoredProblem(problem, outputs, meta.get("about", {}))


def _read(path: Path) -> tuple[str | None, dict[str, torch.Tensor]]:
    """The metadata entry and the tensors; :class:`StoredError` for a file that is no safetensors
    file."""
    try:
        # Keep it open, so that safetensors, which takes a name, gets no fifo and no giant.
        with open_bounded(path, STORED_LIMIT), safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("megamoe")
            return text, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise StoredError(f"{path}: no such file") from None
    except (OSError, ValueError, SafetensorError) as error:
        text = " ".join(str(error).split())
        raise StoredError(
            f"{path}: is no stored problem, since it cannot be read as safetensors: {text}; "
            "`megamoe reduce`, `megamoe fuzz` and `megamoe capture` write stored problems"
        ) from error


def _meta(path: Path, text: str) -> dict[str, Any]:
    """The scalars and ``about``, each of its type."""
    again = "write it again with megamoe.layer.capture or `megamoe reduce`"
    try:
        meta = parse_json(text.encode("utf-8", "surrogatepass"))
    except ValueError as error:
        raise StoredError(f"{path}: its metadata is no JSON ({error}); {again}") from error
    if not isinstance(meta, dict):
        raise StoredError(f"{path}: its metadata is no object; {again}")
    version = meta.get("format")
    if isinstance(version, bool) or version not in FORMATS:
        raise StoredError(
            f"{path}: has format {schema.preview(version)}, this megamoe reads {FORMATS[0]} and "
            f"{FORMATS[1]}; use the version that wrote it"
        )
    if wrong := schema.fault(meta, _META):
        raise StoredError(f"{path}: its metadata: {wrong}; {again}")
    return meta


def _check(path: Path, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
    """Names, dtypes, shapes and ids."""
    layout = layout_of(meta.get("weight_format", "mxfp4"))
    has_shared = any(f"input.{name}" in tensors for name in SHARED_WEIGHTS)
    names = (
        *ACTIVATIONS, "experts", *WEIGHTS, *(NVFP4_FACTORS if layout.factors else ()),
        *(SHARED_WEIGHTS if has_shared else ()),
        *(n for n in ("shared_output",) if f"input.{n}" in tensors),
    )  # fmt: skip
    missing = [name for name in names if f"input.{name}" not in tensors]
    if missing:
        raise StoredError(f"{path}: lacks input.{missing[0]}; record it again")
    inputs = {name: tensors[f"input.{name}"] for name in names}
    for name in names:
        want = 1 if name == "experts" else len(TENSORS[name].shape)
        if inputs[name].ndim != want:
            raise StoredError(f"{path}: input.{name} has {inputs[name].ndim} axes, expected {want}")
    tokens, hidden = inputs["hidden_states"].shape
    count, rows, _ = inputs["w13_weight"].shape
    inter, top_k = rows // 2, inputs["topk_ids"].shape[1]
    shared = inputs["shared_w2_weight"].shape[1] if has_shared else 0
    sizes = {"T": tokens, "K": top_k, "H": hidden, "I": inter, "E": count, "S": shared}
    of_weights = layout.shapes(hidden, inter)
    for name, tensor in inputs.items():
        spec = TENSORS.get(name)  # `experts` is of the file alone
        shape = (count,) if spec is None else spec.sizes(sizes)
        dtype = torch.int64 if spec is None else spec.dtypes[0]
        if name in of_weights:
            shape, dtype = (count, *of_weights[name]), layout.dtype(name)
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise StoredError(
                f"{path}: input.{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} "
                f"{shape}"
            )
    if hidden % layout.multiple or inter % layout.multiple or shared % SIZE_MULTIPLE:
        raise StoredError(
            f"{path}: H {hidden} and I {inter} must be multiples of {layout.multiple}, and a "
            f"shared expert's {shared} of {SIZE_MULTIPLE}"
        )
    if layout.factors and "l2_activation_scale" not in meta:
        raise StoredError(f"{path}: lacks l2_activation_scale; record it again")
    ids, experts, total = inputs["topk_ids"], inputs["experts"], meta["num_experts"]
    if ids.numel() and not (int(ids.min()) >= -1 and int(ids.max()) < total):
        raise StoredError(f"{path}: an id is outside -1 to {total - 1}, the local experts")
    if meta["max_num_tokens"] < tokens:
        raise StoredError(
            f"{path}: max_num_tokens is {meta['max_num_tokens']}, below its {tokens} tokens"
        )
    live = ids[ids >= 0].unique()
    inside = experts.numel() == 0 or (int(experts.min()) >= 0 and int(experts.max()) < total)
    if not inside or not torch.isin(live, experts).all():
        raise StoredError(f"{path}: a slot names an expert whose weights are not in the file")
    more = [n for n in tensors if n.startswith("input.") and n[6:] not in names]
    if more:
        raise StoredError(f"{path}: {schema.preview(more[0])} is no input; record it again")
    unknown = [n for n in tensors if n.startswith("observed.") and n[9:] not in STAGES]
    if unknown:
        raise StoredError(f"{path}: {unknown[0]} is no stage; known: {', '.join(STAGES)}")


def case_of(problem: Problem, name: str, breaks: str = "", recipe: Any = None) -> Case:
    """The forward case that a stored problem is. ``recipe`` says where its inputs lie."""
    params = {
        "family": "envelope",
        "hidden": problem.hidden_size,
        "intermediate": problem.intermediate_size,
        "experts": problem.num_experts,
        "top_k": problem.top_k,
        "tokens": problem.num_tokens,
        "clamp": "none" if problem.activation_clamp is None else problem.activation_clamp,
        "fast_math": problem.fast_math,
        "capacity": problem.max_num_tokens,
        **{n: problem.arguments[n] for n in (*EXTRAS, *OF_FORMAT) if n in problem.arguments},
        **({"shared_recipe": {}} if problem.shared_weights else {}),
        **({"shared_output_recipe": {}} if problem.shared_output is not None else {}),
        "hidden_recipe": recipe or {"kind": KIND},
    }
    return Case(f"forward/{name}", "forward", "full", breaks, 0, params, Path())


def is_stored(case: Case) -> bool:
    """Whether the inputs of ``case`` come from a file."""
    recipe = case.params.get("hidden_recipe", {})
    return isinstance(recipe, Mapping) and recipe.get("kind") == KIND


def inputs_of(case: Case) -> dict[str, Any]:
    """The problem's fields of a case with stored inputs, by name. :class:`StoredError` if not."""
    recipe = case.params["hidden_recipe"]
    # golden/cases/NAME.toml names a file in golden/inputs/.
    file, digest = recipe.get("file"), recipe.get("sha256")
    if not (isinstance(file, str) and isinstance(digest, str) and _FILE.fullmatch(file)):
        raise StoredError(
            f"case {case.id}: its inputs must be the name of a file in golden/{INPUTS} and its "
            f"sha256, not {schema.preview(file)} and {schema.preview(digest)}; import it again"
        )
    path = case.source.parent.parent / INPUTS / file
    try:
        actual = digest_bounded(path, STORED_LIMIT)
    except OSError as error:
        raise StoredError(f"case {case.id}: {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise StoredError(f"case {case.id}: {error}") from error
    if actual != digest:
        raise StoredError(
            f"case {case.id}: {path} is not the file that was imported (sha256 does not match); "
            "restore it, or import it again"
        )
    return load(path).problem.arguments


def capacity_for(tokens: int) -> int:
    """The smallest capacity of a symmetric buffer for this many tokens."""
    return max(1, -(-tokens // CAPACITY_ALIGNMENT)) * CAPACITY_ALIGNMENT
