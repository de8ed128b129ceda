"""What an engine's code finds at the top of the package, and what that costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import megamoe

FROM_VLLM = [
    "DeepGemmMegaMoEExperts", "DeepseekV4MegaMoEExperts", "MegaMoEActivation", "capture",
    "eplb_map_to_physical_and_record", "prepare_megamoe_inputs",
]  # fmt: skip

API = ["Judgement", "LoadedCase", "Problem", "cases", "judge", "load_case", "problem"]


def run(code: str) -> str:
    """Output of ``code`` in a fresh process."""
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def test_importing_megamoe_imports_no_torch_and_shows_the_names():
    code = "import sys, megamoe; print('torch' in sys.modules, *dir(megamoe))"
    torch, *names = run(code).split()
    assert torch == "False"
    assert {*FROM_VLLM, *API} <= set(names)


@pytest.mark.parametrize("name", FROM_VLLM)
def test_each_name_is_what_its_module_has(name):
    member = getattr(megamoe, name)
    assert member is getattr(sys.modules[member.__module__], name)
    assert name in megamoe.__all__


def test_all_names_are_importable_at_once_and_no_others():
    assert sorted(megamoe.__all__) == sorted(megamoe._HOME) == sorted([*FROM_VLLM, *API])
    assert run("from megamoe import *; print(capture.__name__, MegaMoEActivation().name)") == (
        "capture swiglu"
    )
    with pytest.raises(AttributeError, match="module 'megamoe' has no attribute 'kernel'"):
        megamoe.kernel  # noqa: B018
