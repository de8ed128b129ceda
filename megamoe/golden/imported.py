"""Real traffic as a golden: a stored problem becomes a case whose inputs lie in a file.

The case file says where they are and their sha256; everything else, recording, diff, bless,
verify and check, is as for a case with a recipe.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from megamoe.cases import Case, load_cases
from megamoe.cases.recipes import EXTRAS
from megamoe.cases.stored import INPUTS, KIND, OF_FORMAT, case_of, load
from megamoe.files import STORED_LIMIT, folder_lock, read_bounded, write_atomically
from megamoe.golden.candidates import record
from megamoe.golden.places import NAME, GoldenError, inside

_PARAMS = ("family", "hidden", "intermediate", "experts", "top_k", "tokens", "clamp", "fast_math",
           "capacity")  # fmt: skip
_MORE = (*EXTRAS, *OF_FORMAT)
_APART = ("shared_recipe", "shared_output_recipe")


def import_file(root: Path, path: Path, name: str | None = None, breaks: str | None = None) -> Case:
    """Turn ``path`` into a case under ``root`` and record its candidate; ``root`` may be new.

    Raises :class:`GoldenError` or :class:`StoredError`, and leaves nothing behind, if the file is
    no stored problem, the name is taken or the oracle cannot answer. Blessing is another act.
    """
    call = load(path)
    name = path.stem.lower() if name is None else name
    if not NAME.fullmatch(name):
        raise GoldenError(f"name {name!r}: use a-z, 0-9 and . _ + -; give one with --name")
    if not call.problem.num_tokens:
        raise GoldenError(f"{path}: has no tokens; there is nothing to hold a kernel to")
    cases_file = inside(root, root / "cases" / f"{name}.toml")
    inputs_file = inside(root, root / INPUTS / f"{name}.safetensors")
    ids = [c.id for c in load_cases(root)] if (root / "cases").is_dir() else []
    if f"forward/{name}" in ids or cases_file.exists() or inputs_file.exists():
        raise GoldenError(f"case forward/{name} is already in {root}; give another --name")
    content = read_bounded(path, STORED_LIMIT)
    recipe = {
        "kind": KIND, "file": inputs_file.name, "sha256": hashlib.sha256(content).hexdigest()
    }  # fmt: skip
    breaks = breaks or f"The layer is wrong on inputs recorded as {path.name}."
    toml = _toml(case_of(call.problem, name, breaks, recipe))
    files = []
    try:
        with folder_lock(root):
            for file, data in ((inputs_file, content), (cases_file, toml.encode())):
                files.append(file)
                write_atomically(file, data)
        case = next(c for c in load_cases(root) if c.id == f"forward/{name}")
        errors = record(root, [case], 1, _quiet)
        if errors:
            raise GoldenError(errors[0])
    except BaseException:
        for file in files:
            file.unlink(missing_ok=True)
        raise
    return case


_quiet: Callable[[Case, str], None] = lambda case, error: None  # noqa: E731


def _toml(case: Case) -> str:
    """The case's file. JSON strings, numbers and booleans are TOML too."""
    recipe = ", ".join(f"{k} = {json.dumps(v)}" for k, v in case.params["hidden_recipe"].items())
    lines = [
        "# Written by `megamoe golden import`: the inputs are stored, not made from a recipe.",
        "",
        "[[case]]",
        f"name = {json.dumps(case.name)}",
        'kind = "forward"',
        'tier = "quick"',  # a person who imports a golden wants it judged
        f"breaks = {json.dumps(case.breaks)}",
        *(f"{key} = {json.dumps(case.params[key])}" for key in _PARAMS),
        *(f"{key} = {json.dumps(case.params[key])}" for key in _MORE if key in case.params),
        *(f"{key} = {{}}" for key in _APART if key in case.params),
        f"hidden_recipe = {{ {recipe} }}",
    ]
    return "\n".join(lines) + "\n"
