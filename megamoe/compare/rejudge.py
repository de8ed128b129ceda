"""Run the cases of an archive again and say whose bits come back. Needs Python 3.10 and torch.

In an archive of ``megamoe bisect`` this file is called ``replay.py`` and lies beside ``serve.py``,
megamoe's worker, which loads the backend. It runs on a stranger's machine, so it imports nothing of
megamoe. It defines the bits of a stage, and their digest.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib.util
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

POISON = 0x5A
"""Bytes of a blank tensor before a call, as in ``serve.py``."""
SLOTS = ("l2_acts", "l2_acts_sf")
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class NoBits(ValueError):
    """A backend returned something without bits to compare; one line."""


# --- the bits of one call -----------------------------------------------------------------------


def stages(
    parts: Mapping[str, Any], inputs: Mapping[str, Any], result: Any, buffers: Mapping[str, Any]
) -> dict[str, Any]:
    """``{stage: integers}`` on the host, from the output of one call.

    ``parts``: the fields of its kind's ``Parts``. ``inputs``: by name. ``buffers``: the tensors
    that the call may write into, as it left them.
    """
    names, rows = parts["result"], parts["rows"]
    if len(names) == 1:
        tensors = dict(result) if hasattr(result, "items") else {names[0]: result}
    elif names and (not isinstance(result, tuple | list) or len(result) != len(names)):
        raise NoBits(f"returned no tuple of {', '.join(names)}")
    else:
        tensors = dict(zip(names, result if names else (), strict=True))
    tokens = len(inputs[rows]) if rows else None
    into = {stage: buffers[name] for stage, name in parts["written"].items()}
    tensors |= {stage: tensor[:tokens] for stage, tensor in into.items()}
    if rows:
        rest = [t[tokens:].contiguous().view(torch.uint8) for t in into.values()]
        tensors["beyond"] = torch.tensor([int((t != POISON).sum()) for t in rest])
    out = {str(name): integers(str(name), value) for name, value in tensors.items()}
    for name in SLOTS:  # slots with id -1 are not read
        codes, live = out.get(name), inputs.get("topk_ids", torch.empty(0)) >= 0
        if codes is not None and codes.shape[:-1] == live.shape:
            out[name] = torch.where(live.unsqueeze(-1), codes, torch.zeros_like(codes))
    return out


def integers(name: str, value: Any) -> Any:
    """The tensor's bits: whole numbers of its own size, on the host."""
    if not isinstance(value, torch.Tensor):
        raise NoBits(f"{name} is {type(value).__name__}, not a tensor")
    shape = tuple(value.shape)
    if value.device.type == "meta":
        raise NoBits(f"{name} has shape {shape}, too large to be right")
    plain = value.detach().contiguous().cpu()
    if plain.dtype in INTEGERS:
        return plain
    if plain.element_size() not in WHOLE:
        raise NoBits(f"{name} has dtype {plain.dtype}, which is of no stage")
    return plain.view(WHOLE[plain.element_size()])


def digest(tensor: Any) -> str:
    """sha256 of dtype, shape and bytes."""
    plain = tensor.contiguous()
    dtype = str(plain.dtype).removeprefix("torch.")
    hasher = hashlib.sha256(f"{dtype}{list(plain.shape)}".encode())
    size = plain.numel() * plain.element_size()
    if size:  # without numpy, which need not be here
        hasher.update((ctypes.c_char * size).from_address(plain.data_ptr()))
    return hasher.hexdigest()


# --- the archive --------------------------------------------------------------------------------


def main(folder: Path, argv: list[str] | None = None) -> int:
    """Run the archived cases; 0: all as the good side, 1: all as the bad one, 2: something else."""
    about = json.loads((folder / "cases.json").read_text())
    parser = argparse.ArgumentParser(description="Are these the good bits or the bad ones?")
    parser.add_argument("--path", action="append", default=[], help="put first on the import path")
    parser.add_argument("--backend", default=about["backend"], help="default: %(default)s")
    parser.add_argument("--device", default=about["device"])
    parser.add_argument("--contract", default=about.get("contract", "auto"),
                        help="given to a factory that takes one; default: %(default)s")  # fmt: skip
    a = parser.parse_args(argv)
    serve = _file(folder / "serve.py", "megamoe_serve")
    sys.path[:1] = [str(Path(p).resolve()) for p in a.path]
    sys.dont_write_bytecode = True  # a tree keeps nothing for the next revision in it
    modules = about["modules"]
    try:
        copy = about["copy"] if a.backend == about["backend"] else ""
        spec = _locate(a.backend, a.path, folder, copy)
        backend = serve.load(spec, a.device, modules, a.contract)
        facts = serve.facts(a.device)
    except (Exception, SystemExit) as error:
        is_clear = isinstance(error, (NoBits, serve.BackendError))
        print(f"cannot replay: {error if is_clear else serve.one_line(error)}")
        return 2
    print(json.dumps({"backend": str(getattr(backend, "name", "")), **facts}))
    sides = set()
    for case in about["cases"]:
        side, text = _verdict(case, _run(serve, backend, case, folder, a.device, modules))
        print(f"{case['id']}: {text}")
        sides.add(side)
    return {frozenset({"good"}): 0, frozenset({"bad"}): 1}.get(frozenset(sides), 2)


