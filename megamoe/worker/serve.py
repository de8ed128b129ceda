"""The worker: loads one backend, calls it, hands back bytes. Needs Python 3.10 and torch only.

This file runs in somebody else's environment and can be copied there alone, so it imports nothing
of megamoe at the top. It judges nothing: the judge is another process, with its own copy of the
inputs. ``docs/protocol.md`` has every message.

``python serve.py`` reads a JSON object a line on standard input and answers each with one line on
standard output that starts with ``@megamoe ``. What a backend prints goes to standard error.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import importlib.util
import inspect
import json
import locale
import math
import mmap
import os
import platform
import signal
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

PROTOCOL = 1
MARK = "@megamoe "
POISON = 0x5A  # bytes of a blank tensor before a call, so that what is not written shows
ALIGN = 64  # of every tensor in a file, in bytes
CALLABLES = ("forward", "prepare", "eplb_map", "transform_weights", "run")
Place = tuple[str, list[int], int]
"""Of a tensor in a file: torch's name of the dtype, the shape, the offset in bytes."""


class BackendError(ValueError):
    """A backend cannot be found, made or used; the message is one line and says how to mend it."""


def load(spec: str, device: str) -> Any:
    """The backend: ``path/to/file.py:OBJECT_OR_FACTORY``, or a name that megamoe knows."""
    name, _, attribute = spec.rpartition(":")
    if ":" not in spec and not spec.endswith(".py"):
        return importlib.import_module("megamoe.backends").load_backend(spec, device)
    if not name or not attribute or attribute.endswith(".py"):
        raise BackendError("say which object, as in path/to/file.py:OBJECT_OR_FACTORY")
    module = import_file(Path(name).expanduser().resolve())
    if not hasattr(module, attribute):
        names = ", ".join(n for n in vars(module) if not n.startswith("_")) or "none"
        raise BackendError(f"{Path(name).name} has no {attribute!r}; it has {names}")
    return create(getattr(module, attribute), torch.device(device))


def import_file(file: Path) -> Any:
    """The module in ``file``; its folder joins the import path last, as a script's would first."""
    if file.suffix != ".py" or not file.is_file():
        raise BackendError(f"no Python file at {file}; check the path before the :")
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    spec = importlib.util.spec_from_file_location(f"megamoe_backend_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(spec.name, None)
        raise
    return module


def create(found: Any, device: Any) -> Any:
    """The object itself, or what a call of a class or a function gives."""
    is_object = hasattr(found, "name") and hasattr(found, "accumulator")
    if not isinstance(found, type) and (is_object or not callable(found)):
        return found
    try:
        takes_device = "device" in inspect.signature(found).parameters
    except (TypeError, ValueError):  # some built-in callables tell nothing
        takes_device = False
    return found(device=device) if takes_device else found()


def identity(backend: Any) -> dict[str, Any]:
    """What the backend says of itself, and must say again after every call."""
    said = {name: getattr(backend, name, None) for name in ("name", "accumulator")}
    return {
        **{n: v if isinstance(v, str) or v is None else repr(v)[:80] for n, v in said.items()},
        "callables": [name for name in CALLABLES if callable(getattr(backend, name, None))],
        "type": type(backend).__name__,
    }


def fingerprint(backend: Any) -> Any:
    """Its ``fingerprint()``; None where it has none, ``{"raised": ...}`` where that raises."""
    if not callable(getattr(backend, "fingerprint", None)):
        return None
    try:
        return json.loads(json.dumps(backend.fingerprint(), default=dict))
    except BaseException as error:
        return {"raised": one_line(error)}


def facts(device: str) -> dict[str, Any]:
    """The environment that runs the backend."""
    out: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    out |= {n: sys.modules[n].__version__ for n in ("numpy", "triton") if n in sys.modules}
    out |= {"device": device, "processor": platform.machine()}
    if device.startswith("cuda"):
        out |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda,
                "capability": list(torch.cuda.get_device_capability())}  # fmt: skip
    return out


def read_tensors(path: str, places: Mapping[str, Place]) -> dict[str, Any]:
    """Tensors over the file's own memory: a write into one goes to the file."""
    with Path(path).open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)
    out = {}
    for name, (kind, shape, offset) in places.items():
        dtype, count = getattr(torch, kind), math.prod(shape)
        out[name] = torch.empty(shape, dtype=dtype, device="cpu") if not count else (
            torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)
        )  # fmt: skip
    return out


