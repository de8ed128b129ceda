"""Regenerate requirements/*.txt: exact versions and hashes, no download host (`make lock`).

torch's version and the least Python stand in toolchain.toml. One resolution serves every platform
and every newer Python; it is then cut into four files that never name a package twice, so that
any torch file can be installed with the other two:

    torch-cpu.txt    torch without GPU libraries, what it imports, and Triton
    torch-cuda.txt   the registry's default torch with the NVIDIA libraries of its Linux builds
    base.txt         what megamoe itself needs besides torch
    test.txt         what the extras `test`, `workflows` and `plot` add

The registry's default index does not serve CPU builds for Linux. Their digests stand in
requirements/torch-cpu.sha256, in the form `sha256sum --check` reads; a new torch version needs
that file renewed by hand, and this script refuses until it is.

Needs `uv` on the path.
"""

import re
import subprocess
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ROOT / "requirements"
TOOLCHAIN = tomllib.loads((ROOT / "toolchain.toml").read_text())
TORCH = TOOLCHAIN["locked"]["torch"]
PYTHON = TOOLCHAIN["python"]["locked"][0]
GPU_ONLY = re.compile(r"(nvidia-|cuda-)")
"""Packages that a CPU build of torch does not need. Triton stays: its interpreter and its compiler
test the kernels without a GPU."""

Blocks = dict[str, str]
"""Normalised package name -> its requirement line with the hash lines below it."""


def normalise(name: str) -> str:
    """The registry's canonical spelling of a package name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirement_name(requirement: str) -> str:
    """The canonical name at the head of a requirement such as `numpy>=2.0,<3`."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    if match is None:
        raise SystemExit(f"lock: not a requirement: {requirement!r}")
    return normalise(match.group())


def resolve(requirements: list[str], pins: list[str]) -> Blocks:
    """Resolve for all platforms at once; `pins` fixes the choices of an earlier resolution."""
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "pins.txt")
        constraints.write_text("\n".join(pins))
        command = ["uv", "pip", "compile", "-", "--constraint", str(constraints)]
        command += ["--universal", "--python-version", PYTHON, "--generate-hashes", "--quiet"]
        # One version per package on every Python: the same bits everywhere.
        command += ["--fork-strategy", "fewest", "--no-header", "--no-annotate"]
        command += ["--no-emit-index-url", "--no-emit-find-links"]
        try:
            process = subprocess.run(
                command, input="\n".join(requirements), capture_output=True, text=True, check=True
            )
        except FileNotFoundError:
            raise SystemExit("lock: `uv` is not on the path: install it and run again") from None
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"lock: uv could not resolve:\n{error.stderr}") from None
    blocks = re.findall(r"^\S.*(?:\n[ \t]+.*)*", process.stdout, flags=re.MULTILINE)
    return {requirement_name(block): block for block in blocks}


def cpu_torch(default: str) -> str:
    """The torch requirement without GPU libraries: the +cpu build on Linux, else the default.

    `default` is the resolved block of the registry's torch, whose macOS builds are CPU builds.
    """
    digests = []
    for line in (LOCKS / "torch-cpu.sha256").read_text().splitlines():
        digest, wheel = line.split()
        if not wheel.startswith(f"torch-{TORCH}+cpu-"):
            raise SystemExit(f"lock: torch-cpu.sha256 is not for torch {TORCH}: {wheel}")
        digests.append(f"    --hash=sha256:{digest}")
    linux = " \\\n".join([f"torch=={TORCH}+cpu ; sys_platform == 'linux'", *digests])
    other = default.replace(f"torch=={TORCH}", f"torch=={TORCH} ; sys_platform != 'linux'", 1)
    return f"{linux}\n{other}"


def write(name: str, what: str, blocks: Blocks) -> None:
    """Write one lock, sorted by name."""
    header = f"# {what}\n# Exact versions and hashes, written by `make lock`; do not edit.\n"
    text = header + "".join(f"{blocks[package]}\n" for package in sorted(blocks))
    (LOCKS / name).write_text(text)
    print(f"requirements/{name}: {len(blocks)} packages")


def main() -> None:
    """Resolve once, cut into four files, write them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    runtime = [need for need in project["dependencies"] if requirement_name(need) != "torch"]
    test = [need for extra in project["optional-dependencies"].values() for need in extra]
    torch = f"torch=={TORCH}"

    everything = resolve([torch, *project["dependencies"], *test], [])
    pins = [block.split(" ", 1)[0] for block in everything.values()]
    torch_names = set(resolve([torch], pins))
    base_names = set(resolve(runtime, pins)) - torch_names
    test_names = set(everything) - torch_names - base_names

    cuda = {name: everything[name] for name in torch_names}
    cpu = {name: block for name, block in cuda.items() if not GPU_ONLY.match(name)}
    cpu["torch"] = cpu_torch(everything["torch"])
    what = f"torch {TORCH} without GPU libraries, what it imports, and Triton."
    write("torch-cpu.txt", what, cpu)
    write("torch-cuda.txt", f"torch {TORCH}, the registry's default builds.", cuda)
    base = {name: everything[name] for name in base_names}
    write("base.txt", "What megamoe needs besides torch.", base)
    extra = {name: everything[name] for name in test_names}
    write("test.txt", "What the extras `test`, `workflows` and `plot` add.", extra)


if __name__ == "__main__":
    main()
