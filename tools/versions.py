"""Say where a file states another version than toolchain.toml does (`make versions`).

Looked at: flake.lock, flake.nix and nix/ where they are, the locks in requirements/,
pyproject.toml, tools/setup_env.sh, the workflows, README.md and docs/, and the DeepGEMM revisions
that the sources cite. Needs no package besides Python's own.
"""

from __future__ import annotations

import base64
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ("torch-cpu.txt", "torch-cuda.txt", "base.txt", "test.txt")
SRI = re.compile(r"sha256-[A-Za-z0-9+/]{43}=")
REVISION = re.compile(r"(?<![0-9a-zA-Z])[0-9a-f]{40}(?![0-9a-zA-Z])")

Table = dict[str, Any]


def read(root: Path = ROOT) -> Table:
    """toolchain.toml."""
    return tomllib.loads((root / "toolchain.toml").read_text())


def problems(root: Path = ROOT) -> list[str]:
    """Every disagreement under ``root``, a line each: the file, its value, and the right value."""
    table = read(root)
    lines = []
    for check in (python, locks, project, hosts, flake, nix, docs, sources, workflows):
        lines += list(check(root, table))
    return lines


def python(root: Path, table: Table) -> Iterator[str]:
    """The supported Pythons: set-up script, project, linters, the digests of CPU torch."""
    supported_versions = table["python"]["locked"]
    script = re.search(r"^supported='([^']*)'", _text(root, "tools/setup_env.sh"), re.MULTILINE)
    config = _toml(root, "pyproject.toml")
    yield from _differ(
        "tools/setup_env.sh, supported", script and script[1], " ".join(supported_versions)
    )
    bound = config["project"]["requires-python"]
    yield from _differ("pyproject.toml, requires-python", bound, f">={supported_versions[0]}")
    ruff, mypy = config["tool"]["ruff"]["target-version"], config["tool"]["mypy"]["python_version"]
    yield from _differ(
        "pyproject.toml, ruff's target", ruff, f"py{supported_versions[0].replace('.', '')}"
    )
    yield from _differ("pyproject.toml, mypy's version", mypy, supported_versions[0])
    wheels = re.findall(r"-cp3(\d+)-\S*x86_64", _text(root, "requirements/torch-cpu.sha256"))
    pythons = " ".join(f"3.{minor}" for minor in sorted(map(int, wheels)))
    yield from _differ(
        "requirements/torch-cpu.sha256, Pythons", pythons, " ".join(supported_versions)
    )


def locks(root: Path, table: Table) -> Iterator[str]:
    """The torch of the locks, and no package at two versions."""
    torch = table["locked"]["torch"]
    for name, pin in (("torch-cpu.txt", f"{torch}+cpu"), ("torch-cuda.txt", torch)):
        first = re.search(r"^torch==(\S+)", _text(root, f"requirements/{name}"), re.MULTILINE)
        yield from _differ(f"requirements/{name}, torch", first and first[1], pin)
    for package, versions in sorted(locked_versions(root).items()):
        plain = {version.removesuffix("+cpu") for version in versions}
        if len(plain) > 1:
            yield f"requirements/: {package} is locked at {' and '.join(sorted(plain))}; make lock"


def project(root: Path, table: Table) -> Iterator[str]:
    """Check that the locks hold the packages of pyproject.toml."""
    config = _toml(root, "pyproject.toml")["project"]
    pins = locked_versions(root)
    extras = [need for extra in config["optional-dependencies"].values() for need in extra]
    for need in [*config["dependencies"], *extras]:
        name, bounds = _need(need)
        versions = pins.get(name)
        if not versions:
            yield f"pyproject.toml: {name} is in no lock of requirements/; make lock"
            continue
        for version in sorted(versions):
            if not _within(version, bounds):
                yield f"requirements/: {name} {version}, but pyproject.toml asks for {need}"


def hosts(root: Path, table: Table) -> Iterator[str]:
    """A host that differs says why, and still satisfies pyproject.toml."""
    needs = dict(map(_need, _toml(root, "pyproject.toml")["project"]["dependencies"]))
    for host in table["hosts"]:
        if not host.get("reason", "").strip():
            yield f"toolchain.toml: host {host['what']!r} has no reason"
        for name, version in host.items():
            if name in needs and not _within(version, needs[name]):
                yield f"toolchain.toml: host {host['what']!r} has {name} {version}, which "\
                      "pyproject.toml excludes"  # fmt: skip
        if not _within(host.get("python", "99"), [(">=", table["python"]["locked"][0])]):
            yield f"toolchain.toml: host {host['what']!r} has Python {host['python']}"


