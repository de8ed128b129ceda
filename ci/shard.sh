#!/bin/sh
# Judge one shard, and keep what makes it believable: result.json, junit.xml, provenance.json.
#
#   OUT=DIR BACKEND=eager DEVICE=cpu TIER=full ci/shard.sh I N
#
# Environment:
#   OUT              where the three files go (out/shards/I-of-N)
#   BACKEND          eager
#   DEVICE           cpu or cuda (cpu)
#   TIER             quick or full (full)
#   CASE             a glob: only these cases
#   ARCH             as sm90 or sm100: stop where the GPU is another
#   JOBS             worker processes (2)
#   MEGAMOE_PYTHON   an interpreter that has everything, as in a Nix shell; else .venv is made
#   MEGAMOE_REVISION what to call this code where git cannot say
#
# Exit 0: what was judged passed. A shard in which nothing could be judged says so and leaves it to
# the merge, which knows the others. 1: a case failed; the three files are there. 2: nothing was
# judged: misuse, or this host cannot.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
stop() {
    printf 'shard: %s\n' "$*" >&2
    exit 2
}

[ $# -eq 2 ] || stop "say which of how many, as in: ci/shard.sh 1 4"
for number in "$1" "$2"; do
    case $number in '' | 0* | *[!0-9]*) stop "'$number' is not a number from 1 on" ;; esac
done
[ "$1" -le "$2" ] || stop "there is no shard $1 of $2"
out=${OUT:-out/shards/$1-of-$2}
backend=${BACKEND:-eager}
device=${DEVICE:-cpu}
tier=${TIER:-full}
jobs=${JOBS:-2}
case $device in cpu | cuda) ;; *) stop "DEVICE=$device is neither cpu nor cuda" ;; esac
case $tier in quick | full) ;; *) stop "TIER=$tier is neither quick nor full" ;; esac
case $jobs in 0* | *[!0-9]*) stop "JOBS=$jobs is not a number from 1 on" ;; esac
case ${ARCH:-} in
'') ;;
sm[0-9]*) [ "$device" = cuda ] || stop "ARCH=$ARCH is about a GPU: set DEVICE=cuda, or no ARCH" ;;
*) stop "ARCH=$ARCH is no architecture such as sm90 or sm100" ;;
esac

# shellcheck source=ci/python.sh
. "$root/ci/python.sh"

if [ "$device" = cuda ]; then
    architecture=$("$python" -c 'import torch
print("sm%d%d" % torch.cuda.get_device_capability() if torch.cuda.is_available() else "none")') ||
        stop "torch does not load (see above)"
    [ "$architecture" != none ] || stop "DEVICE=cuda, but torch finds no CUDA device: does nvidia-smi list" \
        "one here, and does torch find the driver's libcuda (docs/ci.md)?"
    [ "${ARCH:-$architecture}" = "$architecture" ] || stop "ARCH=$ARCH, but the GPU here is $architecture: this runner" \
        "has the wrong label, or CUDA_VISIBLE_DEVICES chooses another GPU"
fi

# Results of an earlier run must never pass for this one's.
mkdir -p "$out" || stop "OUT=$out: cannot be made"
rm -f "$out/result.json" "$out/junit.xml" "$out/provenance.json" ||
    stop "OUT=$out: cannot be written"

status=0
"$python" -m megamoe check --backend "$backend" --device "$device" --tier "$tier" \
    --shard "$1/$2" -n "$jobs" --json "$out/result.json" --junit "$out/junit.xml" \
    ${CASE:+--case "$CASE"} || status=$?
[ -f "$out/result.json" ] && [ -f "$out/junit.xml" ] || exit 2
"$python" -m megamoe.suite.provenance "$out" || exit 2

if [ "$status" -eq 2 ] && [ "$2" -gt 1 ]; then
    echo "shard: nothing of $1/$2 could be judged on this host; the merge decides"
    status=0
fi
exit "$status"
