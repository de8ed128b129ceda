"""Finding a backend: names, files, entry points; one clear line for each thing that is wrong."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import pytest
import torch

from megamoe import backends
from megamoe.backends import BackendError, load_backend
from megamoe.backends.eager import EagerBackend
from megamoe.worker import known, offer

OTHERS = (
    "or another class: exact, fp32-ordered, sm90-e4m3, sm90-e4m3-k32, sm100-mxf8f6f4, "
    "sm90-e4m3-k128, sm90-e4m3-any"
)
FILE = '''
"""A kernel of somebody's."""

class Mine:
    name = "mine"
    accumulator = "fp32"

    def __init__(self, device="nowhere"):
        self.device = device

    def forward(self, problem):
        return problem.hidden_states

class NoDevice:
    name, accumulator = "plain", "exact"
    forward = print

def make(device):
    return Mine(device)

def fails():
    raise RuntimeError("no compiler\\nsecond line")

def needs_more(size):
    return Mine()

class Demanding(Mine):
    def __init__(self, config):
        pass

OBJECT = Mine()
NOT_A_BACKEND = 5

class Nameless:
    accumulator = "fp32"
    forward = print

class Unknown:
    name, accumulator = "unknown", "fp33"
    forward = print

class Number(Unknown):
    accumulator = 32

class Unsaid:
    name = "unsaid"
    forward = print

class Idle:
    name, accumulator = "idle", "fp32"