def flake(root: Path, table: Table) -> Iterator[str]:
    """flake.lock's rows are the table's inputs: the same names, and each field of each row."""
    path = root / "flake.lock"
    if not path.is_file():
        return
    lock = json.loads(path.read_text())
    nodes, rows = lock["nodes"], table["inputs"]
    names = nodes[lock["root"]].get("inputs", {})
    yield from _differ("flake.lock, inputs", " ".join(sorted(names)), " ".join(sorted(rows)))
    more = sorted(set(nodes) - {lock["root"], *map(str, names.values())})
    if more:
        yield f"flake.lock: inputs of inputs: {', '.join(more)}; the table has none"
    for name in sorted(set(names) & set(rows)):
        node, row = nodes[str(names[name])], rows[name]
        pin = node["locked"]
        for field in ("rev", "narHash", "lastModified"):
            yield from _differ(f"flake.lock, {name}, {field}", pin.get(field), row[field])
        source = f"{pin.get('owner')}/{pin.get('repo')}"
        yield from _differ(f"flake.lock, {name}, source", source.lower(), row["source"].lower())


def nix(root: Path, table: Table) -> Iterator[str]:
    """flake.nix and nix/ name no revision, hash or version that the tables and locks do not."""
    files = [root / "flake.nix", *sorted((root / "nix").rglob("*.nix"))]
    texts = {path.relative_to(root): path.read_text() for path in files if path.is_file()}
    digests = set(re.findall(r"--hash=sha256:([0-9a-f]{64})", _all_locks(root)))
    pins = {row["narHash"] for row in table["inputs"].values()} | set(table["deepgemm"].values())
    versions = {*table["least"].values(), *set().union(*locked_versions(root).values())}
    for name, text in texts.items():
        for revision in sorted(set(REVISION.findall(text)) - revisions(table)):
            yield f"{name}: revision {revision} is not in toolchain.toml"
        hashes = {h: base64.b64decode(h[7:]).hex() for h in set(SRI.findall(text)) - pins}
        hashes |= {h: h for h in re.findall(r"\b[0-9a-f]{64}\b", text)}
        for word, digest in sorted(hashes.items()):
            if digest not in digests:
                yield f"{name}: {word} is neither in toolchain.toml nor in requirements/"
        for version in sorted(set(re.findall(r'"(\d+(?:\.\d+)+)"', text)) - versions):
            yield f"{name}: version {version} is neither in toolchain.toml nor in requirements/"
    if texts:
        for what, version in table["least"].items():
            if not any(f'"{version}"' in text for text in texts.values()):
                yield f"flake.nix and nix/: nothing asserts {what} {version} as toolchain.toml does"
        for name, row in table["inputs"].items():
            pin = f"github:{row['source']}/{row.get('branch', row['rev'])}"
            yield from _absent("flake.nix", texts.get(Path("flake.nix"), ""), pin, f"input {name}")


def docs(root: Path, table: Table) -> Iterator[str]:
    """Versions named in README.md and docs/ are those of the locks or of a named host."""
    by_package = {name: {v.removesuffix("+cpu") for v in versions}
               for name, versions in locked_versions(root).items()}  # fmt: skip
    for name in ("nvcc", *table["least"]):
        by_package.setdefault(name, set()).update(table["least"].get(name, "").split())
    for host in table["hosts"]:
        for name in set(host) & set(by_package):
            by_package[name] |= set(host[name] if isinstance(host[name], list) else [host[name]])
    pythons = table["python"]["locked"]
    words = "|".join(sorted(map(re.escape, [*by_package, "python"]), key=len, reverse=True))
    # Not behind a letter, a dot or a dash: `sgl-deep-gemm 0.1.5` is no package of ours.
    pattern = re.compile(rf"(?<![\w.-])({words})`? v?(\d+\.\d+(?:\.\d+)*)", re.IGNORECASE)
    for path in [root / "README.md", *sorted((root / "docs").rglob("*.md"))]:
        text, file = path.read_text(), path.relative_to(root)
        for package, version in pattern.findall(text):
            right = by_package.get(package.lower(), set())
            if package.lower() == "python":
                right = {*pythons, *(h["python"] for h in table["hosts"] if "python" in h)}
            if not any(_prefix(version, full) for full in right):
                there = ", ".join(sorted(right)) or "none"
                yield f"{file}: {package} {version}, but the locks and toolchain.toml have {there}"
        yield from _unknown_revisions(table, file, text)
        for first, last in re.findall(r"Python (3\.\d+) to (3\.\d+)", text):
            yield from _differ(f"{file}, Pythons", (first, last), (pythons[0], pythons[-1]))