def write_tensors(path: str, tensors: Mapping[str, Any]) -> dict[str, Place]:
    """Write tensors one after the other; returns their places."""
    places = {}
    with Path(path).open("wb") as file:
        for name, tensor in tensors.items():
            host = tensor.detach().contiguous().cpu()
            file.write(bytes(-file.tell() % ALIGN))
            kind = str(host.dtype).removeprefix("torch.")
            places[name] = (kind, list(host.shape), file.tell())
            if host.nbytes:  # without numpy, which need not be here
                file.write((ctypes.c_char * host.nbytes).from_address(host.data_ptr()))
    return places


class Served:
    """A backend in this process, and the inputs of its last call."""

    def __init__(self, backend: Any, device: str) -> None:
        self.backend, self.device = backend, device
        self.files: dict[str, dict[str, Any]] = {}
        """A file that the next request names again is given as the same tensors."""

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """What was returned, or why nothing was; and what the backend says of itself now."""
        try:
            reply = self._called(request)
        except NotImplementedError as error:
            reply = {"declined": one_line(error)}
        except BaseException as error:  # sys.exit and KeyboardInterrupt are a backend's too
            reply = {"raised": one_line(error, place=True)}
        reply["lost"] = self._lost()
        if not reply["lost"] and self.device != "cpu":  # on a CPU the files are its own memory
            self._write_back(request)
        reply["identity"] = identity(self.backend)
        if request.get("fingerprint"):
            reply["fingerprint"] = fingerprint(self.backend)
        return reply

    def _called(self, request: dict[str, Any]) -> dict[str, Any]:
        call, extra = request["call"], {}
        if call in CALLABLES and not callable(getattr(self.backend, call, None)):
            return {"missing": call}
        given = self._inputs(request)
        if call == "forward":
            result = self.backend.forward(problem_of({**given, **request["plain"]}))
        elif call in CALLABLES:
            result = getattr(self.backend, call)(*(given[name] for name in request["arguments"]))
        else:  # a law of a launch or a wrong call: megamoe's own code, where it can be imported
            try:
                module = importlib.import_module("megamoe.worker.acts")
            except ImportError as error:
                return {"missing": f"{call}: megamoe cannot be imported there ({error})"}
            result, extra = module.run(self, request, given)
        if self.device != "cpu":
            torch.cuda.synchronize()
        form, parts = parts_of(result)
        kept, shown = {}, {}
        for name, t in parts.items():
            shown[name] = [type(t).__name__] if not isinstance(t, torch.Tensor) else [
                str(t.dtype).removeprefix("torch."), list(t.shape), list(t.stride())]  # fmt: skip
            if len(shown[name]) == 3 and t.numel() * t.element_size() <= request["limit"]:
                kept[f"out.{name}"] = t
        kept |= {name: given[name] for name in request.get("blank", ())}
        try:
            places = write_tensors(request["out"], kept)
        except OSError as error:
            return {"disk": one_line(error)}
        return {**extra, "form": form, "shown": shown, "places": places}

    def _inputs(self, request: dict[str, Any]) -> dict[str, Any]:
        """All tensors of the request, on the device, by name."""
        self.files = {
            path: self.files.get(path) or self._moved(path, places, request["used"])
            for path, places in request["inputs"].items()
        }
        given = {name: t for file in self.files.values() for name, t in file.items()}
        for name, (kind, shape) in request.get("blank", {}).items():
            size = math.prod(shape) * getattr(torch, kind).itemsize
            flat = torch.full((size,), POISON, dtype=torch.uint8, device=self.device)
            given[name] = flat.view(getattr(torch, kind)).view(shape)
        return given

    def _moved(self, path: str, places: Any, used: Mapping[str, list[int]]) -> dict[str, Any]:
        """One file on the device. Of a tensor in ``used`` all rows but those are zeros."""
        tensors = read_tensors(path, places)
        if self.device == "cpu":
            return tensors
        for name, host in tensors.items():
            tensors[name] = torch.zeros(host.shape, dtype=host.dtype, device=self.device)
            for row in used.get(name, (slice(None),)):
                tensors[name][row].copy_(host[row])
        return tensors

    def _write_back(self, request: dict[str, Any]) -> None:
        """Put what the call left of its inputs into their files, where the judge reads it."""
        for path, tensors in self.files.items():
            for name, host in read_tensors(path, request["inputs"][path]).items():
                now, rows = tensors[name], request["used"].get(name)
                count = torch.count_nonzero
                if rows and int(count(now)) == sum(int(count(now[row])) for row in rows):
                    for row in rows:  # the others are zeros still
                        host[row].copy_(now[row])
                else:
                    host.copy_(now)

    def _lost(self) -> str:
        """Why this process is of no further use. A CUDA error comes back at every call."""
        try:
            usable = getattr(self.backend, "usable", None)
            if callable(usable) and not usable():
                return "the backend says that it can no longer be used"
            if self.device != "cpu":
                torch.cuda.synchronize()
        except BaseException as error:
            return one_line(error)
        return ""


