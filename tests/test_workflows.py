"""The workflows: valid, never a GPU for a fork, every pin watched, and each shell step run.

The steps run as a hosted runner runs them, with ``bash -e``, in a checkout that is links to this
one. Where that would judge real cases twice over, ci/shard.sh is a stand-in that notes its call.
"""

import fnmatch
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

YAML = pytest.importorskip(
    "ruamel.yaml", reason="ruamel.yaml is not installed: no workflow is read"
)

ROOT = Path(__file__).resolve().parents[1]
PINS = tomllib.loads((ROOT / "toolchain.toml").read_text())["pins"]["files"]
FOLDER = ROOT / ".github/workflows"
FLOWS = {path.stem: YAML.YAML(typ="safe").load(path) for path in sorted(FOLDER.glob("*.yml"))}
TEMPLATES = ROOT / ".github/ISSUE_TEMPLATE"
FORMS = sorted(set(TEMPLATES.glob("*.yml")) - {TEMPLATES / "config.yml"})
BUILDKITE = YAML.YAML(typ="safe").load(ROOT / "ci/buildkite.yml")["steps"]
SHARDS = FLOWS["shards"]
GPU_JOBS = FLOWS["gpu"]["jobs"]
CALLERS = [job for flow in FLOWS.values() for job in flow["jobs"].values() if "uses" in job]

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
needs_report = pytest.mark.skipif(
    importlib.util.find_spec("megamoe.report") is None, reason="this tree has no `megamoe report`"
)


def steps():
    """Every step of every job."""
    for name, flow in FLOWS.items():
        for job_name, job in flow["jobs"].items():
            for step in job.get("steps", ()):
                yield f"{name}.{job_name}", job, step


# --- valid ---------------------------------------------------------------------------------------


def validate(schema: str, *files: Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("check_jsonschema", reason="check-jsonschema is not installed")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}"]
    return subprocess.run([*command, *map(str, files)], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("schema", "files", "old", "new"),
    [
        ("github-workflows", sorted(FOLDER.glob("*.yml")), "runs-on:", "run-on:"),
        ("buildkite", [ROOT / "ci/buildkite.yml"], "parallelism: 2", "parallelism: two"),
        ("github-issue-forms", FORMS, "type: textarea", "type: text"),
        ("github-issue-config", [TEMPLATES / "config.yml"], "enabled: true", "enabled: perhaps"),
    ],
)
def test_the_files_are_what_their_schema_allows(tmp_path, schema, files, old, new):
    result = validate(schema, *files)
    assert result.returncode == 0, result.stdout
    wrong = tmp_path / "wrong.yml"
    text = next(text for text in map(Path.read_text, files) if old in text)
    wrong.write_text(text.replace(old, new))
    assert validate(schema, wrong).returncode != 0


def test_an_issue_asks_for_the_machine_and_for_the_reduced_file():
    for form in FORMS:
        fields = {entry["id"]: entry for entry in YAML.YAML(typ="safe").load(form)["body"]}
        assert fields["doctor"]["validations"]["required"]
        assert "`megamoe reduce CASE --backend B`" in fields["reduced"]["attributes"]["description"]


def test_a_call_gives_declared_inputs_and_all_that_are_required():
    declared = SHARDS["on"]["workflow_call"]["inputs"]
    required = {name for name, entry in declared.items() if entry.get("required")}
    for job in CALLERS:
        assert job["uses"] == "./.github/workflows/shards.yml"
        assert required <= set(job["with"]) <= set(declared)
    names = set(re.findall(r"inputs\.(\w+)", (FOLDER / "shards.yml").read_text()))
    assert names == set(declared)


def test_foreign_actions_are_pinned_to_a_commit():
    for where, _, step in steps():
        if "uses" in step:
            assert re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", step["uses"]), where


def test_no_expression_is_pasted_into_a_script():
    """A name of a branch may hold shell code; through the environment it stays a value."""
    for where, _, step in steps():
        assert "${{" not in step.get("run", ""), where


def test_each_job_may_only_read_and_comes_to_an_end():
    for name, flow in FLOWS.items():
        assert flow["permissions"] == {"contents": "read"}, name
        for job in flow["jobs"].values():
            assert "uses" in job or job["timeout-minutes"] <= 60
            assert "permissions" not in job
    for where, _, step in steps():
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False, where


# --- GPUs: where, and for whom -------------------------------------------------------------------


def labels(job) -> list[str]:
    return json.loads(job["with"]["runner"])


