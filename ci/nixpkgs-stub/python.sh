#!/bin/bash
# The stub's Python: the interpreter that MEGAMOE_STUB_PYTHON names. In a build, which cannot see
# that, a stand-in: a Python on a machine with the right GPU, which writes what it is asked for. It
# refuses what the real one would: pytest a file that is not there and tests without git, Triton a
# build without a compiler.
if [ -n "${MEGAMOE_STUB_PYTHON:-}" ]; then
    exec "$MEGAMOE_STUB_PYTHON" "$@"
fi
verdict=0
lint=0
stop() {
    echo "$*" >&2
    exit "${status:-1}"
}
pytest() {
    while [ $# -gt 0 ]; do
        case $1 in
        -m | -k | -n) shift ;;
        -*) ;;
        *) [ -e "$1" ] || status=4 stop "ERROR: file or directory not found: $1" ;;
        esac
        shift
    done
    command -v git >/dev/null || stop "stub: tests make histories with git, which is not on PATH"
    [ -w "$HOME" ] || stop "stub: tests write to HOME, which is $HOME"
}
case $* in
-c*'version_info[:3]'*) echo 3.13.0 ;;
-c*get_device_capability*) echo "$ARCH" ;;
-c*) ;;
'-m pytest'*)
    shift 2
    pytest "$@"
    ;;
'-m ruff --version') echo "ruff 0.15.20" ;;
'-m mypy --version') echo "mypy 2.1.0 (compiled: yes)" ;;
'-m ruff'* | '-m mypy'*)
    echo "stub: python3 $*"
    exit $lint
    ;;
'-m megamoe.suite.provenance '*) echo stub >"$3/provenance.json" ;;
*)
    echo "stub: python3 $*"
    case $* in
    *'--device cuda'*)
        [ -x "${CC:-}" ] || command -v cc gcc clang >/dev/null ||
            stop "Failed to find C compiler. Please specify via CC environment variable"
        ;;
    esac
    workers=
    while [ $# -gt 1 ]; do
        case $1 in
        -n) workers=$2 ;;
        --json | --junit) echo "stub: BACKEND=$BACKEND DEVICE=$DEVICE workers=$workers" >"$2" ;;
        esac
        shift
    done
    exit $verdict
    ;;
esac