def _file(path: Path, name: str) -> Any:
    """A module under a name that no backend imports."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _locate(spec: str, paths: list[str], folder: Path, copy: str) -> str:
    """The path of a file or a package counts from --path, then from here, and the archive's copy
    stands last. Where the copy is meant, no tree is looked at."""
    if spec == copy:
        return str(folder / spec)
    file = spec.rpartition(":")[0]
    for home in (*paths, "."):
        if file and (Path(home) / file).exists():
            return str(Path(home) / spec)
    if not file:
        return spec
    if not copy:
        raise NoBits(
            f"no {file} in {', '.join(paths) or 'this folder'}; check out one of the two trees "
            "and name its folder with --path, as README.md says"
        )
    return str(folder / copy)


def _run(
    serve: Any, backend: Any, case: dict[str, Any], folder: Path, device: str,
    modules: Mapping[str, str],
) -> Any:  # fmt: skip
    """Digests of the stages, or one line with the reason why there are none."""
    if not callable(getattr(backend, case["call"], None)):
        return f"the backend has no {case['call']}"
    try:
        inputs = torch.load(folder / case["inputs"], weights_only=True, map_location="cpu")
        result, buffers = _call(serve, backend, case, inputs, device, modules)
        bits = stages(case["parts"], inputs, result, buffers)
    except (Exception, SystemExit) as error:
        return f"{serve.one_line(error)} ({serve.where(error)})"
    return {name: digest(tensor) for name, tensor in bits.items()}


def _call(
    serve: Any, backend: Any, case: dict[str, Any], inputs: dict[str, Any], device: str,
    modules: Mapping[str, str],
) -> tuple[Any, dict[str, Any]]:  # fmt: skip
    on_device = {name: tensor.to(device, copy=True) for name, tensor in inputs.items()}
    blank = {}
    for name, (kind, shape) in case["blank"].items():
        dtype = getattr(torch, kind)
        flat = torch.full((math.prod(shape) * dtype.itemsize,), POISON, dtype=torch.uint8)
        blank[name] = flat.to(device).view(dtype).view(shape)
    if case["call"] == "forward":
        experts = on_device.pop("experts")
        for name in case["weights"]:  # experts that no id names hold zeros
            few = on_device[name]
            shape = (case["num_experts"], *few.shape[1:])
            on_device[name] = torch.zeros(shape, dtype=few.dtype, device=device)
            on_device[name][experts] = few
        result = backend.forward(serve.problem_of({**on_device, **case["plain"]}, modules))
    else:
        arguments, after = ([on_device[n] for n in case.get(k, [])] for k in ("arguments", "after"))
        result = getattr(backend, case["call"])(*arguments, *blank.values(), *after)
    if device != "cpu":
        torch.cuda.synchronize()
    return result, {**blank, **{name: on_device[name] for name in case["own"]}}


def _verdict(case: dict[str, Any], digests: Any) -> tuple[str, str]:
    """``good``, ``bad`` or ``none``, and one line for a person."""
    if isinstance(digests, str):
        return "none", f"no bits: {digests}"
    sides = [
        side
        for side in ("good", "bad")
        if all(case[side].get(n, d) == d for n, d in digests.items())
    ]
    if len(sides) == 1:
        text = f"the {sides[0].upper()} bits"
    else:
        text = "neither side's bits" if not sides else "both sides' bits"
    changes = [n for n, d in digests.items() if case["good"].get(n, d) != d]
    text += f"; not as good: {', '.join(changes)}" if changes else ""
    return sides[0] if len(sides) == 1 else "none", text


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parent))