def problem_of(fields: dict[str, Any]) -> Any:
    """A :class:`megamoe.problem.Problem`, or the same fields and sizes where megamoe is not."""
    try:
        return importlib.import_module("megamoe.problem").Problem(**fields)
    except ImportError:
        tokens, hidden = fields["hidden_states"].shape
        experts, rows = fields["w13_weight"].shape[:2]
        return SimpleNamespace(
            **fields, num_tokens=tokens, hidden_size=hidden, num_experts=experts,
            intermediate_size=rows // 2, top_k=fields["topk_ids"].shape[1],
        )  # fmt: skip


def parts_of(result: Any) -> tuple[str, dict[str, Any]]:
    """The form of a result and its parts by name, 16 at most; a sequence's are its indices."""
    if isinstance(result, torch.Tensor):
        return "tensor", {"0": result}
    if hasattr(result, "items"):
        return "mapping", {str(k): value for k, value in list(result.items())[:16]}
    if isinstance(result, tuple | list):
        return "sequence", {str(i): value for i, value in enumerate(result[:16])}
    return type(result).__name__, {}


def state() -> dict[str, Any]:
    """What a call must leave as it was: it decides bits, or where a later call reads and writes."""
    one, bit = 1.0, 2.0**-53
    return {
        "working directory": os.getcwd(),  # noqa: PTH109
        "default dtype of torch": str(torch.get_default_dtype()),
        "default device of torch": str(torch.get_default_device()),
        "thread count of torch": torch.get_num_threads(),
        "grad mode of torch": torch.is_grad_enabled(),
        "deterministic mode of torch": torch.are_deterministic_algorithms_enabled(),
        "locale": locale.setlocale(locale.LC_ALL),
        "rounding mode": str([one + bit, -one - bit, (one + 2 * bit) + bit]),
        "flushing of subnormals": 5e-324 * one == 0,
        "timer": [signal.getitimer(which)[0] > 0 for which in range(2)],
        "standard files": [[(s := os.fstat(n)).st_dev, s.st_ino] for n in range(3)],
        **{f"variable {k}": hash(v) for k, v in os.environ.items()},
    }


def serve() -> None:
    """Answer requests until standard input ends."""
    out, requests = os.dup(1), os.fdopen(os.dup(0), "rb", closefd=False)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what a backend prints is no answer

    def say(reply: dict[str, Any]) -> None:
        data = f"{MARK}{json.dumps(reply)}\n".encode()
        while data:
            data = data[os.write(out, data) :]

    hello = json.loads(requests.readline())
    sys.path[:1] = hello["front"]  # in place of this file's folder
    sys.path += hello["back"]
    device, trace = hello["device"], Path(hello["trace"]).open("w")  # noqa: SIM115
    try:
        if hello["threads"]:
            torch.set_num_threads(hello["threads"])
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise BackendError("torch finds no CUDA device; use --device cpu")
        faulthandler.dump_traceback_later(hello["seconds"], file=trace)
        served = Served(load(hello["backend"], device), device)
        ready = {**identity(served.backend), "fingerprint": fingerprint(served.backend)}
        say({"protocol": PROTOCOL, "ready": {**ready, "facts": facts(device)}, "state": state()})
    except BaseException as error:
        say({"protocol": PROTOCOL, "error": one_line(error, place=True)})
        return
    for line in requests:
        request = json.loads(line)
        trace.truncate(0)
        faulthandler.dump_traceback_later(request["seconds"], file=trace)
        reply = served.answer(request)
        faulthandler.cancel_dump_traceback_later()
        try:
            reply["state"] = state()
        except (OSError, ValueError) as error:  # a folder or a descriptor that is gone
            reply["state"] = one_line(error)
        say({"id": request["id"], **reply})


def one_line(error: BaseException, place: bool = False) -> str:
    """Type and first line of the message; with ``place`` also the innermost frame."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0][:500]}" if lines else type(error).__name__
    if not place or isinstance(error, BackendError):
        return text
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{text} ({Path(frame.filename).name}, line {frame.lineno}, in {frame.name})"


if __name__ == "__main__":
    serve()