'''


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "kernel.py"
    path.write_text(FILE)
    return path


@pytest.mark.parametrize("name", ["eager", "auto"])
def test_by_name(name):
    assert isinstance(load_backend(name), EagerBackend)


def test_eager_offers_every_kind():
    backend = load_backend("eager")
    assert backend.accumulator == "fp32-ordered"
    others = {"forward_group"}  # of a kernel with messages of its own
    assert all(callable(getattr(backend, c)) for c in {*backends.CALLABLES} - others)


def test_an_object_is_taken_as_it_is(file):
    backend = load_backend(f"{file}:OBJECT", "cuda")
    assert (backend.name, backend.device) == ("mine", "nowhere")


@pytest.mark.parametrize("factory", ["Mine", "make"])
def test_a_class_or_function_is_called_with_the_device(file, factory):
    assert load_backend(f"{file}:{factory}", "cuda").device == torch.device("cuda")


def test_a_factory_need_not_take_a_device(file):
    assert load_backend(f"{file}:NoDevice").name == "plain"


def test_a_file_is_found_from_the_working_directory(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    assert load_backend("kernel.py:OBJECT").name == "mine"


def test_a_file_may_import_its_neighbour(file):
    (file.parent / "neighbour_of_kernel.py").write_text("SIZE = 3\n")
    file.write_text("import neighbour_of_kernel\n" + FILE)
    assert load_backend(f"{file}:OBJECT").name == "mine"


class EntryPoint:
    name = "theirs"

    def __init__(self, load):
        self.load = load


def entry_points_are(monkeypatch, load):
    monkeypatch.setattr(
        known,
        "entry_points",
        lambda group: [EntryPoint(load)] if group == "megamoe.backends" else [],
    )


def test_by_entry_point(monkeypatch):
    entry_points_are(monkeypatch, lambda: EagerBackend)
    assert isinstance(load_backend("theirs"), EagerBackend)
    assert "theirs" in backends.available()


def test_entry_points_come_from_installed_packages():
    assert known.entry_points is importlib.metadata.entry_points


# --- what is wrong, in one line ---------------------------------------------------------------


def refusal(spec) -> str:
    with pytest.raises(BackendError) as caught:
        load_backend(str(spec))
    message = str(caught.value)
    assert "\n" not in message
    return message


MANY = """
import os
from dataclasses import dataclass
from torch.nn import Linear, Module
from megamoe.backends.eager import EagerBackend as Eager
SIZE = 3
class Own(Module):
    def forward(self, p): pass
class Helper:
    pass
def factory(device="cpu", contract="2026-11"): pass
def plain(): pass
def helper(x): pass
def _hidden(): pass
class _Ready:
    name, accumulator = "r", "fp32"
    def forward(self, p): pass
ready = _Ready()
"""


def test_unknown_name():
    assert refusal("deep_germ") == (
        "unknown backend 'deep_germ'; did you mean deep_gemm? Known: "
        f"{', '.join(backends.available())}, or path/to/file.py:OBJECT"
    )


@pytest.mark.parametrize("tail", ["", ":"])
def test_a_file_without_an_object(file, tail):
    assert refusal(f"{file}{tail}") == (
        f"backend {file}{tail}: say which object, as in path/to/file.py:OBJECT_OR_FACTORY"
    )


def test_a_file_that_is_not_there(tmp_path):
    path = tmp_path / "absent.py"
    assert refusal(f"{path}:X") == (
        f"backend {path}:X: no Python file at {path}; check the path before the :"
    )


def test_a_package_is_its_folder_or_its_init(tmp_path):
    """It may import relatively, and by its own name."""
    package = tmp_path / "ragmoe"
    package.mkdir()
    (package / "__init__.py").write_text("from .layer import Mine\n")
    (package / "layer.py").write_text("from .formats import SIZE\nimport ragmoe.formats\n" + FILE)
    (package / "formats.py").write_text("SIZE = 1\n")
    for path in (package, package / "__init__.py"):
        assert load_backend(f"{path}:Mine").name == "mine"
        assert offer.default_of(f"{path}:Mine", {}) is None
    assert refusal(f"{package / 'layer.py'}:Mine") == (
        f"backend {package / 'layer.py'}:Mine: layer.py has a relative import, which works in a "
        f"package only; name the package, {package}:Mine, and import Mine in its __init__.py"
    )


def test_a_relative_import_outside_of_a_package(file):
    file.write_text("from .formats import SIZE\n")
    assert refusal(f"{file}:X").endswith(
        f"import by the whole name, or add {file.parent / '__init__.py'}"
    )


def test_an_object_that_is_not_there(file):
    message = refusal(f"{file}:Mien")
    text = f"backend {file}:Mien: kernel.py has no 'Mien'; did you mean Mine? It has Mine, NoDevice"
    assert message.startswith(text) and message.endswith(f"; name one, as {file}:Mine")


def test_what_could_be_a_backend_in_a_file(tmp_path):
    """Its own classes with a callable, its factories, its objects; no import of another's."""
    file = tmp_path / "many.py"
    file.write_text(MANY)
    assert refusal(f"{file}:X") == (
        f"backend {file}:X: many.py has no 'X'; it has Eager, Own, factory, plain, ready; name "
        f"one, as {file}:Eager"
    )


def test_a_file_that_does_not_import(file):
    file.write_text("import no_such_module_anywhere\n")
    assert refusal(f"{file}:X") == (
        f"backend {file}:X: loading it raised ModuleNotFoundError: "
        "No module named 'no_such_module_anywhere'"
    )


def test_a_file_that_does_not_parse(file):
    file.write_text("def (:\n")
    assert "loading it raised SyntaxError" in refusal(f"{file}:X")


def test_a_file_that_exits(file):
    file.write_text("raise SystemExit('no GPU here')\n")
    assert "loading it raised SystemExit: no GPU here" in refusal(f"{file}:X")


def test_a_factory_that_raises(file):
    assert refusal(f"{file}:fails") == (
        f"backend {file}:fails: loading it raised RuntimeError: no compiler"
    )


def test_a_factory_that_needs_more(file):
    message = refusal(f"{file}:needs_more")
    assert "needs_more is a function that takes size; name a class, or a function that " in message
    assert message.endswith(
        "but device and contract; it has Mine, NoDevice, make, fails, Demanding, OBJECT, Nameless, "
        f"Unknown, Number, Unsaid; name one, as {file}:Mine"
    )


def test_a_class_that_needs_more(file):
    assert (
        "Demanding is a class that takes config, and megamoe gives it device and contract at most; "
        "add defaults, or name a function that returns the object"
    ) in refusal(f"{file}:Demanding")


def test_the_name_of_a_method_names_its_class(file):
    assert "has no 'forward'; forward is a method of Mine: name the class; it has Mine" in refusal(
        f"{file}:forward"
    )


def test_an_entry_point_that_does_not_load(monkeypatch):
    def load():
        raise ImportError("libcuda.so is missing")

    entry_points_are(monkeypatch, load)
    assert refusal("theirs") == (
        "backend theirs: loading it raised ImportError: libcuda.so is missing"
    )


@pytest.mark.parametrize(
    ("attribute", "says"),
    [
        ("NOT_A_BACKEND", 'int has no `name`; write name = "mine", or another name, in int'),
        ("Nameless", 'Nameless has no `name`; write name = "mine", or another name, in Nameless'),
        (
            "Idle",
            "Idle has nothing to judge; write a method in it: forward, prepare, eplb_map, "
            "transform_weights, forward_group",
        ),
        ("Unsaid", f'Unsaid has no `accumulator`; write accumulator = "fp32" in Unsaid, {OTHERS}'),
        (
            "Unknown",
            "`accumulator` of Unknown is 'fp33'; did you mean fp32? Write accumulator = "
            f'"fp32" in Unknown, {OTHERS}',
        ),
        (
            "Number",
            '`accumulator` of Number is 32; write accumulator = "fp32" in Number, ' + OTHERS,
        ),
    ],
)
def test_an_object_that_is_no_backend(file, attribute, says):
    assert refusal(f"{file}:{attribute}") == f"backend {file}:{attribute}: {says}"


# --- GPUs -------------------------------------------------------------------------------------


def gpu(monkeypatch, *capability, triton=True):
    """A GPU of that compute capability, for all that is asked before a kernel runs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: (find(n) or n) if triton or n != "triton" else None
    )


@pytest.mark.parametrize("capability", [(7, 0), (8, 0), (8, 9)])
def test_a_gpu_that_is_too_old_for_triton_s_products(monkeypatch, capability):
    gpu(monkeypatch, *capability)
    with pytest.raises(BackendError) as caught:
        load_backend("triton", "cuda")
    assert str(caught.value) == (
        "backend triton: loading it raised NotImplementedError: backend triton needs compute "
        f"capability 9.0 or newer, this GPU has {capability[0]}.{capability[1]}"
    )


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (12, 0)])
def test_a_gpu_that_triton_s_products_compile_for(monkeypatch, capability):
    gpu(monkeypatch, *capability)
    assert load_backend("triton", "cuda").name == "triton"


@pytest.mark.parametrize(("device", "available"), [("cpu", True), ("cuda", False)])
def test_triton_without_a_gpu(monkeypatch, device, available):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    with pytest.raises(BackendError) as caught:
        load_backend("triton", device)
    assert str(caught.value) == (
        "backend triton: loading it raised NotImplementedError: backend triton needs an NVIDIA GPU "
        "of compute capability 9.0 or newer; run with --device cuda on a machine that has one"
    )


@pytest.mark.parametrize(
    ("capability", "triton", "expected"),
    [
        ((9, 0), True, "triton"),
        ((9, 0), False, "eager"),
        ((8, 0), True, "eager"),
        ((10, 0), True, "eager"),
    ],
)
def test_auto_takes_what_runs_on_the_gpu(monkeypatch, capability, triton, expected):
    """A GPU too old, or one that nothing has run on, is no error: nothing was asked for by name."""
    gpu(monkeypatch, *capability, triton=triton)
    assert load_backend("auto", "cuda").name == expected


def test_auto_on_a_machine_whose_gpu_is_not_asked_for(monkeypatch):
    gpu(monkeypatch, 9, 0)
    assert load_backend("auto", "cpu").name == "eager"
