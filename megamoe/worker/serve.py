"""The worker: loads one backend, calls it, hands back bytes. Needs Python 3.10 and torch only.

It runs in somebody else's environment, with ``loading.py``, ``offer.py``, ``sources.py``,
``state.py`` and ``tensors.py`` beside it or, made by ``single.py``, in it. It judges nothing: the
judge is another process. ``docs/protocol.md`` has every message: a JSON object a line on standard
input, an answer each on standard output. The output of a backend goes to standard error.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib.util
import json
import os
import platform
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # no garbage is in what stays; the search is a fifth of the import
    gc.disable()

import torch

if TYPE_CHECKING:
    from megamoe.worker import loading

HERE = Path(__file__).resolve().parent
PROTOCOL = 1
MARK = "@megamoe "
POISON = 0x5A  # bytes of a blank tensor before a call, so that an unwritten element shows
FLAGS = ("folds_scales",)
"""Attributes that are true or absent; each decides what the judge asks of the backend."""


def _beside(name: str) -> Any:
    """The module ``name`` of this file's folder, under a name of its own; a worker of one file has
    it already."""
    full = f"megamoe_worker_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, HERE / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[full] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[full]


if not TYPE_CHECKING:
    loading = _beside("loading")
AUTO, CALLABLES = loading.AUTO, loading.CALLABLES
BackendError = loading.BackendError
load, create, misfit = loading.load, loading.create, loading.misfit


def identity(backend: Any) -> dict[str, Any]:
    """The backend's description of itself, which it must repeat after every call."""
    strings = {name: getattr(backend, name, None) for name in ("name", "accumulator")}
    one = getattr(backend, "contract", None)
    computes = getattr(backend, "contracts", one if isinstance(one, str) else None)
    computes = computes if isinstance(computes, (list, tuple, type(None))) else [computes]
    features = getattr(backend, "features", ())
    features = features if isinstance(features, (list, tuple)) else [features]
    return {
        **{n: v if isinstance(v, str) or v is None else [repr(v)[:80]] for n, v in strings.items()},
        "callables": [
            *(name for name in CALLABLES if callable(getattr(backend, name, None))),
            *(str(name)[:80] for name in features[:16]),
            *(name for name in FLAGS if getattr(backend, name, False) is True),
        ],
        "contracts": None if computes is None else [str(name)[:80] for name in computes][:16],
        "batch_invariant": getattr(backend, "batch_invariant", True) is not False,
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


class Service:
    """A backend in this process, and the inputs of its last call."""

    poison = POISON

    def __init__(self, backend: Any, device: str, modules: Mapping[str, str]) -> None:
        self.backend, self.device, self.modules = backend, device, modules
        self.tensors = _beside("tensors")
        self.files: dict[str, dict[str, Any]] = {}
        """The tensors of the last files: if the next request names a file again, it gets the same
        tensors."""

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The result of the call or the reason why there is none, and the backend's present
        identity."""
        try:
            reply = self._invoke(request)
        except BaseException as error:  # sys.exit and KeyboardInterrupt are a backend's too
            reply = {"raised": one_line(error, place=True)}
        reply["lost"] = self._loss()
        if not reply["lost"] and self.device != "cpu":  # on a CPU the files are its own memory
            try:
                for path, tensors in self.files.items():
                    self.tensors.write_back(path, request["inputs"][path], request["used"], tensors)
            except BaseException as error:
                reply["lost"] = f"its inputs cannot be read back: {one_line(error)}"
        description = {"identity": identity(self.backend), "fingerprint": fingerprint(self.backend)}
        return {**reply, **description}

    def _invoke(self, request: dict[str, Any]) -> dict[str, Any]:
        call, extra = request["call"], {}
        self.files = {k: v for k, v in self.files.items() if k in request["inputs"]}
        if call in CALLABLES and not callable(getattr(self.backend, call, None)):
            return {"missing": call}
        try:
            acts: Any = None if call in CALLABLES else loading.megamoe_module(self.modules, "acts")
        except ImportError as error:
            return {"missing": f"{call}: megamoe cannot be imported there ({error})"}
        inputs = self._inputs(request)
        try:
            if call == "forward":
                problem = problem_of({**inputs, **request["plain"]}, self.modules)
                result = self.backend.forward(problem)
            elif call in CALLABLES:
                result = getattr(self.backend, call)(*(inputs[n] for n in request["arguments"]))
            else:  # a law of a launch or a wrong call: megamoe's own code
                result, extra = acts.run(self, request, inputs)
            if self.device != "cpu":
                torch.cuda.synchronize()
        except NotImplementedError as error:
            return {"declined": one_line(error)}
        form, parts = self.tensors.parts_of(result)
        layouts = {name: self.tensors.layout_of(part) for name, part in parts.items()}
        outputs = {
            f"out.{name}": part for name, part in parts.items()
            if len(layouts[name]) == 3 and part.numel() * part.element_size() <= request["limit"]
        } | {name: inputs[name] for name in request.get("blank", ())}  # fmt: skip
        try:
            places = self.tensors.write_tensors(request["out"], outputs)
        except OSError as error:
            return {"unwritten": one_line(error)}
        return {**extra, "form": form, "shown": layouts, "places": places}

    @staticmethod
    def error(error: BaseException) -> tuple[str, str]:
        """What an exception of the backend says, and the line that raised it."""
        return one_line(error), where(error)

    def _inputs(self, request: dict[str, Any]) -> dict[str, Any]:
        """All tensors of the request, on the device, by name."""
        read = self.tensors.device_tensors
        self.files = {
            path: self.files.get(path) or read(path, places, request["used"], self.device)
            for path, places in request["inputs"].items()
        }
        tensors = {name: t for file in self.files.values() for name, t in file.items()}
        return tensors | self.tensors.fill_blanks(request.get("blank", {}), POISON, self.device)

    def _loss(self) -> str:
        """The reason why this process is of no further use; empty if it is. A CUDA error comes back
        at every call."""
        try:
            usable = getattr(self.backend, "usable", None)
            if callable(usable) and not usable():
                return "the backend says that it can no longer be used"
            if self.device != "cpu":
                torch.cuda.synchronize()
        except BaseException as error:
            return one_line(error)
        return ""


def problem_of(fields: dict[str, Any], modules: Mapping[str, str]) -> Any:
    """The problem, as megamoe's own class or, where that is not installed, with the same fields."""
    try:
        return loading.megamoe_module(modules, "problem").Problem(**fields)
    except ImportError:
        tokens, hidden = fields["hidden_states"].shape
        experts, rows = fields["w13_weight"].shape[:2]
        return SimpleNamespace(
            **fields, num_tokens=tokens, hidden_size=hidden, num_experts=experts,
            intermediate_size=rows // 2, top_k=fields["topk_ids"].shape[1],
        )  # fmt: skip


def serve() -> None:
    """Answer requests until standard input ends."""
    gc.freeze()
    gc.enable()
    out, requests = os.dup(1), os.fdopen(os.dup(0), "rb", closefd=False)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # the output of a backend is no answer
    about, origins = _beside("offer"), _beside("sources")
    state = _beside("state").State((0, 1, 2, out, requests.fileno()))

    def say(reply: dict[str, Any]) -> None:
        data = f"\n{MARK}{json.dumps(reply)}\n".encode()  # a line, whatever else was written
        while data:
            data = data[os.write(out, data) :]

    hello = json.loads(requests.readline())
    sys.path[:1] = hello["front"]  # in place of this file's folder
    sys.path += hello["back"]
    device, trace = hello["device"], Path(hello["trace"]).open("w")  # noqa: SIM115
    faulthandler.enable(file=trace, all_threads=False)  # a crash leaves its place
    try:
        sources = origins.Sources(hello["backend"])  # before the backend can change the folder
        if hello["threads"]:
            torch.set_num_threads(hello["threads"])
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise BackendError("torch finds no CUDA device; use --device cpu")
        if device.startswith("cuda:"):  # a rank's own GPU, also for code that names none
            torch.cuda.set_device(device)
        faulthandler.dump_traceback_later(hello["seconds"], file=trace)
        modules, contract = hello.get("modules", {}), hello.get("contract", AUTO)
        service = Service(load(hello["backend"], device, modules, contract), device, modules)
        ready = {**identity(service.backend), "fingerprint": fingerprint(service.backend)}
        ready |= about.offer(hello["backend"], modules, hello.get("packages", ()))
        ready |= {"facts": facts(device), "sources": sources.fresh()}
        ready["misfit"] = misfit(service.backend)
        say({"protocol": PROTOCOL, "ready": ready, "state": state.now()})
    except BaseException as error:
        say({"protocol": PROTOCOL, "error": one_line(error, place=True)})
        return
    for line in requests:
        request = json.loads(line)
        trace.truncate(0)
        faulthandler.dump_traceback_later(request["seconds"], file=trace)
        reply = service.answer(request)
        reply["sources"] = sources.fresh()
        faulthandler.cancel_dump_traceback_later()
        try:
            reply["state"] = state.now()
        except (OSError, ValueError) as error:  # a folder or a descriptor that is gone
            reply["state"] = one_line(error)
        say({"id": request["id"], **reply})


def one_line(error: BaseException, place: bool = False) -> str:
    """Type and first line of the message; with ``place`` also the innermost frame."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0][:500]}" if lines else type(error).__name__
    has_place = isinstance(error, SyntaxError) and error.filename  # its text has file and line
    if not place or has_place or isinstance(error, BackendError):
        return text
    return f"{text} ({where(error)})"


def where(error: BaseException) -> str:
    """File, line and function of the innermost frame, without those of the import and of torch:
    the line of the kernel that called torch can be mended."""
    frames = traceback.extract_tb(error.__traceback__)
    others = ("<frozen", str(Path(torch.__file__).parent) + os.sep)
    frame = [f for f in frames if not f.filename.startswith(others)][-1]
    return f"{Path(frame.filename).name}, line {frame.lineno}, in {frame.name}"


if __name__ == "__main__":
    serve()