def test_cpu_jobs_run_on_hosted_runners_and_gpu_jobs_on_labelled_ones():
    assert labels(FLOWS["test"]["jobs"]["cpu"]) == ["ubuntu-24.04"]
    assert FLOWS["test"]["jobs"]["test"]["runs-on"] == "ubuntu-24.04"
    assert set(GPU_JOBS) == {"sm90", "sm100"}
    for arch, job in GPU_JOBS.items():
        assert labels(job) == ["self-hosted", "gpu", arch]
        assert job["with"]["arch"] == arch and job["with"]["device"] == "cuda"
    backends = {arch: job["with"]["backend"] for arch, job in GPU_JOBS.items()}
    assert backends == {"sm90": "triton", "sm100": "deep_gemm"}


def test_no_event_that_a_fork_can_cause_reaches_a_gpu():
    for flow in FLOWS.values():
        self_hosted = [j for j in flow["jobs"].values() if "self-hosted" in str(j)]
        if self_hosted:
            assert set(flow["on"]) <= {"push", "schedule", "workflow_dispatch"}
            for job in self_hosted:
                assert job["if"].startswith("${{ !github.event.repository.fork && ")
    assert all("pull_request_target" not in flow["on"] for flow in FLOWS.values())
    for step in BUILDKITE:
        if step["key"].startswith("sm"):
            assert step["if"] == "build.pull_request.repository.fork != true"


def matches(path: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern.replace("**", "*")) for pattern in patterns)


def test_a_change_of_a_pin_runs_the_gpu_shards():
    """On every branch, so before it is merged; Buildkite's GPU steps run in every build."""
    push = FLOWS["gpu"]["on"]["push"]
    assert push["branches"] == ["**"] and set(PINS) <= set(push["paths"])
    assert all("if_changed" not in step and "branches" not in step for step in BUILDKITE)


def test_every_file_that_holds_a_pin_is_watched():
    """Found by looking: whatever names the pinned DeepGEMM in full, documents and tests aside."""
    inputs = tomllib.loads((ROOT / "toolchain.toml").read_text())["inputs"]
    pins = [row[key] for row in inputs.values() for key in ("rev", "narHash")]
    # Those that hold one without its digits: torch, and how DeepGEMM is built.
    holders = {"flake.lock", "flake.nix", "requirements/torch-cuda.txt", "nix/deep-gemm.nix"}
    for name in ("*", "nix/**/*", "ci/**/*", "tools/*", ".github/**/*"):
        for path in ROOT.glob(name):
            if path.is_file() and path.suffix in (".toml", ".nix", ".lock", ".json", ".yml", ".sh"):
                text = path.read_text()
                if any(pin in text for pin in pins):
                    holders.add(str(path.relative_to(ROOT)))
    assert "toolchain.toml" in holders
    assert {path for path in holders if not matches(path, PINS)} == set()


# --- each shell step runs ------------------------------------------------------------------------


def expand(value: object, context: dict[str, str]) -> str:
    """Fill in ``${{ name }}``; anything that is not just a known name is an error of the test."""

    def one(match: re.Match[str]) -> str:
        return context[match[1]]

    return re.sub(r"\$\{\{ *([\w.-]+) *\}\}", one, str(value))


