#!/bin/sh
# Merge shards: prove that together they hold each case once, and write one result of them.
#
#   OUT=DIR ci/merge.sh SHARD_DIRECTORY...
#
# OUT (out/merged) gets result.json, junit.xml, provenance.json, summary.md and report.html.
# Exit 0: every judged case passed; 1: not so, or the shards do not make a whole; 2: misuse.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
out=${OUT:-out/merged}
if [ -n "${MEGAMOE_PYTHON:-}" ]; then
    sh "$root/tools/setup_env.sh" --host "$MEGAMOE_PYTHON" || exit 2
    python=$MEGAMOE_PYTHON
else
    sh "$root/tools/setup_env.sh" || exit 2
    python=$root/.venv/bin/python
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

status=0
"$python" -m ci.merge --out "$out" "$@" || status=$?
[ -f "$out/result.json" ] || exit "$status"
"$python" -m megamoe report "$out/result.json" -o "$out/report.html" || [ "$status" -ne 0 ] || status=1
exit "$status"
