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
# shellcheck source=ci/python.sh
. "$root/ci/python.sh"

status=0
"$python" -m ci.merge --out "$out" "$@" || status=$?
[ -f "$out/result.json" ] || exit "$status"
"$python" -m megamoe report "$out/result.json" -o "$out/report.html" || [ "$status" -ne 0 ] || status=1
exit "$status"