class Runner:
    """Runs shell steps in a checkout of links, with this interpreter."""

    def __init__(self, folder: Path, stand_in: bool) -> None:
        self.root = folder / "checkout"
        self.root.mkdir()
        for path in ROOT.iterdir():
            if path.name not in (".git", ".venv", "out", "ci"):
                (self.root / path.name).symlink_to(path)
        self.calls = folder / "calls"
        self.summary = folder / "summary"
        self.path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        (folder / "bin").mkdir()
        if not stand_in:
            (self.root / "ci").symlink_to(ROOT / "ci")
            return
        (self.root / "ci").mkdir()
        (self.root / "ci/toolchain.sh").symlink_to(ROOT / "ci/toolchain.sh")
        note = 'echo "$(basename "$0") $* $BACKEND $DEVICE $ARCH $TIER $CASE" >>"$CALLS"\n'
        leave = 'mkdir -p "$OUT" && : >"$OUT/result.json"\n'
        for name, text in (("shard.sh", f'OUT=${{OUT:-out/shards/$1-of-$2}}\n{note}{leave}'),
                           ("merge.sh", f"{note}{leave}")):  # fmt: skip
            (self.root / "ci" / name).write_text(f"#!/bin/sh\n{text}")
            (self.root / "ci" / name).chmod(0o755)

    def run(self, script: str, **settings: str) -> subprocess.CompletedProcess[str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MEGAMOE"))}
        clean |= {"PATH": self.path, "MEGAMOE_PYTHON": sys.executable, "CALLS": str(self.calls)}
        clean |= {"GITHUB_STEP_SUMMARY": str(self.summary), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            ["bash", "-e", "-c", script], cwd=self.root, env=clean | settings,
            capture_output=True, text=True, timeout=250, check=False,
        )  # fmt: skip

    def step(self, job, name: str, context: dict[str, str], **more: str):
        (step,) = (s for s in job["steps"] if s.get("name") == name)
        env = {**job.get("env", {}), **step.get("env", {})}
        env = {key: expand(value, context) for key, value in env.items()}
        return self.run(step["run"], **{**env, **more})


def context_of(job, shard: int) -> dict[str, str]:
    """What the expressions of shards.yml stand for when ``job`` calls it."""
    entries = SHARDS["on"]["workflow_call"]["inputs"]
    inputs = {name: entry.get("default", "") for name, entry in entries.items()} | job["with"]
    count = len(json.loads(inputs["shards"]))
    context = {f"inputs.{name}": str(value) for name, value in inputs.items()}
    # Of a nightly run: nobody chose a tier or a case.
    context["inputs.tier"] = context["inputs.tier"].replace("${{ inputs.tier || 'full' }}", "full")
    context["inputs.case"] = context["inputs.case"].replace("${{ inputs.case || '' }}", "")
    return context | {"matrix.shard": str(shard), "strategy.job-total": str(count),
                      "vars.PIP_EXTRA_INDEX_URL": ""}  # fmt: skip


def test_these_are_all_the_shell_steps():
    """A new one must get a test below."""
    assert [(where, step["name"]) for where, _, step in steps() if "run" in step] == [
        ("shards.shard", "Judge this shard"),
        ("shards.merge", "Merge the shards"),
        ("shards.merge", "Show the summary"),
        ("test.test", "All tests"),
        ("test.flake", "Evaluate the flake"),
        ("test.sandbox", "Check phase in a sandbox"),
    ]


@needs_bash
@pytest.mark.parametrize("caller", CALLERS, ids=lambda job: job["with"]["name"])
def test_the_shard_step_of_each_caller(tmp_path, caller):
    runner = Runner(tmp_path, stand_in=True)
    for shard in (1, 2):
        result = runner.step(SHARDS["jobs"]["shard"], "Judge this shard", context_of(caller, shard))
        assert result.returncode == 0, result.stderr
    settings = caller["with"]
    arguments = f"{settings['backend']} {settings['device']} {settings.get('arch', '')} full"
    lines = runner.calls.read_text().splitlines()
    assert [line.rstrip() for line in lines] == [f"shard.sh {i} 2 {arguments}" for i in (1, 2)]
    assert (runner.root / "out/shard/result.json").is_file(), "what the next step uploads"


@needs_bash
@needs_report
@pytest.mark.slow
def test_the_workflow_judges_merges_and_shows(tmp_path):
    """All of shards.yml for two small cases, as test.yml calls it; artifacts are moved by hand."""
    caller = FLOWS["test"]["jobs"]["cpu"]
    runner = Runner(tmp_path, stand_in=False)
    for shard in (1, 2):
        context = context_of(caller, shard) | {"inputs.case": "eplb/identity-map-*"}
        result = runner.step(SHARDS["jobs"]["shard"], "Judge this shard", context, JOBS="1")
        assert result.returncode == 0, result.stderr
        (runner.root / "out/shards").mkdir(exist_ok=True)
        (runner.root / "out/shard").rename(runner.root / f"out/shards/cpu-shard-{shard}")
    merge = SHARDS["jobs"]["merge"]
    result = runner.step(merge, "Merge the shards", context)
    assert result.returncode == 0, result.stderr
    artifacts = {path.name for path in (runner.root / "out/merged").iterdir()}
    assert artifacts == {"result.json", "junit.xml", "provenance.json", "summary.md", "report.html"}
    assert runner.step(merge, "Show the summary", context).returncode == 0
    assert "eager on cpu: GREEN: all 2 judged cases passed" in runner.summary.read_text()

    shutil.rmtree(runner.root / "out/shards/cpu-shard-2")
    result = runner.step(merge, "Merge the shards", context)
    assert result.returncode == 1
    assert "shard 2/2 is missing, and with it 1 case: eplb/identity-map-" in result.stderr
    assert runner.step(merge, "Show the summary", context).returncode == 0, "nothing to show"


@needs_bash
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_step_of_all_tests(tmp_path):
    """The real Makefile, and an interpreter that notes its calls; answers as the set-up wants."""
    runner = Runner(tmp_path, stand_in=False)
    python = tmp_path / "bin/noting"
    note = '*version_info*) echo 3.12.1 ;; *find_spec*) ;; *) echo "$*" >>"$CALLS" ;;'
    python.write_text(f'#!/bin/sh\ncase "$*" in {note} esac\n')
    python.chmod(0o755)
    job = FLOWS["test"]["jobs"]["test"]
    context = {"vars.PIP_EXTRA_INDEX_URL": ""}
    result = runner.step(job, "All tests", context, MEGAMOE_PYTHON=str(python), ARGS="-k one")
    assert result.returncode == 0, result.stdout + result.stderr
    tests = "-m pytest -n 4 --dist worksteal -k one"  # beside lint, so before or after any step
    calls = runner.calls.read_text().splitlines()
    assert calls.count(tests) == 1 and [call for call in calls if call != tests] == [
        "-m ruff check .",
        "-m ruff format --check .",
        "-m mypy",
        "tools/versions.py",
        "tools/names.py",
    ]


@needs_bash
def test_the_steps_that_need_nix(tmp_path):
    """Stand-ins for what a hosted runner installs: they note their calls and answer as Nix does."""
    runner = Runner(tmp_path, stand_in=False)
    note = 'echo "$(basename "$0") $*" >>"$CALLS"'
    for name, more in (("apt-get", ""), ("make", ""), ("nix", "echo said"), ("sudo", 'exec "$@"')):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{note}\n{more}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    jobs = FLOWS["test"]["jobs"]
    folder = tmp_path / "kept"
    result = runner.step(jobs["flake"], "Evaluate the flake", {}, OUT=str(folder))
    assert result.returncode == 0, result.stderr
    shell = ".#devShells.x86_64-linux.default"
    for name, arguments in (
        ("check.txt", "flake check --no-build --all-systems ."),
        ("shell.txt", f"build --dry-run --no-link --accept-flake-config {shell}"),
    ):
        lines = (folder / name).read_text().splitlines()
        assert lines == ["said", f"exit status 0: nix {arguments}"]
    (tmp_path / "bin/nix").write_text("#!/bin/sh\nexit 1\n")
    result = runner.step(jobs["flake"], "Evaluate the flake", {}, OUT=str(folder))
    assert result.returncode == 1

    python = runner.root / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{note}\n")
    python.chmod(0o755)
    context = {"vars.PIP_EXTRA_INDEX_URL": ""}
    result = runner.step(jobs["sandbox"], "Check phase in a sandbox", context)
    assert result.returncode == 0, result.stderr
    calls = runner.calls.read_text().splitlines()
    assert [call for call in calls if call.startswith("python ")] == [
        "python ci/sandboxed.py check -q",
        "python ci/sandboxed.py shard sm90-1-of-4 eplb/*",
    ]


@needs_bash
def test_the_commands_of_buildkite(tmp_path):
    """``$$`` becomes ``$`` at upload; the agent numbers parallel jobs from 0 on."""
    runner = Runner(tmp_path, stand_in=True)
    agent = tmp_path / "bin/buildkite-agent"
    agent.write_text(
        '#!/bin/sh\necho "agent $*" >>"$CALLS"\nmkdir -p "$4/out" && cp -R out/shards "$4/out"\n'
    )
    agent.chmod(0o755)
    for step in BUILDKITE:
        commands = step.get("commands") or [step["command"]]
        assert not any(re.search(r"(?<!\$)\$(?!\$)", command) for command in commands)
        for job in range(step.get("parallelism", 1)):
            settings = {"BUILDKITE_PARALLEL_JOB": str(job)} | step["env"]
            settings["BUILDKITE_PARALLEL_JOB_COUNT"] = str(step.get("parallelism", 1))
            result = runner.run("\n".join(commands).replace("$$", "$"), **settings)
            assert result.returncode == 0, result.stderr
            artifacts = step["artifact_paths"][0].removesuffix("/**/*").removesuffix("/*")
            assert list((runner.root / artifacts).rglob("result.json")), "what the agent uploads"
    calls = [line.rstrip() for line in runner.calls.read_text().splitlines()]
    assert [call for call in calls if call.startswith("shard.sh")] == [
        f"shard.sh {i} 2 {arguments}"
        for arguments in ("eager cpu  full", "triton cuda sm90 full", "deep_gemm cuda sm100 full")
        for i in (1, 2)
    ]
    for name in ("cpu", "sm90", "sm100"):
        assert f"agent artifact download out/shards/**/* out/from --step {name}" in calls
    merges = [call for call in calls if call.startswith("merge.sh")]
    assert merges == ["merge.sh out/from/out/shards/1-of-2 out/from/out/shards/2-of-2"] * 3
