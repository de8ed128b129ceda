"""Run a backend on stored inputs and keep the bits of every stage. Needs torch, nothing else.

This file runs in somebody else's environment: an old revision, another interpreter, a stranger's
machine. So it imports nothing of megamoe unless a built-in backend is asked for. Two ways in:

- ``python show.py`` answers requests, one JSON object a line on standard input, with one line on
  standard output that starts with ``@megamoe ``. What a backend prints goes to standard error.
- ``python replay.py``, this file in an archive of ``megamoe bisect``, runs the archived cases and
  says of each whether the bits are those of the good side or of the bad one.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import platform
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

MARK = "@megamoe "
POISON = 0x5A
"""Bytes of a buffer before a call, so that what is not written shows."""
CALLABLE = {
    "staging": "prepare",
    "eplb": "eplb_map",
    "forward": "forward",
    "property": "forward",
    "layout": "transform_weights",
}
WEIGHTS = ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale")


class Missing(Exception):
    """The backend has no such callable."""


# --- finding the backend ----------------------------------------------------------------------


def load(spec: str, device: str) -> Any:
    """The backend: ``path/to/file.py:OBJECT_OR_FACTORY``, or a name that megamoe knows."""
    path, _, attribute = spec.rpartition(":")
    if not path.endswith(".py"):
        return importlib.import_module("megamoe.backends").load_backend(spec, device)
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise FileNotFoundError(f"no Python file at {file}")
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    made = importlib.util.spec_from_file_location(f"megamoe_backend_{file.stem}", file)
    assert made is not None and made.loader is not None
    module = importlib.util.module_from_spec(made)
    sys.modules[made.name] = module
    made.loader.exec_module(module)
    found = getattr(module, attribute)
    is_object = hasattr(found, "name") and hasattr(found, "accumulator")
    if isinstance(found, type) or (callable(found) and not is_object):
        takes = "device" in inspect.signature(found).parameters
        return found(device=device) if takes else found()
    return found


def facts(backend: Any, device: str) -> dict[str, Any]:
    """Who answers: for people, and for the judge the accumulator class."""
    import torch

    out: dict[str, Any] = {
        "backend": str(getattr(backend, "name", type(backend).__name__)),
        "accumulator": getattr(backend, "accumulator", None),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device,
    }
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        out["numpy"] = numpy.__version__
    if device.startswith("cuda"):
        out["gpu"] = torch.cuda.get_device_name()
    return out


# --- one case ---------------------------------------------------------------------------------


def run(backend: Any, request: dict[str, Any], device: str) -> dict[str, Any]:
    """Bits of every stage of one case, as integer tensors on the host."""
    import torch

    kind = request["kind"]
    if not callable(getattr(backend, CALLABLE[kind], None)):
        raise Missing(CALLABLE[kind])
    given = torch.load(request["inputs"], weights_only=True, map_location="cpu")
    given.update(request["plain"])
    made = {"staging": _staging, "eplb": _eplb, "layout": _layout}.get(kind, _forward)(
        backend, given, device
    )
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return {name: _bits(name, tensor) for name, tensor in made.items()}


def _forward(backend: Any, given: dict[str, Any], device: str) -> dict[str, Any]:
    import torch

    given = dict(given)
    experts, count = given.pop("experts"), given.pop("num_experts")
    for name in WEIGHTS:  # experts that no id names hold zeros
        few = given[name]
        given[name] = torch.zeros(count, *few.shape[1:], dtype=few.dtype)
        given[name][experts] = few
    ids = given["topk_ids"].clone()
    moved = {n: t.to(device) if isinstance(t, torch.Tensor) else t for n, t in given.items()}
    out = backend.forward(_problem(moved))
    made = dict(out) if hasattr(out, "items") else {"y": out}
    live = (ids >= 0).unsqueeze(-1)
    for name in ("l2_acts", "l2_acts_sf"):  # slots with id -1 are not read
        if name in made:
            codes = _bits(name, made[name])
            made[name] = torch.where(live, codes, torch.zeros_like(codes))
    return made


def _problem(fields: dict[str, Any]) -> Any:
    try:
        return importlib.import_module("megamoe.problem").Problem(**fields)
    except ImportError:
        inter, top_k = fields["w13_weight"].shape[1] // 2, fields["topk_ids"].shape[1]
        tokens, hidden = fields["hidden_states"].shape
        sizes = {
            "num_tokens": tokens, "hidden_size": hidden, "intermediate_size": inter,
            "num_experts": fields["w13_weight"].shape[0], "top_k": top_k,
        }  # fmt: skip
        return SimpleNamespace(**fields, **sizes)


def _staging(backend: Any, given: dict[str, Any], device: str) -> dict[str, Any]:
    import torch

    hidden, weights, ids = (given[n] for n in ("hidden_states", "topk_weights", "topk_ids"))
    tokens, top_k = ids.shape
    rows, size = max(given["capacity"], tokens + 1), hidden.shape[1]
    out = {
        "x": torch.zeros(rows, size, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn),
        "x_sf": torch.zeros(rows, size // 128, dtype=torch.int32, device=device),
        "topk_idx": torch.zeros(rows, top_k, dtype=torch.int64, device=device),
        "topk_weights": torch.zeros(rows, top_k, device=device),
    }
    for tensor in out.values():
        tensor.view(torch.uint8).fill_(POISON)
    backend.prepare(hidden.to(device), weights.to(device), ids.to(device), *out.values())
    rest = [t[tokens:].contiguous().view(torch.uint8) for t in out.values()]
    beyond = torch.tensor([int((t != POISON).sum()) for t in rest])
    return {**{name: t[:tokens] for name, t in out.items()}, "beyond": beyond}


def _eplb(backend: Any, given: dict[str, Any], device: str) -> dict[str, Any]:
    names = (
        "topk_ids", "expert_load_view", "logical_to_physical_map", "logical_replica_count",
    )  # fmt: skip
    moved = [given[name].to(device) for name in names]
    ids = backend.eplb_map(*moved, given["record_enabled"].to(device))
    return {"ids": ids, "load": moved[1]}


def _layout(backend: Any, given: dict[str, Any], device: str) -> dict[str, Any]:
    made = backend.transform_weights(*(given[name].to(device) for name in WEIGHTS))
    return dict(zip(("w13", "w13_sf", "w2", "w2_sf"), made, strict=True))


def _bits(name: str, tensor: Any) -> Any:
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is {type(tensor).__name__}, not a tensor")
    plain = tensor.detach().contiguous().cpu()
    if plain.dtype.is_floating_point:
        whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        plain = plain.view(whole[plain.element_size()])
    return plain


def digest(tensor: Any) -> str:
    """sha256 of shape and bytes; of integers, so that the dtype of codes plays no part."""
    import torch

    found = hashlib.sha256(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
    flat = tensor.contiguous().flatten().view(torch.uint8)
    try:
        found.update(memoryview(flat.numpy()))
    except RuntimeError:  # a torch that cannot reach this environment's numpy
        found.update(bytes(flat.tolist()))
    return found.hexdigest()


# --- answering --------------------------------------------------------------------------------


def serve() -> None:
    """Answer requests until standard input ends."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a backend prints is no answer

    def say(reply: dict[str, Any]) -> None:
        out.write(f"{MARK}{json.dumps(reply)}\n")
        out.flush()

    hello = json.loads(sys.stdin.readline())
    sys.path[:1] = hello["front"]  # in place of this file's folder
    sys.path += hello["back"]
    device = hello["device"]
    try:
        backend = load(hello["backend"], device)
        say({"ready": facts(backend, device)})
    except (Exception, SystemExit) as error:
        say({"error": one_line(error)})
        return
    for line in sys.stdin:
        say(_answer(backend, json.loads(line), device))


