#!/bin/bash
# The stub's Python: the interpreter that MEGAMOE_STUB_PYTHON names. In a build, which cannot see
# that, a stand-in: a Python on a machine with the right GPU, which writes what it is asked for.
if [ -n "${MEGAMOE_STUB_PYTHON:-}" ]; then
    exec "$MEGAMOE_STUB_PYTHON" "$@"
fi
verdict=0
case $* in
-c*'version_info[:3]'*) echo 3.13.0 ;;
-c*get_device_capability*) echo "$ARCH" ;;
-c*) ;;
'-m megamoe.suite.provenance '*) echo stub >"$3/provenance.json" ;;
*)
    echo "stub: python3 $*"
    while [ $# -gt 1 ]; do
        case $1 in --json | --junit) echo "stub: BACKEND=$BACKEND DEVICE=$DEVICE" >"$2" ;; esac
        shift
    done
    exit $verdict
    ;;
esac
