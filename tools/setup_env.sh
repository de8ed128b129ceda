#!/bin/sh
# Make the environment that the Makefile's verbs run in, once.
#
#   sh tools/setup_env.sh              make or refresh .venv
#   sh tools/setup_env.sh --host PY    make nothing; check that interpreter PY has what megamoe needs
#
# Environment: PYTHON (default python3), TORCH (cpu or cuda; default: cuda where an NVIDIA GPU is).
#
# A shell script and not Python, because its first duty is to speak where Python is too old or absent.
set -eu

cd "$(dirname "$0")/.."
venv=.venv
supported='3.11 3.12 3.13 3.14' # what the locks hold wheels for

say() { printf 'setup: %s\n' "$*"; }
die() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

# The version of interpreter $1 as 3.X.Y; empty if it cannot run.
version_of() {
    "$1" -c 'import sys; print("%d.%d.%d" % tuple(sys.version_info[:3]))' 2>/dev/null || true
}

is_supported() {
    for minor in $supported; do
        case $1 in "$minor".*) return 0 ;; esac
    done
    return 1
}

check_host() {
    version=$(version_of "$1")
    [ -n "$version" ] || die "MEGAMOE_PYTHON=$1 does not run: name a Python 3.11 or newer"
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "MEGAMOE_PYTHON=$1 is Python $version: megamoe needs 3.11 or newer"
    # find_spec and not import: it answers at once where importing torch takes seconds.
    missing=$("$1" -c '
from importlib.util import find_spec
needs = {"torch": "torch", "numpy": "numpy", "safetensors": "safetensors", "pytest": "pytest",
         "pytest-xdist": "xdist", "pytest-timeout": "pytest_timeout", "rich": "rich"}
print(" ".join(package for package, module in needs.items() if find_spec(module) is None))')
    [ -z "$missing" ] || die "MEGAMOE_PYTHON=$1 lacks: $missing. Install them there," \
        "or leave MEGAMOE_PYTHON out to get an environment in .venv"
}

# Set $python and $version: PYTHON if it is supported, else the first that is.
find_python() {
    first=${PYTHON:-python3}
    first_version=$(version_of "$first")
    for python in "$first" python3.13 python3.12 python3.11 python3.14; do
        version=$(version_of "$python")
        if is_supported "$version"; then
            [ "$python" = "$first" ] ||
                say "using $python ($version): $first is ${first_version:-not to be found}"
            return
        fi
    done
    if [ -n "$first_version" ]; then problem="$first is $first_version"; else problem="no $first"; fi
    die "megamoe needs one of Python $supported and found none ($problem):" \
        "install one, or name it: make setup PYTHON=/path/to/python3.12"
}

# cuda where a driver shows a GPU, else cpu.
torch_kind() {
    case ${TORCH:-} in
    cpu | cuda) echo "$TORCH" ;;
    '')
        if [ -n "$(ls /proc/driver/nvidia/gpus 2>/dev/null)" ]; then
            echo cuda
        elif command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
            echo cuda
        else
            echo cpu
        fi
        ;;
    *) die "TORCH=$TORCH is neither cpu nor cuda" ;;
    esac
}

# pip in the environment: hashes demanded, wheels only (an sdist would fetch unlocked build needs).
# What it says beside its progress is kept in pip.log and shown by pip_failed.
locked() {
    quiet=-q
    [ -t 1 ] && quiet=
    # shellcheck disable=SC2086
    PIP_USER=0 "$venv/bin/python" -m pip install $quiet --disable-pip-version-check --no-input \
        --no-deps --require-hashes --only-binary :all: "$@" 2>"$venv/pip.log"
}

pip_failed() {
    cat "$venv/pip.log" >&2
    die "pip could not install $1 (its words stand above)"
}

install_torch() {
    if [ "$1" = cuda ]; then
        say "2 of 4: installing torch with its CUDA libraries (about 4 GB on disk; some minutes)"
        locked -r requirements/torch-cuda.txt || pip_failed torch
        return
    fi
    say "2 of 4: installing torch, the CPU build (one to three minutes)"
    if locked -r requirements/torch-cpu.txt; then return; fi
    # Only "there is no such build here" has a way round; anything else (no network, a wrong hash)
    # must be seen as it is.
    grep -q 'No matching distribution found for torch==' "$venv/pip.log" || pip_failed torch
    say "the package indexes set up for pip have no CPU build of torch for this Python, so the" \
        "default build comes instead, with about 4 GB of CUDA libraries. To avoid that, stop" \
        "here, add an index of torch's CPU builds with" \
        "'pip config set global.extra-index-url INDEX', and run make again."
    locked -r requirements/torch-cuda.txt || pip_failed torch
}

make_environment() {
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        die "$python ($version) lacks the venv module; on Debian and Ubuntu:" \
            "apt-get install python${version%.*}-venv"
    # Never clear a folder that something else made.
    if [ -e "$venv" ] && [ ! -e "$venv/megamoe-environment" ]; then
        die "$venv is there but this set-up did not make it: move it away and run again"
    fi
    step="4 of 4: "
    say "1 of 4: making $venv with Python $version"
    "$python" -m venv --clear "$venv" || die "$python could not make $venv (see above)"
    : >"$venv/megamoe-environment"
    install_torch "$kind"
    say "3 of 4: installing the other packages"
    locked -r requirements/base.txt -r requirements/test.txt ||
        pip_failed 'the locked packages'
}

if [ "${1:-}" = --host ]; then
    check_host "$2"
    exit 0
fi

find_python
kind=$(torch_kind) || exit 1
# Two stamps, compared by content so that a fresh checkout's file times do not matter. A changed
# environment is made afresh: pip would keep a +cpu torch where the default build is now wanted,
# and packages that a lock no longer names.
environment="$version $kind $(cat requirements/*.txt | cksum)"
project=$(cksum <pyproject.toml)
stamp() { cat "$venv/$1" 2>/dev/null || true; }

if [ "$(stamp megamoe-environment)" != "$environment" ]; then
    make_environment
    printf '%s\n' "$environment" >"$venv/megamoe-environment"
fi
if [ "$(stamp megamoe-project)" != "$project" ]; then
    say "${step:-}installing megamoe itself"
    # setuptools is in the locks, so building the editable install fetches nothing.
    PIP_USER=0 "$venv/bin/python" -m pip install -q --disable-pip-version-check --no-deps \
        --no-index --no-build-isolation --editable . 2>"$venv/pip.log" || pip_failed megamoe
    "$venv/bin/python" -m pip check --disable-pip-version-check >"$venv/pip.log" ||
        die "the locks do not satisfy pyproject.toml (run make lock): $(cat "$venv/pip.log")"
    printf '%s\n' "$project" >"$venv/megamoe-project"
    say "ready: $("$venv/bin/python" -c \
        'from importlib.metadata import version as v; print("torch", v("torch"), "numpy", v("numpy"))')"
fi