def _answer(backend: Any, request: dict[str, Any], device: str) -> dict[str, Any]:
    import torch

    try:
        made = run(backend, request, device)
    except Missing as missing:
        return {"missing": str(missing)}
    except NotImplementedError as error:
        return {"declined": one_line(error)}
    except (Exception, SystemExit) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}, line {frame.lineno}, in {frame.name}"
        return {"raised": f"{one_line(error)} ({where})"}
    try:
        if request.get("out"):
            part = Path(f"{request['out']}.part")
            torch.save(made, part)
            part.replace(request["out"])
    except (OSError, RuntimeError) as error:  # torch says so of a full disk
        return {"disk": one_line(error)}
    return {"digests": {name: digest(tensor) for name, tensor in made.items()}}


def one_line(error: BaseException) -> str:
    """Type and first line of the message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# --- replaying an archive ---------------------------------------------------------------------


def replay(folder: Path, argv: list[str] | None = None) -> int:
    """Run the archived cases; 0: all as the good side, 1: all as the bad one, 2: something else."""
    about = json.loads((folder / "cases.json").read_text())
    parser = argparse.ArgumentParser(description="Are these the good bits or the bad ones?")
    parser.add_argument("--path", action="append", default=[], help="put first on the import path")
    parser.add_argument("--backend", default=about["backend"], help="default: %(default)s")
    parser.add_argument("--device", default=about["device"])
    a = parser.parse_args(argv)
    sys.path[:1] = [str(Path(p).resolve()) for p in a.path]
    spec = a.backend
    file = spec.rpartition(":")[0]
    for base in (*a.path, folder):  # a file's path counts from --path, then from the archive
        if file.endswith(".py") and (Path(base) / file).exists():
            spec = str(Path(base) / spec)
            break
    try:
        backend = load(spec, a.device)
    except (Exception, SystemExit) as error:
        print(f"cannot replay: {one_line(error)}")
        return 2
    print(json.dumps(facts(backend, a.device)))
    seen = set()
    for case in about["cases"]:
        reply = _answer(backend, {**case, "inputs": str(folder / case["inputs"])}, a.device)
        if "digests" not in reply:
            print(f"{case['id']}: no bits: {next(iter(reply.values()))}")
            seen.add("none")
            continue
        sides = [
            side
            for side in ("good", "bad")
            if all(case[side].get(n, d) == d for n, d in reply["digests"].items())
        ]
        if len(sides) == 1:
            text = f"the {sides[0].upper()} bits"
        else:
            text = "neither side's bits" if not sides else "both sides' bits"
        moved = [n for n, d in reply["digests"].items() if case["good"].get(n, d) != d]
        print(f"{case['id']}: {text}" + (f"; not as good: {', '.join(moved)}" if moved else ""))
        seen.add(sides[0] if len(sides) == 1 else "none")
    return {frozenset({"good"}): 0, frozenset({"bad"}): 1}.get(frozenset(seen), 2)


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    if (here / "cases.json").exists():
        sys.exit(replay(here))
    serve()
