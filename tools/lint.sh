#!/bin/sh
# ruff, mypy, tools/versions.py and tools/names.py, by the interpreter that is named. Each runs, so that one red does
# not hide the next.
#
#   sh tools/lint.sh .venv/bin/python
#
# A ruff or mypy that is not the one of requirements/ (nixpkgs has its own) has other rules: what it
# finds is a warning, and only the locked one decides. Exit 1: something is wrong.
set -eu

python=$1
root=$(cd "$(dirname "$0")/.." && pwd)
red=0

judge() { # TOOL ARGUMENTS...
    status=0
    "$python" -m "$@" || status=$?
    [ "$status" -ne 0 ] || return 0
    locked=$(sed -n "s/^$1==\([^ ]*\).*/\1/p" "$root/requirements/test.txt")
    version=$("$python" -m "$1" --version 2>/dev/null | sed -n "s/^$1 \([0-9.]*\).*/\1/p")
    if [ -n "$version" ] && [ "$version" != "$locked" ]; then
        echo "lint: warning: $* ended with $status, but $1 $version is not the locked $locked," \
            "which alone decides" >&2
    else
        red=1
    fi
}

judge ruff check .
judge ruff format --check .
judge mypy
"$python" tools/versions.py || red=1
"$python" tools/names.py || red=1
exit $red
