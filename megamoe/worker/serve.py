"""The worker: loads one backend, calls it, hands back bytes. Needs Python 3.10 and torch only.

It runs in somebody else's environment, with ``offer.py``, ``sources.py``, ``state.py`` and
``tensors.py`` beside it or, made by ``single.py``, in it. It judges nothing: the judge is another
process. ``docs/protocol.md`` has every message: a JSON object a line on standard input, an answer
each on standard output. The output of a backend goes to standard error.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import importlib.util
import inspect
import json
import os
import platform
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__":  # no garbage is in what stays; the search is a fifth of the import
    gc.disable()

import torch

HERE = Path(__file__).resolve().parent
PROTOCOL = 1
MARK = "@megamoe "
POISON = 0x5A  # bytes of a blank tensor before a call, so that an unwritten element shows
AUTO = "auto"  # of contracts: the backend's own
FLAGS = ("folds_scales",)
"""Attributes that are true or absent; each decides what the judge asks of the backend."""
CALLABLES = ("forward", "prepare", "eplb_map", "transform_weights", "forward_group", "run")


class BackendError(ValueError):
    """A backend cannot be found, created or used; the message is one line and says how to mend
    it."""


def load(spec: str, device: str, modules: Mapping[str, str], contract: str = AUTO) -> Any:
    """The backend: ``path/to/file.py:OBJECT_OR_FACTORY``, the same with the folder of a package, or
    a name that megamoe knows.

    ``modules``: where megamoe's ``backends``, ``acts`` and ``problem`` are; some or all may lack.
    """
    name, _, attribute = spec.rpartition(":")
    if ":" not in spec and not spec.endswith(".py"):
        arguments = () if contract == AUTO else (contract,)  # an older megamoe knows of none
        if "backends" not in modules:
            raise BackendError("megamoe must be installed; or give path/to/file.py:OBJECT")
        return megamoe_module(modules, "backends").load_backend(spec, device, *arguments)
    if not name or not attribute or attribute.endswith(".py"):
        raise BackendError("say which object, as in path/to/file.py:OBJECT_OR_FACTORY")
    file = Path(name).expanduser().resolve()
    try:
        module = import_file(file)
    except ImportError as error:
        if "no known parent package" not in str(error):
            raise
        about = module_of("megamoe_worker_offer", HERE / "offer.py")
        raise BackendError(about.is_in_package(Path(name), attribute)) from error
    target = getattr(module, attribute, None)
    required = _required(target)
    if required or not hasattr(module, attribute):
        about = module_of("megamoe_worker_offer", HERE / "offer.py")
        hint = about.lacks(module, attribute, CALLABLES, name)
        if not required:
            raise BackendError(f"{Path(name).name} has no {attribute!r}{hint}")
        raise BackendError(about.needs(attribute, required, isinstance(target, type)) + hint)
    return create(target, torch.device(device), contract)


def _required(factory: Any) -> list[str]:
    """The arguments that a function or a class needs, and that no factory of a backend gets."""
    if not inspect.isfunction(factory) and not isinstance(factory, type):
        return []
    try:
        takes = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # some classes of C tell nothing
        return []
    required = [p.name for p in takes if p.default is p.empty and p.kind not in (2, 4)]
    return [one for one in required if one not in ("device", "contract")]


def megamoe_module(modules: Mapping[str, str], part: str) -> Any:
    """The module of megamoe that the judge names for ``part``; an ``ImportError`` without one."""
    if part not in modules:
        raise ImportError(f"the judge names no module for {part}")
    return importlib.import_module(modules[part])


def import_file(file: Path) -> Any:
    """The module in ``file``; its folder joins the import path last, as a script's would first.
    The folder of a package means its ``__init__.py``; the folder around it joins the path."""
    file = file / "__init__.py" if file.is_dir() else file
    if file.suffix != ".py" or not file.is_file():
        raise BackendError(f"no Python file at {file}; check the path before the :")
    home = str(file.parent.parent if file.stem == "__init__" else file.parent)
    if home not in sys.path:
        sys.path.append(home)
    return module_of(f"megamoe_backend_{file.stem}", file)


def module_of(name: str, file: Path) -> Any:
    """The module in ``file``, under a name of its own. A worker of one file has its two already."""
    if name.startswith("megamoe_worker_") and name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(spec.name, None)
        raise
    return module


def create(target: Any, device: Any, contract: str = AUTO) -> Any:
    """The object itself, or the result of a call with optional ``device`` and ``contract``."""
    is_object = hasattr(target, "name") and hasattr(target, "accumulator")
    if not isinstance(target, type) and (is_object or not callable(target)):
        return target
    try:
        takes = dict(inspect.signature(target).parameters)
    except (TypeError, ValueError):  # some built-in callables tell nothing
        takes = {}
    arguments = {"device": device} if contract == AUTO else {"device": device, "contract": contract}
    parameter = takes.get("contract")
    if contract == AUTO and parameter is not None and parameter.default is inspect.Parameter.empty:
        raise BackendError("it needs a `contract`; give that a default, or say --contract REV")
    return target(**{name: value for name, value in arguments.items() if name in takes})


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
        self.tensors = module_of("megamoe_worker_tensors", HERE / "tensors.py")
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
            acts: Any = None if call in CALLABLES else megamoe_module(self.modules, "acts")
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
        return megamoe_module(modules, "problem").Problem(**fields)
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
    watch, about = (module_of(f"megamoe_worker_{n}", HERE / f"{n}.py") for n in ("state", "offer"))
    modules_of = module_of("megamoe_worker_sources", HERE / "sources.py")
    state = watch.State((0, 1, 2, out, requests.fileno()))

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
        sources = modules_of.Sources(hello["backend"])  # before the backend can change the folder
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
