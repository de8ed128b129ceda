#!/bin/bash
# The stub's Python: the interpreter that MEGAMOE_STUB_PYTHON names. In a build, where there is
# none, it says how it was called and writes the reports that it is asked for.
if [ -n "${MEGAMOE_STUB_PYTHON:-}" ]; then
    exec "$MEGAMOE_STUB_PYTHON" "$@"
fi
echo "stub: python3 $*"
while [ $# -gt 1 ]; do
    case $1 in
    --json | --junit) echo "stub: written by a stand-in for Python" >"$2" ;;
    esac
    shift
done