def sources(root: Path, table: Table) -> Iterator[str]:
    """A DeepGEMM revision that a source cites is one of the table's."""
    for folder in ("megamoe", "tools"):
        for path in sorted((root / folder).rglob("*.py")):
            yield from _unknown_revisions(table, path.relative_to(root), path.read_text())


def workflows(root: Path, table: Table) -> Iterator[str]:
    """The Python that hosted runners set up."""
    for path in sorted((root / ".github/workflows").glob("*.yml")):
        for version in re.findall(r"python-version: *[\"']?([\d.]+)", path.read_text()):
            where = f"{path.relative_to(root)}, python-version"
            yield from _differ(where, version, table["python"]["ci"])
    ci = table["python"]["ci"]
    if ci not in table["python"]["locked"]:
        yield f"toolchain.toml: python.ci is {ci}, which no lock holds wheels for"


# --- parts ---------------------------------------------------------------------------------------


def revisions(table: Table) -> set[str]:
    """Every revision of the tables; revisions for bisecting are given by their first digits."""
    return {row["rev"] for row in table["inputs"].values()} | set(table["deepgemm"])


def locked_versions(root: Path) -> dict[str, set[str]]:
    """Package -> the versions that requirements/ locks it at."""
    versions: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", _all_locks(root), re.M):
        versions.setdefault(_canonical(name), set()).add(version)
    return versions


def _unknown_revisions(table: Table, name: Path, text: str) -> Iterator[str]:
    text = re.sub(r"uses: \S+", "", text)  # an action's revision, which tests compare with ours
    citations = set(re.findall(r"DeepGEMM `?([0-9a-f]{7,40})\b", text)) | set(
        REVISION.findall(text)
    )
    for revision in sorted(citations):
        if not any(_prefix_of(revision, full) for full in revisions(table)):
            yield f"{name}: revision {revision} is not in toolchain.toml"


def _prefix_of(revision: str, full: str) -> bool:
    return full.startswith(revision) or revision.startswith(full)


def _prefix(version: str, full: str) -> bool:
    """Whether ``version`` equals ``full`` or omits its last numbers: 3.6 for 3.6.0."""
    return f"{full}.".startswith(f"{version}.")


def _absent(file: str, text: str, pin: str, what: str) -> Iterator[str]:
    if pin not in text:
        yield f"{file}: {what} is not {pin}, as toolchain.toml says"


def _differ(where: str, actual: object, expected: object) -> Iterator[str]:
    if actual != expected:
        yield f"{where}: {actual}, but toolchain.toml says {expected}"


def _need(requirement: str) -> tuple[str, list[tuple[str, str]]]:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    name = _canonical(match[0]) if match else requirement
    return name, re.findall(r"(>=|<=|==|<|>)\s*([\d.]+)", requirement)


def _within(version: str, bounds: list[tuple[str, str]]) -> bool:
    def numbers(text: str) -> list[int]:
        out = [int(n) for n in re.findall(r"\d+", text.partition("+")[0])]
        return out + [0] * (6 - len(out))

    here = numbers(version)
    holds = {
        ">=": lambda there: here >= there,
        "<=": lambda there: here <= there,
        "==": lambda there: here == there,
        "<": lambda there: here < there,
        ">": lambda there: here > there,
    }
    return all(holds[sign](numbers(bound)) for sign, bound in bounds)


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _all_locks(root: Path) -> str:
    return "\n".join(_text(root, f"requirements/{name}") for name in LOCKS)


def _text(root: Path, name: str) -> str:
    return (root / name).read_text()


def _toml(root: Path, name: str) -> Table:
    return tomllib.loads(_text(root, name))


def main() -> int:
    """Print every disagreement; exit 1 if there is one."""
    lines = problems()
    for line in lines:
        print(f"versions: {line}", file=sys.stderr)
    if not lines:
        print("versions: all files say what toolchain.toml says")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
